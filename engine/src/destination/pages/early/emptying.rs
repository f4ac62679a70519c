//! Taking away what lies in pages and does not count.

use super::super::Pages;
use crate::sys::mapping;
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use std::io;

/// Runs of private memory that are emptied in one call: each call of its own would interrupt all
/// processors on which a thread of this process runs.
const AT_ONCE: usize = 512;

/// Empties pages of which [`there`](super::Early) says that something lies in them, and says so
/// no longer. Nobody may be writing them.
pub(super) struct Emptying<'p> {
    pages: &'p Pages,
    /// To be emptied together, no more than [`AT_ONCE`].
    waiting: Vec<RegionRun>,
    error: Option<io::Error>,
}

impl<'p> Emptying<'p> {
    pub(super) const fn new(pages: &'p Pages) -> Self {
        Self { pages, waiting: Vec::new(), error: None }
    }

    /// These too, by the [end](Self::end) at the latest.
    pub(super) fn add(&mut self, range: PageRange) {
        let end = range.start.0 + range.count;
        let mut rest = range;
        while let Some(old) = self.pages.early.there.first_set_in(rest) {
            for run in self.pages.layout().split(old) {
                let Some(file) = self.pages.file_of(&run) else {
                    if self.is_due() {
                        self.empty();
                    }
                    self.waiting.push(run);
                    continue;
                };
                self.pages.empty_file_pages(run.pages, file);
                self.pages.early.note_empty(run.pages);
            }
            let next = old.start.0 + old.count;
            rest = PageRange::new(PageNumber(next), end - next);
        }
    }

    /// Whether enough of them wait to be emptied.
    pub(super) const fn is_due(&self) -> bool {
        self.waiting.len() >= AT_ONCE
    }

    /// Empties those that wait.
    pub(super) fn empty(&mut self) {
        let runs = &self.waiting;
        let ranges: Option<Vec<_>> = runs.iter().map(|run| self.pages.private(run)).collect();
        // SAFETY: as for `zap`.
        let done = ranges.map_or(0, |it| unsafe { mapping::empty_private_at_once(&it) });
        let (emptied, others) = runs.split_at(done);
        for run in emptied {
            self.pages.early.note_empty(run.pages);
        }
        for run in others {
            match self.pages.zap(run) {
                Ok(()) => self.pages.early.note_empty(run.pages),
                Err(error) => drop(self.error.get_or_insert(error)),
            }
        }
        self.waiting.clear();
    }

    /// Empties what is left.
    ///
    /// # Errors
    /// Some page could not be emptied; what lies there stays noted.
    pub(super) fn end(mut self) -> io::Result<()> {
        self.empty();
        self.error.map_or(Ok(()), Err)
    }
}
