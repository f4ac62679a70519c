//! A precopy by hand: what a tracker reports is copied, and in the end the copy must be equal.

use crate::common::memory::PAGE;
use crate::common::{self, Kind, Memory, Random};
use afterimage::dirty::{DirtyTracker, TrackedRegion};
use afterimage::{GuestAddress, RegisteredAddress};
use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const WORDS: u64 = PAGE / 8;
const WRITERS: u64 = 3;
const ROUNDS: u64 = 12;

/// What has been copied of a memory of one region.
pub(crate) struct Copy {
    memory: Arc<Memory>,
    words: Vec<u64>,
}

impl Copy {
    pub(crate) fn of(memory: &Arc<Memory>) -> Self {
        let mut copy = Self {
            memory: Arc::clone(memory),
            words: vec![0; (memory.small_pages() * WORDS) as usize],
        };
        (0..memory.small_pages()).for_each(|page| copy.page(page));
        copy
    }

    pub(crate) fn page(&mut self, page: u64) {
        for word in 0..WORDS {
            self.words[(page * WORDS + word) as usize] =
                self.memory.word(page, word).load(Ordering::Relaxed);
        }
    }

    /// Copies what the tracker reports now; how many pages.
    pub(crate) fn round(&mut self, tracker: &mut dyn DirtyTracker) -> usize {
        let pages = collected(tracker, &self.memory);
        for page in &pages {
            self.page(*page);
        }
        pages.len()
    }

    pub(crate) fn check(&self) {
        for page in 0..self.memory.small_pages() {
            for word in 0..WORDS {
                let now = self.memory.word(page, word).load(Ordering::Relaxed);
                let copied = self.words[(page * WORDS + word) as usize];
                assert_eq!(now, copied, "page {page}, word {word}: a write was lost");
            }
        }
    }
}

/// The pages that a tracker reports, of a memory of one region at guest address 0.
pub(crate) fn collected(tracker: &mut dyn DirtyTracker, memory: &Memory) -> BTreeSet<u64> {
    let mut pages = BTreeSet::new();
    let end = memory.small_pages() * PAGE;
    let collect = &mut |guest: GuestAddress, length: u64| {
        assert!(guest.0.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0);
        assert!(guest.0 + length <= end, "{guest} + {length} is not in the region");
        pages.extend(guest.0 / PAGE..(guest.0 + length) / PAGE);
    };
    tracker.collect(collect).expect("collected");
    pages
}

/// Several threads write random pages while these are collected and copied again and again:
/// then they stop, and one more round must make the copy equal.
pub(crate) fn no_write_is_lost(
    tracker: &mut dyn DirtyTracker,
    memory: &Arc<Memory>,
    wrote: &(dyn Fn(u64) + Sync),
    random: &mut Random,
) {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut copy = std::thread::scope(|scope| {
        for _ in 0..WRITERS {
            let mut random = random.fork();
            let (stop, written) = (&stop, &written);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let page = random.below(memory.small_pages());
                    memory.word(page, random.below(WORDS)).fetch_add(1, Ordering::Relaxed);
                    wrote(page);
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        tracker.start().expect("started");
        let mut copy = Copy::of(memory);
        for _ in 0..ROUNDS {
            let before = written.load(Ordering::Relaxed);
            let has_more = || written.load(Ordering::Relaxed) > before + 20;
            common::wait_until("writes", String::new, has_more);
            assert!(copy.round(tracker) > 0, "nothing was reported");
        }
        copy
    });
    copy.round(tracker);
    copy.check();
    assert_eq!(copy.round(tracker), 0, "nobody writes any more");
    tracker.stop().expect("stopped");
}

/// A memory of one region, as it is tracked.
pub(crate) fn region_of(memory: &Memory) -> TrackedRegion {
    let (guest, length) = (memory.guest_address(0), memory.small_pages() * PAGE);
    let start = RegisteredAddress(memory.word(0, 0).as_ptr() as u64);
    match memory.kind_of(0) {
        Kind::Anonymous => TrackedRegion::private(guest, start, length),
        Kind::Huge => TrackedRegion::hugetlb(guest, start, length),
        Kind::Memfd => TrackedRegion::shared(guest, start, length, file_of(memory).into(), 0),
    }
}

pub(crate) fn file_of(memory: &Memory) -> File {
    File::options().read(true).write(true).open(memory.path_of(0)).expect("a memfd")
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
