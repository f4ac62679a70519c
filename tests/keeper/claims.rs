//! What is stored outlives who stored it, and belongs to one at a time.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use afterimage_tools::keeper::{Keeper, Why};

use crate::support::{Daemon, argument, content, memfd, role, until_gone, until_said};

/// Stores a guest and waits to be killed.
#[test]
fn role_client() {
    let Some(path) = argument() else { return };
    let mut keeper = Keeper::connect(&path, "a child").unwrap();
    let files: Vec<File> = (0..150_u8).map(|index| memfd(&[index, 7])).collect();
    let names: Vec<String> = (0..150).map(|index| format!("memory.{index}")).collect();
    let set: Vec<(&str, BorrowedFd<'_>)> =
        names.iter().map(String::as_str).zip(files.iter().map(AsFd::as_fd)).collect();
    keeper.store("web1", &set).unwrap();
    println!("\nstored");
    loop {
        std::thread::park();
    }
}

#[test]
fn a_set_outlives_the_process_that_stored_it() {
    let daemon = Daemon::start(&[]);
    let mut child = role("claims::role_client", &daemon.path);
    until_said(&mut child, "stored");
    let mut keeper = daemon.client();
    let error = keeper.claim("web1").unwrap_err();
    assert!(error.is(Why::Claimed), "{error}");
    let holder = format!("in use by process {}", child.id());
    assert!(error.to_string().contains(&holder), "{error}");
    for refused in [keeper.fetch("web1").map(drop), keeper.remove("web1")] {
        assert!(refused.unwrap_err().is(Why::Claimed));
    }
    assert_eq!(keeper.list().unwrap()[0].claimed_by, Some(child.id() as i32));
    child.kill().unwrap();
    child.wait().unwrap();
    // No wait: whoever knows that it is dead can have it.
    keeper.claim("web1").unwrap();
    let files = keeper.fetch("web1").unwrap();
    assert_eq!(files.len(), 150);
    for (index, file) in files.iter().enumerate() {
        assert_eq!(file.name, format!("memory.{index}"));
        assert_eq!(content(file), [index as u8, 7]);
    }
    let listed = &keeper.list().unwrap()[0];
    assert_eq!((listed.stored_by, listed.files), (child.id() as i32, 150));
}

/// Claims again and again. A process of its own: where other threads start children, those
/// have its connections too for a moment.
#[test]
fn role_successors() {
    let Some(path) = argument() else { return };
    let connect = || Keeper::connect(&path, "a child").unwrap();
    let file = memfd(b"x");
    connect().store("web1", &[("a", file.as_fd())]).unwrap();
    for _ in 0..300 {
        // The one before was dropped just now.
        let mut keeper = connect();
        keeper.claim("web1").unwrap();
        assert_eq!(keeper.fetch("web1").unwrap().len(), 1);
    }
}

#[test]
fn claims_pass_from_each_to_the_next_without_a_wait() {
    let daemon = Daemon::start(&[]);
    let child = role("claims::role_successors", &daemon.path);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_set_is_changed_by_its_holder() {
    let daemon = Daemon::start(&[]);
    let (mut holder, mut other) = (daemon.client(), daemon.client());
    let (one, two) = (memfd(b"one"), memfd(b"two"));
    holder.store("web1", &[("a", one.as_fd()), ("b", one.as_fd())]).unwrap();
    holder.add("web1", &[("b", two.as_fd()), ("c", two.as_fd())]).unwrap();
    holder.let_go("web1", &["a", "z"]).unwrap();
    let error = other.add("web1", &[("d", two.as_fd())]).unwrap_err();
    assert!(error.is(Why::Claimed), "{error}");
    let error = other.store("web1", &[("d", two.as_fd())]).unwrap_err();
    assert!(error.is(Why::Claimed), "{error}");
    let files = holder.fetch("web1").unwrap();
    let found: Vec<_> = files.iter().map(|it| (it.name.as_str(), content(it))).collect();
    assert_eq!(found, [("b", b"two".to_vec()), ("c", b"two".to_vec())]);
    holder.store("web1", &[("new", one.as_fd())]).unwrap();
    holder.release("web1").unwrap();
    // Held, but nobody's: it is not replaced by mistake.
    let error = other.store("web1", &[("d", two.as_fd())]).unwrap_err();
    assert!(error.is(Why::Claimed), "{error}");
    other.claim("web1").unwrap();
    assert_eq!(other.fetch("web1").unwrap()[0].name, "new");
    other.remove("web1").unwrap();
    assert!(holder.claim("web1").unwrap_err().is(Why::NotThere));
}

#[test]
fn what_is_let_go_is_closed() {
    let daemon = Daemon::start(&[]);
    let mut keeper = daemon.client();
    keeper.list().unwrap();
    let before = daemon.open_files();
    let file = memfd(b"x");
    for _ in 0..3 {
        keeper.store("web1", &[("a", file.as_fd()), ("b", file.as_fd())]).unwrap();
    }
    daemon.until_open_files(before + 2);
    keeper.let_go("web1", &["a"]).unwrap();
    daemon.until_open_files(before + 1);
    keeper.remove("web1").unwrap();
    keeper.store("web1", &[("a", file.as_fd()), ("a", file.as_fd())]).unwrap_err();
    daemon.until_open_files(before);
}

#[test]
fn clients_notice_that_the_keeper_is_gone_and_store_again() {
    let directory = tempfile::tempdir().unwrap();
    let file = memfd(b"x");
    let path = directory.path().join("keeper.sock");
    let first = Daemon::start_at(&path, &[]);
    let mut keeper = first.client();
    keeper.store("web1", &[("a", file.as_fd())]).unwrap();
    first.kill();
    until_gone(&keeper);
    let error = keeper.list().unwrap_err().to_string();
    assert!(error.contains("is gone"), "{error}");
    let error = Keeper::connect(&path, "a test").unwrap_err().to_string();
    assert!(error.contains("start afterimage-keeper --listen unix:"), "{error}");
    // In the place of the socket that the dead one left.
    let second = Daemon::start_at(&path, &[]);
    let mut keeper = second.client();
    assert!(keeper.list().unwrap().is_empty());
    keeper.store("web1", &[("a", file.as_fd())]).unwrap();
    assert_eq!(keeper.fetch("web1").unwrap().len(), 1);
}
