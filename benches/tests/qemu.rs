//! QEMU's own postcopy and the engine under QEMU: that rounds run, and that the guest's memory
//! is checked.

use afterimage_bench::qemu::{self, QemuError, QemuOptions, QemuReport};
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

/// The report of one small round of each of these modes.
fn small_round(mode: &str) -> Option<QemuReport> {
    let line = ["--memory=256M", "--working-set=64M", "--rounds=1", mode];
    let result = match qemu::run(&options(&line)) {
        Err(error @ (QemuError::Missing { .. } | QemuError::Unbuilt { .. })) => Err(error),
        result => Ok(result.unwrap()),
    };
    require::or_skip("qemu", result)
}

fn check(report: &QemuReport) {
    println!("{report}");
    assert!(report.verified);
    for round in report.modes.iter().flat_map(|mode| &mode.rounds) {
        assert_eq!((round.pages_wrong, round.pages_compared), (0, 64 << 8));
        assert!(round.blackout_us > 0 && round.total_us > round.blackout_us);
        // Content does not compress: what the guest dirties has been sent, and once.
        let once = 64 << 20..256 << 20;
        assert!(once.contains(&round.bytes), "{} bytes", round.bytes);
        if let Some(bytes) = round.wire_bytes {
            assert!(bytes >= round.bytes && once.contains(&bytes), "{bytes} bytes");
        }
        assert!(round.guest.fault_latency_us.count > 0, "the guest saw no fault");
        assert!(round.guest.work.operations.len() > 100, "the guest did not work on");
    }
}

#[test]
fn no_word_is_wrong_after_either_of_qemus_postcopies() {
    let Some(report) = small_round("--mode=both") else { return };
    check(&report);
    assert_eq!(report.modes.len(), 2);
    assert!(report.modes.iter().all(|mode| mode.rounds[0].qemu.is_some()));
    assert!(report.rows.is_empty(), "there is nothing to compare with");
}

#[test]
fn no_word_is_wrong_after_the_engine_has_moved_the_guest_and_a_page_shows_its_work() {
    let Some(mut report) = small_round("--mode=afterimage") else { return };
    check(&report);
    let own = report.modes[0].rounds[0].engine.as_ref().unwrap();
    assert_eq!(own.source["outcome"], "finished");
    assert_eq!(own.destination["pages_complete"], own.destination["pages_total"]);
    assert!(own.requests.unwrap() > 0, "the guest waited for pages, and none was asked for");
    let directory = tempfile::tempdir().unwrap();
    let path = qemu::page::write(directory.path(), &report).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap().contains("<svg id=\"work\""));
    report.report = Some(path);
    assert!(report.to_string().contains("pictures: "));
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
