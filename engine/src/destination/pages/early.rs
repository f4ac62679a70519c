//! Early copies: pages that came while the guest still ran at the source.
//!
//! An early copy lies where the page will be, and counts (`current`) until the source says that
//! it is stale. Nothing of it is complete, so no fault is answered with it. Where memory has a
//! file it lies behind the alias and is not mapped; where it has none it is copied, and mapped,
//! because there is no other place for it: nobody may touch guest memory before the guest's
//! state is there. Invariants:
//!
//! - while early copies are taken (`Taking`), `current` is set only by whoever has claimed the
//!   page, wrote all of it, and finds under the gate that the pass it came with is still the
//!   newest; the acknowledgement is queued under the same gate;
//! - from the first `Stale` of a pass to its `Pass` no pass is the newest: a copy that is older
//!   than what is stale never counts;
//! - a current page is not written; where something is written that may not count, `there` says
//!   that the page is not empty, though not complete: whoever makes it zero empties it first;
//! - when memory is settled, every current page is complete for whoever looks: it is made so
//!   ([`promote`](Pages::promote)) before anybody decides anything by the planes, and in the
//!   course of time for all of them. Until then it costs nothing, however large memory is;
//! - that memory is settled, and what is current then, is kept where the planes are: a
//!   successor completes it. Before that a successor begins with no early copies, but knows
//!   that something lies in the pages of files.

mod arriving;
mod emptying;

use super::Pages;
use crate::destination::kept::KeptEarly;
use crate::sys::fill::Fill;
use crate::sys::mapping;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::{Bitmap, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use emptying::Emptying;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

/// Pages that are mapped in one go.
const MAP_STEP: u64 = 512;

/// No early copies are taken, and none are left.
const OFF: u64 = 0;
const TAKING: u64 = 1;
/// None are taken; those that were current are complete, or become so when somebody looks.
const PROMOTING: u64 = 2;

/// Which pages have early copies.
#[derive(Debug)]
pub(super) struct Early {
    /// The stage, those that count (`current`), and whether `there` was ever set.
    kept: KeptEarly,
    /// The pass whose copies are taken, 0 for none. Changed under the gate alone.
    pass: AtomicU16,
    there: Bitmap<LazyWords>,
    is_stopping: AtomicBool,
}

impl Early {
    pub(super) fn new(kept: KeptEarly, pages: u64) -> io::Result<Self> {
        Ok(Self {
            kept,
            pass: AtomicU16::new(0),
            there: Bitmap::over(LazyWords::new(pages)?, pages),
            is_stopping: AtomicBool::new(false),
        })
    }

    fn stage(&self) -> u64 {
        self.kept.stage().load(Ordering::Acquire)
    }

    fn enter(&self, stage: u64) {
        self.kept.stage().store(stage, Ordering::Release);
    }

    const fn current(&self) -> &Bitmap<LazyWords> {
        &self.kept.current
    }

    /// Whether something may lie in pages that are not complete.
    pub(super) fn has_old(&self) -> bool {
        self.kept.has_old().load(Ordering::Acquire) != 0
    }

    pub(super) fn is_taking(&self) -> bool {
        self.stage() == TAKING
    }

    /// To be asked under the gate, if the answer is to last.
    fn takes(&self, pass: u16) -> bool {
        pass != 0 && self.is_taking() && self.pass.load(Ordering::Acquire) == pass
    }

    /// Something lies, or is about to, where these pages are.
    pub(super) fn note_there(&self, pages: PageRange) {
        self.kept.has_old().store(1, Ordering::Release);
        self.there.set(pages, |_| ());
    }

    pub(super) fn note_empty(&self, pages: PageRange) {
        if self.has_old() {
            self.there.clear(pages, |_| ());
        }
    }
}

impl Pages {
    /// Whether early copies are taken: nothing is settled yet.
    pub(crate) fn is_taking_early(&self) -> bool {
        self.early.is_taking()
    }

    /// Early copies may come, of a pass that is still to be told. What is complete already (a
    /// successor finds it so) is here like them, and for good.
    ///
    /// # Errors
    /// There is no room to note them.
    pub(crate) fn take_early(&self) -> io::Result<()> {
        let _gate = self.discarding();
        self.memory.kept.reserve_early()?;
        self.early.pass.store(0, Ordering::Release);
        self.early.enter(TAKING);
        for run in self.planes.completed().runs() {
            self.early.current().set(run, |_| ());
        }
        Ok(())
    }

    /// Copies of this pass are taken from now on, and of no other.
    pub(crate) fn begin_pass(&self, pass: u16) {
        let _gate = self.discarding();
        self.early.pass.store(pass, Ordering::Release);
    }

    /// Early copies of these pages do not count any more, nor does any that is still coming,
    /// until the next pass begins.
    ///
    /// Emptying private memory takes its time: calls `meanwhile` now and then.
    pub(crate) fn stale(
        &self,
        range: PageRange,
        segment: &Segment,
        mut meanwhile: impl FnMut(),
    ) -> io::Result<()> {
        self.begin_pass(0);
        let mut emptying = Emptying::new(self);
        let decoded = segment.decode(range, |stale| {
            self.early.current().clear(stale, |_| ());
            for run in self.layout().split(stale) {
                // What has a file keeps its old content: the next copy is written over it.
                if self.file_of(&run).is_none() {
                    emptying.add(run.pages);
                }
            }
            if emptying.is_due() {
                emptying.empty();
                meanwhile();
            }
        });
        let emptied = emptying.end();
        decoded.map_err(io::Error::other)?;
        emptied
    }

    /// Memory is final: what is current is complete from now on, and nothing else that came.
    /// Whoever waited before looks again.
    pub(crate) fn settle(&self) {
        let gate = self.discarding();
        self.early.pass.store(0, Ordering::Release);
        self.early.enter(PROMOTING);
        drop(gate);
        self.memory.wake_all();
    }

    /// No early copy counts, and none will.
    pub(crate) fn forget_early(&self) -> io::Result<()> {
        let _gate = self.discarding();
        self.early.pass.store(0, Ordering::Release);
        self.leave_early();
        self.empty_old(self.all())
    }

    /// No early copies are taken or count any more. Their bitmap is not even read where there
    /// were none: in a file that would take up room.
    pub(super) fn leave_early(&self) {
        if self.early.stage() != OFF {
            // First: whoever takes over in between must find none that counts.
            self.early.current().clear(self.all(), |_| ());
            self.early.enter(OFF);
            self.memory.kept.release_early();
        }
    }

    /// The pages that are here: those of which an early copy counts, or once that is settled
    /// those that are complete.
    pub(crate) fn present(&self) -> &Bitmap<LazyWords> {
        if self.early.is_taking() { self.early.current() } else { self.planes.completed() }
    }

    /// Makes complete what of these pages is so already by an early copy. Comes before any
    /// decision by the planes.
    pub(crate) fn promote(&self, pages: PageRange) {
        if self.early.stage() != PROMOTING {
            return;
        }
        let end = pages.start.0 + pages.count;
        let mut rest = pages;
        while let Some(run) = self.early.current().first_set_in(rest) {
            // In this order: nobody may find a page neither current nor complete.
            self.mark_complete(run, &self.counters.early, |_| ());
            self.early.current().clear(run, |_| ());
            let next = run.start.0 + run.count;
            rest = PageRange::new(PageNumber(next), end - next);
        }
    }

    /// After [`settle`](Self::settle): makes everything complete that is so, and maps what lies
    /// in files before somebody faults on it, until [`stop_mapping`](Self::stop_mapping).
    pub(crate) fn map_early(&self) {
        let mut from = PageNumber(0);
        while let Some(run) = self.early.current().next_set(from, MAP_STEP) {
            if self.early.is_stopping.load(Ordering::Acquire) {
                return;
            }
            from = PageNumber(run.start.0 + run.count);
            self.promote(run);
            // Zero pages have nothing to map.
            let mut rest = run;
            while let Some(there) = self.early.there.first_set_in(rest) {
                let parts = self.layout().split(there);
                parts.filter(|part| self.file_of(part).is_some()).for_each(|part| {
                    self.map_complete(&part);
                });
                let next = there.start.0 + there.count;
                rest = PageRange::new(PageNumber(next), from.0 - next);
            }
        }
        self.early.enter(OFF);
        self.memory.kept.release_early();
    }

    fn map_complete(&self, run: &RegionRun) {
        let gate = self.installing();
        let filled = self.fill(Fill::Continue, run);
        drop(gate);
        // Whoever waits faults again, and is answered.
        if filled.stopped.is_some() || filled.holes > 0 || filled.present > 0 {
            self.wake(run);
        }
        self.note_alias_written(run.length);
    }

    pub(super) const fn all(&self) -> PageRange {
        PageRange::new(PageNumber(0), self.planes.pages())
    }

    /// [`map_early`](Self::map_early) ends soon.
    pub(crate) fn stop_mapping(&self) {
        self.early.is_stopping.store(true, Ordering::Release);
    }

    /// Empties pages in which something lies that does not count: they are missing afterwards.
    /// Nobody may be writing them.
    pub(super) fn empty_old(&self, pages: PageRange) -> io::Result<()> {
        if !self.early.has_old() {
            return Ok(());
        }
        let mut emptying = Emptying::new(self);
        emptying.add(pages);
        emptying.end()
    }

    /// Nothing may be left in pages that are about to be complete and zero, or free; `false` if
    /// something is.
    pub(super) fn empty_for_zero(&self, pages: PageRange) -> bool {
        let emptied = self.empty_old(pages);
        if let Err(error) = &emptied {
            tracing::error!(%error, %pages, "an older copy cannot be emptied: its pages stay missing");
        }
        emptied.is_ok()
    }

    /// Discarded pages, of which nobody writes an early copy.
    pub(super) fn forget_copies(&self, pages: PageRange) {
        if self.early.is_taking() {
            self.early.current().clear(pages, |_| ());
        }
        // Private memory is the VMM's to empty afterwards, who gives it up.
        let _ = self.empty_for_zero(pages);
    }

    /// Where private memory of this process lies, and how long it is.
    fn private(&self, run: &RegionRun) -> Option<(u64, u64)> {
        let local = self.layout().regions()[run.region].local?;
        Some((local.0 + run.offset, run.length))
    }

    fn zap(&self, run: &RegionRun) -> io::Result<()> {
        let Some((start, length)) = self.private(run) else {
            return Err(io::Error::other("memory of another process cannot be emptied"));
        };
        // SAFETY: who made the region promised that it is a private anonymous mapping to which
        // no reference is alive until the guest may run; these pages hold what nobody needs.
        unsafe { mapping::empty_private(start, length) }
    }
}
