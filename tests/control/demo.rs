//! The demo's processes, which are driven as those of a real VMM would be.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::metrics;
use crate::support::{Daemon, LIMIT, Manager};

/// A demo, of plain threads unless the arguments say otherwise, whose sockets are in `directory`.
pub(crate) fn start(directory: &Path, arguments: &[&str]) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    for default in [["--guest", "threads"], ["--memory", "64M"]] {
        if !arguments.contains(&default[0]) {
            command.args(default);
        }
    }
    command.arg("--json").args(arguments);
    command.arg("--control").arg(directory).arg("--metrics").arg(directory);
    Daemon::spawn(command)
}

/// Connects to a role as soon as it listens.
pub(crate) fn manager(directory: &Path, role: &str) -> Manager {
    let path = directory.join(format!("{role}.sock"));
    Manager::connect(&once_there(path))
}

fn once_there(path: PathBuf) -> PathBuf {
    let until = Instant::now() + LIMIT;
    // It is bound and listens a moment later: whoever is there can be connected to.
    while std::os::unix::net::UnixStream::connect(&path).is_err() {
        assert!(Instant::now() < until, "{} does not come", path.display());
        std::thread::yield_now();
    }
    path
}

#[test]
fn a_running_guest_is_held_until_it_is_switched_over_from_the_socket() {
    for leave in ["switchover", "continue"] {
        let directory = tempfile::tempdir().unwrap();
        let demo = start(directory.path(), &["--hold"]);
        let mut destination = manager(directory.path(), "destination");
        let mut source = manager(directory.path(), "source");
        assert_eq!(source.greeting["role"], "source");
        destination.ok(json!({"do": "subscribe"}));
        if source.ok(json!({"do": "subscribe"}))["hold"].is_null() {
            assert_eq!(source.event("held")["hold"], "before_switchover");
        }
        let state = source.query();
        assert_eq!(
            (&state["phase"], &state["hold"]),
            (&json!("attached"), &json!("before_switchover"))
        );
        let samples = metrics::samples(&directory.path().join("source.metrics.sock"));
        assert_eq!(metrics::count(&samples, "afterimage_memory_bytes"), 64 << 20);
        source.ok(json!({"do": "set", "bandwidth": "2G"}));
        source.ok(json!({"do": leave}));
        source.event("released");
        assert_eq!(source.query()["hold"], json!(null));
        source.event("running");
        destination.event("state");
        assert_eq!(destination.event("run")["phase"], "running");
        source.event("finished");
        assert_eq!(source.event("closing")["outcome"], "finished");
        assert_eq!(destination.event("closing")["outcome"], "finished");
        let (status, text) = demo.end();
        assert_eq!(status, 0, "{text}");
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, 0, "the sockets go with their processes");
    }
}

#[test]
fn a_page_server_and_a_page_client_of_the_demo_can_be_watched_too() {
    let directory = tempfile::tempdir().unwrap();
    let demo = start(directory.path(), &["--handoff", "--bandwidth", "16M"]);
    let mut server = manager(directory.path(), "page-server");
    assert_eq!(server.greeting["tool"], "page-server");
    server.ok(json!({"do": "subscribe"}));
    server.event("running");
    let (code, message) = server.refused(json!({"do": "cancel"}));
    assert!(code == "not_now" && message.contains("--fence"), "{code}: {message}");
    server.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    assert_eq!(server.event("closing")["outcome"], "finished");
    let (status, text) = demo.end();
    assert_eq!(status, 0, "{text}");
}
