//! What operators see.

use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::Signal;

use crate::support::{Daemon, address, command, memfd};

fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = command().args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn guests_are_listed_and_removed() {
    let daemon = Daemon::start(&[]);
    let mode = std::fs::metadata(&daemon.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others could take guests");
    let at = address(&daemon.path);
    let mut keeper = daemon.client();
    let file = memfd(b"x");
    keeper.store("web1", &[("a", file.as_fd())]).unwrap();
    let (status, text, _) = run(&["list", "--at", &at, "--json"]);
    assert_eq!(status, 0);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (report["schema_version"].as_u64(), report["tool"].as_str()),
        (Some(1), Some("afterimage-keeper"))
    );
    let guest = &report["guests"][0];
    assert_eq!((guest["guest"].as_str(), guest["files"].as_u64()), (Some("web1"), Some(1)));
    assert_eq!(guest["claimed_by"], std::process::id());
    assert_eq!(guest["stored_by"], std::process::id());
    let (status, _, error) = run(&["remove", "--at", &at, "--guest", "web1"]);
    assert!(status == 1 && error.contains("in use by process"), "{error}");
    drop(keeper);
    let (_, text, _) = run(&["list", "--at", &at]);
    assert!(text.contains("web1: 1 descriptors") && text.contains("not claimed"), "{text}");
    assert_eq!(run(&["remove", "--at", &at, "--guest", "web1"]).0, 0);
    let (status, _, error) = run(&["remove", "--at", &at, "--guest", "web1"]);
    assert!(status == 1 && error.contains("no guest") && error.lines().count() == 1, "{error}");
}

#[test]
fn it_does_not_drop_what_it_holds_at_the_first_signal() {
    let daemon = Daemon::start(&[]);
    let mut keeper = daemon.client();
    let file = memfd(b"x");
    keeper.store("web1", &[("a", file.as_fd())]).unwrap();
    daemon.signal(Signal::SIGTERM);
    let line = daemon.line("not stopping");
    assert!(line.contains("1 guests"), "{line}");
    assert_eq!(keeper.fetch("web1").unwrap().len(), 1);
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.end(), 4);
    let daemon = Daemon::start(&[]);
    daemon.signal(Signal::SIGINT);
    assert_eq!(daemon.end(), 0, "it holds nothing");
}

#[test]
fn a_place_that_is_taken_is_told() {
    let daemon = Daemon::start(&[]);
    let at = address(&daemon.path);
    let (status, _, error) = run(&["--listen", &at]);
    assert!(status == 1 && error.contains("another keeper listens"), "{error}");
    daemon.client().list().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let (status, _, error) = run(&["--listen", &address(&file)]);
    assert!(status == 1 && error.contains("is no socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"x");
    let (status, _, error) = run(&["--listen", "tcp:127.0.0.1:0"]);
    assert!(status == 1 && error.contains("unix:PATH"), "{error}");
    let (status, _, error) = run(&["--listen", &address(&directory.path().join("no/sock"))]);
    assert!(status == 1 && error.contains("directory"), "{error}");
    assert_eq!(run(&[]).0, 2);
    let (status, text, _) = run(&["--help"]);
    assert!(status == 0 && text.contains("Exit status") && text.contains("Examples"), "{text}");
}
