//! Many VMs from one snapshot at once.

use std::thread;

use crate::memory::Kind;
use crate::vm::{MIB, Snapshot, Vm, ended};

const VMS: usize = 64;
const LENGTHS: &[u64] = &[3 * MIB, MIB];
/// Beside guest RAM: 16 MiB, 2 MiB for each of the streams, of which there are two at most, and four
/// bits a page, which is far less than another here.
const MOST: u64 = 21 * MIB;

/// What a process has in memory that is its own, and its page tables.
fn own_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let of = |field: &str| {
        let line = status.lines().find(|line| line.starts_with(field)).unwrap_or("0");
        let number = line.split_whitespace().find_map(|word| word.parse::<u64>().ok());
        number.unwrap_or(0) << 10
    };
    of("RssAnon") + of("VmPTE")
}

/// All of them do this at once.
fn together(vms: &mut [Vm], command: &str) {
    for vm in vms.iter_mut() {
        vm.begins(command);
    }
    for vm in vms {
        vm.has_done(command);
    }
}

#[test]
fn many_vms_are_restored_from_one_page_server_at_once() {
    let snapshot = Snapshot::new(Kind::Private, LENGTHS);
    // Not finished before it was looked at.
    let server = snapshot.server(&["--bandwidth", "on-request"]);
    let names: Vec<String> = (0..VMS).map(|index| format!("uffd{index}")).collect();
    let pages = snapshot.pages();
    let mut handlers: Vec<_> =
        names.iter().map(|name| snapshot.handler(name, &["--connect", &pages])).collect();
    let mut vms: Vec<_> = names.iter().map(|name| snapshot.loaded(name)).collect();
    let some = "check 0 1000";
    together(&mut vms, some);
    for handler in &mut handlers {
        let bytes = own_memory(handler.child.id());
        assert!(bytes < MOST, "{bytes} bytes");
    }
    let all = format!("check 0 {}", snapshot.layout.pages());
    together(&mut vms, &all);
    for handler in handlers {
        let report = ended(handler, 0, "finished");
        assert_eq!(report["pages_complete"], snapshot.layout.pages(), "{report}");
    }
    // They need nobody any more.
    together(&mut vms, &all);
    drop(server);
}

#[test]
fn a_handler_stays_small_while_much_comes() {
    let snapshot = Snapshot::new(Kind::Private, &[96 * MIB, 32 * MIB]);
    let _server = snapshot.server(&["--streams", "2"]);
    let mut handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
    let mut vm = snapshot.loaded("uffd");
    let mut most = 0;
    while handler.child.try_wait().unwrap().is_none() {
        most = most.max(own_memory(handler.child.id()));
        thread::yield_now();
    }
    ended(handler, 0, "finished");
    assert!((MIB..MOST).contains(&most), "{most} bytes");
    vm.check();
}

#[test]
fn many_vms_are_restored_from_one_file_at_once() {
    let snapshot = Snapshot::new(Kind::Private, LENGTHS);
    let names: Vec<String> = (0..16).map(|index| format!("uffd{index}")).collect();
    let handlers: Vec<_> = names.iter().map(|name| snapshot.local_handler(name, &[])).collect();
    let mut vms: Vec<_> = names.iter().map(|name| snapshot.loaded(name)).collect();
    for (vm, seed) in vms.iter_mut().zip(1..) {
        vm.begins(&format!("work {seed} 300"));
    }
    for (vm, seed) in vms.iter_mut().zip(1..) {
        vm.has_done(&format!("work {seed} 300"));
    }
    for handler in handlers {
        ended(handler, 0, "finished");
    }
}
