//! The destination's memory: what is in place, who may put it there.
//!
//! Mirrors `engine/src/destination/pages.rs` and `pages/claim.rs`: region 0 is copied and
//! the kernel arbitrates; region 1 is written through an alias, only by who has claimed it,
//! and shown with CONTINUE. Planes, memory, the set of pages discarded while they were being
//! written and the buffer into which events are read outlive the process, as if a keeper
//! held them; events that nobody has read outlive it in the kernel.
//!
//! A discard is an event: while it is unread no page can be placed, whoever discards waits,
//! and as soon as it has been read the pages are gone. Until it is in the planes nothing may
//! be placed either, which is the gate in the engine.

mod early;

use crate::mutant::Mutant;
use crate::network::Side;
use crate::plan::Plan;
use afterimage_protocol::bitmap::{PageState, Planes};
use afterimage_protocol::layout::{PageNumber, PageRange};
use early::Early;
use std::collections::{BTreeSet, VecDeque};

/// What half a page looks like.
pub(crate) const HALF: u64 = u64::MAX;

#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) planes: Planes,
    /// Pages below this one are copied, the rest written through an alias.
    pub(crate) first_alias: u64,
    /// What lies there: anonymous memory, or the page cache of the file.
    content: Vec<Option<u64>>,
    /// What the guest has mapped.
    is_mapped: Vec<bool>,
    pub(crate) discarded_in_flight: BTreeSet<PageNumber>,
    /// Discards that wait in the kernel to be read.
    pub(crate) unread: VecDeque<Removal>,
    /// A discard that has been read and is not in the planes yet.
    pub(crate) buffer: Option<PageNumber>,
    /// What was ever given back by this process: for the checks.
    pub(crate) given_back: BTreeSet<PageNumber>,
    /// Pages of the last piece that broke off, which it is most awkward to discard.
    pub(crate) interrupted: Vec<PageNumber>,
    /// Complete and not yet acknowledged.
    pub(crate) to_acknowledge: Vec<PageRange>,
    /// Whoever waits for these looks again.
    pub(crate) woken: Vec<PageNumber>,
    pub(crate) early: Early,
    /// Early copies may have come to whoever had this memory before.
    does_precopy: bool,
    mutant: Option<Mutant>,
}

/// A page that a vCPU discards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removal {
    pub(crate) page: PageNumber,
    /// `MADV_DONTNEED` on shared memory: what has arrived stays in the file.
    pub(crate) keeps: bool,
    pub(crate) vcpu: usize,
}

/// A background piece that is coming in.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) pages: PageRange,
    pub(crate) values: Vec<u64>,
    pub(crate) won: Vec<PageRange>,
    /// The pass that it came with, if it is an early copy.
    pub(crate) pass: Option<u16>,
    pub(crate) stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Until nobody else writes any of it: early copies only.
    Waits,
    Claimed,
    Half,
    Received,
    /// Only with [`Mutant::DiscardWithoutGate`]: these were found missing a step ago.
    Looked(Vec<PageNumber>),
}

impl Memory {
    pub(crate) fn new(plan: &Plan, mutant: Option<Mutant>) -> Self {
        let pages = plan.pages;
        Self {
            planes: Planes::new(pages),
            first_alias: plan.first_alias,
            does_precopy: plan.can_precopy[Side::Destination as usize],
            content: vec![None; pages as usize],
            is_mapped: vec![false; pages as usize],
            discarded_in_flight: BTreeSet::new(),
            unread: VecDeque::new(),
            buffer: None,
            given_back: BTreeSet::new(),
            interrupted: Vec::new(),
            to_acknowledge: Vec::new(),
            woken: Vec::new(),
            early: Early::default(),
            mutant,
        }
    }

    fn breaks(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(crate) const fn is_alias(&self, page: PageNumber) -> bool {
        page.0 >= self.first_alias
    }

    /// What the guest would read, if it would not fault.
    pub(crate) fn visible(&self, page: PageNumber) -> Option<u64> {
        let at = page.0 as usize;
        self.content[at].filter(|_| self.is_mapped[at])
    }

    pub(crate) fn write(&mut self, page: PageNumber, value: u64) {
        self.content[page.0 as usize] = Some(value);
    }

    fn mark_complete(&mut self, pages: PageRange) {
        let newly = &mut self.to_acknowledge;
        self.planes.complete(pages, |run| newly.push(run));
        self.woken.extend(pages.iter());
    }

    fn place(&mut self, page: PageNumber, value: u64) {
        let at = page.0 as usize;
        // EEXIST: what is there stays.
        if self.content[at].is_none() {
            (self.content[at], self.is_mapped[at]) = (Some(value), true);
        }
    }

    /// Takes a piece on, before any of it is received.
    pub(crate) fn begin(&mut self, pages: PageRange, values: Vec<u64>) -> Piece {
        let mut won = Vec::new();
        let claims_late = self.breaks(Mutant::ClaimAfterWrite) && self.is_alias(pages.start);
        if claims_late {
            won.push(pages);
        } else {
            self.planes.claim(pages, |run| won.push(run));
        }
        if self.breaks(Mutant::AckBeforeComplete) {
            self.to_acknowledge.extend(won.iter().copied());
        }
        Piece { pages, values, won, pass: None, stage: Stage::Claimed }
    }

    /// Whether a discard has been read and not entered: nothing may be placed.
    pub(crate) const fn is_gated(&self) -> bool {
        self.buffer.is_some()
    }

    /// Whether the kernel refuses to place pages, because an event is unread.
    pub(crate) fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// Receives some more of a piece. `true` once it is in place.
    pub(crate) fn advance(&mut self, piece: &mut Piece) -> bool {
        let is_alias = self.is_alias(piece.pages.start);
        let has_to_wait = self.is_gated() || (self.has_unread() && !is_alias);
        match &piece.stage {
            Stage::Waits => self.claim_early(piece),
            Stage::Claimed | Stage::Half => {
                let is_half = piece.stage == Stage::Claimed;
                if is_alias {
                    for page in piece.won.iter().flat_map(PageRange::iter) {
                        let value = piece.values[(page.0 - piece.pages.start.0) as usize];
                        self.write(page, if is_half { HALF } else { value });
                    }
                }
                piece.stage = if is_half { Stage::Half } else { Stage::Received };
                false
            }
            Stage::Received if has_to_wait => false,
            Stage::Received if piece.pass.is_some() => {
                self.finish_early(piece);
                true
            }
            Stage::Received if is_alias => {
                if self.breaks(Mutant::ClaimAfterWrite) {
                    piece.won.clear();
                    self.planes.claim(piece.pages, |run| piece.won.push(run));
                }
                for run in &piece.won {
                    self.show(*run);
                }
                true
            }
            Stage::Received => {
                let missing = self.missing(piece);
                if self.breaks(Mutant::DiscardWithoutGate) {
                    piece.stage = Stage::Looked(missing);
                    return false;
                }
                self.place_all(piece, &missing);
                true
            }
            Stage::Looked(missing) => {
                self.place_all(piece, missing);
                true
            }
        }
    }

    fn missing(&self, piece: &Piece) -> Vec<PageNumber> {
        let won = piece.won.iter().flat_map(PageRange::iter);
        won.filter(|page| !self.planes.is_complete(*page)).collect()
    }

    fn place_all(&mut self, piece: &Piece, missing: &[PageNumber]) {
        for &page in missing {
            self.place(page, piece.values[(page.0 - piece.pages.start.0) as usize]);
            self.mark_complete(PageRange::one(page));
        }
    }

    /// Shows claimed pages of the alias: complete, then CONTINUE, which the kernel refuses
    /// while an event is unread; whoever waits is answered from the planes then.
    fn show(&mut self, pages: PageRange) {
        for page in pages.iter() {
            if self.discarded_in_flight.remove(&page) {
                self.content[page.0 as usize] = None;
            }
            let is_there = self.content[page.0 as usize].is_some();
            self.is_mapped[page.0 as usize] = is_there && !self.has_unread();
        }
        self.mark_complete(pages);
    }

    /// The process dies in the middle of placing a piece: behind the alias when its pages are
    /// complete and not shown, else when they are copied and not complete.
    pub(crate) fn place_half(&mut self, piece: &Piece) {
        if piece.pass.is_some() {
            self.place_half_early(piece);
        } else if self.is_alias(piece.pages.start) {
            for run in &piece.won {
                for page in run.iter().filter(|page| self.discarded_in_flight.contains(page)) {
                    self.content[page.0 as usize] = None;
                }
                self.planes.complete(*run, |_| ());
            }
        } else {
            for page in self.missing(piece) {
                self.place(page, piece.values[(page.0 - piece.pages.start.0) as usize]);
            }
        }
    }

    /// The channel of a piece has died.
    pub(crate) fn give_back(&mut self, piece: &Piece) {
        self.interrupted = piece.won.iter().flat_map(PageRange::iter).collect();
        self.given_back.extend(&self.interrupted);
        for run in &piece.won {
            if self.is_alias(run.start) {
                self.empty(*run, Mutant::ZeroWithoutEmptying);
            }
            self.planes.give_back(*run);
            if !self.breaks(Mutant::NoWakeOnGiveBack) {
                self.woken.extend(run.iter());
            }
        }
    }

    /// Half pages behind the alias are emptied, unless that is the rule that is broken; what
    /// was discarded meanwhile is complete.
    fn empty(&mut self, pages: PageRange, unless: Mutant) {
        for page in pages.iter() {
            if self.planes.is_complete(page) {
                continue;
            }
            if !self.breaks(unless) {
                self.content[page.0 as usize] = None;
            }
            if self.discarded_in_flight.remove(&page) {
                self.mark_complete(PageRange::one(page));
            }
        }
    }

    /// A page that was asked for.
    pub(crate) fn urgent(&mut self, page: PageNumber, value: u64) {
        if self.is_alias(page) {
            if self.planes.claim_one(page) {
                self.write(page, value);
                self.show(PageRange::one(page));
            } else if self.planes.is_complete(page) {
                self.woken.push(page);
            }
        } else if self.planes.is_complete(page) {
            self.woken.push(page);
        } else {
            self.place(page, value);
            self.mark_complete(PageRange::one(page));
        }
    }

    /// Pages that are zero at the source.
    pub(crate) fn zero(&mut self, pages: PageRange) {
        let mut won = Vec::new();
        self.planes.claim(pages, |run| won.push(run));
        for run in won {
            run.iter().for_each(|page| self.empty_old(page));
            self.mark_complete(run);
        }
    }

    /// The VMM gives a page up (`Destination::discard`), then frees it.
    pub(crate) fn discard(&mut self, page: PageNumber) {
        self.forget(page);
        (self.content[page.0 as usize], self.is_mapped[page.0 as usize]) = (None, false);
    }

    /// An event is read, into the buffer: whoever discarded goes on, and the page is gone
    /// (`MADV_DONTNEED` on private memory, `MADV_REMOVE`), or unmapped only (`MADV_DONTNEED`
    /// on shared memory). Returns it, and whether the page reads as zero from now on.
    pub(crate) fn read_removal(&mut self) -> Option<(Removal, bool)> {
        let removal = self.unread.pop_front()?;
        let Removal { page, keeps, .. } = removal;
        self.buffer = Some(page);
        self.is_mapped[page.0 as usize] = false;
        let is_zero = !keeps || !self.planes.is_complete(page);
        if !keeps {
            self.content[page.0 as usize] = None;
        }
        Some((removal, is_zero))
    }

    /// What has been read is entered in the planes.
    pub(crate) fn enter_removal(&mut self) -> Option<PageNumber> {
        let page = self.buffer.take()?;
        self.forget(page);
        self.woken.push(page);
        Some(page)
    }

    fn forget(&mut self, page: PageNumber) {
        match self.planes.state(page) {
            PageState::Claimed if self.is_alias(page) => {
                self.discarded_in_flight.insert(page);
            }
            PageState::Complete => self.mark_complete(PageRange::one(page)),
            PageState::Claimed | PageState::Free => {
                self.empty_old(page);
                self.mark_complete(PageRange::one(page));
            }
        }
    }

    /// Answers a fault whose page is complete: what is there is shown, or zero.
    pub(crate) fn answer(&mut self, page: PageNumber) {
        let at = page.0 as usize;
        self.content[at].get_or_insert(0);
        self.is_mapped[at] = true;
        self.woken.push(page);
    }

    /// Another process takes over from a dead one: discards that were read are entered, half
    /// pages emptied, claims and early copies forgotten. `is_unused` if no guest has run here.
    pub(crate) fn take_over(&mut self, is_unused: bool) {
        if self.breaks(Mutant::EventBufferLost) {
            self.buffer = None;
        }
        self.enter_removal();
        if self.breaks(Mutant::DiscardsForgotten) {
            self.discarded_in_flight.clear();
        }
        for number in self.first_alias..self.planes.pages() {
            if self.planes.state(PageNumber(number)) == PageState::Claimed {
                let page = PageRange::one(PageNumber(number));
                self.empty(page, Mutant::TakeoverWithoutEmptying);
            }
        }
        // Those that were complete already, and not taken off the list yet.
        self.discarded_in_flight.clear();
        if !self.breaks(Mutant::ClaimsKeptAtTakeover) {
            self.planes.forget_claims();
        }
        self.to_acknowledge.clear();
        self.given_back.clear();
        self.forget_early(is_unused);
    }
}
