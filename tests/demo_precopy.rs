//! The demo with precopy passes, as its users run it.

use std::process::{Command, Output};

use afterimage_tools::ram::HUGE_PAGE_BYTES;
use afterimage_tools::require;
use serde_json::Value;

fn demo(arguments: &str) -> Output {
    println!("demo {arguments}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.args(arguments.split_whitespace()).env_remove("RUST_LOG").output().unwrap()
}

fn number(report: &Value, key: &str) -> u64 {
    report[key].as_u64().unwrap_or_else(|| panic!("{key} is no count: {report}"))
}

/// Runs the demo, and checks what must hold of every move after passes.
fn moves(arguments: &str) -> Value {
    let output = demo(&format!("--json --memory 64M {arguments}"));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["verified"], true, "{report}");
    let of = |key| number(&report, key);
    let parts = ["pages_requested", "pages_background", "pages_precopy", "pages_zero"];
    assert_eq!(parts.map(of).iter().sum::<u64>(), of("pages_total"), "{report}");
    assert!(of("pages_precopy") > 0, "{report}");
    // That of one process is written down before the other can tell of the next.
    assert!(of("stopped_event_us") <= of("source_exit_us"), "{report}");
    let passes = report["passes"].as_array().unwrap();
    for (index, pass) in passes.iter().enumerate() {
        assert_eq!(number(pass, "number"), index as u64 + 1, "{report}");
        assert!(number(pass, "pages_written") <= of("pages_total"), "{report}");
        assert!(number(pass, "time_us") > 0, "{report}");
    }
    assert!(number(&passes[0], "bytes_sent") > of("memory_bytes") / 2, "all of it: {report}");
    report
}

fn has_kvm() -> bool {
    require::kvm() && require::userfaultfd()
}

#[test]
fn every_tracker_of_a_guest_on_kvm_finds_what_it_writes() {
    if !has_kvm() {
        return;
    }
    for (tracker, more) in [
        ("log", "--backing anonymous --vcpus 4"),
        ("ring", "--backing memfd --workload random --streams 4"),
        ("pagemap", "--backing anonymous --workload hot-set"),
    ] {
        let report = moves(&format!("--guest kvm --passes 3 --dirty-tracker {tracker} {more}"));
        assert_eq!(report["dirty_tracker"], tracker);
        assert_eq!(report["passes"].as_array().unwrap().len(), 3, "{report}");
        assert_eq!(report["switchover_cause"], "passes-done", "{report}");
    }
}

#[test]
fn every_tracker_of_a_guest_on_threads_finds_what_it_writes() {
    for tracker in ["pagemap", "bitmap"] {
        let report = moves(&format!("--guest threads --passes 2 --dirty-tracker {tracker}"));
        assert_eq!(report["dirty_tracker"], tracker);
        assert_eq!(report["passes"].as_array().unwrap().len(), 2, "{report}");
    }
    if let Some(_pages) = require::hugetlb(2 * (64 << 20) / HUGE_PAGE_BYTES) {
        moves("--guest threads --passes 1 --backing hugetlb");
    }
}

#[test]
fn the_trackers_that_nobody_names_suit_the_guest() {
    assert_eq!(moves("--guest threads --passes 1")["dirty_tracker"], "pagemap");
    if has_kvm() {
        assert_eq!(moves("--guest kvm --passes 1")["dirty_tracker"], "log");
    }
}

#[test]
fn without_passes_nothing_is_told_of_any() {
    let output = demo("--json --memory 64M --guest threads");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["passes"], Value::Array(Vec::new()), "{report}");
    assert_eq!(number(&report, "pages_precopy"), 0, "{report}");
    for key in ["switchover_cause", "dirty_tracker"] {
        assert_eq!(report[key], Value::Null, "{report}");
    }
    assert!(report["stopped_event_us"].is_u64(), "{report}");
}

#[test]
fn a_busy_guest_moves_by_automatic_passes_and_is_told_of_where_it_must_converge() {
    let busy = "--guest threads --workload random --precopy-bandwidth 48M";
    let report = moves(&format!("--passes auto {busy}"));
    let cause = &report["switchover_cause"];
    assert!(["not-shrinking", "time-is-up"].contains(&cause.as_str().unwrap()), "{report}");

    let output = demo(&format!("--memory 64M --passes converged --timeout 4 {busy}"));
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("still runs at the source: use --passes auto"), "{text}");
}

#[test]
fn a_guest_that_converges_comes_with_all_of_its_memory() {
    let report = moves("--guest threads --passes converged --worked-fraction 0.02");
    assert_eq!(report["switchover_cause"], "converged", "{report}");
    assert_eq!(number(&report["fault_latency_us"], "count"), 0, "nothing was missing: {report}");
}

#[test]
fn the_page_has_the_passes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display();
    moves(&format!("--guest threads --passes 2 --report {path}"));
    let page = std::fs::read_to_string(directory.path().join("index.html")).unwrap();
    for part in ["Before the switchover", "pages written meanwhile", "in precopy"] {
        assert!(page.contains(part), "{part} is not in the page");
    }
}

#[test]
fn what_cannot_be_is_refused_with_what_can() {
    for (arguments, hint) in [
        ("--guest threads --passes 1 --dirty-tracker log", "use pagemap or bitmap"),
        ("--guest threads --passes 1 --dirty-tracker ring", "use pagemap or bitmap"),
        ("--passes 1 --handoff", "handed over when it is stopped"),
        ("--passes 1 --kill source", "handed over when it is stopped"),
        ("--passes 1 --kill page-server --cuts 3", "handed over when it is stopped"),
        ("--passes 1 --kill page-client --backing anonymous", "use --backing memfd or hugetlb"),
        ("--passes 1 --precopy-bandwidth on-request", "would never end"),
        ("--passes many", "auto or converged"),
        ("--dirty-tracker pagemap", "--passes"),
    ] {
        let output = demo(arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains(hint), "{arguments}");
    }
}
