//! Bitmaps with one bit a page, in memory that the caller supplies.
//!
//! [`Bitmap`] is the plain kind: what is dirty, sent or acknowledged at a source.
//! [`Planes`] are the two of a destination, whose transitions decide which of several
//! threads may put a page in place. Both work on any slice of atomic words, so that the
//! words can lie in a memfd that outlives the process. [`Segment`] is their form on the
//! wire.
//!
//! Bits beyond the number of pages are never set.

mod planes;
mod segment;

pub use planes::{PageState, Planes};
pub use segment::{MAX_SEGMENT_PAGES, Segment, SegmentError};

use crate::layout::{PageNumber, PageRange};
use crate::sync::{AtomicU64, Ordering};

/// The words of a bitmap: 64 pages each, lowest bit first.
pub trait Words: AsRef<[AtomicU64]> + Send + Sync {}
impl<T: AsRef<[AtomicU64]> + Send + Sync> Words for T {}

/// How many words a bitmap of `pages` pages needs.
#[must_use]
pub const fn words_for(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

/// One bit a page. All methods may be called from any thread at any time; each changes
/// every word in one atomic step, and a range word by word.
#[derive(Debug)]
pub struct Bitmap<W = Box<[AtomicU64]>> {
    words: W,
    pages: u64,
}

impl Bitmap {
    /// A bitmap of its own memory, all bits clear.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
        Self { words, pages }
    }
}

impl<W: Words> Bitmap<W> {
    /// A bitmap in the words given, with the bits they hold.
    ///
    /// # Panics
    /// If there are fewer words than [`words_for`] says.
    #[must_use]
    pub fn over(words: W, pages: u64) -> Self {
        assert!(words.as_ref().len() >= words_for(pages), "too few words for {pages} pages");
        Self { words, pages }
    }

    /// How many pages it covers.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the page's bit is set. What was written before it was set is visible to
    /// whoever sees it set.
    #[must_use]
    pub fn test(&self, page: PageNumber) -> bool {
        debug_assert!(page.0 < self.pages);
        let word = self.words.as_ref()[(page.0 / 64) as usize].load(Ordering::Acquire);
        word & (1 << (page.0 % 64)) != 0
    }

    /// Sets the bits of a range and calls `changed` with each run that was clear before.
    /// Returns how many pages that are. Whoever clears a bit sees what was written before
    /// any call that set it, or the bit is set again: no mark is lost.
    ///
    /// # Panics
    /// If the bitmap does not have all the pages.
    pub fn set(&self, range: PageRange, changed: impl FnMut(PageRange)) -> u64 {
        // No plain look first, as below: a bit that is seen set may be being cleared by
        // somebody who has not seen what this caller wrote, and the mark would be lost.
        self.set_by(range, changed, |word, mask| word.fetch_or(mask, Ordering::AcqRel))
    }

    /// The same for planes: a call that finds the bits set publishes nothing, but a word
    /// that is full costs no exclusive access.
    fn set_unpublished(&self, range: PageRange, changed: impl FnMut(PageRange)) -> u64 {
        self.set_by(range, changed, |word, mask| {
            let old = word.load(Ordering::Acquire);
            if old & mask == mask { old } else { word.fetch_or(mask, Ordering::AcqRel) }
        })
    }

    fn set_by(
        &self,
        range: PageRange,
        mut changed: impl FnMut(PageRange),
        or: impl Fn(&AtomicU64, u64) -> u64,
    ) -> u64 {
        self.assert_has(range);
        let mut runs = RunCollector::new(&mut changed);
        for_words(range, |index, mask| {
            let old = or(&self.words.as_ref()[index], mask);
            runs.push(index, mask & !old);
        });
        runs.finish()
    }

    /// Bits beyond the last page would be counted and sent, so none is ever set.
    fn assert_has(&self, range: PageRange) {
        assert!(
            range.end().is_some_and(|end| end.0 <= self.pages),
            "a bitmap of {} pages has no pages {range}",
            self.pages
        );
    }

    /// Clears the bits of a range and calls `changed` with each run that was set before.
    /// Returns how many pages that are.
    ///
    /// # Panics
    /// If the bitmap does not have all the pages.
    pub fn clear(&self, range: PageRange, mut changed: impl FnMut(PageRange)) -> u64 {
        self.assert_has(range);
        let mut runs = RunCollector::new(&mut changed);
        for_words(range, |index, mask| {
            let word = &self.words.as_ref()[index];
            let old = word.load(Ordering::Acquire);
            let old = if old & mask == 0 { old } else { word.fetch_and(!mask, Ordering::AcqRel) };
            runs.push(index, mask & old);
        });
        runs.finish()
    }

    /// Sets one bit; `true` if this call did it.
    pub fn set_one(&self, page: PageNumber) -> bool {
        self.set(PageRange::one(page), |_| ()) == 1
    }

    /// Clears one bit; `true` if this call did it.
    pub fn clear_one(&self, page: PageNumber) -> bool {
        self.clear(PageRange::one(page), |_| ()) == 1
    }

    /// How many bits are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.as_ref()[..words_for(self.pages)]
            .iter()
            .map(|word| u64::from(word.load(Ordering::Acquire).count_ones()))
            .sum()
    }

    /// How many bits of a range are set.
    ///
    /// # Panics
    /// If the bitmap does not have all the pages.
    #[must_use]
    pub fn count_in(&self, range: PageRange) -> u64 {
        self.assert_has(range);
        let mut total = 0;
        for_words(range, |index, mask| {
            let word = self.words.as_ref()[index].load(Ordering::Acquire);
            total += u64::from((word & mask).count_ones());
        });
        total
    }

    /// The first run of set bits at or after `from`, at most `limit` pages long; `None` if
    /// no bit there is set, or the limit is 0.
    #[must_use]
    pub fn next_set(&self, from: PageNumber, limit: u64) -> Option<PageRange> {
        if limit == 0 {
            return None;
        }
        let mut from = from.0;
        loop {
            let start = self.find(from, 0)?;
            let stop = start.saturating_add(limit).min(self.pages);
            let end = self.find_within(start, stop, u64::MAX);
            if end > start {
                return Some(PageRange::new(PageNumber(start), end - start));
            }
            // Another thread cleared the first bit between the two looks; later ones may
            // still be set.
            from = start + 1;
        }
    }

    /// The first run of clear bits at or after `from`, at most `limit` pages long; `None` if
    /// no bit there is clear, or the limit is 0.
    #[must_use]
    pub fn next_clear(&self, from: PageNumber, limit: u64) -> Option<PageRange> {
        if limit == 0 {
            return None;
        }
        let mut from = from.0;
        loop {
            let start = self.find(from, u64::MAX)?;
            let stop = start.saturating_add(limit).min(self.pages);
            let run = self.first_clear_in(PageRange::new(PageNumber(start), stop - start));
            if run.is_some() {
                return run;
            }
            // Another thread set all of them between the two looks; later ones may still
            // be clear.
            from = stop;
        }
    }

    /// The first run of clear bits in a range.
    #[must_use]
    pub fn first_clear_in(&self, range: PageRange) -> Option<PageRange> {
        let stop = range.start.0.saturating_add(range.count).min(self.pages);
        let mut from = range.start.0;
        loop {
            let start = self.find_within(from, stop, u64::MAX);
            if start >= stop {
                return None;
            }
            let end = self.find_within(start, stop, 0);
            if end > start {
                return Some(PageRange::new(PageNumber(start), end - start));
            }
            // Another thread set the first bit between the two looks; later ones may still
            // be clear.
            from = start + 1;
        }
    }

    /// The first run of set bits in a range.
    #[must_use]
    pub fn first_set_in(&self, range: PageRange) -> Option<PageRange> {
        let stop = (range.start.0 + range.count).min(self.pages);
        let start = self.find_within(range.start.0, stop, 0);
        let end = self.find_within(start, stop, u64::MAX);
        (end > start).then(|| PageRange::new(PageNumber(start), end - start))
    }

    /// The runs of set bits, in order.
    pub fn runs(&self) -> impl Iterator<Item = PageRange> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.find(from, 0)?;
            let end = self.find(start, u64::MAX).unwrap_or(self.pages);
            from = end.max(start + 1);
            Some(PageRange::new(PageNumber(start), (end - start).max(1)))
        })
    }

    /// The first page at or after `from` whose bit differs from that of `all`, which is 0
    /// (find a set bit) or all ones (find a clear one).
    fn find(&self, from: u64, all: u64) -> Option<u64> {
        let page = self.find_within(from, self.pages, all);
        (page < self.pages).then_some(page)
    }

    /// The same up to `stop`, which is returned if there is none before it.
    fn find_within(&self, from: u64, stop: u64, all: u64) -> u64 {
        if from >= stop {
            return stop;
        }
        let words = self.words.as_ref();
        let mut index = (from / 64) as usize;
        let mut differ = (words[index].load(Ordering::Acquire) ^ all) & (u64::MAX << (from % 64));
        while differ == 0 {
            index += 1;
            if index >= words_for(stop) {
                return stop;
            }
            differ = words[index].load(Ordering::Acquire) ^ all;
        }
        (index as u64 * 64 + u64::from(differ.trailing_zeros())).min(stop)
    }

    /// The raw word that holds pages `64 × index` and following.
    #[must_use]
    pub fn word(&self, index: usize) -> u64 {
        self.words.as_ref()[index].load(Ordering::Acquire)
    }
}

/// Calls `each` with the index and mask of every word that `range` touches.
fn for_words(range: PageRange, mut each: impl FnMut(usize, u64)) {
    let end = range.start.0 + range.count;
    let mut page = range.start.0;
    while page < end {
        let bit = page % 64;
        let bits = (64 - bit).min(end - page);
        let mask = (u64::MAX >> (64 - bits)) << bit;
        each((page / 64) as usize, mask);
        page += bits;
    }
}

/// Joins the set bits of consecutive words into runs.
struct RunCollector<'a, F: FnMut(PageRange)> {
    emit: &'a mut F,
    start: u64,
    count: u64,
    total: u64,
}

impl<'a, F: FnMut(PageRange)> RunCollector<'a, F> {
    fn new(emit: &'a mut F) -> Self {
        Self { emit, start: 0, count: 0, total: 0 }
    }

    fn push(&mut self, index: usize, mut bits: u64) {
        self.total += u64::from(bits.count_ones());
        let base = index as u64 * 64;
        while bits != 0 {
            let first = bits.trailing_zeros();
            let length = (bits >> first).trailing_ones();
            let start = base + u64::from(first);
            if self.count > 0 && self.start + self.count == start {
                self.count += u64::from(length);
            } else {
                self.flush();
                (self.start, self.count) = (start, u64::from(length));
            }
            let mask = (u64::MAX >> (64 - length)) << first;
            bits &= !mask;
        }
    }

    fn flush(&mut self) {
        if self.count > 0 {
            (self.emit)(PageRange::new(PageNumber(self.start), self.count));
            self.count = 0;
        }
    }

    fn finish(mut self) -> u64 {
        self.flush();
        self.total
    }
}
