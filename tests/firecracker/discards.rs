//! A balloon takes pages while faults are answered and the background is on its way.

use afterimage_tools::require;

use crate::memory::{HUGE, Kind};
use crate::vm::{MIB, OF_4_GIB, Snapshot, ended};

#[test]
fn what_was_given_up_reads_as_zeros_ever_after() {
    for kind in [Kind::Private, Kind::Shared] {
        let snapshot = Snapshot::new(kind, OF_4_GIB);
        let handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
        let mut vm = snapshot.loaded("uffd");
        vm.does("check 0 20");
        // Some have come, some have not; across the border of the regions, too.
        vm.does("remove 10 30");
        vm.does("remove 700 768");
        vm.does("remove 768 800");
        vm.does("check-zero 10 30");
        vm.does("check 30 700");
        vm.does("check-zero 700 800");
        vm.does("remove 10 30");
        vm.does("check-zero 10 30");
        vm.does("check 0 10");
        vm.does("check 800 1024");
        let report = ended(handler, 0, "finished");
        assert_eq!(report["pages_discarded"], 10 + 100, "{report}");
        vm.does("check-zero 10 30");
    }
}

#[test]
fn pages_are_given_up_while_faults_and_background_are_in_flight() {
    for (kind, seed) in [(Kind::Private, 1), (Kind::Shared, 2), (Kind::Private, 3)] {
        let snapshot = Snapshot::new(kind, &[12 * MIB, 4 * MIB]);
        let handler = snapshot.local_handler("uffd", &[]);
        let mut vm = snapshot.loaded("uffd");
        vm.does(&format!("work {seed} 3000"));
        ended(handler, 0, "finished");
        // Half of it from elsewhere, slowly, so that it lasts as long as the work.
        let server = snapshot.server(&["--bandwidth", "4M"]);
        let handler = snapshot.handler("uffd", &["--connect", &snapshot.pages()]);
        let mut vm = snapshot.loaded("uffd");
        vm.does(&format!("work {seed} 3000"));
        ended(handler, 0, "finished");
        drop(server);
    }
}

#[test]
fn a_huge_page_that_was_given_up_is_zero() {
    let Some(_pages) = require::hugetlb(8 + 8) else { return };
    for kind in [Kind::Huge, Kind::SharedHuge] {
        let snapshot = Snapshot::new(kind, &[3 * HUGE, HUGE]);
        let handler = snapshot.local_handler("uffd", &["--bandwidth", "on-request"]);
        let mut vm = snapshot.loaded("uffd");
        vm.does("check 0 5");
        vm.does("remove 0 1024");
        vm.does("check-zero 0 1024");
        vm.does("check 1024 2048");
        let report = ended(handler, 0, "finished");
        assert_eq!(report["pages_discarded"], 1, "{report}");
    }
}
