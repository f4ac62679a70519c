//! One destination gets the memory of files.

use std::fs::{self, File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use afterimage::{Checksums, DestinationEvent, Endpoint, Listener, Plaintext};
use nix::sys::signal::Signal;

use crate::support::{PAGE, Server, Target, inherit_as_3, pattern, sha256};
use std::process::Command;

const PAGES: u64 = 2048;
const LENGTH: u64 = PAGES * PAGE;

struct Ram {
    _directory: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
}

fn ram(seed: u64) -> Ram {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ram");
    let bytes = pattern(PAGES, seed);
    fs::write(&path, &bytes).unwrap();
    Ram { _directory: directory, path, bytes }
}

fn finishes(mut server: Server, regions: &[(u64, u64)], expected: &[&[u8]], checksums: Checksums) {
    let address = server.address();
    let target = Target::start(regions, Endpoint::Connect(address), checksums);
    let fetched = target.finish();
    assert!(fetched.state().is_empty());
    for (got, expected) in fetched.contents.iter().zip(expected) {
        assert_eq!(sha256(got), sha256(expected));
    }
    let (status, report, lines) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")), "{report} {lines:#?}");
    let pages: u64 = regions.iter().map(|(_, length)| length / PAGE).sum();
    assert_eq!(report["pages_total"], pages);
    assert_eq!(report["pages_missing"], 0);
    assert_eq!(report["schema_version"], 1);
    assert_eq!(report["mode"], "migration");
    let events: Vec<_> = report["events"].as_array().unwrap().iter().collect();
    let names: Vec<_> = events.iter().map(|it| it["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["attached", "ready", "given", "running", "finished"]);
}

#[test]
fn a_file_arrives_over_tcp() {
    let ram = ram(1);
    let path = ram.path.to_str().unwrap();
    let server = Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path]);
    finishes(server, &[(0, LENGTH)], &[&ram.bytes], Checksums::Off);
}

#[test]
fn a_file_arrives_over_a_unix_socket_with_checksums_and_streams() {
    let ram = ram(2);
    let socket = format!("unix:{}.socket", ram.path.display());
    let path = ram.path.to_str().unwrap();
    let server = Server::start(&[
        "--listen",
        &socket,
        "--memory",
        path,
        "--checksums",
        "--streams",
        "3",
        "--polling",
        "0s",
    ]);
    finishes(server, &[(0, LENGTH)], &[&ram.bytes], Checksums::On);
}

#[test]
fn a_listening_socket_can_be_inherited() {
    let ram = ram(3);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
    command.args(["--listen", "fd:3", "--memory"]).arg(&ram.path);
    inherit_as_3(&mut command, listener.into());
    let mut server = Server::spawn(command);
    server.line("listening on fd:3");
    let fetched = Target::connect(&[(0, LENGTH)], &address).finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&ram.bytes));
    assert_eq!(server.end().0, 0);
}

#[test]
fn the_server_can_connect_to_a_destination_that_comes_late() {
    let ram = ram(4);
    let path = ram.path.with_file_name("destination.sock");
    let address = format!("unix:{}", path.display());
    let memory = ram.path.to_str().unwrap();
    let mut server = Server::start(&["--connect", &address, "--memory", memory]);
    server.line("connecting to");
    let listener = Listener::bind(&address.parse().unwrap(), Plaintext::LoopbackOnly).unwrap();
    let target = Target::start(&[(0, LENGTH)], Endpoint::Listen(listener), Checksums::Off);
    assert_eq!(sha256(&target.finish().contents[0]), sha256(&ram.bytes));
    assert_eq!(server.end().0, 0);
}

#[test]
fn pieces_lie_where_a_layout_says() {
    let ram = ram(5);
    let layout = ram.path.with_file_name("layout.json");
    let text = format!(
        r#"{{"regions": [
            {{"guest_address": "0x100000000", "length": {half}, "file": "ram", "offset": 0}},
            {{"guest_address": 0, "length": {half}, "file": "ram", "offset": {half}}}
        ]}}"#,
        half = LENGTH / 2
    );
    fs::write(&layout, text).unwrap();
    let layout = layout.to_str().unwrap();
    let server = Server::start(&["--listen", "tcp:127.0.0.1:0", "--layout", layout]);
    let (first, second) = ram.bytes.split_at(ram.bytes.len() / 2);
    let regions = [(0, LENGTH / 2), (4 << 30, LENGTH / 2)];
    finishes(server, &regions, &[second, first], Checksums::Off);
}

#[test]
fn several_files_follow_each_other() {
    let (one, two) = (ram(6), ram(7));
    let piece = format!("{},4K,1M", two.path.display());
    let path = one.path.to_str().unwrap();
    let server =
        Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path, "--memory", &piece]);
    let regions = [(0, LENGTH), (LENGTH, 1 << 20)];
    finishes(server, &regions, &[&one.bytes, &two.bytes[4096..][..1 << 20]], Checksums::Off);
}

#[test]
fn holes_arrive_as_zeros_and_are_allocated_nowhere() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("sparse");
    let file = File::create(&path).unwrap();
    let length = 64 << 20;
    file.set_len(length).unwrap();
    let content = pattern(4, 8);
    for at in [0, 20 << 20, length - 4 * PAGE] {
        file.write_all_at(&content, at).unwrap();
    }
    let blocks = file.metadata().unwrap().blocks();
    let mut server =
        Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path.to_str().unwrap()]);
    let fetched = Target::connect(&[(0, length)], &server.address()).finish();
    let mut expected = vec![0; length as usize];
    for at in [0, 20 << 20, length as usize - content.len()] {
        expected[at..][..content.len()].copy_from_slice(&content);
    }
    assert_eq!(sha256(&fetched.contents[0]), sha256(&expected));
    let allocated = fetched.files[0].metadata().unwrap().blocks();
    // The guest touched three pages; the one in the middle is a hole.
    assert!(allocated <= blocks + 8, "{allocated} blocks at the destination, {blocks} in the file");
    assert_eq!(file.metadata().unwrap().blocks(), blocks, "reading allocates nothing");
    let (status, report, _) = server.end();
    assert_eq!(status, 0);
    assert!(report["pages_zero"].as_u64().unwrap() > 16_000, "{report}");
}

#[test]
fn pages_that_were_cut_off_are_told_and_the_rest_arrives() {
    let ram = ram(9);
    let path = ram.path.to_str().unwrap();
    let mut server = Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path]);
    let address = server.address();
    let file = OpenOptions::new().write(true).open(&ram.path).unwrap();
    file.set_len(LENGTH / 2).unwrap();
    let mut target = Target::start_quietly(&[(0, LENGTH)], &address);
    let mut lost = 0;
    while lost < PAGES / 2 {
        if let DestinationEvent::Unreadable { first_page, pages } = target.next() {
            assert!(first_page >= PAGES / 2, "page {first_page} is there");
            lost += pages;
        }
    }
    server.line("some pages cannot be read");
    while target.destination.stats().pages_complete < PAGES / 2 {
        std::thread::yield_now();
    }
    server.signal(Signal::SIGTERM);
    let line = server.line("not stopping");
    assert!(line.contains("of its 2048 pages"), "{line}");
    assert!(server.is_running());
    server.signal(Signal::SIGTERM);
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (4, Some("abandoned")), "{report}");
    assert!(report["pages_unreadable"].as_u64().unwrap() >= PAGES / 2, "{report}");
}

#[test]
fn a_destination_that_breaks_off_and_comes_back_gets_the_rest() {
    // Its own memory dies with it, so that a new one starts anew before the guest ran.
    let ram = ram(10);
    let path = ram.path.to_str().unwrap();
    let mut server = Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path]);
    let address = server.address();
    let mut first = Target::start_quietly(&[(0, LENGTH)], &address);
    first.until_attached();
    drop(first);
    server.line("is away");
    let fetched = Target::connect(&[(0, LENGTH)], &address).finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&ram.bytes));
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_signal_before_the_guest_is_given_away_ends_it_at_once() {
    let ram = ram(11);
    let path = ram.path.to_str().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path]);
        server.line("listening on");
        server.signal(signal);
        let (status, report, lines) = server.end();
        assert_eq!((status, report["outcome"].as_str()), (3, Some("stopped")), "{report}");
        assert!(lines.iter().any(|line| line.contains("nothing is lost")), "{lines:#?}");
    }
}
#[test]
fn memory_that_does_not_fit_the_destination_is_told() {
    let ram = ram(12);
    let path = ram.path.to_str().unwrap();
    let mut server = Server::start(&["--listen", "tcp:127.0.0.1:0", "--memory", path]);
    let target = Target::connect(&[(0, 2 * LENGTH)], &server.address());
    let line = server.line("refuses this source");
    assert!(line.contains("0x800000 bytes at the source"), "{line}");
    drop(target);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, 3);
}
