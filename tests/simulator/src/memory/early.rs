//! Early copies: what came while the guest still ran at the source. `pages/early.rs` in the
//! engine.
//!
//! An early copy lies where its page will be. It counts (`current`) only if the pass it came
//! with is still the newest when all of it is there, and until the source says that it is stale.
//! Nobody may read it before everything is settled; then what counts is complete. What does not
//! count stays behind the alias (`old`), so a page that turns out to be zero is emptied first;
//! where memory is copied it is thrown away at once, because it would be mapped.
//!
//! None of this but content outlives the process.

use super::{Memory, Piece, Stage};
use crate::mutant::Mutant;
use afterimage_protocol::bitmap::{Bitmap, PageState, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::collections::BTreeSet;

#[derive(Debug, Default)]
pub(crate) struct Early {
    /// The pass whose copies count.
    pass: Option<u16>,
    /// Pages of which there is a copy that counts.
    pub(crate) current: BTreeSet<PageNumber>,
    /// Pages behind the alias that may not be empty though they are not complete.
    pub(super) old: BTreeSet<PageNumber>,
    /// What counted and was forgotten, with whoever knew of it: for the checks.
    pub(crate) forgotten: BTreeSet<PageNumber>,
}

impl Memory {
    /// Whether copies of this pass count.
    pub(crate) fn takes(&self, pass: u16) -> bool {
        self.early.pass == Some(pass)
            || (self.early.pass.is_some() && self.breaks(Mutant::PassNumberIgnored))
    }

    /// The newest pass that was taken in.
    pub(crate) const fn newest_pass(&self) -> Option<u16> {
        self.early.pass
    }

    /// Copies of this pass count from now on, and of no other.
    pub(crate) const fn begin_pass(&mut self, pass: Option<u16>) {
        self.early.pass = pass;
    }

    /// Copies of these pages are out of date, and none counts until the next pass.
    pub(crate) fn stale(&mut self, pages: PageRange) {
        for page in pages.iter() {
            if self.planes.is_complete(page) {
                continue;
            }
            self.early.current.remove(&page);
            self.early.forgotten.remove(&page);
            self.throw_away(page);
        }
    }

    /// Where memory is copied, what does not count may not stay mapped.
    fn throw_away(&mut self, page: PageNumber) {
        if !self.is_alias(page) {
            let at = page.0 as usize;
            (self.content[at], self.is_mapped[at]) = (None, false);
        }
    }

    /// Memory is final: what counts is complete, and was acknowledged before.
    pub(crate) fn settle(&mut self) {
        self.early.pass = None;
        for page in std::mem::take(&mut self.early.current) {
            self.planes.complete(PageRange::one(page), |_| ());
        }
    }

    /// No early copy counts any more, or is known. With `is_unused` no guest has run here, so
    /// that only early copies lie where nothing is complete.
    pub(crate) fn forget_early(&mut self, is_unused: bool) {
        if !self.does_precopy {
            return;
        }
        self.early.pass = None;
        let current = std::mem::take(&mut self.early.current);
        self.early.forgotten.extend(current);
        let pages = (0..self.planes.pages()).map(PageNumber);
        let open: Vec<_> = pages.filter(|page| !self.planes.is_complete(*page)).collect();
        for page in open {
            if self.is_alias(page) {
                self.early.old.insert(page);
            } else if is_unused && !self.breaks(Mutant::OldCopiesKept) {
                self.throw_away(page);
            }
        }
    }

    /// What is here, as a destination says when it attaches.
    pub(crate) fn here(&self) -> Segment {
        let here = Bitmap::new(self.planes.pages());
        for run in self.planes.completed().runs() {
            here.set(run, |_| ());
        }
        for page in &self.early.current {
            here.set_one(*page);
        }
        Segment::encode(&here, PageRange::new(PageNumber(0), self.planes.pages()))
    }

    /// Whether a page has come, for good or for now.
    pub(crate) fn is_here(&self, page: PageNumber) -> bool {
        self.planes.is_complete(page) || self.early.current.contains(&page)
    }

    /// What lies where a page is, or will be.
    pub(crate) fn lies(&self, page: PageNumber) -> u64 {
        self.content[page.0 as usize].unwrap_or(0)
    }

    /// An early piece is taken on as soon as nobody else writes any of it.
    pub(crate) const fn begin_early(pages: PageRange, values: Vec<u64>, pass: u16) -> Piece {
        Piece { pages, values, won: Vec::new(), pass: Some(pass), stage: Stage::Waits }
    }

    fn counts(&self, piece: &Piece) -> bool {
        piece.pass.is_some_and(|pass| self.takes(pass))
    }

    /// Claims what does not count yet of an early piece. `true` if that was all.
    pub(super) fn claim_early(&mut self, piece: &mut Piece) -> bool {
        if !self.counts(piece) {
            return true;
        }
        let (here, open): (Vec<_>, Vec<_>) =
            piece.pages.iter().partition(|page| self.is_here(*page));
        if open.iter().any(|page| self.planes.state(*page) == PageState::Claimed) {
            return false;
        }
        self.to_acknowledge.extend(here.into_iter().map(PageRange::one));
        for page in open {
            self.planes.claim_one(page);
            piece.won.push(PageRange::one(page));
        }
        if piece.values.iter().all(|value| *value == 0) {
            self.finish_early(piece);
            return true;
        }
        let first_alias = self.first_alias;
        let written = piece.won.iter().map(|run| run.start);
        self.early.old.extend(written.filter(|page| page.0 >= first_alias));
        piece.stage = Stage::Claimed;
        false
    }

    /// All of an early piece has come.
    pub(super) fn finish_early(&mut self, piece: &Piece) {
        let counts = self.counts(piece);
        for &run in &piece.won {
            let page = run.start;
            let at = page.0 as usize;
            if self.discarded_in_flight.remove(&page) {
                self.content[at] = None;
                self.mark_complete(run);
            }
            if counts && !self.planes.is_complete(page) {
                self.put_early(page, piece.values[(page.0 - piece.pages.start.0) as usize]);
                self.early.current.insert(page);
                self.to_acknowledge.push(run);
            }
            self.planes.give_back(run);
            // It may have been settled meanwhile.
            self.woken.push(page);
        }
    }

    /// Behind the alias content is in place by now.
    fn put_early(&mut self, page: PageNumber, value: u64) {
        let at = page.0 as usize;
        if value == 0 {
            self.empty_old(page);
        } else if !self.is_alias(page) {
            (self.content[at], self.is_mapped[at]) = (Some(value), true);
        }
    }

    /// The process dies when it has copied an early piece, and before it counts.
    pub(super) fn place_half_early(&mut self, piece: &Piece) {
        for page in piece.won.iter().flat_map(PageRange::iter) {
            if self.counts(piece) && !self.is_alias(page) {
                self.put_early(page, piece.values[(page.0 - piece.pages.start.0) as usize]);
            }
        }
    }

    /// A page is zero, or reads so: nothing else may lie there.
    pub(super) fn empty_old(&mut self, page: PageNumber) {
        if self.early.old.remove(&page) && !self.breaks(Mutant::ZeroOverOldCopy) {
            self.content[page.0 as usize] = None;
        }
    }
}
