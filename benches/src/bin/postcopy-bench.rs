//! Measures the engine against the floors of the machine it runs on.

fn main() -> std::process::ExitCode {
    afterimage_bench::cli::main()
}
