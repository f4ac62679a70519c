//! Where the sockets are, and who may use them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::support::{Daemon, Manager, Server, socket_argument};

/// A page server that is to fail at once: its exit status and what it said.
fn fails(arguments: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command.args(["--listen", "tcp:127.0.0.1:0", "--memory", "/dev/null"]).args(arguments);
    let output = command.output().unwrap();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn only_its_user_may_connect_and_the_socket_goes_with_the_process() {
    let server = Server::start(&[]);
    let mode = server.socket().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let path = server.socket();
    server.daemon.signal(Signal::SIGTERM);
    assert_eq!(server.daemon.end().0, 3);
    assert!(!path.exists());
}

#[test]
fn a_socket_of_the_dead_is_replaced_and_one_of_the_living_refused() {
    let server = Server::start(&[]);
    let path = server.socket();
    let control = socket_argument(&path);
    let (status, line) = fails(&["--control", &control]);
    assert_eq!(status, 1, "{line}");
    assert!(line.contains(&control) && line.contains("another process listens"), "{line}");
    server.daemon.signal(Signal::SIGKILL);
    let Server { daemon, directory, .. } = server;
    daemon.end();
    assert!(path.exists(), "one that is killed tidies up nothing");
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command.args(["--listen", "tcp:127.0.0.1:0", "--memory"]).arg(directory.path().join("ram"));
    command.args(["--control", &control]);
    let mut second = Daemon::spawn(command);
    second.line("listening on");
    assert_eq!(Manager::connect(&path).greeting["tool"], "page-server");
}

#[test]
fn what_is_no_place_for_a_socket_is_refused_with_what_would_be() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let (status, line) = fails(&["--control", &socket_argument(&file)]);
    assert_eq!(status, 1, "{line}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    for (arguments, hint) in [
        (["--control", "tcp:127.0.0.1:0"], "unix:PATH"),
        (["--metrics", "tcp:192.0.2.1:9"], "--insecure-metrics"),
        (["--metrics", "fd:3"], "unix:PATH"),
    ] {
        let (status, line) = fails(&arguments);
        assert_eq!(status, 2, "{line}");
        assert!(line.contains(hint), "{line}");
    }
    // Another's socket is not ours to remove where listening has failed.
    let path = directory.path().join("theirs");
    let _theirs = UnixListener::bind(&path).unwrap();
    assert_eq!(fails(&["--control", &socket_argument(&path)]).0, 1);
    assert!(path.exists());
}
