//! Precopy at the source: what the guest has written, what the destination is told of it, and
//! when a pass begins.

use super::SourceHost;
use crate::mutant::Mutant;
use crate::network::Side;
use crate::world::World;
use afterimage_protocol::bitmap::{Bitmap, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::ControlFrame;
use std::collections::BTreeSet;

/// What a driver keeps for the passes.
#[derive(Debug, Default)]
pub(crate) struct Passes {
    /// What the guest has written since this was collected last: the tracker's.
    pub(crate) written: BTreeSet<PageNumber>,
    /// What the destination was known to have at the end of the connection before, and was not
    /// written by then.
    vouched: BTreeSet<PageNumber>,
    /// The book is that of a destination that was told what is stale in it.
    pub(crate) is_told: bool,
    /// The next pages to be told of are the first on this connection.
    is_first: bool,
    /// Pages told as stale, until the pass was taken in: acknowledgements of these are of older
    /// copies.
    told: BTreeSet<PageNumber>,
    /// The pass whose pages may leave.
    pub(crate) open: Option<u16>,
    /// How many have ended that this process began.
    pub(crate) ended: u64,
}

impl SourceHost {
    /// The destination has attached, and what it has follows: what was known of it is kept.
    pub(super) fn reset_book(&mut self, is_same_memory: bool) {
        let passes = &mut self.passes;
        if !is_same_memory {
            passes.vouched.clear();
        } else if passes.is_told {
            let pages = (0..self.book.pages()).map(PageNumber);
            passes.vouched = pages.filter(|page| self.book.is_acked(*page)).collect();
        }
        passes.is_told = false;
        self.book.reset();
    }

    /// What the destination has is in the book.
    pub(super) fn book_is_complete(&mut self) {
        (self.passes.is_first, self.passes.is_told) = (true, true);
    }

    /// The connection has ended.
    pub(super) fn end_passes(&mut self) {
        self.passes.open = None;
        self.passes.told.clear();
    }

    /// Which of these acknowledgements are of copies that count.
    pub(super) fn heed(&self, runs: &[PageRange]) -> Vec<PageRange> {
        let pages = runs.iter().flat_map(PageRange::iter);
        pages.filter(|page| !self.passes.told.contains(page)).map(PageRange::one).collect()
    }
}

impl World {
    pub(super) fn tell_stale(&mut self) {
        let forgets_last =
            self.breaks(Mutant::LastWritesNotTold) && self.source.session.is_frozen();
        let vouches_for_all = self.breaks(Mutant::VouchForEverything);
        let source = &mut self.source;
        let written = std::mem::take(&mut source.passes.written);
        source.passes.vouched.retain(|page| !written.contains(page));
        let mut stale = if forgets_last { BTreeSet::new() } else { written };
        if std::mem::take(&mut source.passes.is_first) {
            let vouched = &source.passes.vouched;
            stale = (0..source.book.pages()).map(PageNumber).collect();
            stale.retain(|page| source.book.is_acked(*page) && !vouched.contains(page));
            if vouches_for_all {
                stale.clear();
            }
        }
        source.passes.open = None;
        let bits = Bitmap::new(source.book.pages());
        for page in &stale {
            source.book.reopen(PageRange::one(*page));
            source.ever_acked.remove(page);
            bits.set_one(*page);
        }
        self.note(|| format!("source tells as stale: {stale:?}"));
        if !stale.is_empty() {
            let range = PageRange::new(PageNumber(0), self.plan.pages);
            let segment = Segment::encode(&bits, range);
            self.send_control_from_source(ControlFrame::Stale { range, segment });
        }
        if !self.breaks(Mutant::StaleAckHeeded) {
            self.source.passes.told.extend(stale);
        }
    }

    /// A pass was taken in: its pages may leave.
    pub(super) fn open_pass(&mut self, number: u16) {
        crate::checks::i4_nothing_under_way(self);
        self.source.passes.told.clear();
        self.source.passes.open = Some(number);
        if number > 1 {
            self.situation("another pass began");
        }
    }

    /// The last pass was taken in: what was under way counts no more.
    pub(super) fn settled(&mut self) {
        self.source.passes.told.clear();
        let mut are_lost = false;
        for data in self.source.channels.values_mut() {
            are_lost |= !data.shadow.is_empty();
            data.in_flight.requeue(&self.source.book);
            data.shadow.clear();
        }
        if are_lost {
            self.situation("pages were under way when memory became final");
        }
    }

    /// A pass ends when all of it has arrived; the next one begins, if more are wanted.
    pub(crate) fn end_pass(&mut self) {
        let source = &self.source;
        let is_done = source.book.acked_pages() == self.plan.pages
            && source.channels.values().all(|data| data.in_flight.is_empty());
        let may = source.passes.open.is_some()
            && source.passes.ended < self.plan.passes
            && !source.session.is_frozen()
            && !self.is_idle(Side::Source);
        let hurries = self.breaks(Mutant::PassBeforeAcknowledged) && self.random.chance(300);
        if !may || !(is_done || hurries) {
            return;
        }
        self.source.passes.ended += 1;
        if self.source.passes.ended < self.plan.passes {
            let begun = self.with_source("next pass", |session, _| session.next_pass());
            debug_assert!(begun.is_ok(), "a pass is open");
        }
    }
}
