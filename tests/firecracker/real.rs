//! The same with a real Firecracker, where the machine has one.

mod guest;
mod machine;

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;

use afterimage_tools::require;

use crate::docs::{SOCKET_IS_THERE, commands};
use crate::vm::{ended, give_up};
use machine::Snapshot;

fn snapshot() -> Option<Snapshot> {
    let firecracker = firecracker()?;
    Some(Snapshot::take(firecracker, "None"))
}

/// Firecracker, and what it needs.
fn firecracker() -> Option<PathBuf> {
    let firecracker = require::firecracker()?;
    (require::kvm() && require::userfaultfd()).then_some(firecracker)
}

const SPEEDS: [&[&str]; 3] = [&[], &["--bandwidth", "20M"], &["--bandwidth", "on-request"]];

#[test]
fn a_real_one_is_restored_from_a_file() {
    let Some(snapshot) = snapshot() else { return };
    for speed in SPEEDS {
        let handler = snapshot.local_handler("uffd", "vm.mem", speed);
        let mut vm = snapshot.restored("uffd");
        vm.lives_on();
        if speed.contains(&"on-request") {
            vm.kill();
            let report = ended(handler, 0, "vm_ended");
            assert_eq!(report["pages_background"], 0, "{report}");
        } else {
            let report = ended(handler, 0, "finished");
            assert_eq!(report["pages_complete"], report["pages_total"], "{report}");
            // It needs nobody any more.
            vm.lives_on();
        }
    }
}

#[test]
fn real_ones_are_restored_from_one_server_at_once() {
    let Some(snapshot) = snapshot() else { return };
    let pages = snapshot.socket("pages");
    let handlers = ["a", "b", "c", "d"].map(|name| {
        // Its memory is not there yet.
        (name, snapshot.handler(name, &["--connect", &pages]))
    });
    let _server = snapshot.server(&[]);
    let restored = handlers.map(|(name, handler)| (snapshot.restored(name), handler));
    for (mut vm, handler) in restored {
        vm.lives_on();
        ended(handler, 0, "finished");
        vm.lives_on();
    }
}

#[test]
fn a_real_one_survives_the_death_of_its_server() {
    let Some(snapshot) = snapshot() else { return };
    let server = snapshot.server(&["--bandwidth", "1M"]);
    let handler = snapshot.handler("uffd", &["--connect", &snapshot.socket("pages")]);
    let mut vm = snapshot.restored("uffd");
    // Killed, as its value ends.
    drop(server);
    let _server = snapshot.server(&[]);
    vm.lives_on();
    ended(handler, 0, "finished");
    vm.lives_on();
}

/// Firecracker reads what is missing itself, in the kernel, to write it to the file.
#[test]
fn a_real_one_that_lacks_pages_is_snapshotted_again() {
    let Some(snapshot) = snapshot() else { return };
    let handler = snapshot.local_handler("uffd", "vm.mem", &["--bandwidth", "on-request"]);
    let mut vm = snapshot.restored("uffd");
    vm.snapshot("again.state", "again.mem");
    let report = ended(handler, 0, "finished");
    assert_eq!(report["pages_background"], 0, "{report}");
    vm.kill();
    let handler = snapshot.local_handler("next", "again.mem", &[]);
    let mut vm = snapshot.restored_from("again.state", "next");
    vm.lives_on();
    ended(handler, 0, "finished");
}

#[test]
fn a_real_one_has_huge_pages() {
    let Some(firecracker) = firecracker() else { return };
    // Of the guest that is snapshotted, and then of the one that is restored.
    let Some(_pages) = require::hugetlb(guest::MEMORY_MIB / 2) else { return };
    let snapshot = Snapshot::take(firecracker, "2M");
    for speed in SPEEDS {
        let handler = snapshot.local_handler("uffd", "vm.mem", speed);
        let mut vm = snapshot.restored("uffd");
        vm.lives_on();
        vm.kill();
        let (status, report, said) = handler.end();
        assert_eq!(status, 0, "{report} {said:#?}");
    }
}

#[test]
fn a_real_one_is_killed_when_nobody_serves_it_any_more() {
    let Some(snapshot) = snapshot() else { return };
    for (on_exit, is_killed) in [("kill-vmm", true), ("leave", false)] {
        let more = ["--bandwidth", "on-request", "--on-exit", on_exit];
        let mut handler = snapshot.local_handler("uffd", "vm.mem", &more);
        // All that it needs to say its first line.
        let mut vm = snapshot.restored("uffd");
        give_up(&mut handler);
        ended(handler, 4, "abandoned");
        if is_killed {
            assert_eq!(vm.end().signal(), Some(9));
        }
    }
}

#[test]
fn a_real_one_is_restored_by_the_commands_of_the_docs() {
    let Some(snapshot) = snapshot() else { return };
    let curl = Command::new("curl").arg("--version").output();
    if require::or_skip("curl", curl).is_none() {
        return;
    }
    let [handler, load] = &commands("From a file")[..] else { panic!("two blocks") };
    // A person takes longer to type the next than it takes to begin to listen.
    let starts = "--api-sock api.sock &\n";
    assert!(load.contains(starts), "{load}");
    let load =
        load.replace(starts, &format!("{starts}vmm=$!\nuntil test -S api.sock; do :; done\n"));
    snapshot.types(&format!(
        "trap 'kill $vmm $handler' EXIT\n{handler}handler=$!{SOCKET_IS_THERE}{load}wait $handler || exit 1\n\
         until test $(grep -c 'wrong 0*$' said) -ge 4; do :; done\n\
         ! grep 'wrong 0*[1-9a-f]' said\n"
    ));
    let report = std::fs::read_to_string(snapshot.path("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["outcome"], "finished", "{report}");
}
