//! Many destinations get the same memory.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::thread;

use afterimage::{Address, DestinationEvent};
use afterimage_protocol::wire::{
    Capabilities, Channel, GREETING_PREFIX, Greeting, Hello, Incarnation, Role, SessionId, Stamp,
};
use nix::sys::signal::Signal;

use crate::support::{PAGE, Server, Target, argument, pattern, role, sha256};

const PAGES: u64 = 2048;

struct Image {
    _directory: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
}

fn image(pages: u64, seed: u64) -> Image {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let bytes = pattern(pages, seed);
    fs::write(&path, &bytes).unwrap();
    Image { _directory: directory, path, bytes }
}

fn serve(image: &Image, more: &[&str]) -> (Server, Address) {
    let memory = image.path.to_str().unwrap();
    let mut arguments = vec!["--snapshot", "--listen", "tcp:127.0.0.1:0", "--memory", memory];
    arguments.extend(more);
    let mut server = Server::start(&arguments);
    let address = server.address();
    (server, address)
}

fn fetch(pages: u64, address: &Address) -> String {
    sha256(&Target::of_snapshot(&[(0, pages * PAGE)], address).finish().contents[0])
}

#[test]
fn three_destinations_at_once_and_a_late_one_get_everything() {
    let image = image(PAGES, 20);
    let expected = sha256(&image.bytes);
    let (mut server, address) = serve(&image, &["--streams", "2"]);
    thread::scope(|scope| {
        let all: Vec<_> = (0..3).map(|_| scope.spawn(|| fetch(PAGES, &address))).collect();
        for one in all {
            assert_eq!(one.join().unwrap(), expected);
        }
    });
    assert_eq!(fetch(PAGES, &address), expected);
    for _ in 0..4 {
        server.line("has every page");
    }
    server.signal(Signal::SIGTERM);
    let (status, report, lines) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")), "{report} {lines:#?}");
    let destinations = report["destinations"].as_array().unwrap();
    assert_eq!(destinations.len(), 4);
    for destination in destinations {
        assert_eq!(destination["state"], "done");
        assert_eq!(destination["pages_missing"], 0);
    }
    assert_eq!(report["pages_total"], 4 * PAGES);
}

/// Enough that a destination dies before all of it has arrived.
const MANY: u64 = 32 << 10;

/// The part of a destination that dies with its first page.
#[test]
fn role_dying_destination() {
    let Some(address) = argument() else { return };
    let target = Target::of_snapshot(&[(0, MANY * PAGE)], &address.parse().unwrap());
    while target.destination.stats().pages_complete == 0 {
        thread::yield_now();
    }
    nix::sys::signal::raise(Signal::SIGKILL).unwrap();
}

#[test]
fn a_destination_that_dies_in_the_middle_harms_nobody() {
    let image = image(MANY, 21);
    let (mut server, address) = serve(&image, &["--checksums"]);
    let mut child = role("snapshot::role_dying_destination", &address.to_string()).spawn().unwrap();
    assert!(!child.wait().unwrap().success());
    server.line("is away");
    assert!(server.is_running());
    assert_eq!(fetch(MANY, &address), sha256(&image.bytes));
    server.line("has every page");
    server.signal(Signal::SIGTERM);
    let line = server.line("not stopping");
    assert!(line.contains("1 (1 of them away)"), "{line}");
    server.signal(Signal::SIGTERM);
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (4, Some("abandoned")), "{report}");
}

/// A server that listens where the one did that was killed.
fn serve_again(image: &Image, address: &Address) -> Server {
    let (memory, address) = (image.path.to_str().unwrap(), address.to_string());
    let mut server = Server::start(&["--snapshot", "--listen", &address, "--memory", memory]);
    server.address();
    server
}

/// One that has some pages of an image whose server was killed.
fn left_behind(image: &Image) -> (Target, Address) {
    let (server, address) = serve(image, &["--bandwidth", "on-request"]);
    let mut target = Target::of_snapshot(&[(0, PAGES * PAGE)], &address);
    target.until(|event| *event == DestinationEvent::Run);
    assert!(target.destination.stats().pages_complete >= 3, "it has touched some");
    // By SIGKILL.
    drop(server);
    target.until(|event| *event == DestinationEvent::Disconnected);
    (target, address)
}

#[test]
fn who_lacks_pages_of_a_server_that_was_killed_goes_on_with_the_next() {
    let image = image(PAGES, 23);
    let (target, address) = left_behind(&image);
    let server = serve_again(&image, &address);
    let fetched = target.finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&image.bytes));
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, 0);
}

#[test]
fn nobody_goes_on_with_an_image_that_was_written_since() {
    let image = image(PAGES, 24);
    let (mut target, address) = left_behind(&image);
    fs::write(&image.path, pattern(PAGES, 25)).unwrap();
    let server = serve_again(&image, &address);
    let mut reason = String::new();
    while reason.is_empty() {
        match target.next() {
            DestinationEvent::TurnedAway(why) | DestinationEvent::Failed(why) => reason = why,
            event => assert_ne!(event, DestinationEvent::Finished),
        }
    }
    assert!(reason.contains("is not served here"), "{reason}");
    assert!(target.destination.stats().pages_complete < PAGES);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, 0);
}

/// A destination that says hello and then nothing; and what it is answered.
fn stranger(address: &Address, name: u8) -> (TcpStream, Greeting) {
    let Address::Tcp(host) = address else { panic!("{address} is not TCP") };
    let mut socket = TcpStream::connect(host).unwrap();
    let hello = Hello {
        role: Role::Destination,
        channel: Channel::Control,
        stamp: Stamp::default(),
        capabilities: Capabilities::default(),
        session: SessionId::UNKNOWN,
        incarnation: Incarnation([name; 16]),
    };
    socket.write_all(&Greeting::Hello(hello).encode()).unwrap();
    let mut prefix = [0; GREETING_PREFIX];
    socket.read_exact(&mut prefix).unwrap();
    let announced = Greeting::announced(&prefix).unwrap();
    let mut body = vec![0; announced.length()];
    socket.read_exact(&mut body).unwrap();
    (socket, Greeting::decode(announced, &body).unwrap())
}

#[test]
fn a_destination_too_many_is_refused_until_there_is_room() {
    let image = image(PAGES, 22);
    // The strangers say nothing more, and must not be taken for dead.
    let patient = ["--max-destinations", "2", "--heartbeat", "10s", "--silence", "60s"];
    let (mut server, address) = serve(&image, &patient);
    let (first, answer) = stranger(&address, 1);
    assert!(matches!(answer, Greeting::Hello(_)), "{answer:?}");
    let (_second, answer) = stranger(&address, 2);
    assert!(matches!(answer, Greeting::Hello(_)), "{answer:?}");
    let (_, answer) = stranger(&address, 3);
    let Greeting::Refuse(refusal) = answer else { panic!("{answer:?}") };
    assert!(refusal.reason.contains("2 destinations"), "{refusal}");
    drop(first);
    assert_eq!(fetch(PAGES, &address), sha256(&image.bytes));
    server.line("has every page");
    server.signal(Signal::SIGINT);
    assert_eq!(server.end().0, 0);
}
