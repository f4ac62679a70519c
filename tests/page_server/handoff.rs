//! A VMM hands its guest over, and dies.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Child;

use afterimage::{DestinationEvent, GuestAddress, StateSection};
use afterimage_tools::handoff::{GiveError, Piece, give};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

use crate::support::{PAGE, Server, Target, argument, line_of, memfd, pattern, role, sha256};

const PAGES: u64 = 1024;
const LENGTH: u64 = PAGES * PAGE;
const HIGH: u64 = 4 << 30;

fn state() -> Vec<StateSection> {
    let section = |name: &str, bytes| StateSection { name: name.into(), version: 2, bytes };
    vec![
        section("cpu0", vec![1, 2, 3]),
        section("disk", vec![9; 2 << 20]),
        section("empty", vec![]),
    ]
}

fn filled(seed: u64) -> File {
    let file = memfd(LENGTH);
    file.write_all_at(&pattern(PAGES, seed), 0).unwrap();
    file
}

/// The part of a VMM.
#[test]
fn role_vmm() {
    let Some(path) = argument() else { return };
    let (low, high) = (filled(30), filled(31));
    fcntl(&low, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let piece =
        |at, file| Piece { guest_address: GuestAddress(at), length: LENGTH, file, offset: 0 };
    let pieces = [piece(0, low.as_fd()), piece(HIGH, high.as_fd())];
    let taken = give(Path::new(&path), "a test's VMM", &pieces, &state()).unwrap();
    println!("\ntaken as {}", taken.session);
    loop {
        std::thread::park();
    }
}

fn vmm(path: &str) -> Child {
    role("handoff::role_vmm", path).spawn().unwrap()
}

fn server(directory: &Path) -> (Server, String) {
    let path = directory.join("handoff.sock").to_str().unwrap().to_owned();
    let mut server =
        Server::start(&["--listen", "tcp:127.0.0.1:0", "--handoff", &format!("unix:{path}")]);
    server.line("can hand its guest over");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others could hand a guest over");
    (server, path)
}

#[test]
fn a_vmm_killed_right_after_it_handed_over_is_not_missed() {
    let directory = tempfile::tempdir().unwrap();
    let (mut server, path) = server(directory.path());
    let address = server.address();
    let mut vmm = vmm(&path);
    let session = line_of(&mut vmm, "taken as ");
    // Before a page is sent: there is no destination yet.
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let warning = server.line("warning");
    assert!(warning.contains("descriptor 1 can still be cut short"), "{warning}");
    server.line("has handed its guest over");
    let fetched = Target::connect(&[(0, LENGTH), (HIGH, LENGTH)], &address).finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&pattern(PAGES, 30)));
    assert_eq!(sha256(&fetched.contents[1]), sha256(&pattern(PAGES, 31)));
    assert_eq!(fetched.state(), state());
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")), "{report}");
    assert_eq!(report["handoff"]["giver"], "a test's VMM");
    assert_eq!(report["handoff"]["giver_pid"], vmm.id());
    assert_eq!(report["handoff"]["state_bytes"], 3 + (2 << 20));
    assert_eq!(report["handoff"]["warnings"].as_array().unwrap().len(), 1);
    assert!(session.ends_with(report["session"].as_str().unwrap()), "{session} {report}");
    assert!(!Path::new(&path).exists(), "the socket is removed");
}

#[test]
fn a_destination_that_waits_already_is_served_when_a_guest_comes() {
    let directory = tempfile::tempdir().unwrap();
    let (mut server, path) = server(directory.path());
    let target = Target::connect(&[(0, LENGTH), (HIGH, LENGTH)], &server.address());
    let mut vmm = vmm(&path);
    line_of(&mut vmm, "taken as ");
    let fetched = target.finish();
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    assert_eq!(sha256(&fetched.contents[1]), sha256(&pattern(PAGES, 31)));
    assert_eq!(server.end().0, 0);
}

#[test]
fn what_is_no_guest_is_refused_and_the_next_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let (mut server, path) = server(directory.path());
    let address = server.address();
    drop(UnixStream::connect(&path).unwrap());
    server.line("a hand-over failed");
    let file = filled(32);
    let piece =
        Piece { guest_address: GuestAddress(0), length: LENGTH, file: file.as_fd(), offset: 0 };
    // Two regions at the same guest address.
    let error = give(Path::new(&path), "wrong", &[piece, piece], &[]).unwrap_err();
    assert!(
        matches!(&error, GiveError::Refused { reason } if reason.contains("overlap")),
        "{error}"
    );
    server.line("a hand-over failed");
    let taken = give(Path::new(&path), "right", &[piece], &[]).unwrap();
    let fetched = Target::connect(&[(0, LENGTH)], &address).finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&pattern(PAGES, 32)));
    let (status, report, _) = server.end();
    assert_eq!((status, report["session"].as_str()), (0, Some(&*taken.session)));
}

#[test]
fn the_only_copy_of_a_guest_is_not_dropped_at_the_first_signal() {
    let directory = tempfile::tempdir().unwrap();
    let (mut server, path) = server(directory.path());
    let mut vmm = vmm(&path);
    line_of(&mut vmm, "taken as ");
    server.line("has handed its guest over");
    server.signal(Signal::SIGTERM);
    server.line("the only copy");
    assert!(server.is_running());
    server.signal(Signal::SIGINT);
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (4, Some("abandoned")), "{report}");
    assert_eq!(report["pages_missing"], 2 * PAGES);
    vmm.kill().unwrap();
    vmm.wait().unwrap();
}

/// Its VMM has gone: nobody but another destination could run it.
#[test]
fn the_only_copy_of_a_guest_that_was_refused_is_had_by_the_next_destination() {
    let directory = tempfile::tempdir().unwrap();
    let (mut server, path) = server(directory.path());
    let address = server.address();
    let mut vmm = vmm(&path);
    line_of(&mut vmm, "taken as ");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let regions = [(0, LENGTH), (HIGH, LENGTH)];
    let mut first = Target::connect(&regions, &address);
    first.until_attached();
    first.refuse();
    server.line("will not run the guest");
    first.until(|event| matches!(event, DestinationEvent::Ended(_)));
    assert!(server.is_running());
    let fetched = Target::connect(&regions, &address).finish();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&pattern(PAGES, 30)));
    assert_eq!(sha256(&fetched.contents[1]), sha256(&pattern(PAGES, 31)));
    assert_eq!(fetched.state(), state());
    assert!(!first.said.contains(&DestinationEvent::Run));
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_signal_before_a_guest_comes_ends_it_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (server, path) = server(directory.path());
    server.signal(Signal::SIGTERM);
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (3, Some("stopped")), "{report}");
    let file = filled(33);
    let piece =
        Piece { guest_address: GuestAddress(0), length: LENGTH, file: file.as_fd(), offset: 0 };
    let error = give(Path::new(&path), "late", &[piece], &[]).unwrap_err();
    assert!(matches!(error, GiveError::Connect { .. }), "{error}");
}

#[test]
fn huge_pages_are_handed_over() {
    const HUGE: u64 = 2 << 20;
    let Some(_pages) = afterimage_tools::require::hugetlb(4) else { return };
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create(c"huge", flags).unwrap());
    file.set_len(3 * HUGE).unwrap();
    let content = pattern(HUGE / PAGE, 34);
    let map = memmap2::MmapOptions::new().len(3 * HUGE as usize).map_raw(&file).unwrap();
    for at in [0, 2 * HUGE as usize] {
        // SAFETY: inside the mapping, which nobody else uses.
        unsafe {
            map.as_mut_ptr().add(at).copy_from_nonoverlapping(content.as_ptr(), content.len());
        }
    }
    drop(map);
    let directory = tempfile::tempdir().unwrap();
    let (mut server, path) = server(directory.path());
    let address = server.address();
    let piece =
        Piece { guest_address: GuestAddress(0), length: 3 * HUGE, file: file.as_fd(), offset: 0 };
    give(Path::new(&path), "huge", &[piece], &[]).unwrap();
    let fetched = Target::start_quietly(&[(0, 3 * HUGE)], &address).finish();
    let expected = [&content[..], &vec![0; HUGE as usize], &content].concat();
    assert_eq!(sha256(&fetched.contents[0]), sha256(&expected));
    assert_eq!(server.end().0, 0);
}
