//! What a source has sent, and what of it has been acknowledged.
//!
//! [`Book`] has two bits a page and is shared by all threads of a source; [`InFlight`]
//! belongs to one channel and remembers what would be lost with it. Invariants:
//!
//! - a page that was acknowledged is never handed out again (I6), unless the guest has written
//!   it since, before the switchover ([`reopen`](Book::reopen));
//! - a page that was handed out is in the in-flight list of the channel it went to until it
//!   is acknowledged; when the channel dies it is handed out again (I4).

use crate::bitmap::{Bitmap, Words};
use crate::layout::{PageNumber, PageRange};
use crate::sync::{AtomicU64, Ordering};
use std::collections::{HashSet, VecDeque};

/// How many separate runs a channel may have in flight before it has to wait for acks.
/// Bounds the memory of an [`InFlight`].
pub const MAX_IN_FLIGHT_RUNS: usize = 16_384;

/// How far from the front it is looked whether the front alone keeps a channel full.
const NEAR: usize = 256;

/// Which pages a source has handed to its channels, and which have arrived. All methods may
/// be called from any thread.
#[derive(Debug)]
pub struct Book<W> {
    sent: Bitmap<W>,
    acked: Bitmap<W>,
    acked_pages: AtomicU64,
}

impl<W: Words> Book<W> {
    /// Nothing sent, in the words given, which must be zero.
    #[must_use]
    pub fn over(sent: W, acked: W, pages: u64) -> Self {
        Self {
            sent: Bitmap::over(sent, pages),
            acked: Bitmap::over(acked, pages),
            acked_pages: AtomicU64::new(0),
        }
    }

    /// How many pages there are.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.sent.pages()
    }

    /// The first page at or after `from` that has not been handed out.
    #[must_use]
    pub fn peek(&self, from: PageNumber) -> Option<PageNumber> {
        self.sent.next_clear(from, 1).map(|run| run.start)
    }

    /// Takes the first run of pages in `range` that has not been handed out.
    pub fn take_in(&self, range: PageRange) -> Option<PageRange> {
        let end = range.start.0 + range.count;
        let mut rest = range;
        while let Some(candidate) = self.sent.first_clear_in(rest) {
            let next = candidate.start.0 + candidate.count;
            rest = PageRange::new(PageNumber(next), end - next);
            let mut won: Option<PageRange> = None;
            self.sent.set(candidate, |run| {
                // Whatever else this call won goes back: one run is handed out.
                if won.is_none() {
                    won = Some(run);
                } else {
                    self.sent.clear(run, |_| ());
                }
            });
            let Some(run) = won else { continue };
            // An acknowledgement may have come between; what has arrived is not sent again.
            let Some(wanted) = self.acked.first_clear_in(run) else { continue };
            let (stop, run_end) = (wanted.start.0 + wanted.count, run.start.0 + run.count);
            self.requeue(PageRange::new(PageNumber(stop), run_end - stop));
            return Some(wanted);
        }
        None
    }

    /// Takes a page that is waited for, whether or not it has been sent. `false` if it has
    /// been acknowledged: it is there, and is not sent again.
    pub fn take_urgent(&self, page: PageNumber) -> bool {
        if self.acked.test(page) {
            return false;
        }
        self.sent.set_one(page);
        true
    }

    /// Takes in that pages are complete at the destination. Returns how many this is news
    /// for.
    pub fn acknowledge(&self, pages: PageRange) -> u64 {
        self.sent.set(pages, |_| ());
        let count = self.acked.set(pages, |_| ());
        self.acked_pages.fetch_add(count, Ordering::AcqRel);
        count
    }

    /// Hands pages out again that may be lost, unless they have arrived.
    pub fn requeue(&self, pages: PageRange) {
        let end = pages.start.0 + pages.count;
        let mut rest = pages;
        while let Some(open) = self.acked.first_clear_in(rest) {
            self.sent.clear(open, |_| ());
            let next = open.start.0 + open.count;
            rest = PageRange::new(PageNumber(next), end - next);
        }
    }

    /// What was sent of these pages is out of date: they are handed out again, also those that
    /// have arrived. No acknowledgement of what was sent before may come after it.
    pub fn reopen(&self, pages: PageRange) {
        // In this order: who sees a page not sent must not see it acknowledged.
        let count = self.acked.clear(pages, |_| ());
        self.acked_pages.fetch_sub(count, Ordering::AcqRel);
        self.sent.clear(pages, |_| ());
    }

    /// The first run of pages in `range` that have not been handed out.
    #[must_use]
    pub fn first_unsent_in(&self, range: PageRange) -> Option<PageRange> {
        self.sent.first_clear_in(range)
    }

    /// Whether a page has arrived.
    #[must_use]
    pub fn is_acked(&self, page: PageNumber) -> bool {
        self.acked.test(page)
    }

    /// The first run of pages in `range` that have arrived.
    #[must_use]
    pub fn first_acked_in(&self, range: PageRange) -> Option<PageRange> {
        self.acked.first_set_in(range)
    }

    /// The first run of pages in `range` that have not arrived.
    #[must_use]
    pub fn first_missing_in(&self, range: PageRange) -> Option<PageRange> {
        self.acked.first_clear_in(range)
    }

    /// Which of pages `64 × index` and following have arrived, the first in the lowest bit.
    #[must_use]
    pub fn acked_word(&self, index: usize) -> u64 {
        self.acked.word(index)
    }

    /// How many pages have arrived.
    #[must_use]
    pub fn acked_pages(&self) -> u64 {
        self.acked_pages.load(Ordering::Acquire)
    }

    /// How many pages have not been handed out. Reads every word.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.pages() - self.sent.count()
    }

    /// Starts again: nothing sent, nothing arrived. For a destination whose memory is new,
    /// and before its planes are taken in. No channel may be open.
    pub fn reset(&self) {
        let all = PageRange::new(PageNumber(0), self.pages());
        self.acked.clear(all, |_| ());
        self.sent.clear(all, |_| ());
        self.acked_pages.store(0, Ordering::Release);
    }
}

/// What one channel has sent and the destination has not acknowledged, in the order sent.
#[derive(Debug, Default)]
pub struct InFlight {
    runs: VecDeque<PageRange>,
}

impl InFlight {
    /// Adds what is about to be sent.
    pub fn push(&mut self, pages: PageRange) {
        if let Some(last) = self.runs.back_mut()
            && last.end() == Some(pages.start)
        {
            last.count += pages.count;
            return;
        }
        self.runs.push_back(pages);
    }

    /// Takes pages out that nobody will acknowledge.
    pub fn withdraw(&mut self, pages: PageRange) {
        let (from, end) = (pages.start.0, pages.start.0 + pages.count);
        let is_hit = |run: &PageRange| run.start.0 < end && from < run.start.0 + run.count;
        // It was pushed a moment ago.
        while let Some(at) = self.runs.iter().rposition(is_hit) {
            let Some(run) = self.runs.remove(at) else { return };
            let run_end = run.start.0 + run.count;
            if end < run_end {
                self.runs.insert(at, PageRange::new(PageNumber(end), run_end - end));
            }
            if run.start.0 < from {
                self.runs.insert(at, PageRange::new(run.start, from - run.start.0));
            }
        }
    }

    /// Drops what has been acknowledged: from the front, and anywhere else only where that is not
    /// enough, because of a page that does not arrive (there is no room for it) and is sent again and
    /// again.
    pub fn settle<W: Words>(&mut self, book: &Book<W>) {
        self.settle_front(book);
        if self.is_full() && self.is_stuck(book) {
            let mut seen = HashSet::new();
            let is_open = |run: &PageRange| book.acked.first_clear_in(*run).is_some();
            self.runs.retain(|run| is_open(run) && seen.insert(*run));
        }
    }

    /// Whether what follows the front has been acknowledged, or is the front again. Where all of it is
    /// under way, as on a channel that is merely busy, to look at the rest would be for nothing.
    fn is_stuck<W: Words>(&self, book: &Book<W>) -> bool {
        let front = self.runs.front();
        let is_over = |run: &PageRange| book.acked.first_clear_in(*run).is_none();
        self.runs.iter().skip(1).take(NEAR).any(|run| Some(run) == front || is_over(run))
    }

    fn settle_front<W: Words>(&mut self, book: &Book<W>) {
        while let Some(front) = self.runs.front_mut() {
            match book.acked.first_clear_in(*front) {
                None => {
                    self.runs.pop_front();
                }
                Some(open) => {
                    front.count -= open.start.0 - front.start.0;
                    front.start = open.start;
                    return;
                }
            }
        }
    }

    /// Whether the channel must wait for acks before it sends more.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.runs.len() >= MAX_IN_FLIGHT_RUNS
    }

    /// How many separate runs are under way: never more than one above
    /// [`MAX_IN_FLIGHT_RUNS`] where [`is_full`](Self::is_full) is heeded, and one more for each
    /// [`withdraw`](Self::withdraw) from what was pushed last.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// The first page that is under way.
    #[must_use]
    pub fn first(&self) -> Option<PageNumber> {
        self.runs.front().map(|run| run.start)
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The channel has died: everything that may be lost with it is handed out again.
    pub fn requeue<W: Words>(&mut self, book: &Book<W>) {
        for run in self.runs.drain(..) {
            book.requeue(run);
        }
    }
}
