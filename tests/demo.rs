//! The demo as its users run it: the real program, its report, and its exit status.
//!
//! Each test runs the binary and checks the JSON object against what must hold whatever
//! the machine is like: nothing here depends on how fast something is.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use afterimage_tools::ram::HUGE_PAGE_BYTES;
use afterimage_tools::require;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const DEMO: &str = env!("CARGO_BIN_EXE_demo");
/// Long enough for any run on a busy machine; reached only in failure.
const LIMIT: Duration = Duration::from_mins(3);
const NOBODY: u32 = 65534;

/// A run of the demo that has ended.
#[derive(Debug)]
struct Run {
    pid: u32,
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn demo(arguments: &str) -> Command {
    let mut command = Command::new(DEMO);
    command.args(arguments.split_whitespace());
    command
}

fn start(command: &mut Command) -> Child {
    command
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the end of a started demo, and ends it if it takes too long.
fn finish(mut child: Child) -> Run {
    let pid = child.id();
    let (sender, ended) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if ended.recv_timeout(LIMIT).is_err() {
            // The sender is kept until the process has been waited for: the id is its own.
            kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        }
    });
    let mut errors = child.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).unwrap();
        text
    });
    let mut stdout = String::new();
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let stderr = errors.join().unwrap();
    // Both ends of output are closed: the process has ended or is about to.
    let status = child.wait().unwrap().code();
    sender.send(()).unwrap();
    guard.join().unwrap();
    Run { pid, status, stdout, stderr }
}

fn run(arguments: &str) -> Run {
    println!("demo {arguments}");
    finish(start(&mut demo(arguments)))
}

impl Run {
    /// What it says of errors. Where the rights are missing it says so first, on every run.
    fn errors(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| !line.contains("for user-mode faults only")).collect()
    }

    fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "one object on one line: {self:?}");
        let value: Value = serde_json::from_str(&self.stdout).unwrap();
        assert_eq!(value["schema_version"], 1, "{self:?}");
        value
    }
}

/// A key that is a number of at least 0.
fn number(report: &Value, key: &str) -> u64 {
    let value = &report[key];
    value.as_u64().unwrap_or_else(|| panic!("{key} is {value}, not a count: {report}"))
}

/// Runs the demo and checks all that must hold of every successful move.
fn moves(arguments: &str) -> Value {
    let run = run(&format!("--json {arguments}"));
    assert_eq!(run.status, Some(0), "{run:?}");
    let report = run.json();
    check_pages(&report);
    check_times(&report);
    check_guest(&report);
    check_roles(&report, run.pid);
    if !arguments.is_empty() && !report["user_faults_only"].as_bool().unwrap() {
        assert_eq!(run.stderr, "", "nothing to complain of");
    }
    report
}

fn check_pages(report: &Value) {
    let of = |key| number(report, key);
    let total = of("pages_total");
    assert_eq!(total, of("memory_bytes") / of("page_bytes"), "{report}");
    let parts = of("pages_requested") + of("pages_background") + of("pages_zero");
    assert_eq!(parts, total, "each page came in one way: {report}");
    let content = of("pages_requested") + of("pages_background");
    assert!(of("bytes_received") >= content * of("page_bytes"), "{report}");
    let most = (content + of("pages_duplicate")) * of("page_bytes");
    assert!(of("bytes_received") <= most, "{report}");
    assert_eq!(of("recoveries"), 0, "{report}");
}

fn check_times(report: &Value) {
    let of = |key| number(report, key);
    assert!(of("blackout_us") > 0 && of("total_us") > 0, "{report}");
    assert!(of("first_page_us") <= of("total_us"), "{report}");
    assert!(of("background_bytes_per_s") > 0, "{report}");
    let latency = &report["fault_latency_us"];
    let count = number(latency, "count");
    let buckets = latency["buckets"].as_array().unwrap().iter();
    assert_eq!(buckets.map(|bucket| bucket.as_u64().unwrap()).sum::<u64>(), count, "{report}");
    let at = |key: &str| latency[key].as_f64().unwrap();
    assert!(at("p50") <= at("p99") && at("p99") <= at("p999"), "{report}");
    assert!(at("p999") <= at("max") && at("mean") <= at("max"), "{report}");
    let stall = report["stall_us"].as_f64().unwrap();
    assert!((stall - at("mean") * count as f64).abs() <= count as f64, "{report}");
}

fn check_guest(report: &Value) {
    let of = |key| number(report, key);
    assert_eq!(report["verified"], true, "{report}");
    assert!(of("guest_rounds_before") > 0, "it had work behind it: {report}");
    assert!(of("guest_rounds_after") > of("guest_rounds_before"), "it went on: {report}");
    assert!(of("source_exit_us") >= of("total_us"), "{report}");
    assert!(of("guest_stop_us") > of("source_exit_us"), "it outlived the source: {report}");
    let after_the_source = of("guest_operations_after") - of("guest_operations_at_source_exit");
    assert!(after_the_source > 0, "it worked without the source: {report}");
    let digest = report["sha256_source"].as_str().unwrap();
    assert_eq!(digest.len(), 64);
    assert_eq!(report["sha256_destination"], digest, "{report}");
}

fn check_roles(report: &Value, parent: u32) {
    let roles = report["roles"].as_array().unwrap();
    let names: Vec<_> = roles.iter().map(|role| role["role"].as_str().unwrap()).collect();
    assert_eq!(names, ["source", "destination"]);
    let pids: Vec<_> = roles.iter().map(|role| number(role, "pid")).collect();
    assert!(pids[0] != pids[1] && !pids.contains(&parent.into()), "three processes: {report}");
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} was left behind");
    }
}

fn has_kvm() -> bool {
    require::kvm() && require::userfaultfd()
}

/// Moves where 2 × `mib` MiB of huge pages can be had.
fn moves_on_huge_pages(mib: u64, arguments: &str) {
    let pages = 2 * (mib << 20) / HUGE_PAGE_BYTES;
    let Some(_pages) = require::hugetlb(pages) else {
        return;
    };
    let report = moves(&format!("--memory {mib}M --backing hugetlb {arguments}"));
    assert_eq!(report["page_bytes"], HUGE_PAGE_BYTES);
}

#[test]
fn a_guest_on_kvm_moves_whatever_it_is_made_of() {
    if !has_kvm() {
        return;
    }
    moves("--memory 128M --guest kvm --vcpus 1 --backing anonymous --streams 1 --transport tcp");
    moves("--memory 128M --guest kvm --vcpus 2 --backing memfd --streams 4 --transport unix");
    moves("--memory 256M --guest kvm --vcpus 4 --backing anonymous --streams 4 --transport unix");
    moves("--memory 64M --guest kvm --vcpus 4 --backing memfd --streams 1 --transport tcp");
    moves_on_huge_pages(64, "--guest kvm --vcpus 2 --streams 4 --transport tcp");
}

#[test]
fn a_guest_on_threads_moves_whatever_it_is_made_of() {
    moves("--memory 128M --guest threads --vcpus 1 --backing memfd --streams 4 --transport tcp");
    moves("--memory 128M --guest threads --vcpus 2 --backing anonymous --streams 4");
    moves("--memory 128M --guest threads --vcpus 4 --streams 1 --transport unix --checksums");
    moves("--memory 64M --guest threads --vcpus 2 --backing memfd --streams 1 --transport unix");
    moves_on_huge_pages(64, "--guest threads --vcpus 4 --streams 1 --transport unix");
}

#[test]
fn every_workload_moves() {
    let workloads = ["sequential", "random", "hot-set", "read-mostly", "mixed"];
    for (index, workload) in workloads.iter().enumerate() {
        let streams = 1 + index % 3;
        moves(&format!("--memory 64M --guest threads --workload {workload} --streams {streams}"));
        if has_kvm() {
            moves(&format!("--memory 64M --guest kvm --workload {workload} --backing memfd"));
        }
    }
}

#[test]
fn zero_pages_are_not_sent() {
    let size = 64 << 20;
    for backing in ["anonymous", "memfd"] {
        let arguments = format!("--memory 64M --guest threads --backing {backing}");
        let sparse = format!("{arguments} --worked-fraction 0.2 --zero-fraction 1");
        let report = moves(&sparse);
        // All that is not worked, four fifths.
        assert!(number(&report, "pages_zero") > 3 * number(&report, "pages_total") / 4);
        assert!(number(&report, "bytes_received") < size / 4, "{report}");
        let report = moves(&format!("{arguments} --zero-fraction 0"));
        // What the guest has for itself at the bottom, and mostly leaves alone.
        assert!(number(&report, "pages_zero") <= 512, "{report}");
    }
}

#[test]
fn a_guest_moves_by_default_on_what_there_is() {
    let report = moves("--memory 64M");
    let expected = if has_kvm() { "kvm" } else { "threads" };
    assert_eq!(report["guest"], expected);
    let text = run("--memory 64M --guest threads");
    assert_eq!(text.status, Some(0), "{text:?}");
    assert!(text.stdout.starts_with("A running guest of 64 MiB moved over tcp:127.0.0.1:"));
    let is_verified = |line: &str| line.starts_with("  verified ") && line.contains(" yes ");
    assert!(text.stdout.lines().any(is_verified), "{text:?}");
    let widest = text.stdout.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(110), "{text:?}");
}

#[test]
fn one_wrong_byte_is_noticed() {
    // In memory that nobody writes, which the digests cover, and in a page that is worked.
    for (part, has_other_digest) in [("0.5", true), ("1", false)] {
        let arguments = format!("--memory 64M --guest threads --worked-fraction {part}");
        let run = run(&format!("--json --corrupt-one-byte {arguments}"));
        assert_eq!(run.status, Some(1), "{run:?}");
        let report = run.json();
        assert_eq!(report["verified"], false);
        let what = report["verification"].as_str().unwrap();
        assert!(what.starts_with("page 15871, byte 4088: should be 0x"), "{what}");
        let differs = report["sha256_source"] != report["sha256_destination"];
        assert_eq!(differs, has_other_digest, "{report}");
        assert_eq!(run.errors().len(), 1, "{run:?}");
        assert!(run.stderr.contains(what), "{run:?}");
    }
}

/// Runs a copy of the demo that anybody may read, as nobody.
fn as_nobody(arguments: &str) -> Option<Run> {
    if !nix::unistd::geteuid().is_root() {
        let lacking = Err::<(), _>("only root can become somebody else");
        require::or_skip("root", lacking)?;
    }
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = directory.path().join("demo");
    // By another process: a file that is open for writing, perhaps in a child that another
    // test has just forked, cannot be executed.
    let copied = Command::new("cp").arg(DEMO).arg(&program).status().unwrap();
    assert!(copied.success());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    command.args(arguments.split_whitespace()).uid(NOBODY).gid(NOBODY);
    Some(finish(start(command.current_dir("/"))))
}

/// Whether nobody has no right to a full userfaultfd here, as it should be.
fn nobody_has_no_right() -> bool {
    let Some(probe) = as_nobody("--probe --json") else {
        return false;
    };
    assert_eq!(probe.status, Some(0), "{probe:?}");
    let lacking = probe.json()["userfaultfd"].as_str().map(str::to_owned);
    let lacking = lacking.ok_or("everybody may use userfaultfd here");
    require::or_skip("restricted-userfaultfd", lacking).is_some()
}

#[test]
fn without_rights_the_guest_moves_on_threads() {
    if !nobody_has_no_right() {
        return;
    }
    let run = as_nobody("--json --memory 64M --backing memfd").unwrap();
    assert_eq!(run.status, Some(0), "{run:?}");
    let report = run.json();
    check_pages(&report);
    check_guest(&report);
    assert_eq!(report["guest"], "threads");
    assert_eq!(report["user_faults_only"], true);
    assert_eq!(run.stderr.lines().count(), 1, "{run:?}");
    assert!(run.stderr.contains("user-mode faults only"), "{run:?}");
    assert!(run.stderr.contains("CAP_SYS_PTRACE"), "{run:?}");
}

#[test]
fn without_rights_kvm_fails_with_the_remedies() {
    if !nobody_has_no_right() {
        return;
    }
    let run = as_nobody("--json --memory 64M --guest kvm").unwrap();
    assert_eq!(run.status, Some(3), "{run:?}");
    let report = run.json();
    assert_eq!(report["verified"], false);
    assert_eq!(report["exit_status"], 3);
    let line = report["error"].as_str().unwrap();
    assert_eq!(run.stderr, format!("demo: {line}\n"));
    for remedy in ["CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1", "--guest threads"] {
        assert!(line.contains(remedy), "{line}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_in_one_line() {
    let run = run("--json --memory 256G --backing hugetlb");
    assert_eq!(run.status, Some(3), "{run:?}");
    assert_eq!(run.errors().len(), 1, "{run:?}");
    assert!(run.json()["error"].as_str().unwrap().contains("smaller --memory"), "{run:?}");
    for (arguments, hint) in [
        ("--memory 4X", "as 512M or 4G"),
        ("--memory 3M", "a multiple of 2M"),
        ("--vcpus 9", "1..=8"),
        ("--streams 17", "1..=16"),
        ("--bandwidth 0", "as 100M or 1.5G"),
        ("--bandwidth on-request", "would never end"),
        ("--backing paper", "hugetlb"),
    ] {
        let run = self::run(arguments);
        assert_eq!(run.status, Some(2), "{run:?}");
        assert!(run.stderr.contains(hint), "{run:?}");
    }
}

#[test]
fn help_has_examples_and_the_exit_statuses() {
    let run = run("--help");
    assert_eq!(run.status, Some(0));
    for part in ["Examples:\n", "demo --json | jq", "Exit status:\n  0  the guest moved"] {
        assert!(run.stdout.contains(part), "{}", run.stdout);
    }
    assert!(!run.stdout.contains("--role"), "{}", run.stdout);
}

/// The processes that a running demo has started, once there are both and play their parts:
/// one that is stopped before that keeps the demo in `vfork`, as no real hang would.
fn wait_for_roles(demo: &Child) -> [Pid; 2] {
    let list = format!("/proc/{0}/task/{0}/children", demo.id());
    let deadline = Instant::now() + LIMIT;
    loop {
        let children = fs::read_to_string(&list).unwrap();
        let pids: Vec<_> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        let plays = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().contains("--role")
        };
        if let [source, destination] = pids[..]
            && pids.iter().all(plays)
        {
            return [Pid::from_raw(source), Pid::from_raw(destination)];
        }
        assert!(Instant::now() < deadline, "the demo has not started two processes");
        std::thread::yield_now();
    }
}

#[test]
fn a_process_that_dies_is_an_error_and_takes_the_other_along() {
    for victim in [0, 1] {
        let child = start(&mut demo("--json --memory 256M --guest threads"));
        let roles = wait_for_roles(&child);
        kill(roles[victim], Signal::SIGKILL).unwrap();
        let run = finish(child);
        assert_eq!(run.status, Some(4), "{run:?}");
        assert_eq!(run.json()["verified"], false);
        assert_eq!(run.errors().len(), 1, "{run:?}");
        let name = ["source", "destination"][victim];
        assert!(run.errors()[0].starts_with(&format!("demo: the {name} ")), "{run:?}");
        for role in roles {
            assert!(!Path::new(&format!("/proc/{role}")).exists(), "{role} was left behind");
        }
    }
}

#[test]
fn a_process_that_hangs_is_an_error_in_time() {
    for victim in [0, 1] {
        let child = start(&mut demo("--memory 256M --guest threads --timeout 2"));
        let roles = wait_for_roles(&child);
        kill(roles[victim], Signal::SIGSTOP).unwrap();
        let run = finish(child);
        assert_eq!(run.status, Some(4), "{run:?}");
        assert_eq!(run.errors().len(), 1, "{run:?}");
        for role in roles {
            assert!(!Path::new(&format!("/proc/{role}")).exists(), "{role} was left behind");
        }
    }
}

#[test]
fn both_processes_end_with_the_demo() {
    let mut child = start(&mut demo("--memory 256M --guest threads"));
    let roles = wait_for_roles(&child);
    let watches = roles.map(|pid| EndOf::watch(pid).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    for watch in watches {
        assert!(watch.wait(LIMIT), "a process outlived the demo");
    }
}

/// Tells when a process that is no child of this one has ended.
struct EndOf(std::os::fd::OwnedFd);

impl EndOf {
    fn watch(pid: Pid) -> std::io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: the call takes two numbers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        Ok(Self(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd as i32) }))
    }

    fn wait(&self, limit: Duration) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(limit).unwrap()).unwrap() == 1
    }
}
