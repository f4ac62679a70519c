//! Drives and watches a migration by its control socket.

use std::process::ExitCode;

fn main() -> ExitCode {
    afterimage_tools::ctl::main()
}
