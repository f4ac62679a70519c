//! What the command says of the machine, of wrong arguments, and of addresses.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use afterimage::{FaultScope, probe};

use crate::support::PAGE;

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_page-server")).args(arguments).output().unwrap()
}

fn status_and_error(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn the_probe_says_whether_a_guest_on_kvm_can_be_served() {
    let is_ok = probe().missing(FaultScope::KernelAndUser).next().is_none();
    let output = run(&["--probe", "--json"]);
    assert_eq!(output.status.code(), Some(if is_ok { 0 } else { 5 }));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], is_ok);
    assert_eq!(report["schema_version"], 1);
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), probe().findings.len());
    let output = run(&["--probe"]);
    let table = String::from_utf8(output.stdout).unwrap();
    for finding in findings {
        let name = finding["name"].as_str().unwrap();
        assert!(table.contains(name), "{name} is not in {table}");
    }
}

#[test]
fn the_probe_works_as_nobody() {
    if !nix::unistd::geteuid().is_root() {
        afterimage_tools::require::or_skip::<(), _>("root", Err("this is no root"));
        return;
    }
    // Where nobody may read it.
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = directory.path().join("page-server");
    // Written by another process: a file that is open for writing, perhaps in a child that
    // another test has just forked, cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_page-server")).arg(&binary).status();
    assert!(copied.unwrap().success());
    let output = Command::new(&binary)
        .args(["--probe", "--json"])
        .uid(65534)
        .gid(65534)
        .current_dir("/")
        .output()
        .unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let find = |name: &str| {
        let findings = report["findings"].as_array().unwrap();
        findings.iter().find(|it| it["name"] == name).cloned().unwrap()
    };
    let plain = find("userfaultfd for user faults");
    assert_eq!(plain["state"], "ok", "{plain}");
    let is_open_to_all = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .is_ok_and(|text| text.trim() == "1")
        || fs::metadata("/dev/userfaultfd").is_ok_and(|it| it.permissions().mode() & 0o6 == 0o6);
    let full = find("userfaultfd for kernel faults");
    assert_eq!(full["state"] == "ok", is_open_to_all, "{full}");
    assert_eq!(output.status.code(), Some(if is_open_to_all { 0 } else { 5 }));
    if !is_open_to_all {
        assert!(full["remedy"].as_str().unwrap().contains("CAP_SYS_PTRACE"), "{full}");
    }
}

#[test]
fn wrong_arguments_are_told_apart_from_failures() {
    let directory = tempfile::tempdir().unwrap();
    let ram = directory.path().join("ram");
    fs::write(&ram, vec![1; 2 * PAGE as usize]).unwrap();
    let ram = ram.to_str().unwrap();
    let beyond = format!("{ram},4K,8K");
    let bad = directory.path().join("layout.json");
    fs::write(&bad, r#"{"regions": [{"guest_address": 0}]}"#).unwrap();
    let bad = bad.to_str().unwrap();
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let held_address = format!("tcp:{}", held.local_addr().unwrap());
    let local = "tcp:127.0.0.1:0";
    for (status, expected, arguments) in [
        (2, "--memory", &["--listen", local][..]),
        (2, "--listen", &["--memory", ram]),
        (2, "write tcp:HOST:PORT", &["--listen", "nonsense", "--memory", ram]),
        (2, "1..=16", &["--listen", local, "--memory", ram, "--streams", "17"]),
        (2, "on-request", &["--listen", local, "--memory", ram, "--bandwidth", "fast"]),
        (2, "as in 200ms", &["--listen", local, "--memory", ram, "--silence", "5"]),
        (2, "longer than", &["--listen", local, "--memory", ram, "--silence", "100ms"]),
        (2, "cannot be used with", &["--connect", "unix:/x", "--memory", ram, "--snapshot"]),
        (
            2,
            "cannot be used with",
            &["--listen", local, "--memory", ram, "--snapshot", "--release"],
        ),
        (2, "Unix sockets", &["--listen", local, "--handoff", local]),
        (2, "for --listen", &["--connect", "fd:3", "--memory", ram]),
        (1, "check the path", &["--listen", local, "--memory", "/nowhere/ram"]),
        (1, "has 8192 bytes", &["--listen", local, "--memory", &beyond]),
        (1, "is no layout", &["--listen", local, "--layout", bad]),
        (1, "another process listens", &["--listen", &held_address, "--memory", ram]),
        (1, "make its directory", &["--listen", "unix:/nowhere/x", "--memory", ram]),
        (1, "pass a listening socket in", &["--listen", "fd:77", "--memory", ram]),
        (1, "--insecure-plaintext", &["--listen", "tcp:0.0.0.0:0", "--memory", ram]),
        (1, "--insecure-plaintext", &["--connect", "tcp:192.0.2.1:9", "--memory", ram]),
    ] {
        let (code, error) = status_and_error(arguments);
        assert_eq!(code, status, "{arguments:?}: {error}");
        assert!(error.contains(expected), "{arguments:?}: {error}");
        if status == 1 {
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}

#[test]
fn a_failure_is_reported_as_json_too() {
    let output = run(&["--listen", "tcp:127.0.0.1:0", "--memory", "/nowhere/ram", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["outcome"], "failed");
    assert!(report["error"].as_str().unwrap().contains("/nowhere/ram"), "{report}");
}

#[test]
fn the_help_shows_examples_and_every_exit_status() {
    let output = run(&["--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(help.contains("Examples:") && help.contains("Exit status:"), "{help}");
    for status in 0..=5 {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{status}  "))));
    }
}
