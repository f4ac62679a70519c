//! The protocol between two ends of a socket pair and of a path.

use super::give::Piece;
use super::*;
use afterimage::{GuestAddress, StateSection};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

const LENGTH: u64 = 1 << 20;

fn memfd(length: u64) -> File {
    let file = File::from(memfd_create(c"guest", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(length).unwrap();
    file
}

fn section(name: &str, bytes: usize) -> StateSection {
    StateSection { name: name.to_owned(), version: 3, bytes: vec![7; bytes] }
}

/// Gives to a listener on a path; `with` is what the receiver does.
fn hand_over<R: Send>(
    pieces: &[Piece<'_>],
    state: &[StateSection],
    with: impl FnOnce(UnixStream) -> R + Send,
) -> (Result<Taken, GiveError>, R) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("handoff");
    let listener = UnixListener::bind(&path).unwrap();
    thread::scope(|scope| {
        let receiver = scope.spawn(move || with(listener.accept().unwrap().0));
        let given = give(&path, "test", pieces, state);
        (given, receiver.join().unwrap())
    })
}

#[test]
fn what_is_given_arrives_whole() {
    // More files than one message carries, a file in two regions, a section of many pieces.
    let files: Vec<File> = (0..150).map(|_| memfd(LENGTH)).collect();
    let mut pieces: Vec<Piece<'_>> = files
        .iter()
        .enumerate()
        .map(|(index, file)| Piece {
            guest_address: GuestAddress(index as u64 * LENGTH),
            length: LENGTH,
            file: file.as_fd(),
            offset: 0,
        })
        .collect();
    let last = pieces.last_mut().unwrap();
    last.length = LENGTH / 2;
    let last = Piece { offset: LENGTH / 2, guest_address: GuestAddress(1 << 40), ..*last };
    pieces.push(last);
    for (index, file) in files.iter().enumerate() {
        file.write_all_at(&[index as u8 + 1], 0).unwrap();
    }
    let state = [section("cpu", 5), section("nothing", 0), section("much", 3_500_000)];
    let (given, received) = hand_over(&pieces, &state, |socket| {
        let mut offer = receive(socket).unwrap();
        let regions = std::mem::take(&mut offer.regions);
        assert_eq!(offer.warnings.len(), 150, "none is sealed");
        (regions, offer.take("the session").unwrap())
    });
    assert_eq!(given.unwrap().session, "the session");
    let (regions, handover) = received;
    assert_eq!(handover.sections, state);
    assert_eq!(handover.giver, Giver { name: "test".into(), pid: std::process::id() as i32 });
    assert_eq!(regions.len(), 151);
    for (index, (region, piece)) in regions.iter().zip(&pieces).enumerate() {
        assert_eq!(
            (region.guest_address, region.length, region.offset),
            (piece.guest_address, piece.length, piece.offset)
        );
        let file = File::from(region.file.try_clone().unwrap());
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(usize::from(byte[0]), index.min(149) + 1);
        let original = &files[index.min(149)];
        assert_eq!(file.metadata().unwrap().ino(), original.metadata().unwrap().ino());
        let flags = fcntl(&file, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, nix::libc::FD_CLOEXEC, "children get no guest memory");
    }
}

#[test]
fn a_sealed_file_raises_no_warning() {
    let file = memfd(LENGTH);
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let piece =
        Piece { guest_address: GuestAddress(0), length: LENGTH, file: file.as_fd(), offset: 0 };
    let (given, warnings) = hand_over(&[piece], &[], |socket| {
        let offer = receive(socket).unwrap();
        let warnings = offer.warnings.clone();
        offer.refuse("not today");
        warnings
    });
    assert!(warnings.is_empty(), "{warnings:?}");
    let error = given.unwrap_err();
    assert!(matches!(&error, GiveError::Refused { reason } if reason == "not today"), "{error}");
}

#[test]
fn a_region_beyond_its_file_is_refused_on_both_sides() {
    let file = memfd(LENGTH);
    let (read, write) = nix::unistd::pipe().unwrap();
    let piece =
        Piece { guest_address: GuestAddress(0), length: LENGTH, file: file.as_fd(), offset: 0 };
    for (piece, expected) in [
        (Piece { offset: 4096, ..piece }, "needs 1048576 bytes from offset 4096"),
        (Piece { length: 5, ..piece }, "multiples of 4096"),
        (Piece { length: 0, ..piece }, "multiples of 4096"),
        (Piece { offset: !4095, ..piece }, "its file has 1048576 bytes"),
        (Piece { file: read.as_fd(), ..piece }, "is no file"),
    ] {
        let (given, received) = hand_over(&[piece], &[], |socket| receive(socket).map(drop));
        let given = given.unwrap_err().to_string();
        let received = received.unwrap_err().to_string();
        assert!(received.contains(expected), "{received}");
        assert!(given.contains(&received), "{given}");
    }
    drop(write);
    let (given, received) = hand_over(&[], &[], |socket| receive(socket).map(drop));
    assert!(given.unwrap_err().to_string().contains("no memory"));
    received.unwrap_err();
}

#[test]
fn more_than_is_allowed_is_not_even_offered() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = vec![0; MAX_STATE_BYTES as usize + 1];
    let state = [StateSection { name: "too much".into(), version: 1, bytes }];
    let error = give(&directory.path().join("none"), "test", &[], &state).unwrap_err();
    assert!(matches!(error, GiveError::TooMuch { .. }), "{error}");
    let error = give(&directory.path().join("none"), "test", &[], &[]).unwrap_err();
    assert!(error.to_string().contains("--handoff unix:"), "{error}");
}

#[test]
fn nonsense_is_refused_before_anything_is_allocated() {
    let with_header = |version: u32, length: u32| {
        let mut bytes = framing::MAGIC.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes
    };
    let offer = |json: &str| {
        let mut bytes = with_header(VERSION, json.len() as u32);
        bytes.extend(json.bytes());
        bytes
    };
    let giver = r#""giver":{"name":"x"}"#;
    let region = r#"{"guest_address":0,"length":4096,"file":0,"offset":0}"#;
    let huge = r#"{"name":"s","version":1,"length":18446744073709551615}"#;
    for (bytes, expected) in [
        (b"GET / HTTP/1.1\r\n".to_vec(), "no VMM"),
        (with_header(2, 0), "version 2"),
        (with_header(VERSION, u32::MAX), "4294967295 bytes"),
        (offer("{}"), "not understood"),
        (
            offer(&format!(
                r#"{{{giver},"files":1,"regions":[{region}],"sections":[{huge},{huge}]}}"#
            )),
            "bytes of device state",
        ),
        (
            offer(&format!(r#"{{{giver},"files":9999,"regions":[{region}],"sections":[]}}"#)),
            "9999 files",
        ),
        (
            offer(&format!(r#"{{{giver},"files":0,"regions":[{region}],"sections":[]}}"#)),
            "lies in descriptor 0, 0 came",
        ),
    ] {
        let (mut giver, receiver) = UnixStream::pair().unwrap();
        giver.write_all(&bytes).unwrap();
        let error = receive(receiver).unwrap_err();
        assert!(describe(&error).contains(expected), "{}", describe(&error));
        let mut answer = Vec::new();
        // What it has not read it resets; the answer comes first.
        let _ = giver.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer[4..]).into_owned();
        assert!(answer.contains("refused"), "{answer}");
    }
}

fn describe(error: &ReceiveError) -> String {
    let source = std::error::Error::source(error).map(ToString::to_string);
    format!("{error}: {}", source.unwrap_or_default())
}

#[test]
fn fewer_descriptors_than_announced_are_an_error_and_none_leaks() {
    let (mut giver, receiver) = UnixStream::pair().unwrap();
    let json = r#"{"giver":{"name":"x"},"files":2,"regions":[{"guest_address":0,"length":4096,"file":0,"offset":0}],"sections":[]}"#;
    giver.write_all(&framing::MAGIC).unwrap();
    giver.write_all(&VERSION.to_le_bytes()).unwrap();
    giver.write_all(&(json.len() as u32).to_le_bytes()).unwrap();
    giver.write_all(json.as_bytes()).unwrap();
    let file = memfd(4096);
    framing::send_files(&giver, &[file.as_fd()]).unwrap();
    giver.shutdown(std::net::Shutdown::Write).unwrap();
    let inode = file.metadata().unwrap().ino();
    receive(receiver).unwrap_err();
    let is_leaked = std::fs::read_dir("/proc/self/fd").unwrap().any(|entry| {
        let path = entry.unwrap().path();
        let is_ours = path.file_name().unwrap().to_str() == Some(&file.as_raw_fd().to_string());
        !is_ours && std::fs::metadata(path).is_ok_and(|it| it.ino() == inode && it.len() == 4096)
    });
    assert!(!is_leaked);
}

#[test]
fn a_giver_that_dies_before_it_gives_keeps_the_guest() {
    let file = memfd(LENGTH);
    let (giver, receiver) = UnixStream::pair().unwrap();
    let json = format!(
        r#"{{"giver":{{"name":"x"}},"files":1,"regions":[{{"guest_address":0,"length":{LENGTH},"file":0,"offset":0}}],"sections":[]}}"#
    );
    (&giver).write_all(&framing::MAGIC).unwrap();
    (&giver).write_all(&VERSION.to_le_bytes()).unwrap();
    (&giver).write_all(&(json.len() as u32).to_le_bytes()).unwrap();
    (&giver).write_all(json.as_bytes()).unwrap();
    framing::send_files(&giver, &[file.as_fd()]).unwrap();
    let offer = receive(receiver).unwrap();
    drop(giver);
    offer.take("session").unwrap_err();
}

#[test]
fn a_giver_that_dies_after_it_gave_has_given() {
    let (giver, receiver) = UnixStream::pair().unwrap();
    let offer = Offer {
        regions: Vec::new(),
        sections: vec![section("cpu", 1)],
        giver: Giver::default(),
        warnings: Vec::new(),
        socket: receiver,
        files: Vec::new(),
        placed: Vec::new(),
    };
    let giver = thread::spawn(move || {
        assert_eq!(framing::receive::<Word>(&giver).unwrap(), Word::Ready);
        framing::send(&giver, &Word::Given).unwrap();
    });
    assert_eq!(offer.take("session").unwrap().sections, [section("cpu", 1)]);
    giver.join().unwrap();
}
