//! VMs that are restored, and have every page.

use std::os::unix::process::ExitStatusExt;

use afterimage_tools::require;

use crate::memory::{HUGE, Kind, ROOM, scarce_file};
use crate::support::PAGE;
use crate::vm::{GIB, MIB, OF_1_GIB, OF_4_GIB, Snapshot, ended};

#[test]
fn both_layouts_are_restored_from_a_file() {
    for lengths in [OF_1_GIB, OF_4_GIB] {
        for kind in [Kind::Private, Kind::Shared] {
            let snapshot = Snapshot::new(kind, lengths);
            let handler = snapshot.local_handler("uffd", &[]);
            let mut vm = snapshot.loaded("uffd");
            vm.check();
            let report = ended(handler, 0, "finished");
            assert_eq!(report["pages_complete"], snapshot.layout.pages(), "{report}");
            // It needs nobody any more.
            vm.check();
        }
    }
}

/// Of 4 GiB, as it was captured; its second region lies behind the hole of a PC.
#[test]
fn a_large_vm_finds_its_pages_at_a_server_that_was_told_the_file_alone() {
    let (border, end) = (3 * GIB / PAGE, 4 * GIB / PAGE);
    let some = [0..20, border - 20..border + 20, end - 20..end];
    let snapshot = Snapshot::sparse(&[3 * GIB, GIB], &some);
    let _server = snapshot.server_of_the_file();
    let handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
    let mut vm = snapshot.loaded("uffd");
    for pages in some {
        vm.does(&format!("check {} {}", pages.start, pages.end));
    }
    vm.does(&format!("check-zero {} {}", border - 100, border - 20));
    let report = ended(handler, 0, "finished");
    assert_eq!(report["pages_total"], end, "{report}");
}

#[test]
fn a_vm_is_restored_before_its_memory_is_there() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
    let mut vm = snapshot.loaded("uffd");
    vm.begins("check 700 800");
    let _server = snapshot.server(&[]);
    vm.has_done("check 700 800");
    vm.check();
    ended(handler, 0, "finished");
}

#[test]
fn a_message_in_pieces_is_understood() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let handler = snapshot.local_handler("uffd", &[]);
    let mut vm = snapshot.vmm();
    vm.does(&format!("connect {}", snapshot.path("uffd").display()));
    vm.does("half");
    vm.does("rest");
    vm.check();
    ended(handler, 0, "finished");
}

#[test]
fn the_memory_file_may_be_handed_over_too() {
    let snapshot = Snapshot::new(Kind::Shared, OF_4_GIB);
    let handler = snapshot.local_handler("uffd", &[]);
    let mut vm = snapshot.vmm();
    vm.does(&format!("connect {}", snapshot.path("uffd").display()));
    vm.does("hand-over-with-its-file");
    vm.check();
    ended(handler, 0, "finished");
}

#[test]
fn only_what_is_touched_comes_on_demand() {
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
    let mut vm = snapshot.loaded("uffd");
    vm.does("check 0 50");
    vm.does("check 1000 1024");
    vm.kill();
    let report = ended(handler, 0, "vm_ended");
    assert_eq!(report["pages_background"], 0, "{report}");
    let of = |field: &str| report[field].as_u64().unwrap();
    // It may have ended between getting the last one and the counting of it.
    assert!((73..=74).contains(&(of("pages_requested") + of("pages_zero"))), "{report}");
}

#[test]
fn the_background_keeps_to_its_rate_and_faults_do_not_wait_for_it() {
    let snapshot = Snapshot::new(Kind::Private, &[16 * MIB]);
    let handler = snapshot.local_handler("uffd", &["--bandwidth", "1M"]);
    let mut vm = snapshot.loaded("uffd");
    // Sixteen seconds' worth.
    vm.check();
    let report = ended(handler, 0, "finished");
    let of = |field: &str| report[field].as_u64().unwrap();
    let (pages, seconds) = (of("pages_background"), of("total_us") as f64 / 1e6);
    assert!((pages * PAGE) as f64 <= (seconds + 1.0) * MIB as f64, "{report}");
}

#[test]
fn what_the_kernel_touches_comes_too() {
    if !require::userfaultfd() {
        return;
    }
    let snapshot = Snapshot::new(Kind::Private, OF_4_GIB);
    let handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
    let mut vm = snapshot.loaded("uffd");
    // Before it resumes, and when it is snapshotted again.
    vm.does("check-in-kernel 0 3");
    vm.does("check 0 100");
    vm.does("check-in-kernel 0 1024");
    ended(handler, 0, "finished");
}

/// The kernel says of a page for which there is no room that it is there already.
#[test]
fn a_vm_for_which_there_are_too_few_huge_pages_fails_and_reads_nothing_wrong() {
    let Some(_pages) = require::hugetlb(ROOM) else { return };
    if require::or_skip("mount", scarce_file()).is_none() {
        return;
    }
    for bandwidth in ["on-request", "unlimited"] {
        let snapshot = Snapshot::new(Kind::ScarceHuge, &[6 * HUGE]);
        let handler = snapshot.local_handler("uffd", &["--bandwidth", bandwidth]);
        let mut vm = snapshot.loaded("uffd");
        vm.begins(&format!("check 0 {}", snapshot.layout.pages()));
        let report = ended(handler, 1, "failed");
        assert!(report["error"].as_str().unwrap().contains("no huge page left"), "{report}");
        assert!(report["pages_complete"].as_u64().unwrap() <= ROOM, "{report}");
        assert_eq!(vm.end().signal(), Some(9), "it would wait for pages that do not come");
    }
}

#[test]
fn huge_pages_come_whole() {
    let Some(_pages) = require::hugetlb(8 + 8) else { return };
    for kind in [Kind::Huge, Kind::SharedHuge] {
        let snapshot = Snapshot::new(kind, &[3 * HUGE, HUGE]);
        for (bandwidth, outcome) in [("on-request", "vm_ended"), ("unlimited", "finished")] {
            let handler = snapshot.local_handler("uffd", &["--bandwidth", bandwidth]);
            let mut vm = snapshot.loaded("uffd");
            vm.does("check 512 1024");
            vm.does("check 1800 1900");
            if outcome == "vm_ended" {
                vm.kill();
                let report = ended(handler, 0, outcome);
                assert!(report["pages_complete"].as_u64().unwrap() <= 2, "{report}");
            } else {
                vm.check();
                let report = ended(handler, 0, outcome);
                assert_eq!(report["pages_total"], 4, "{report}");
            }
        }
    }
}
