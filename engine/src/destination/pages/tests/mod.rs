//! What becomes of each page, whoever brings it, in whatever order.

mod discards;
mod early;
mod faults;
mod once;
mod placing;
mod room;
mod stress;
mod takeover;

use super::claim::Claim;
use super::hold::{Place, held};
use super::{FaultAnswer, InstallError, MissingPage, Pages, Target, Urgent};
use crate::destination::memory::{DestinationMemory, DiscardNotice, MemoryError};
use crate::sys::testing::{self, Area, Kind};
use crate::sys::uffd::UffdError;
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

/// A guest's memory, and the pages of the destination that fills it.
#[derive(Clone)]
struct Guest {
    pages: Arc<Pages>,
    area: Arc<Area>,
}

impl Guest {
    fn new(kind: Kind, pages: u64, discards: DiscardNotice) -> Option<Self> {
        let area = Arc::new(Area::new(kind, pages)?);
        match DestinationMemory::register(vec![area.region()], testing::scope(), discards) {
            Ok(memory) => Some(Self { pages: Arc::new(Pages::new(memory).unwrap()), area }),
            Err(MemoryError::Uffd(error @ UffdError::Unavailable(_))) => {
                testing::skip("userfaultfd", error);
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// One for each kind that the machine has.
    fn each(pages: u64, discards: DiscardNotice) -> impl Iterator<Item = Self> {
        Kind::ALL.into_iter().filter_map(move |kind| Self::new(kind, pages, discards))
    }

    fn has_file(&self) -> bool {
        self.area.file.is_some()
    }

    fn page_bytes(&self) -> u64 {
        self.area.page_bytes()
    }

    /// A page full of this word.
    fn page_of(&self, word: u64) -> Vec<u8> {
        word.to_le_bytes().repeat(self.page_bytes() as usize / 8)
    }

    /// The first and the last word of a page, which must be there.
    fn read(&self, page: u64) -> (u64, u64) {
        let start = page * self.page_bytes();
        let word = |offset| self.area.word(start + offset).load(Ordering::Relaxed);
        (word(0), word(self.page_bytes() - 8))
    }

    /// The same by a thread of its own, which may wait.
    fn touch(&self, page: u64) -> Receiver<(u64, u64)> {
        let (sender, receiver) = channel();
        let guest = self.clone();
        std::thread::spawn(move || sender.send(guest.read(page)));
        receiver
    }

    /// Waits for faults, and reads them.
    fn faults(&self) -> Vec<MissingPage> {
        let mut faults = Vec::new();
        testing::await_that("a fault is read", || {
            self.pages.read_events(&mut faults).unwrap();
            !faults.is_empty()
        });
        faults
    }

    /// Whether the userfaultfd has something to tell.
    fn has_event(&self) -> bool {
        super::fault::is_readable(self.pages.memory().uffd()).unwrap()
    }

    /// Reads one page, answering what faults there are from the planes alone.
    fn read_answered(&self, page: u64) -> (u64, u64) {
        self.answer_until(&self.touch(page), page)
    }

    fn answer_until<T>(&self, until: &Receiver<T>, page: u64) -> T {
        let (mut faults, mut got) = (Vec::new(), None);
        testing::await_that(&format!("page {page} is answered"), || {
            self.pages.read_events(&mut faults).unwrap();
            faults.retain(|&fault| match self.pages.answer(fault) {
                FaultAnswer::Answered => false,
                FaultAnswer::EventPending => true,
                other => panic!("{other:?} for page {page}"),
            });
            got = until.try_recv().ok();
            got.is_some()
        });
        got.unwrap()
    }

    /// Writes the first `whole` pages of a claimed piece with `word`, half of the next.
    fn receive(&self, claim: &Claim<'_>, word: u64, whole: u64) {
        let length = whole * self.page_bytes() + self.page_bytes() / 2;
        let content = self.page_of(word).repeat(whole as usize + 1);
        let mut at = 0;
        for target in claim.targets().unwrap().expect("an alias") {
            match target {
                Target::Memory(run) => {
                    let left = (length.saturating_sub(at) as usize).min(run.length);
                    // SAFETY: claimed, mapped, and written by this thread alone.
                    unsafe { run.write(&content[..left]) };
                    at += run.length as u64;
                }
                Target::Nowhere(bytes) => at += bytes,
            }
        }
    }

    /// Brings a piece by the background, and returns what was acknowledged.
    fn bring(&self, first: u64, count: u64, word: u64) -> Vec<PageRange> {
        let claim = self.pages.claim(range(first, count));
        self.finish(claim, word, count)
    }

    fn finish(&self, claim: Claim<'_>, word: u64, count: u64) -> Vec<PageRange> {
        let mut staging = Vec::new();
        if self.has_file() {
            self.receive(&claim, word, count);
        } else {
            staging = self.page_of(word).repeat(count as usize);
        }
        let mut acknowledged = Vec::new();
        claim.finish(&staging, |run| acknowledged.push(run)).unwrap();
        acknowledged
    }

    fn urgent(&self, page: u64, word: u64) -> Urgent {
        self.pages.urgent(PageNumber(page), &self.page_of(word)).unwrap()
    }

    /// Urgent, background, zero, discarded; and the duplicates.
    fn counted(&self) -> ([u64; 4], u64) {
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.pages.counters;
        let ways = [&counters.urgent, &counters.background, &counters.zero, &counters.discarded];
        (ways.map(of), of(&counters.duplicate))
    }

    /// Every page that is complete was counted once, and nothing is left of discards.
    #[track_caller]
    fn assert_books_balance(&self) {
        let done = self.pages.layout().page_count() - self.pages.remaining();
        assert_eq!(self.pages.planes().complete_count(), done, "{:?}", self.area.kind);
        let (ways, _) = self.counted();
        let early = self.pages.counters.early.load(Ordering::Relaxed);
        assert_eq!(ways.iter().sum::<u64>() + early, done, "{:?}: {ways:?}", self.area.kind);
        assert_eq!(self.pages.discarding().pages().len(), 0, "{:?}", self.area.kind);
    }
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(PageNumber(first), count)
}

/// Runs `other` in this thread once, when it first passes by `place`.
fn at(place: Place, other: impl FnOnce() + 'static) {
    let mut other = Some(other);
    held::hold(move |passed| {
        if passed == place
            && let Some(other) = other.take()
        {
            other();
        }
    });
}
