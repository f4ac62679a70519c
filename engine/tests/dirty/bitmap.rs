//! What the VMM marks by itself, and several trackers as one.

use crate::common::memory::PAGE;
use crate::common::{Kind, Memory, Random};
use crate::copying::{collected, no_write_is_lost};
use afterimage::GuestAddress;
use afterimage::dirty::{DirtyBitmap, DirtyTracker, Trackers};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

fn bitmap(pages: u64) -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(&[(GuestAddress(0), pages * PAGE)]).expect("a bitmap"))
}

#[test]
fn no_mark_is_lost_while_others_are_collected() {
    let mut random = Random::seeded("no_mark_is_lost");
    for _ in 0..50 {
        let memory = Memory::new(&[(Kind::Anonymous, 300 * PAGE)]);
        let mut tracker = bitmap(300);
        let device = Arc::clone(&tracker);
        let wrote = move |page: u64| device.mark(GuestAddress(page * PAGE), 1);
        no_write_is_lost(&mut tracker, &memory, &wrote, &mut random);
    }
}

#[test]
fn every_page_that_a_write_touches_is_marked() {
    let memory = Memory::new(&[(Kind::Anonymous, 100 * PAGE)]);
    let mut tracker = bitmap(100);
    tracker.mark(GuestAddress(0), PAGE);
    tracker.start().expect("started");
    tracker.mark(GuestAddress(5 * PAGE - 1), 2);
    tracker.mark(GuestAddress(60 * PAGE + 7), 10 * PAGE);
    tracker.mark(GuestAddress(80 * PAGE), 0);
    tracker.mark(GuestAddress(99 * PAGE), PAGE);
    let found: Vec<_> = collected(&mut tracker, &memory).into_iter().collect();
    let expected: Vec<_> = [4, 5].into_iter().chain(60..71).chain([99]).collect();
    assert_eq!(found, expected);
    assert!(collected(&mut tracker, &memory).is_empty(), "told once");
}

#[test]
fn a_mark_outside_of_all_memory_is_an_error_and_the_others_are_kept() {
    let mut tracker = bitmap(10);
    tracker.start().expect("started");
    tracker.mark(GuestAddress(9 * PAGE), 2 * PAGE);
    let mut found = Vec::new();
    let error = tracker.collect(&mut |guest, _| found.push(guest)).expect_err("outside");
    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    assert_eq!(found, [GuestAddress(9 * PAGE)]);
    tracker.collect(&mut |_, _| panic!("told already")).expect("told once");
}

#[test]
fn ranges_that_are_no_whole_pages_are_refused() {
    for (guest, length) in [(0, 0), (1, PAGE), (0, PAGE + 1), (PAGE * 2, u64::MAX - PAGE + 1)] {
        DirtyBitmap::new(&[(GuestAddress(guest), length)]).expect_err("not whole pages");
    }
}

/// Says which of its calls came.
#[derive(Debug)]
struct Recorded {
    calls: Arc<AtomicU32>,
    page: u64,
    can_start: bool,
}

impl DirtyTracker for Recorded {
    fn start(&mut self) -> io::Result<()> {
        if !self.can_start {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        written(GuestAddress(self.page * PAGE), PAGE);
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.calls.fetch_add(100, Ordering::Relaxed);
        Err(io::Error::other("cannot stop"))
    }
}

#[test]
fn several_trackers_report_as_one_and_all_are_stopped() {
    let calls = Arc::new(AtomicU32::new(0));
    let one = |page, can_start| {
        Box::new(Recorded { calls: Arc::clone(&calls), page, can_start }) as Box<dyn DirtyTracker>
    };
    let mut trackers = Trackers::new(vec![one(1, true), one(2, true)]);
    trackers.start().expect("started");
    let mut found = Vec::new();
    trackers.collect(&mut |guest, _| found.push(guest.0 / PAGE)).expect("collected");
    assert_eq!(found, [1, 2]);
    trackers.stop().expect_err("both say so");
    assert_eq!(calls.swap(0, Ordering::Relaxed), 202);

    let mut trackers = Trackers::new(vec![one(1, true), one(2, false), one(3, true)]);
    let error = trackers.start().expect_err("the second cannot");
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert_eq!(calls.load(Ordering::Relaxed), 101, "the first was stopped");
}
