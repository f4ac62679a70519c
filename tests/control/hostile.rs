//! Clients that send rubbish, do not read, come in crowds, or die.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{LIMIT, Manager, Server, Target, socket_argument};

#[test]
fn rubbish_is_answered_and_the_connection_goes_on() {
    let server = Server::start(&[]);
    let mut manager = server.begun();
    for rubbish in [&b"hello\n"[..], b"\n", b"\0\xff\xfe\n", b"{\"id\":{}}\n", b"[1,2]\n", b"7\n"] {
        manager.write(rubbish);
        let answer = manager.read().unwrap();
        assert_eq!(answer["error"]["code"], "bad_request", "{answer}");
    }
    manager.write(b"{\"id\":9,\"do\":\"dance\"}\n");
    let answer = manager.read().unwrap();
    assert_eq!((&answer["id"], &answer["error"]["code"]), (&json!(9), &json!("unknown")));
    // Longer than a line may be, in one piece and in many; told once.
    for pieces in [1, 7] {
        for _ in 0..pieces {
            manager.write(&vec![b'x'; 70_000]);
        }
        manager.write(b"\n");
        let answer = manager.read().unwrap();
        assert_eq!(answer["error"]["code"], "bad_request", "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("65536"), "{answer}");
    }
    // Two in one packet, and one in two.
    manager.write(b"{\"id\":1,\"do\":\"query\"}\n{\"id\":2,\"do\":\"query\"}\n{\"id\":3,");
    manager.write(b"\"do\":\"query\"}\n");
    for id in 1..=3 {
        let answer = manager.read().unwrap();
        assert!(answer["id"] == id && answer["ok"]["phase"] == "connecting", "{answer}");
    }
}

#[test]
fn a_client_that_never_stops_talking_does_not_keep_others_waiting() {
    let server = Server::start(&[]);
    let mut manager = server.begun();
    let mut talker = UnixStream::connect(server.socket()).unwrap();
    // It ends when the server does, at the latest with this test.
    let rubbish = vec![b'x'; 65_536];
    let thread = std::thread::spawn(move || while talker.write_all(&rubbish).is_ok() {});
    for _ in 0..200 {
        manager.query();
    }
    drop((manager, server));
    thread.join().unwrap();
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_the_log_says_so() {
    let mut server = Server::start(&[]);
    let mut manager = server.begun();
    let mut slow = UnixStream::connect(server.socket()).unwrap();
    // Two megabytes of answers, for which nobody looks.
    let requests = "{\"id\":1,\"do\":\"query\"}\n".repeat(64);
    let is_dropped = (0..1000).any(|_| slow.write_all(requests.as_bytes()).is_err());
    assert!(is_dropped, "it was listened to without end");
    let line = server.daemon.line("was dropped");
    assert!(line.contains("bytes unread") && line.contains("session="), "{line}");
    assert_eq!(manager.query()["phase"], "connecting");
}

#[test]
fn more_clients_than_there_is_room_for_are_told_so() {
    let server = Server::start(&[]);
    let mut managers: Vec<_> = (0..16).map(|_| server.manager()).collect();
    let mut refused = server.manager();
    assert_eq!(refused.greeting["error"]["code"], "not_now", "{}", refused.greeting);
    assert!(refused.read().is_none(), "and hung up on");
    assert!(managers.iter_mut().all(|manager| manager.query().is_object()));
    // Once one has gone there is room again.
    drop(managers.pop());
    let until = std::time::Instant::now() + LIMIT;
    while server.manager().greeting.get("error").is_some() {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }
}

#[test]
fn killing_the_manager_changes_nothing_and_the_next_one_reads_everything() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    drop(server.begun());
    let mut watcher = Command::new(env!("CARGO_BIN_EXE_afterimage-ctl"))
        .args(["--json", "--socket", &socket_argument(&server.socket()), "watch"])
        .args(["--interval", "50ms"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watcher.stdout.take().unwrap()).lines();
    let state: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(state["phase"], "connecting");
    let target = Target::connect(&server.address);
    target.until(|event| *event == afterimage::DestinationEvent::Run);
    let mut manager = server.manager();
    manager.ok(json!({"do": "set", "bandwidth": "2G"}));
    kill(Pid::from_raw(watcher.id() as i32), Signal::SIGKILL).unwrap();
    watcher.wait().unwrap();
    drop(manager);
    let mut next = server.manager();
    let state = next.query();
    assert_eq!(state["parameters"]["bandwidth"], "2147483648", "{state}");
    assert_eq!(state["session"], next.greeting["session"]);
    target.finish();
    assert_eq!(server.daemon.end().0, 0);
}

#[test]
fn a_client_that_asks_and_closes_its_side_gets_its_answer_and_is_hung_up_on() {
    let server = Server::start(&[]);
    drop(server.begun());
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.write_all(b"{\"id\":1,\"do\":\"capabilities\"}\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "a greeting and an answer: {text}");
    assert!(lines[1]["ok"]["verbs"].is_object(), "{text}");
    assert!(Manager::connect(&server.socket()).query().is_object());
}
