//! Answers to faults, and who is woken.

use super::*;
use crate::destination::memory::DestinationRegion;
use afterimage_protocol::layout::{GuestAddress, RegisteredAddress};
use std::sync::atomic::AtomicU64;

#[test]
fn a_page_that_has_not_come_must_be_asked_for() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        let waiting = guest.touch(3);
        let faults = guest.faults();
        assert_eq!(faults.iter().map(|fault| fault.page).collect::<Vec<_>>(), [PageNumber(3)]);
        assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::Ask);
        assert_eq!(guest.urgent(3, 6), Urgent::Installed);
        assert_eq!(testing::await_message(&waiting, "the page asked for"), (6, 6));
    }
}

#[test]
fn what_is_in_the_page_cache_is_not_taken_for_the_page() {
    for guest in Guest::each(4, DiscardNotice::Called).filter(Guest::has_file) {
        let claim = guest.pages.claim(range(0, 2));
        guest.receive(&claim, 1, 1);
        let waiting = guest.touch(1);
        let faults = guest.faults();
        assert!(faults[0].is_minor);
        assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::BeingWritten);
        drop(claim);
        assert_eq!(guest.urgent(1, 6), Urgent::Installed);
        assert_eq!(testing::await_message(&waiting, "the page asked for"), (6, 6));
    }
}

#[test]
fn a_complete_page_that_was_never_shown_is_answered_at_once() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        // Zero: nothing is behind it.
        guest.pages.zero(range(0, 1));
        assert_eq!(guest.read_answered(0), (0, 0));
        // Content that lies in the page cache, whose page table entry is gone.
        if guest.has_file() {
            guest.bring(1, 1, 8);
            let page = guest.page_bytes();
            guest.area.advise(page, page, libc::MADV_DONTNEED).unwrap();
            assert_eq!(guest.read_answered(1), (8, 8));
        }
    }
}

#[test]
fn either_kind_of_fault_on_a_complete_page_leads_to_its_content() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        guest.bring(0, 1, 8);
        guest.pages.zero(range(1, 1));
        // On private memory no fault is minor.
        for &is_minor in if guest.has_file() { &[true, false][..] } else { &[false] } {
            for page in [0, 1, 0, 1] {
                // Told late, or wrongly, because the page cache has changed since.
                let fault = MissingPage { page: PageNumber(page), is_minor };
                assert_eq!(guest.pages.answer(fault), FaultAnswer::Answered);
                let expected = if page == 0 { 8 } else { 0 };
                let got = testing::await_message(&guest.touch(page), "a page answered");
                assert_eq!(got, (expected, expected), "{:?}", guest.area.kind);
            }
        }
    }
}

#[test]
fn whoever_waits_for_a_page_that_turns_out_zero_is_woken() {
    for guest in Guest::each(8, DiscardNotice::Called) {
        let waiting = [guest.touch(2), guest.touch(5)];
        let mut asked = Vec::new();
        while asked.len() < 2 {
            asked.extend(guest.faults());
        }
        for &fault in &asked {
            assert_eq!(guest.pages.answer(fault), FaultAnswer::Ask);
        }
        assert_eq!(guest.pages.zero_urgent(range(0, 8)), 8);
        for waiting in &waiting {
            assert_eq!(guest.answer_until(waiting, 2), (0, 0));
        }
    }
}

#[test]
fn a_fault_that_was_read_and_forgotten_comes_again_after_a_wake_up() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        let waiting = guest.touch(1);
        assert_eq!(guest.faults()[0].page, PageNumber(1));
        guest.pages.memory().wake_all();
        assert_eq!(guest.faults()[0].page, PageNumber(1));
        assert_eq!(guest.urgent(1, 3), Urgent::Installed);
        assert_eq!(testing::await_message(&waiting, "the page asked for"), (3, 3));
    }
}

#[test]
fn a_zero_run_of_the_background_wakes_whom_an_urgent_copy_left_to_it() {
    for guest in Guest::each(4, DiscardNotice::Called).filter(Guest::has_file) {
        let waiting = guest.touch(1);
        let faults = guest.faults();
        assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::Ask);
        // The answer comes while another thread has claimed the page for a zero run.
        let other = guest.clone();
        at(Place::ZeroClaimed, move || {
            assert_eq!(other.urgent(1, 0), Urgent::BeingWritten);
        });
        assert_eq!(guest.pages.zero(range(0, 4)), 4);
        assert_eq!(guest.answer_until(&waiting, 1), (0, 0));
    }
}

/// When the fault of a page that turns out zero is read.
#[derive(Clone, Copy, Debug)]
enum Read {
    Before,
    /// After it has been claimed.
    Meanwhile,
    After,
}

#[test]
fn whoever_waits_for_a_page_in_a_zero_run_of_the_background_gets_it_whenever_the_fault_is_read() {
    for read in [Read::Before, Read::Meanwhile, Read::After] {
        for guest in Guest::each(8, DiscardNotice::Called) {
            let waiting = guest.touch(5);
            let other = guest.clone();
            let answer = move || {
                // What is asked for may never be answered: the source learns that the page has
                // arrived before the request comes.
                let answer = other.pages.answer(other.faults()[0]);
                assert!(matches!(answer, FaultAnswer::Ask | FaultAnswer::BeingWritten));
            };
            match read {
                Read::Before => answer(),
                Read::Meanwhile => at(Place::ZeroClaimed, answer),
                Read::After => {}
            }
            assert_eq!(guest.pages.zero(range(4, 4)), 4);
            assert_eq!(guest.answer_until(&waiting, 5), (0, 0), "{read:?}");
        }
    }
}

#[test]
fn no_reader_of_a_page_is_lost_while_zero_runs_race_with_its_fault() {
    const PAGES: u64 = 20_000;
    for guest in [Kind::Anonymous, Kind::Memfd]
        .into_iter()
        .filter_map(|kind| Guest::new(kind, PAGES, DiscardNotice::Called))
    {
        let reached = Arc::new(AtomicU64::new(0));
        let reader = {
            let (guest, reached) = (guest.clone(), Arc::clone(&reached));
            std::thread::spawn(move || {
                for page in 0..PAGES {
                    reached.store(page, Ordering::Release);
                    assert_eq!(guest.read(page), (0, 0));
                }
                reached.store(PAGES, Ordering::Release);
            })
        };
        let zeroer = {
            let (guest, reached) = (guest.clone(), Arc::clone(&reached));
            std::thread::spawn(move || {
                // Just where the reader is, so that its fault is read at the same time.
                for page in 0..PAGES {
                    while reached.load(Ordering::Acquire) < page {
                        std::thread::yield_now();
                    }
                    guest.pages.zero(range(page, 1));
                }
            })
        };
        let mut faults = Vec::new();
        testing::await_that("all pages are read", || {
            guest.pages.read_events(&mut faults).unwrap();
            // What would be asked for is not: the wake-up alone must bring the reader on.
            faults.retain(|&fault| guest.pages.answer(fault) == FaultAnswer::EventPending);
            reached.load(Ordering::Acquire) == PAGES
        });
        reader.join().unwrap();
        zeroer.join().unwrap();
    }
}

#[test]
fn zero_pages_of_memory_without_a_file_are_answered_whatever_their_size() {
    use crate::sys::uffd::Features;
    use std::os::fd::AsFd;
    use userfaultfd::RegisterMode;
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::Hugetlb] {
        let features = Features::MISSING_HUGETLBFS.with(Features::MISSING_SHMEM);
        let Some(uffd) = testing::userfaultfd(features) else { return };
        let Some(area) = Area::new(kind, 2) else { continue };
        let start = area.address() as *mut _;
        let missing = RegisterMode::MISSING;
        uffd.register_with_mode(start, area.length as usize, missing).unwrap();
        let region = DestinationRegion::handed_over(
            GuestAddress(0),
            RegisteredAddress(area.address()),
            area.length,
            kind.page_size(),
            None,
        );
        // Not `into_raw_fd`, which closes the descriptor that it returns (userfaultfd 0.9).
        let descriptor = uffd.as_fd().try_clone_to_owned().unwrap();
        let memory = DestinationMemory::attach(descriptor, vec![region]).unwrap();
        let pages = Arc::new(Pages::new(memory).unwrap());
        let guest = Guest { pages, area: Arc::new(area) };
        assert_eq!(guest.pages.zero(range(0, 1)), 1);
        assert_eq!(guest.read_answered(0), (0, 0), "{kind:?}");
        assert_eq!(guest.urgent(1, 4), Urgent::Installed);
        assert_eq!(guest.read(1), (4, 4), "{kind:?}");
    }
}
