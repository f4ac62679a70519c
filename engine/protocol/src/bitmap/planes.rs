//! The two planes of a destination: which pages are claimed, which are complete.

use super::{AtomicU64, Bitmap, Words, words_for};
use crate::layout::{PageNumber, PageRange};

/// What the planes say of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// Nobody is putting it in place.
    Free,
    /// Somebody is; only whoever claimed it may write it.
    Claimed,
    /// It is in place, and is never written by the engine again.
    Complete,
}

/// Says for each page whether it has arrived, and lets exactly one of several threads put
/// it in place.
///
/// A page goes free → claimed → complete, or back from claimed to free when its claimer
/// gives up; never back from complete. Invariants:
///
/// - of all calls of [`claim`](Self::claim) between two give-backs of a page, one wins;
/// - a page becomes complete once: [`complete`](Self::complete) says for which pages this
///   call did it;
/// - whoever sees a page complete sees everything its claimer wrote before;
/// - whoever claims a page that was given back sees what was written by those before;
/// - a page stays complete, and a claim that begins after somebody saw it so is lost.
///
/// Where the kernel itself decides which copy of a page stays (`UFFDIO_COPY`), a page may
/// go from free to complete without a claim. Then a claim won before, or at the same time,
/// may be of a page that is complete by now: its copy fails with `EEXIST`. So where an
/// alias is written, every installer has to claim.
///
/// All methods may be called from any thread.
///
/// ```
/// use afterimage_protocol::bitmap::Planes;
/// use afterimage_protocol::layout::{PageNumber, PageRange};
///
/// let planes = Planes::new(1000);
/// let mut mine = Vec::new();
/// planes.claim(PageRange::new(PageNumber(10), 5), |run| mine.push(run));
/// assert_eq!(mine, [PageRange::new(PageNumber(10), 5)]);
/// assert_eq!(planes.complete(mine[0], |_| ()), 5);
/// ```
#[derive(Debug)]
pub struct Planes<W = Box<[AtomicU64]>> {
    claimed: Bitmap<W>,
    complete: Bitmap<W>,
}

impl Planes {
    /// Planes in memory of their own, every page free.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        Self { claimed: Bitmap::new(pages), complete: Bitmap::new(pages) }
    }
}

impl<W: Words> Planes<W> {
    /// Planes in words that the caller supplies, with what they hold: [`words_for`]`(pages)`
    /// words each. After a restart call [`forget_claims`](Self::forget_claims).
    #[must_use]
    pub fn over(claimed: W, complete: W, pages: u64) -> Self {
        Self { claimed: Bitmap::over(claimed, pages), complete: Bitmap::over(complete, pages) }
    }

    /// How many pages there are.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.complete.pages()
    }

    /// What is known of a page.
    #[must_use]
    pub fn state(&self, page: PageNumber) -> PageState {
        if self.complete.test(page) {
            PageState::Complete
        } else if self.claimed.test(page) {
            PageState::Claimed
        } else {
            PageState::Free
        }
    }

    /// Whether a page is in place.
    #[must_use]
    pub fn is_complete(&self, page: PageNumber) -> bool {
        self.complete.test(page)
    }

    /// Claims the free pages of a range; `won` is called with each run that is now the
    /// caller's. Returns how many pages these are.
    pub fn claim(&self, range: PageRange, mut won: impl FnMut(PageRange)) -> u64 {
        let mut pages = 0;
        self.claimed.set_unpublished(range, |run| {
            // A page can be complete without a claim: see `give_back`.
            self.incomplete_in(run, |run| {
                pages += run.count;
                won(run);
            });
        });
        pages
    }

    /// Claims one page; `true` if it is now the caller's.
    pub fn claim_one(&self, page: PageNumber) -> bool {
        self.claim(PageRange::one(page), |_| ()) == 1
    }

    /// Gives claimed pages back that are not complete. Only their claimer may, and only
    /// when it will not write them any more.
    pub fn give_back(&self, range: PageRange) {
        for page in range.iter() {
            // A page that the kernel took from somebody else meanwhile keeps its claim, if
            // this look sees it. Where it does not, the page ends complete and unclaimed,
            // which `claim` knows.
            if !self.complete.test(page) {
                self.claimed.clear_one(page);
            }
        }
    }

    /// Marks pages complete, claimed or not; `newly` is called with each run that was not
    /// complete before. Returns how many pages these are.
    pub fn complete(&self, range: PageRange, newly: impl FnMut(PageRange)) -> u64 {
        // Claimed first: a page is never seen complete and free at once.
        self.claimed.set_unpublished(range, |_| ());
        self.complete.set_unpublished(range, newly)
    }

    /// Calls `missing` with each run of a range that is not complete.
    pub fn incomplete_in(&self, range: PageRange, mut missing: impl FnMut(PageRange)) {
        let mut rest = range;
        while let Some(run) = self.complete.first_clear_in(rest) {
            missing(run);
            rest = after(range, run);
        }
    }

    /// Calls `open` with each run of a range that is claimed and not complete.
    pub fn claimed_in(&self, range: PageRange, mut open: impl FnMut(PageRange)) {
        let mut rest = range;
        while let Some(run) = self.claimed.first_set_in(rest) {
            self.incomplete_in(run, &mut open);
            rest = after(range, run);
        }
    }

    /// Calls `there` with each run of a range that is complete.
    pub fn complete_in(&self, range: PageRange, mut there: impl FnMut(PageRange)) {
        let mut rest = range;
        while let Some(run) = self.complete.first_set_in(rest) {
            there(run);
            rest = after(range, run);
        }
    }

    /// How many pages are complete. Reads every word.
    #[must_use]
    pub fn complete_count(&self) -> u64 {
        self.complete.count()
    }

    /// The plane of complete pages, for its wire form and its runs.
    #[must_use]
    pub const fn completed(&self) -> &Bitmap<W> {
        &self.complete
    }

    /// Makes every page that is claimed but not complete free again. For a handler that
    /// takes planes over from a dead one, before it starts any thread.
    pub fn forget_claims(&self) {
        for index in 0..words_for(self.pages()) {
            let start = PageNumber(index as u64 * 64);
            let count = (self.pages() - start.0).min(64);
            self.give_back(PageRange::new(start, count));
        }
    }
}

/// What of `range` comes after `run`.
const fn after(range: PageRange, run: PageRange) -> PageRange {
    let next = run.start.0 + run.count;
    PageRange::new(PageNumber(next), range.start.0 + range.count - next)
}
