//! A guest as a set.

use std::os::fd::AsFd;

use afterimage::{GuestAddress, SessionId, StateSection};
use afterimage_tools::handoff::Piece;
use afterimage_tools::keeper::{KeptGuest, Why};

use crate::support::{Daemon, memfd};

#[test]
fn a_guest_is_fetched_as_it_was_stored() {
    let daemon = Daemon::start(&[]);
    let file = memfd(&[5; 16384]);
    let session = SessionId([0xab; 16]);
    let piece = |at, offset| Piece {
        guest_address: GuestAddress(at),
        length: 8192,
        file: file.as_fd(),
        offset,
    };
    let section = |name: &str, bytes| StateSection { name: name.into(), version: 3, bytes };
    let sections =
        [section("cpu", vec![1, 2]), section("none", vec![]), section("disk", vec![9; 1 << 20])];
    let pieces = [piece(0, 8192), piece(1 << 32, 0)];
    let mut vmm = daemon.client();
    KeptGuest::store(&mut vmm, "web1", session, "a VMM", &pieces, &sections).unwrap();
    let mut next = daemon.client();
    let error = KeptGuest::fetch(&mut next, "web1").unwrap_err().to_string();
    assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
    vmm.release("web1").unwrap();
    let guest = KeptGuest::fetch(&mut next, "web1").unwrap();
    assert_eq!((guest.session, guest.giver.name.as_str()), (session, "a VMM"));
    assert_eq!(guest.sections, sections);
    let regions: Vec<_> =
        guest.regions.iter().map(|it| (it.guest_address.0, it.length, it.offset)).collect();
    assert_eq!(regions, [(0, 8192, 8192), (1 << 32, 8192, 0)]);
}

#[test]
fn what_is_no_guest_is_told() {
    let daemon = Daemon::start(&[]);
    let mut keeper = daemon.client();
    let error = KeptGuest::fetch(&mut keeper, "none").unwrap_err();
    assert!(error.to_string().contains("no guest \"none\" is held"), "{error}");
    let file = memfd(b"{}\n");
    for names in [&["memory.0"][..], &["guest"], &["guest", "memory.0"]] {
        let set: Vec<_> = names.iter().map(|name| (*name, file.as_fd())).collect();
        keeper.store("odd", &set).unwrap();
        let error = KeptGuest::fetch(&mut keeper, "odd").unwrap_err().to_string();
        assert!(error.contains("is no guest") && error.contains("remove it"), "{error}");
    }
    assert!(!keeper.claim("none").unwrap_err().is(Why::Claimed));
}
