//! Clients that break the rules harm no other.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use afterimage_tools::keeper::{Keeper, KeeperError, MAX_CLIENTS, MAX_GUESTS, Why};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    socket,
};

use crate::support::{Daemon, memfd, until};

const HELLO: &str = r#"{"do":"hello","version":1,"name":"raw"}"#;

/// A connection without the library.
struct Raw(OwnedFd);

impl Raw {
    fn connect(daemon: &Daemon) -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(&daemon.path).unwrap()).unwrap();
        Self(fd)
    }

    fn send(&self, text: &str, file: Option<&std::fs::File>, count: usize) -> nix::Result<usize> {
        let raw = vec![file.map_or(0, AsRawFd::as_raw_fd); count];
        let rights = [ControlMessage::ScmRights(&raw)];
        let rights = if count == 0 { &rights[..0] } else { &rights[..] };
        let bytes = [IoSlice::new(text.as_bytes())];
        sendmsg::<()>(self.0.as_raw_fd(), &bytes, rights, MsgFlags::MSG_NOSIGNAL, None)
    }

    /// The answer; empty at the end of the connection.
    fn answer(&self) -> String {
        let mut bytes = [0; 4096];
        let length = recv(self.0.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    }
}

/// Stores, fetches and removes a guest.
fn works(keeper: &mut Keeper) {
    let file = memfd(b"x");
    keeper.store("good", &[("a", file.as_fd())]).unwrap();
    assert_eq!(keeper.fetch("good").unwrap().len(), 1);
    keeper.remove("good").unwrap();
}

#[test]
fn nonsense_ends_its_own_connection_only() {
    let daemon = Daemon::start(&[]);
    let mut good = daemon.client();
    good.list().unwrap();
    let before = daemon.open_files();
    let file = memfd(b"x");
    let long = "x".repeat(65 << 10);
    for (packets, count, expected) in [
        (&["GET / HTTP/1.1"][..], 0, "not understood"),
        (&[r#"{"do":"list"}"#], 0, "did not say hello"),
        (&[r#"{"do":"hello","version":9,"name":"x"}"#], 0, "version 9"),
        (&[HELLO, r#"{"do":"dance"}"#], 0, "not understood"),
        (&[HELLO, &long], 0, "a packet of more than"),
        // More descriptors than a packet may have, with each of them.
        (&[HELLO], 65, "or 64 descriptors"),
        (&[HELLO], 253, "or 64 descriptors"),
    ] {
        let raw = Raw::connect(&daemon);
        let mut said = String::new();
        for packet in packets {
            raw.send(packet, Some(&file), count).unwrap();
            said = raw.answer();
        }
        assert!(said.contains("refused") && said.contains(expected), "{said}");
        assert_eq!(raw.answer(), "", "it is hung up on");
    }
    daemon.until_open_files(before);
    works(&mut good);
}

#[test]
fn a_request_that_cannot_be_right_is_refused_and_the_next_is_answered() {
    let daemon = Daemon::start(&[]);
    let raw = Raw::connect(&daemon);
    let file = memfd(b"x");
    let refuses = |text: &str, count: usize, expected: &str| {
        raw.send(text, Some(&file), count).unwrap();
        let said = raw.answer();
        assert!(said.contains("refused") && said.contains(expected), "{text}: {said}");
    };
    raw.send(HELLO, None, 0).unwrap();
    assert!(raw.answer().contains("done"));
    refuses(HELLO, 0, "once");
    refuses(r#"{"do":"put","guest":"g","names":["a"]}"#, 2, "1 names came with 2");
    refuses(r#"{"do":"put","guest":"g","names":[]}"#, 0, "0 names");
    refuses(r#"{"do":"put","guest":"../g","names":["a"]}"#, 1, "is no name");
    refuses(r#"{"do":"put","guest":"g","names":["a b"]}"#, 1, "is no name");
    refuses(r#"{"do":"put","guest":"g","names":["a","a"]}"#, 2, "twice");
    refuses(r#"{"do":"commit","guest":"g"}"#, 0, "nothing was put together");
    refuses(r#"{"do":"fetch","guest":"g","from":0}"#, 0, "not_there");
    raw.send(r#"{"do":"put","guest":"g","names":["a"]}"#, Some(&file), 1).unwrap();
    assert!(raw.answer().contains("done"));
    refuses(r#"{"do":"put","guest":"g","names":["a"]}"#, 1, "twice");
    refuses(r#"{"do":"commit","guest":"g"}"#, 0, "nothing was put together");
    raw.send(r#"{"do":"put","guest":"g","names":["a"]}"#, Some(&file), 1).unwrap();
    assert!(raw.answer().contains("done"));
    raw.send(r#"{"do":"commit","guest":"g"}"#, None, 0).unwrap();
    assert!(raw.answer().contains("done"));
    raw.send(r#"{"do":"release","guest":"g"}"#, None, 0).unwrap();
    assert!(raw.answer().contains("done"));
    refuses(r#"{"do":"fetch","guest":"g","from":0}"#, 0, "must be claimed");
}

#[test]
fn a_client_that_never_reads_is_hung_up_on() {
    let daemon = Daemon::start(&[]);
    let mut good = daemon.client();
    let raw = Raw::connect(&daemon);
    raw.send(HELLO, None, 0).unwrap();
    // Its answers fill its socket; then it is let go, and sending ends.
    // Far more than fit into both sockets.
    let is_let_go = (0..100_000).any(|_| raw.send(r#"{"do":"list"}"#, None, 0).is_err());
    assert!(is_let_go, "it is still heard");
    daemon.line("cannot be answered");
    works(&mut good);
}

#[test]
fn what_was_not_finished_is_let_go_with_its_client() {
    let daemon = Daemon::start(&[]);
    let mut good = daemon.client();
    good.list().unwrap();
    let before = daemon.open_files();
    let raw = Raw::connect(&daemon);
    let file = memfd(b"x");
    raw.send(HELLO, None, 0).unwrap();
    raw.answer();
    raw.send(r#"{"do":"put","guest":"g","names":["a","b"]}"#, Some(&file), 2).unwrap();
    assert!(raw.answer().contains("done"));
    daemon.until_open_files(before + 3);
    assert!(good.list().unwrap().is_empty(), "half a guest is none");
    drop(raw);
    daemon.until_open_files(before);
    works(&mut good);
}

#[test]
fn what_was_said_last_counts_although_its_client_is_dead() {
    let daemon = Daemon::start(&[]);
    for _ in 0..20 {
        let raw = Raw::connect(&daemon);
        let file = memfd(b"x");
        raw.send(HELLO, None, 0).unwrap();
        raw.answer();
        raw.send(r#"{"do":"put","guest":"g","names":["a"]}"#, Some(&file), 1).unwrap();
        raw.answer();
        raw.send(r#"{"do":"commit","guest":"g"}"#, None, 0).unwrap();
        drop(raw);
        let mut next = daemon.client();
        // Children that other tests are starting may have the connection for a moment more.
        until("the claim of a dead client ends", || next.claim("g").is_ok());
        next.remove("g").unwrap();
    }
}

#[test]
fn limits_are_said_and_leave_room_for_others() {
    let daemon = Daemon::start(&["--max-files", "300"]);
    let mut keeper = daemon.client();
    let file = memfd(b"x");
    for number in 0..MAX_GUESTS {
        keeper.store(&format!("guest-{number}"), &[("a", file.as_fd())]).unwrap();
    }
    let full = |result: Result<(), KeeperError>, expected: &str| {
        let error = result.unwrap_err();
        assert!(error.is(Why::Full) && error.to_string().contains(expected), "{error}");
    };
    full(keeper.store("more", &[("a", file.as_fd())]), "256 guests");
    assert_eq!(keeper.list().unwrap().len(), MAX_GUESTS);
    let names: Vec<_> = (0..60).map(|number| format!("n{number}")).collect();
    let many: Vec<_> = names.iter().map(|name| (name.as_str(), file.as_fd())).collect();
    full(keeper.add("guest-0", &many), "--max-files");
    keeper.remove("guest-1").unwrap();
    keeper.store("guest-1", &[("a", file.as_fd())]).unwrap();
}

#[test]
fn too_many_clients_are_told_so() {
    let daemon = Daemon::start(&[]);
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| daemon.client()).collect();
    let error = Keeper::connect(&daemon.path, "one too many").unwrap_err();
    assert!(error.is(Why::Full), "{error}");
    works(&mut clients[0]);
    drop(clients.pop());
    // The keeper may hear of the end after it has heard of the next.
    until("there is room for a client", || Keeper::connect(&daemon.path, "next").is_ok());
}
