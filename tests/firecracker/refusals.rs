//! What cannot be served, and is said in a line.

use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;

use crate::memory::Kind;
use crate::support::{CLIENT, Daemon};
use crate::vm::{MIB, OF_4_GIB, Snapshot, ended};

/// The handler ends, and the VM with it.
fn refused(snapshot: &Snapshot, mut handler: Daemon, hand_over: &str, expected: &str) {
    let mut vm = snapshot.vmm();
    vm.does(&format!("connect {}", snapshot.path("uffd").display()));
    // It may be killed before it can say that it has.
    vm.begins(hand_over);
    handler.line("the VM was killed");
    assert_eq!(vm.end().signal(), Some(Signal::SIGKILL as i32));
    let report = ended(handler, 1, "failed");
    assert!(report["error"].as_str().unwrap().contains(expected), "{report}");
}

#[test]
fn a_variant_that_is_not_known_is_refused() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let handler = snapshot.local_handler("uffd", &[]);
    refused(
        &snapshot,
        handler,
        "hand-over-with-a-socket",
        "descriptor 2 is no file with its memory",
    );
}

#[test]
fn a_memory_file_of_another_vm_is_refused() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    for (length, expected) in [(MIB, "has 1048576 bytes"), (5 * MIB, "the VM has 4194304")] {
        let other = Snapshot::new(Kind::Private, &[length]);
        let memory = other.path("memory").display().to_string();
        let handler = snapshot.handler("uffd", &["--memory", &memory]);
        refused(&snapshot, handler, "hand-over", expected);
    }
}

#[test]
fn a_server_with_other_memory_is_refused() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let other = Snapshot::new(Kind::Private, &[4 * MIB]);
    let _server = other.server(&[]);
    let handler = snapshot.handler("uffd", &["--connect", &other.pages()]);
    refused(&snapshot, handler, "hand-over", "turns this side away");
}

#[test]
fn a_second_vm_finds_nobody() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let mut handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
    let vm = snapshot.loaded("uffd");
    handler.line("serving the guest");
    assert!(UnixStream::connect(snapshot.path("uffd")).is_err());
    // Another page-client takes the next.
    let another = snapshot.local_handler("uffd", &[]);
    let mut next = snapshot.loaded("uffd");
    next.check();
    ended(another, 0, "finished");
    vm.kill();
    ended(handler, 0, "vm_ended");
}

#[test]
fn a_stranger_is_turned_away_and_the_vm_is_served() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let mut handler = snapshot.local_handler("uffd", &[]);
    let mut stranger = UnixStream::connect(snapshot.path("uffd")).unwrap();
    std::io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    handler.line("no descriptor came with the message");
    let mut vm = snapshot.loaded("uffd");
    vm.check();
    ended(handler, 0, "finished");
}

#[test]
fn options_that_do_not_fit_are_refused_before_anybody_comes() {
    let at = ["--firecracker", "unix:/nowhere/uffd"];
    for (more, expected) in [
        (&["--memory", "/nowhere/memory"][..], "check the path"),
        (&["--memory", "/dev/null", "--connect", "unix:/x"], "cannot be used with"),
        (&["--connect", "unix:/x"], "make its directory"),
        (&["--connect", "unix:/x", "--bandwidth", "1M"], "--memory"),
        (&["--connect", "unix:/x", "--state", "/x", "--keeper", "unix:/k"], "cannot be used"),
    ] {
        let (status, _, said) = Daemon::start(CLIENT, &[&at[..], more].concat()).end();
        assert!(status == 1 || status == 2, "{said:#?}");
        assert!(said.iter().any(|line| line.contains(expected)), "{expected}: {said:#?}");
    }
}
