//! Moves a running guest between two processes and verifies every page.

fn main() -> std::process::ExitCode {
    afterimage_tools::demo::main()
}
