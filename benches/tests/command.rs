//! The command as a user runs it: what it measures is there, and what is wrong is found.

use std::process::{Command, Output};

use afterimage_tools::require;
use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_postcopy-bench");
    Command::new(program).args(arguments).output().expect("the command starts")
}

fn object(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
}

fn row<'a>(object: &'a Value, name: &str) -> &'a Value {
    let rows = object["rows"].as_array().expect("rows");
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row {name}"))
}

/// Rows of every kind of unit that needs no right, on small memory.
const ROWS: &str = "fault_idle_p50_blocking,fault_loaded_p99,fault_busy_p50,background_kept,\
                    background_limit_memfd,sparse_time,zero_bytes_per_page,switchover_us,\
                    memory_bits_per_page,cpu_per_gib,working_set_time";

#[test]
fn rows_are_measured_in_every_round_and_verified() {
    if !require::userfaultfd() {
        return;
    }
    let arguments = ["--json", "--memory", "64M", "--rounds", "2", "--only", ROWS];
    let output = bench(&arguments);
    let object = object(&output);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(object["verified"], true);
    assert_eq!(object["schema_version"], 1);
    for name in ROWS.split(',') {
        let row = row(&object, name);
        let rounds = row["rounds"].as_array().expect("rounds");
        assert_eq!(rounds.len(), 2, "{row}");
        assert!(rounds.iter().all(|value| value.as_f64().is_some_and(|value| value > 0.0)));
        let value = row["value"].as_f64().expect("a value");
        let spread = row["spread"].as_array().expect("a spread");
        assert!(spread[0].as_f64().unwrap() <= value && value <= spread[1].as_f64().unwrap());
        if let Some(reach) = row["reach"].as_f64() {
            let is_reached = if row["better"] == "lower" { value <= reach } else { value >= reach };
            assert_eq!(row["ok"], is_reached, "{row}");
        }
    }
    let floor = "floor 3: L, blocking, idle, back to back";
    assert!(object["floors"][floor]["p50_us"]["median"].as_f64().unwrap() > 0.0);
    let buckets = object["histograms"][floor]["buckets"].as_array().unwrap();
    let sum: u64 = buckets.iter().filter_map(Value::as_u64).sum();
    assert_eq!(object["histograms"][floor]["count"], sum);
    assert!(!object["machine"]["kernel"].as_str().unwrap().is_empty());
}

/// Rows of a link that is cut, and of a source that frees.
const RELIABILITY: &str = "recovery_us,recovery,recovery_connected,recovery_connected_64_gib,\
                           recovery_us_after_2_s,resident_source,resident_source_end,\
                           resident_source_memfd,resident_source_memfd_end";

#[test]
fn recoveries_and_what_a_source_frees_are_measured_and_drawn() {
    if !require::userfaultfd() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().to_str().expect("a name");
    let arguments =
        ["--json", "--memory", "64M", "--rounds", "1", "--only", RELIABILITY, "--report", path];
    let output = bench(&arguments);
    let object = object(&output);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(object["verified"], true);
    let value = |name: &str| row(&object, name)["value"].as_f64().expect("a value");
    for name in ["recovery", "recovery_connected", "recovery_connected_64_gib"] {
        assert!(value(name) > 0.0, "{name}");
    }
    assert!(value("recovery_us") > 0.0 && value("recovery_us_after_2_s") > 0.0);
    let scenarios = object["scenarios"].as_object().expect("scenarios");
    let short = &scenarios["recovery after 100 ms without a link, 1 GiB anonymous, sparse"];
    assert_eq!(short["count"]["median"], 8.0, "one for each cut");
    for part in ["round_trip_us", "pause_us", "agreement_us", "request_us"] {
        assert!(short[part]["median"].as_f64().expect("a figure") > 0.0, "{part}");
    }
    // On a busy machine more waits to be freed than the half that has arrived, never less.
    for kind in ["resident_source", "resident_source_memfd"] {
        let (half, end) = (value(kind), value(&format!("{kind}_end")));
        assert!((0.45..1.0).contains(&half), "{kind}: {half}");
        assert!(end < half, "{kind}: {end} at the end, {half} before");
    }
    let page = std::fs::read_to_string(directory.path().join("index.html")).expect("the page");
    assert!(page.contains("What is left at a source that frees"));
}

/// Rows of precopy and of limits.
const PRECOPY: &str = "precopy_fault_ratio,precopy_stall_ratio,precopy_fault_ratio_memfd,\
                       precopy_stall_ratio_memfd,stopped_event_us,stopped_event,bandwidth_error,\
                       bandwidth_error_before,bandwidth_error_after,bandwidth_error_changed,\
                       fault_limited_p99,fault_limited_p99_floor";

#[test]
fn guests_that_move_at_work_and_limits_are_measured_and_verified() {
    if !require::userfaultfd() {
        return;
    }
    let output = bench(&["--json", "--memory", "64M", "--rounds", "1", "--only", PRECOPY]);
    let object = object(&output);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(object["verified"], true);
    for name in PRECOPY.split(',') {
        let value = row(&object, name)["value"].as_f64();
        assert!(value.is_some_and(f64::is_finite), "{name}: {value:?}");
    }
    // Each limit is another, so that what is watched is the one that holds. A busy machine may
    // be too slow for it.
    for part in ["bandwidth_error_before", "bandwidth_error_after", "bandwidth_error_changed"] {
        assert!(row(&object, part)["value"].as_f64().expect("a value") < 50.0, "{part}");
    }
    let alone = "a guest at work moves, 64 MiB anonymous, dense, postcopy alone";
    assert!(object["scenarios"][alone]["remote_faults"]["median"].as_f64().expect("faults") > 0.0);
}

#[test]
fn one_wrong_byte_fails_the_run_whatever_moved_it() {
    if !require::userfaultfd() {
        return;
    }
    for row in [
        "fault_idle_p50_blocking",
        "background_limit_anonymous",
        "working_set_time",
        "recovery",
        "precopy_fault_ratio",
        "bandwidth_error",
    ] {
        let arguments = ["--json", "--memory", "8M", "--rounds", "1", "--only", row];
        let output = bench(&[&arguments[..], &["--corrupt-one-byte"]].concat());
        assert_eq!(output.status.code(), Some(1), "{row}");
        let object = object(&output);
        assert_eq!(object["verified"], false, "{row}");
        assert!(object["error"].as_str().unwrap().contains("wrong content"), "{object}");
    }
}

#[test]
fn unix_sockets_and_namespaces_connect_both_sides() {
    if !require::userfaultfd() {
        return;
    }
    let rows = "fault_idle_p50_blocking,background_limit_anonymous";
    let arguments = ["--json", "--memory", "16M", "--rounds", "1", "--only", rows, "--network"];
    let output = bench(&[&arguments[..], &["unix"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    if !require::network_namespaces() {
        return;
    }
    let output = bench(&[&arguments[..], &["veth:1000"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(row(&object(&output), "background_limit_anonymous")["value"].as_f64().unwrap() > 0.0);
}

#[test]
fn what_is_asked_wrongly_is_said_so() {
    let output = bench(&["--only", "nothing"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--list"));
    assert_eq!(bench(&["--network", "pigeon"]).status.code(), Some(2));
    assert_eq!(bench(&["--memory", "3M"]).status.code(), Some(2));
    let list = bench(&["--list"]);
    assert!(list.status.success());
    let list = String::from_utf8_lossy(&list.stdout).into_owned();
    assert!(list.lines().count() >= 20 && list.contains("fault_loaded_p999_us"), "{list}");
}
