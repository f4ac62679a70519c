//! A place at a keeper that hangs up at the wrong moment.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::super::packet;
use super::super::words::{Reply, Request};
use super::*;

/// A keeper that takes these connections one after the other, and hangs up on each after so many
/// requests, the last of which it does not answer. Returns all that it was asked.
fn keeper(path: &Path, connections: &'static [usize]) -> JoinHandle<Vec<Request>> {
    let listener = packet::listen(path).unwrap();
    thread::spawn(move || {
        let mut asked = Vec::new();
        for requests in connections {
            let client = next_of(&listener);
            for left in (0..*requests).rev() {
                let packet = packet::receive(&client).unwrap().expect("another request");
                asked.push(serde_json::from_slice(&packet.bytes).unwrap());
                if left > 0 {
                    packet::send(&client, &Reply::Done, &[]).unwrap();
                }
            }
        }
        asked
    })
}

/// The next connection, which waits.
fn next_of(listener: &OwnedFd) -> OwnedFd {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::from(60_000_u16);
    assert_eq!(poll(&mut fds, limit), Ok(1), "nobody connects");
    let client = packet::accept(listener.as_fd()).unwrap();
    fcntl(&client, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    client
}

#[test]
fn a_guest_that_is_there_in_doubt_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keeper");
    // Greeted; greeted, put, committed; greeted, removed.
    let keeper = keeper(&path, &[2, 3, 2]);
    let mut place = Place::connect(&path, "vm7", "a test").unwrap();
    assert!(place.fetch().is_err());
    let file = File::open("/dev/null").unwrap().into();
    let set = vec![NamedFile { name: "a".to_owned(), file }];
    place.store(set, &[], |_| {}).unwrap();
    assert!(!place.holds());
    place.remove(|_| {});
    let asked = keeper.join().unwrap();
    assert_eq!(asked.last(), Some(&Request::Remove { guest: "vm7".to_owned() }), "{asked:?}");
}
