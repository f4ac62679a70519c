//! Moves a guest between two unmodified QEMUs.

use std::process::ExitCode;

fn main() -> ExitCode {
    afterimage_tools::qemu::main()
}
