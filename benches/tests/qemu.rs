//! The peer: that its rounds run, and that the guest's memory is checked.

use afterimage_bench::qemu::{self, QemuError, QemuOptions};
use afterimage_tools::require;
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    options: QemuOptions,
}

fn options(line: &[&str]) -> QemuOptions {
    Line::parse_from([&["test"], line].concat()).options
}

#[test]
fn no_word_is_wrong_after_either_of_qemus_postcopies() {
    let small = options(&["--memory=256M", "--working-set=64M", "--rounds=1"]);
    let result = match qemu::run(&small) {
        Err(error @ QemuError::Missing { .. }) => Err(error),
        result => Ok(result.unwrap()),
    };
    let Some(report) = require::or_skip("qemu", result) else { return };

    println!("{report}");
    assert!(report.verified);
    assert_eq!(report.modes.len(), 2);
    for round in report.modes.iter().flat_map(|mode| &mode.rounds) {
        assert_eq!((round.pages_wrong, round.pages_compared), (0, 64 << 8));
        assert!(round.blackout_us > 0 && round.total_us > round.blackout_us);
        // Content does not compress: what the guest dirties has been sent, and once.
        assert!((64 << 20..256 << 20).contains(&round.bytes), "{} bytes", round.bytes);
        assert!(round.guest.fault_latency_us.count > 0, "the guest saw no fault");
        assert!(round.guest.work.operations.len() > 100, "the guest did not work on");
    }
}

#[test]
fn what_is_missing_is_named_with_the_command_that_brings_it() {
    let empty = tempfile::tempdir().unwrap();
    let error = qemu::run(&options(&["--directory", empty.path().to_str().unwrap()])).unwrap_err();
    assert!(matches!(error, QemuError::Missing { .. }));
    assert!(error.to_string().contains("benches/qemu/get"), "{error}");
}

#[test]
fn a_guest_too_small_for_its_working_set_is_refused() {
    let error = qemu::run(&options(&["--memory=512M", "--working-set=512M"])).unwrap_err();
    assert!(matches!(error, QemuError::Options(_)), "{error}");
}
