//! `afterimage-ctl` as its users run it.

use std::process::{Command, Output};

use afterimage::DestinationEvent;
use serde_json::{Value, json};

use crate::support::{Daemon, Server, Target, socket_argument};

fn ctl(server: &Server, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage-ctl"));
    command.arg("--socket").arg(socket_argument(&server.socket())).args(arguments);
    command
}

fn run(server: &Server, arguments: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = ctl(server, arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

#[test]
fn answers_are_shown_in_words_or_as_they_are() {
    let server = Server::start(&[]);
    let session = server.begun().query()["session"].as_str().unwrap().to_owned();
    let (status, words, _) = run(&server, &["query"]);
    assert_eq!(status, 0);
    assert!(words.contains(&session) && words.contains("phase      connecting"), "{words}");
    let (_, text, _) = run(&server, &["--json", "query"]);
    let state: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(state["session"], session);
    let (status, words, _) = run(&server, &["capabilities"]);
    assert_eq!(status, 0);
    assert!(words.contains("pause       yes") && words.contains("switchover  no: "), "{words}");
    assert_eq!(
        run(&server, &["set", "--bandwidth", "100M"]),
        (0, "done\n".to_owned(), String::new())
    );
    let (_, words, _) = run(&server, &["query"]);
    assert!(words.contains("bandwidth  104857600"), "{words}");
}

#[test]
fn the_exit_status_says_what_kind_of_failure_it_was() {
    let server = Server::start(&[]);
    drop(server.begun());
    let (status, _, line) = run(&server, &["switchover"]);
    assert_eq!(status, 3, "{line}");
    assert!(
        line.starts_with("afterimage-ctl: page-server serves a guest that is stopped"),
        "{line}"
    );
    let (status, _, line) = run(&server, &["set", "--bandwidth", "fast"]);
    assert_eq!(status, 2, "{line}");
    let nowhere = Command::new(env!("CARGO_BIN_EXE_afterimage-ctl"))
        .args(["--socket", "unix:/nowhere/control.sock", "query"])
        .output()
        .unwrap();
    assert_eq!(nowhere.status.code(), Some(1));
    let line = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(line.contains("unix:/nowhere/control.sock") && line.contains("--control"), "{line}");
    assert_eq!(run(&server, &["cancel"]).0, 0);
    assert_eq!(server.daemon.end().0, 3);
}

#[test]
fn watch_prints_every_event_line_and_ends_with_the_process() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut manager = server.begun();
    let mut as_json = Daemon::spawn(ctl(&server, &["--json", "watch", "--interval", "50ms"]));
    let mut in_words = Daemon::spawn(ctl(&server, &["watch", "--interval", "50ms"]));
    manager.ok(json!({"do": "subscribe", "progress_ms": 50}));
    let target = Target::connect(&server.address);
    target.until(|event| *event == DestinationEvent::Run);
    manager.event("progress");
    // Both have subscribed when they have printed something.
    for watcher in [&mut as_json, &mut in_words] {
        watcher.first_output();
    }
    manager.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    target.finish();
    let (status, text) = as_json.end();
    assert_eq!(status, 0, "{text}");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_there = |name: &str| lines.iter().any(|line| line["event"] == name);
    for name in ["parameters", "finished", "closing"] {
        assert!(is_there(name), "{name} in {text}");
    }
    let (status, text) = in_words.end();
    assert_eq!(status, 0, "{text}");
    assert!(text.contains("finished") && text.contains(" % ") && !text.contains('\x1b'), "{text}");
}

#[test]
fn watch_says_by_its_status_that_not_all_has_arrived() {
    let server = Server::start(&[]);
    let mut manager = server.begun();
    let mut watcher = Daemon::spawn(ctl(&server, &["--json", "watch"]));
    watcher.first_output();
    manager.ok(json!({"do": "cancel"}));
    let (status, text) = watcher.end();
    assert_eq!(status, 4, "{text}");
}
