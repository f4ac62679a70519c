//! `demo --handoff`: the VMM that had the guest is dead before a page is sent.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
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
const LIMIT: Duration = Duration::from_mins(1);
const NOBODY: u32 = 65534;

fn command(program: impl AsRef<Path>, arguments: &str) -> Command {
    println!("demo --json --handoff {arguments}");
    let mut command = Command::new(program.as_ref());
    command.args(["--json", "--handoff"]).args(arguments.split_whitespace());
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(arguments: &str) -> Output {
    command(DEMO, arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    let text = std::str::from_utf8(&output.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "one object on one line: {output:?}");
    serde_json::from_str(text).unwrap()
}

fn errors(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// A key that is a number of at least 0.
fn number(report: &Value, key: &str) -> u64 {
    let value = &report[key];
    value.as_u64().unwrap_or_else(|| panic!("{key} is {value}, not a count: {report}"))
}

/// What must hold of every guest that was handed over and moved.
fn check(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report = json(output);
    let of = |key| number(&report, key);
    assert_eq!(report["handoff"], true, "{report}");
    assert_eq!(report["verified"], true, "{report}");
    assert_eq!(report["sha256_destination"], report["sha256_source"], "{report}");

    assert!(0 < of("handed_over_us") && of("handed_over_us") <= of("vmm_exit_us"), "{report}");
    assert_eq!(of("vmm_exit_us"), of("source_exit_us"), "{report}");
    assert!(of("vmm_exit_us") < of("first_page_us"), "the VMM lived: {report}");
    assert!(of("vmm_exit_us") < of("blackout_us"), "its end is in the blackout: {report}");
    assert!(of("first_page_us") <= of("total_us"), "{report}");
    // `total_us` ends when the destination hears that all is there: it may hear it later.
    assert!(of("first_page_us") < of("page_server_exit_us"), "{report}");
    assert!(of("page_server_exit_us") < of("guest_stop_us"), "{report}");

    assert!(of("guest_rounds_before") > 0, "{report}");
    assert!(of("guest_rounds_after") > of("guest_rounds_before"), "it went on: {report}");
    let alone = of("guest_operations_after") - of("guest_operations_at_source_exit");
    assert!(alone > 0, "it worked without the page server: {report}");
    let parts = of("pages_requested") + of("pages_background") + of("pages_zero");
    assert_eq!(parts, of("pages_total"), "{report}");

    let roles = report["roles"].as_array().unwrap();
    let names: Vec<_> = roles.iter().map(|role| role["role"].as_str().unwrap()).collect();
    assert_eq!(names, ["source", "page-server", "destination"]);
    let mut pids: Vec<_> = roles.iter().map(|role| number(role, "pid")).collect();
    for pid in &pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} was left behind");
    }
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 3, "{report}");
    report
}

fn moves(arguments: &str) -> Value {
    let output = run(arguments);
    let report = check(&output);
    assert!(report["user_faults_only"] == true || output.stderr.is_empty(), "{output:?}");
    report
}

/// Moves on 4 KiB and on 2 MiB pages, over TCP and over Unix sockets.
fn moves_on_everything(guest: &str) {
    let report = moves(&format!("--memory 128M --guest {guest}"));
    assert_eq!(report["backing"], "memfd", "the default");
    let address = report["address"].as_str().unwrap();
    assert!(address.starts_with("tcp:127.0.0.1:"), "{report}");
    // What nobody wrote is a hole still: neither digest nor hand-over has filled it.
    let sparse = "--worked-fraction 0.2 --zero-fraction 1 --streams 4 --checksums";
    let unix = format!("--memory 64M --guest {guest} --transport unix");
    let report = moves(&format!("{unix} --backing memfd {sparse}"));
    assert!(number(&report, "pages_zero") > 3 * number(&report, "pages_total") / 4, "{report}");
    assert!(report["address"].as_str().unwrap().starts_with("unix:"), "{report}");

    let Some(_pages) = require::hugetlb(2 * (64 << 20) / HUGE_PAGE_BYTES) else { return };
    let report = moves(&format!("--memory 64M --guest {guest} --backing hugetlb --streams 2"));
    assert_eq!(report["page_bytes"], HUGE_PAGE_BYTES);
    moves(&format!("{unix} --backing hugetlb"));
}

#[test]
fn a_vmm_with_a_guest_on_kvm_is_dead_before_a_page_is_sent() {
    if require::kvm() && require::userfaultfd() {
        moves_on_everything("kvm");
    }
}

#[test]
fn a_vmm_with_a_guest_on_threads_is_dead_before_a_page_is_sent() {
    moves_on_everything("threads");
}

#[test]
fn the_report_says_when_the_vmm_died() {
    let mut command = Command::new(DEMO);
    command.args(["--handoff", "--memory", "64M", "--guest", "threads"]).env_remove("RUST_LOG");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = std::str::from_utf8(&output.stdout).unwrap();
    for part in ["  VMM's end ", "hand-over and VMM's end included", "the page server had ended"] {
        assert!(text.contains(part), "{text}");
    }
    let widest = text.lines().map(|line| line.chars().count()).max();
    // The first line says more where rights are missing.
    assert!(widest <= Some(110), "{text}");
}

#[test]
fn anonymous_memory_is_refused_with_the_remedy() {
    let output = run("--backing anonymous");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let report = json(&output);
    let line = report["error"].as_str().unwrap();
    assert!(line.contains("use --backing memfd or hugetlb"), "{line}");
    assert_eq!(errors(&output), format!("demo: {line}\n"));
    assert_eq!(report["exit_status"], 2);
}

/// A copy of the demo that anybody may run, in a folder that anybody may read.
fn copy_for_all(directory: &Path) -> std::path::PathBuf {
    let program = directory.join("demo");
    // By another process: a file that is open for writing, perhaps in a child that another
    // test has just forked, cannot be executed.
    let copied = Command::new("cp").arg(DEMO).arg(&program).status().unwrap();
    assert!(copied.success());
    for path in [directory, &program] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    program
}

#[test]
fn without_rights_a_guest_on_threads_is_handed_over() {
    if !nix::unistd::geteuid().is_root() {
        // Whoever runs this has no more rights than nobody.
        moves("--memory 64M --guest threads");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let program = copy_for_all(directory.path());
    let mut command = command(program, "--memory 64M");
    let output = command.uid(NOBODY).gid(NOBODY).current_dir("/").output().unwrap();
    let report = check(&output);
    if report["user_faults_only"] != true {
        let lacking = Err::<(), _>("everybody may use userfaultfd here");
        let _ = require::or_skip("restricted-userfaultfd", lacking);
        return;
    }
    assert_eq!(report["guest"], "threads");
    assert_eq!(errors(&output).lines().count(), 1, "{output:?}");
    assert!(errors(&output).contains("CAP_SYS_PTRACE"), "{output:?}");
}

/// The processes that a running demo has started, once they are three and play their parts.
fn wait_for_roles(demo: &Child) -> [Pid; 3] {
    let list = format!("/proc/{0}/task/{0}/children", demo.id());
    let deadline = Instant::now() + LIMIT;
    loop {
        let children = fs::read_to_string(&list).unwrap();
        let pids: Vec<i32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        let plays = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|it| it.contains("--role"))
        };
        if let [vmm, page_server, destination] = pids[..]
            && pids.iter().all(plays)
        {
            return [vmm, page_server, destination].map(Pid::from_raw);
        }
        assert!(Instant::now() < deadline, "the demo has not started three processes");
        std::thread::yield_now();
    }
}

#[test]
fn a_process_that_dies_before_the_hand_over_is_an_error() {
    for (victim, name) in ["source", "page-server", "destination"].into_iter().enumerate() {
        let mut command = command(DEMO, "--memory 256M --guest threads");
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let roles = wait_for_roles(&child);
        // They fill memory for longer than this takes; nothing has been handed over yet.
        kill(roles[victim], Signal::SIGKILL).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        let line = json(&output)["error"].as_str().unwrap().to_owned();
        // Where rights are missing, that is said before.
        let said = errors(&output);
        assert_eq!(said.lines().last(), Some(format!("demo: {line}").as_str()));
        assert!(said.lines().count() <= 2, "{said}");
        assert!(line.contains(name), "{line}");
        for role in roles {
            assert!(!Path::new(&format!("/proc/{role}")).exists(), "{role} was left behind");
        }
    }
}
