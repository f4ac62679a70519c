//! Serves the memory of a guest that another process runs, from its source.

use std::process::ExitCode;

fn main() -> ExitCode {
    afterimage_tools::page_client::main()
}
