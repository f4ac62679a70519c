//! `demo --cuts` and `demo --kill`: a guest moves while its network is cut and the processes
//! around it are killed, and arrives whole.
//!
//! What is due when is said by pages that have arrived, so nothing here depends on how fast
//! something is.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use afterimage_tools::ram::HUGE_PAGE_BYTES;
use afterimage_tools::require;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const DEMO: &str = env!("CARGO_BIN_EXE_demo");
/// Long enough on a busy machine; reached only in failure. The demo has a limit of its own.
const LIMIT: Duration = Duration::from_mins(2);

fn command(arguments: &str) -> Command {
    println!("demo --json {arguments}");
    let mut command = Command::new(DEMO);
    command.arg("--json").args(arguments.split_whitespace());
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(arguments: &str) -> Output {
    command(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "one object on one line: {output:?}");
    serde_json::from_str(text).unwrap()
}

/// A key that is a number of at least 0.
fn number(report: &Value, key: &str) -> u64 {
    let value = &report[key];
    value.as_u64().unwrap_or_else(|| panic!("{key} is {value}, not a count: {report}"))
}

fn list<'a>(report: &'a Value, key: &str) -> &'a [Value] {
    report[key].as_array().unwrap_or_else(|| panic!("{key} is no list: {report}"))
}

/// What was to happen: cuts, and how often each process is killed.
struct Wanted {
    cuts: u64,
    page_server: u64,
    page_client: u64,
    source: u64,
}

const NOTHING: Wanted = Wanted { cuts: 0, page_server: 0, page_client: 0, source: 0 };

/// What must hold of every guest that has moved through all that was wanted.
fn moves(arguments: &str, wanted: &Wanted) -> Value {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    assert!(report["user_faults_only"] == true || output.stderr.is_empty(), "{output:?}");
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(report["sha256_destination"], report["sha256_source"], "{report}");
    assert!(number(&report, "guest_rounds_after") > number(&report, "guest_rounds_before"));
    check_outages(&report, wanted);
    check_roles(&report, wanted);
    check_pages(&report, wanted);
    report
}

fn check_outages(report: &Value, wanted: &Wanted) {
    let of = |key| number(report, key);
    assert_eq!((of("cuts_wanted"), of("cuts")), (wanted.cuts, wanted.cuts), "{report}");
    for (role, count) in [
        ("page-server", wanted.page_server),
        ("page-client", wanted.page_client),
        ("source", wanted.source),
    ] {
        assert_eq!(report["kills"][role].as_u64().unwrap_or(0), count, "{role}: {report}");
    }
    let outages = list(report, "outages");
    let restarts = wanted.page_server + wanted.page_client;
    assert_eq!(outages.len() as u64, wanted.cuts + restarts, "{report}");
    assert!(of("recoveries") >= outages.len() as u64, "{report}");
    let mut end = 0;
    for outage in outages {
        assert!(number(outage, "at_us") >= end, "one after the other: {report}");
        assert!(number(outage, "recovery_us") > 0, "a page came again: {report}");
        end = number(outage, "at_us") + number(outage, "recovery_us");
    }
    // Each after its share of the pages.
    let cuts = outages.iter().filter(|outage| outage["kind"] == "cut");
    for (index, cut) in cuts.enumerate() {
        let due = of("pages_total") * (2 * index as u64 + 1) / (2 * wanted.cuts);
        assert!(number(cut, "pages_complete") >= due, "cut {index}: {report}");
    }
    let recovery = &report["recovery_us"];
    assert_eq!(number(recovery, "count"), outages.len() as u64, "{report}");
    let longest = outages.iter().map(|outage| number(outage, "recovery_us")).max();
    assert_eq!(number(recovery, "max"), longest.unwrap_or(0), "{report}");
    assert!(number(recovery, "p50") <= number(recovery, "p99"), "{report}");
    let done = outages.iter().map(|outage| number(outage, "guest_operations")).sum::<u64>();
    assert_eq!(of("operations_during_outages"), done, "{report}");
}

/// Each process that was killed had a successor, and none is left.
fn check_roles(report: &Value, wanted: &Wanted) {
    let roles = list(report, "roles");
    let count = |name: &str| roles.iter().filter(|role| role["role"] == name).count() as u64;
    let served = u64::from(wanted.source > 0);
    let attached = u64::from(wanted.page_client > 0);
    let kept = u64::from(wanted.page_server + wanted.page_client > 0);
    assert_eq!((count("source"), count("destination")), (1, 1), "{report}");
    assert_eq!(count("page-server"), served + wanted.page_server, "{report}");
    assert_eq!(count("page-client"), attached + wanted.page_client, "{report}");
    assert_eq!(count("keeper"), kept, "{report}");
    for role in roles {
        let pid = number(role, "pid");
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{role} was left behind");
    }
}

/// Nothing came in two ways. What a page-client has counted last before it was killed nobody
/// knows.
fn check_pages(report: &Value, wanted: &Wanted) {
    let of = |key| number(report, key);
    let parts = of("pages_requested") + of("pages_background") + of("pages_zero");
    if wanted.page_client == 0 {
        assert_eq!(parts, of("pages_total"), "{report}");
    } else {
        assert!(parts <= of("pages_total"), "{report}");
    }
}

#[test]
fn a_guest_moves_over_a_network_that_is_cut() {
    let wanted = Wanted { cuts: 20, ..NOTHING };
    let report = moves("--memory 64M --guest threads --cuts 20", &wanted);
    for (kind, count) in [("closed", 10), ("reset", 9), ("silent", 1)] {
        assert_eq!(report["cuts_by_kind"][kind], count, "{report}");
    }
    assert_eq!(report["background_slowed"], true, "{report}");
    let wanted = Wanted { cuts: 5, ..NOTHING };
    let unix = "--transport unix --streams 4 --checksums --bandwidth 64M";
    let report = moves(&format!("--memory 64M --guest threads --cuts 5 {unix}"), &wanted);
    assert_eq!(report["background_slowed"], false, "{report}");
    assert_eq!(report["bandwidth"], (64u64 << 20).to_string(), "{report}");
}

/// Half of them while passes are sent, which go on over the next connection.
#[test]
fn a_guest_whose_passes_are_cut_moves_as_well() {
    let mut guests = vec!["threads --backing anonymous", "threads --backing memfd --streams 3"];
    if require::kvm() && require::userfaultfd() {
        guests.push("kvm");
    }
    for guest in guests {
        let output = run(&format!("--memory 64M --cuts 8 --passes 2 --guest {guest}"));
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let report = json(&output);
        assert_eq!(report["verified"], true, "{report}");
        assert_eq!(list(&report, "passes").len(), 2, "{report}");
        let outages = list(&report, "outages");
        let during = |stage: &str| outages.iter().filter(|it| it["during"] == stage).count();
        assert_eq!((during("passes"), number(&report, "cuts_wanted")), (4, 8), "{report}");
        // What the guest asks for is not held up: on a busy machine it may outrun the last.
        assert!((3..=4).contains(&during("postcopy")), "{report}");
        assert_eq!(number(&report, "cuts"), outages.len() as u64, "{report}");
        for outage in &outages[..7] {
            let is_early = outage["at_us"].as_i64().unwrap() < 0;
            assert_eq!(is_early, outage["during"] == "passes", "{report}");
            assert!(number(outage, "recovery_us") > 0, "a page came again: {report}");
        }
        assert!(number(&report, "recoveries") >= 7, "{report}");
        let of = |key| number(&report, key);
        assert!(of("pages_precopy") > 0, "what the passes brought was of use: {report}");
        let parts = ["pages_requested", "pages_background", "pages_precopy", "pages_zero"];
        assert_eq!(parts.map(of).iter().sum::<u64>(), of("pages_total"), "{report}");
    }
}

#[test]
fn a_guest_that_has_what_it_needs_never_stops() {
    // It works in few pages, which it has when silence falls over the network.
    let wanted = Wanted { cuts: 3, ..NOTHING };
    let arguments = "--memory 64M --guest threads --worked-fraction 0.02 --cuts 3";
    let report = moves(arguments, &wanted);
    let silent = &list(&report, "outages")[2];
    assert_eq!(silent["what"], "silent", "{report}");
    assert!(number(silent, "guest_operations") > 0, "{report}");
}

#[test]
fn a_page_server_that_is_killed_has_a_successor() {
    let wanted = Wanted { page_server: 3, source: 1, ..NOTHING };
    moves("--memory 64M --guest threads --kill page-server", &wanted);
}

#[test]
fn a_page_client_that_is_killed_has_a_successor() {
    let wanted = Wanted { page_client: 2, ..NOTHING };
    let arguments = "--memory 64M --guest threads --kill page-client --kills 2 --backing";
    for backing in ["anonymous", "memfd"] {
        let report = moves(&format!("{arguments} {backing}"), &wanted);
        assert_eq!(report["handoff"], false, "{report}");
    }
    let Some(_pages) = require::hugetlb(2 * (64 << 20) / HUGE_PAGE_BYTES) else { return };
    moves(&format!("{arguments} hugetlb"), &wanted);
}

#[test]
fn a_page_client_that_is_killed_after_passes_has_a_successor() {
    let output =
        run("--memory 64M --guest threads --passes 2 --kill page-client --kills 1 --backing \
                      memfd");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(&output);
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(number(&report["kills"], "page-client"), 1, "{report}");
    assert_eq!(list(&report, "passes").len(), 2, "{report}");
    assert!(number(&report, "pages_precopy") > 0, "what the passes brought was of use: {report}");
}

#[test]
fn a_source_is_killed_when_it_has_handed_its_guest_over() {
    let wanted = Wanted { source: 1, ..NOTHING };
    let report = moves("--memory 64M --guest threads --kill source", &wanted);
    assert_eq!(report["handoff"], true, "{report}");
    assert!(number(&report, "vmm_exit_us") < number(&report, "first_page_us"), "{report}");
    assert_eq!(report["background_slowed"], false, "nothing needs time: {report}");
}

const ALL: Wanted = Wanted { cuts: 20, page_server: 2, page_client: 2, source: 1 };
const ALL_OF_IT: &str = "--memory 64M --cuts 20 --kill page-server,page-client,source --kills 2";

#[test]
fn a_guest_on_threads_survives_all_of_it_together() {
    let report = moves(&format!("{ALL_OF_IT} --guest threads"), &ALL);
    assert_eq!(report["backing"], "memfd", "{report}");
    assert!(number(&report, "vmm_exit_us") < number(&report, "first_page_us"), "{report}");
}

#[test]
fn a_guest_on_kvm_survives_all_of_it_together() {
    if require::kvm() && require::userfaultfd() {
        moves(&format!("{ALL_OF_IT} --guest kvm"), &ALL);
    }
}

#[test]
fn a_wrong_byte_is_noticed_whoever_was_killed() {
    let arguments = "--memory 64M --guest threads --cuts 2 --kill page-server,page-client";
    let output = run(&format!("{arguments} --kills 1 --corrupt-one-byte"));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = json(&output);
    assert_eq!(report["verified"], false, "{report}");
    assert_eq!((number(&report, "cuts"), list(&report, "outages").len()), (2, 4), "{report}");
}

#[test]
fn what_cannot_be_done_is_refused_with_the_remedy() {
    for (arguments, hint) in [
        ("--kill page-server --backing anonymous", "use --backing memfd or hugetlb"),
        ("--kill page-client --report /nowhere", "leave one of them out"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let report = json(&output);
        assert!(report["error"].as_str().unwrap().contains(hint), "{report}");
    }
    for arguments in ["--kill destination", "--cuts 1001", "--kills 2"] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn the_report_and_its_page_show_what_happened() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = "--memory 64M --guest threads --cuts 5 --kill page-server --kills 1";
    let mut command = Command::new(DEMO);
    command.args(arguments.split_whitespace()).arg("--report").arg(directory.path());
    let output = command.env_remove("RUST_LOG").stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = std::str::from_utf8(&output.stdout).unwrap();
    for part in [
        "cuts                 5  2 closed, 2 reset, 1 silent",
        "kills                2  1 page-server, 1 source",
        "recoveries           6  half in ",
        "operations of the guest in that time",
        "slowed down to make time",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let widest = text.lines().map(|line| line.chars().count()).max();
    // The first line says more where rights are missing.
    assert!(widest <= Some(110), "{text}");
    let html = fs::read_to_string(directory.path().join("index.html")).unwrap();
    assert!(html.contains("page-server killed"), "no mark in the picture");
    assert!(html.contains("5 cuts of the network and the 1 death"), "no word about the marks");
}

/// The processes of a running demo, once the last of them plays its part.
fn wait_for_roles(demo: &Child) -> Vec<i32> {
    let list = format!("/proc/{0}/task/{0}/children", demo.id());
    let deadline = Instant::now() + LIMIT;
    loop {
        let children = fs::read_to_string(&list).unwrap();
        let pids: Vec<i32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        let is_page_client = |pid: &i32| {
            let command = fs::read_to_string(format!("/proc/{pid}/cmdline"));
            command.is_ok_and(|it| it.contains("--role") && it.contains("page-client"))
        };
        if pids.iter().any(is_page_client) {
            return pids;
        }
        assert!(Instant::now() < deadline, "the demo has not started a page-client");
        std::thread::yield_now();
    }
}

/// Whether a process runs; one that nobody has waited for yet does not.
fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    let state = stat.ok().and_then(|it| it.rsplit_once(") ").and_then(|(_, it)| it.chars().next()));
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

fn wait_for_the_end_of(pids: &[i32]) {
    let deadline = Instant::now() + LIMIT;
    while let Some(pid) = pids.iter().find(|pid| is_alive(**pid)) {
        assert!(Instant::now() < deadline, "process {pid} was left behind");
        std::thread::yield_now();
    }
}

/// A demo with all of its processes, and a directory in which it has its own.
fn begin(directory: &Path) -> (Child, Vec<i32>) {
    let arguments = "--memory 64M --guest threads --bandwidth 1M --kill page-server,page-client";
    let mut command = command(arguments);
    command.env("TMPDIR", directory).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let pids = wait_for_roles(&child);
    assert!(pids.len() >= 4, "beside it a keeper, a page server and a destination: {pids:?}");
    (child, pids)
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing_behind() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let directory = tempfile::tempdir().unwrap();
        let (child, pids) = begin(directory.path());
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        let report = json(&output);
        assert!(report["error"].as_str().unwrap().contains(signal.as_str()), "{report}");
        wait_for_the_end_of(&pids);
        let left: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn every_process_ends_with_a_demo_that_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, pids) = begin(directory.path());
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for_the_end_of(&pids);
}
