//! An adopter's tests link the engine as its program does.

use std::process::Command;

use afterimage as _;

#[test]
fn the_program_links_and_runs() {
    let output = Command::new(env!("CARGO_BIN_EXE_adopter"))
        .output()
        .expect("running the adopter");
    assert!(output.status.success());
    assert_eq!(output.stdout, b"afterimage is linked\n");
}
