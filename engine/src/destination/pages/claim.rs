//! Background pieces: claimed before they are received, placed after, given back if the
//! channel breaks in between.

use super::hold::{Place, pass};
use super::{InstallError, Pages, populate};
use crate::destination::memory::RegionFile;
use crate::sys::fill::{Fill, Stopped};
use crate::sys::mapping::RawRun;
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a copy waits before it looks again whether an event has been read.
const EVENT_WAIT: Duration = Duration::from_micros(50);

/// Pages that one thread has claimed and is about to receive. Dropped without
/// [`finish`](Self::finish), it gives them back; it must not be dropped while anything still
/// writes to its [`targets`](Self::targets).
#[derive(Debug)]
#[must_use = "a claim that is dropped at once was claimed for nothing"]
pub(crate) struct Claim<'p> {
    pages: &'p Pages,
    run: RegionRun,
    /// The runs that this claim won, in order; the rest of the piece belongs to others.
    won: Vec<PageRange>,
    /// The precopy pass that the piece came with.
    pass: Option<u16>,
}

/// Where the bytes of a piece go, in the order in which they arrive.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// Straight into memory, claimed by this claim.
    Memory(RawRun),
    /// Nowhere: somebody else brings these pages.
    Nowhere(u64),
}

impl Pages {
    /// Claims what is free of a piece inside one region.
    pub(crate) fn claim(&self, piece: PageRange) -> Claim<'_> {
        self.promote(piece);
        let run = self.run_of(piece);
        debug_assert_eq!(run.pages, piece, "a piece lies in one region");
        let mut won = Vec::new();
        let count = self.planes.claim(piece, |run| won.push(run));
        self.counters.duplicate.fetch_add(piece.count - count, Ordering::Relaxed);
        Claim { pages: self, run, won, pass: None }
    }
}

impl<'p> Claim<'p> {
    /// What an early piece has won.
    pub(super) fn early(
        pages: &'p Pages,
        piece: PageRange,
        won: Vec<PageRange>,
        pass: u16,
    ) -> Self {
        Self { pages, run: pages.run_of(piece), won, pass: Some(pass) }
    }

    /// Whether it won nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.won.is_empty()
    }

    /// The runs that it won, which are the caller's affair now.
    pub(super) fn take(&mut self) -> Vec<PageRange> {
        std::mem::take(&mut self.won)
    }
}

impl Claim<'_> {
    /// Where to receive the piece: `None` if it shall be received into staging, as a whole.
    ///
    /// # Errors
    /// [`InstallError::NoMemory`] where there is nothing behind the alias.
    pub(crate) fn targets(&self) -> Result<Option<Vec<Target>>, InstallError> {
        let Some(file) = self.pages.file_of(&self.run) else { return Ok(None) };
        let page_bytes = self.pages.page_bytes(&self.run);
        let mut targets = Vec::with_capacity(2 * self.won.len() + 1);
        let mut at = 0;
        for won in &self.won {
            let offset = self.offset_in_piece(won);
            if offset > at {
                targets.push(Target::Nowhere(offset - at));
            }
            let length = won.count * page_bytes;
            populate(&self.pages.run_of(*won), file)?;
            targets.push(Target::Memory(file.alias.run(self.run.offset + offset, length)));
            at = offset + length;
        }
        if at < self.run.length {
            targets.push(Target::Nowhere(self.run.length - at));
        }
        Ok(Some(targets))
    }

    fn offset_in_piece(&self, won: &PageRange) -> u64 {
        (won.start.0 - self.run.pages.start.0) * self.pages.page_bytes(&self.run)
    }

    /// Puts the piece in place, all of whose bytes have arrived: in its targets, or in
    /// `staging`. Calls `complete` with the runs that this made complete, or current if the piece
    /// is an early one; they may be acknowledged, and of an early piece before it returns. May wait for the fault thread to read an event.
    ///
    /// # Errors
    /// [`InstallError`]; pages that were not placed are given back.
    pub(crate) fn finish(
        mut self,
        staging: &[u8],
        mut complete: impl FnMut(PageRange),
    ) -> Result<(), InstallError> {
        while let Some(&won) = self.won.first() {
            let run = self.pages.run_of(won);
            match self.pages.file_of(&run) {
                Some(file) => match self.pass {
                    Some(pass) => {
                        self.pages.finish_early_alias(&run, file, pass, &mut complete);
                    }
                    None => self.finish_alias(&run, file, &mut complete),
                },
                None => {
                    let from = self.offset_in_piece(&won) as usize;
                    let content = &staging[from..from + run.length as usize];
                    match self.pass {
                        Some(pass) => {
                            self.pages.finish_early_copy(&run, content, pass, &mut complete)?;
                        }
                        None => self.finish_copy(&run, content, &mut complete)?,
                    }
                }
            }
            self.won.remove(0);
        }
        Ok(())
    }

    fn finish_alias(
        &self,
        run: &RegionRun,
        file: &RegionFile,
        complete: &mut impl FnMut(PageRange),
    ) {
        let gone = self.pages.show(run, file, &self.pages.counters.background);
        self.pages.counters.duplicate.fetch_add(gone, Ordering::Relaxed);
        complete(run.pages);
    }

    fn finish_copy(
        &self,
        run: &RegionRun,
        content: &[u8],
        complete: &mut impl FnMut(PageRange),
    ) -> Result<(), InstallError> {
        let pages = self.pages;
        let page_bytes = pages.page_bytes(run);
        let (mut next, mut placed) = (run.pages.start, 0);
        let end = PageNumber(run.pages.start.0 + run.pages.count);
        while next < end {
            let gate = pages.installing();
            // An urgent copy or a discard may have been quicker, and may be at every look.
            let Some(missing) = first_incomplete(pages, next, end) else { break };
            let part = pages.run_of(missing);
            let from = ((missing.start.0 - run.pages.start.0) * page_bytes) as usize;
            pass(Place::Looked);
            let filled = pages.fill(Fill::Copy(&content[from..from + part.length as usize]), &part);
            let reached = filled.reached() / page_bytes;
            let mut newly = Vec::new();
            if reached > 0 {
                pass(Place::Copied);
                let reached = PageRange::new(missing.start, reached);
                let counter = &pages.counters.background;
                placed += pages.mark_complete(reached, counter, |run| newly.push(run));
            }
            drop(gate);
            // Not under the gate: who is told may have to wait, and reading events with it.
            newly.into_iter().for_each(&mut *complete);
            next = PageNumber(missing.start.0 + reached);
            match filled.stopped {
                None => {}
                Some(Stopped::EventPending) if pages.is_unread.load(Ordering::Acquire) => {
                    return Err(InstallError::NoReader { page: next });
                }
                // Only the fault thread reads events. A timer rather than a wake-up: an
                // event can be read between the refusal and our going to sleep.
                Some(Stopped::EventPending) => std::thread::sleep(EVENT_WAIT),
                Some(stopped) => return Err(pages.install_error(&part, filled.reached(), stopped)),
            }
        }
        pages.counters.duplicate.fetch_add(run.pages.count - placed, Ordering::Relaxed);
        Ok(())
    }
}

fn first_incomplete(pages: &Pages, from: PageNumber, end: PageNumber) -> Option<PageRange> {
    let mut found = None;
    let whole = PageRange::new(from, end.0 - from.0);
    pages.planes.incomplete_in(whole, |run| {
        found.get_or_insert(run);
    });
    found
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        for &won in &self.won {
            let run = self.pages.run_of(won);
            if let Some(file) = self.pages.file_of(&run) {
                // Half a page may have been written; it must not be found there later by
                // whoever learns that the page is zero. A page that was shown already (the
                // thread panics) is the guest's.
                let mut unshown = Vec::new();
                self.pages.planes.incomplete_in(won, |run| unshown.push(run));
                for pages in unshown {
                    self.pages.give_back_file_pages(pages, file);
                }
            } else {
                self.pages.planes.give_back(won);
            }
            self.pages.wake(&run);
        }
    }
}

impl Pages {
    /// Gives back pages of a file: emptied, and complete where they were discarded while
    /// they were claimed.
    pub(super) fn give_back_file_pages(&self, pages: PageRange, file: &RegionFile) {
        self.empty_file_pages(pages, file);
        pass(Place::Emptied);
        let mut gate = self.discarding();
        for page in pages.iter() {
            if gate.contains(page) {
                // In this order: whoever takes over in between must not find it forgotten.
                self.mark_complete(PageRange::one(page), &self.counters.discarded, |_| ());
                pass(Place::GivenBack);
                gate.remove(page);
            }
        }
        self.planes.give_back(pages);
    }
}
