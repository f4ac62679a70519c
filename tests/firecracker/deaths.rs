//! A VM that ends, or is ended.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::Signal;

use crate::memory::Kind;
use crate::support::Daemon;
use crate::vm::{MIB, OF_4_GIB, Snapshot, Vm, ended, give_up};

/// What a VM does before it ends; whether its memory was handed over by then.
const STEPS: &[(&[&str], bool)] = &[
    (&[], false),
    (&["half"], false),
    (&["hand-over"], true),
    (&["hand-over", "check 0 5"], true),
    (&["hand-over", "roam 5 100"], true),
];

/// `end` is that of the handler of a VM that was taken.
fn at_each_step(slow: &[&str], end: (i32, &str), ends: impl Fn(&mut Vm)) {
    for (steps, is_taken) in STEPS {
        let snapshot = Snapshot::new(Kind::Private, &[12 * MIB, 4 * MIB]);
        let mut handler = snapshot.local_handler("uffd", slow);
        let mut vm = snapshot.vmm();
        vm.does(&format!("connect {}", snapshot.path("uffd").display()));
        steps.iter().for_each(|step| vm.does(step));
        if *is_taken {
            handler.line("serving the guest");
        }
        ends(&mut vm);
        if !is_taken {
            // Nothing was taken: another may come.
            handler.line("handed no memory over: it hung up");
            let mut next = snapshot.loaded("uffd");
            next.does("check 0 100");
            next.kill();
        }
        let (status, outcome) = if *is_taken { end } else { (0, "vm_ended") };
        ended(handler, status, outcome);
        if outcome == "failed" {
            assert_eq!(vm.end().signal(), Some(Signal::SIGKILL as i32));
        }
    }
}

#[test]
fn a_server_does_not_wait_for_vms_that_have_ended() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let mut server = snapshot.server(&["--bandwidth", "on-request", "--json"]);
    for _ in 0..3 {
        let handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
        let mut vm = snapshot.loaded("uffd");
        vm.does("check 0 10");
        vm.kill();
        ended(handler, 0, "vm_ended");
        server.line("needs no more");
    }
    server.signal(Signal::SIGTERM);
    let (status, report, said) = server.end();
    assert_eq!(status, 0, "{report} {said:#?}");
}

#[test]
fn a_vm_may_be_killed_at_each_step() {
    at_each_step(&["--bandwidth", "1M"], (0, "vm_ended"), |vm| {
        vm.child.kill().unwrap();
        vm.child.wait().unwrap();
    });
}

#[test]
fn a_vm_that_is_killed_at_once_is_no_failure() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    for _ in 0..10 {
        let handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
        snapshot.loaded("uffd").kill();
        ended(handler, 0, "vm_ended");
    }
}

#[test]
fn a_vm_that_closes_the_connection_and_lives_is_killed_if_pages_are_missing() {
    at_each_step(&["--bandwidth", "on-request"], (1, "failed"), |vm| vm.does("hang-up"));
}

#[test]
fn a_vm_that_ends_while_it_waits_for_a_page_ends_its_handler() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    // The memory is nowhere.
    let mut handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
    let mut vm = snapshot.loaded("uffd");
    vm.begins("check 0 1");
    handler.line("serving the guest");
    assert!(vm.is_at_it());
    vm.kill();
    ended(handler, 0, "vm_ended");
}

#[test]
fn a_vm_that_lacks_pages_is_killed_when_its_handler_must_end() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let mut handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
    let mut vm = snapshot.loaded("uffd");
    vm.does("check 0 5");
    give_up(&mut handler);
    handler.line("the VM was killed");
    assert_eq!(vm.end().signal(), Some(Signal::SIGKILL as i32));
    ended(handler, 4, "abandoned");
}

#[test]
fn a_vm_that_is_left_waits_and_reads_no_zeros() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let more = ["--bandwidth", "on-request", "--on-exit", "leave"];
    let mut handler = snapshot.local_handler("uffd", &more);
    let mut vm = snapshot.loaded("uffd");
    vm.does("check 0 5");
    give_up(&mut handler);
    handler.line("the VM is left");
    ended(handler, 4, "abandoned");
    // What has come is there; the rest never comes.
    vm.does("check 0 5");
    vm.begins("check 5 6");
    assert!(vm.child.try_wait().unwrap().is_none());
    assert!(vm.is_at_it());
    vm.kill();
}

/// A VM that has some pages of a server that was killed, and its handler, which knows that.
fn left_by_its_server(snapshot: &Snapshot) -> (Daemon, Vm) {
    let server = snapshot.server(&["--bandwidth", "on-request"]);
    let mut handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
    let mut vm = snapshot.loaded("uffd");
    vm.does("check 0 5");
    server.signal(Signal::SIGKILL);
    server.end();
    handler.line("waiting for it to come back");
    (handler, vm)
}

#[test]
fn a_vm_whose_server_was_killed_goes_on_with_the_next() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let (handler, mut vm) = left_by_its_server(&snapshot);
    let _another = snapshot.server(&[]);
    vm.does("check 0 505");
    ended(handler, 0, "finished");
}

#[test]
fn a_vm_whose_server_has_another_image_now_is_killed() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let (mut handler, vm) = left_by_its_server(&snapshot);
    // What was written does not matter.
    let image = std::fs::File::options().write(true).open(snapshot.path("memory")).unwrap();
    image.write_all_at(&[1], MIB).unwrap();
    let _another = snapshot.server(&[]);
    handler.line("turns this side away");
    handler.line("the VM was killed");
    assert_eq!(vm.end().signal(), Some(Signal::SIGKILL as i32));
    ended(handler, 1, "failed");
}

#[test]
fn a_vm_whose_memory_cannot_be_read_is_killed() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let mut handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
    let mut vm = snapshot.loaded("uffd");
    vm.does("check 0 5");
    std::fs::File::options()
        .write(true)
        .open(snapshot.path("memory"))
        .unwrap()
        .set_len(MIB)
        .unwrap();
    vm.begins("check 500 501");
    handler.line("cannot read");
    handler.line("the VM was killed");
    assert_eq!(vm.end().signal(), Some(Signal::SIGKILL as i32));
    let report = ended(handler, 1, "failed");
    assert!(report["error"].as_str().unwrap().contains("cannot read"), "{report}");
}
