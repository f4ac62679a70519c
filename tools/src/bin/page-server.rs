//! Serves the memory of a stopped guest, or of a snapshot, to whoever runs it.

use std::process::ExitCode;

fn main() -> ExitCode {
    afterimage_tools::page_server::main()
}
