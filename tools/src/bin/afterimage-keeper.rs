//! Holds file descriptors for processes that may die.

fn main() -> std::process::ExitCode {
    afterimage_tools::keeper::main()
}
