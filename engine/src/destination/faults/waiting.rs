//! What waits for an event to be read: while one is unread nothing can be placed, and this
//! thread is the one that reads.

use super::super::pages::{InstallError, Urgent};
use super::{Asked, FaultThread};
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::io;
use std::time::Instant;

/// Pages that are made to fail in one go.
const POISON_STEP: u64 = 4096;

/// A copy that could not be placed.
pub(super) struct Held {
    pub(super) page: PageNumber,
    pub(super) content: Vec<u8>,
}

impl FaultThread {
    pub(super) const fn waits_for_events(&self) -> bool {
        !self.held.is_empty() || !self.again.is_empty() || !self.poisoned.is_empty()
    }

    /// Places copies that were held back, and lets pages fail that the source cannot read.
    pub(super) fn try_again(&mut self) {
        for Held { page, content } in std::mem::take(&mut self.held) {
            if let Err(error) = self.place(page, &content) {
                self.lose_line(&error);
            }
        }
        self.poison_some();
    }

    /// Lets some of the pages fail that the source cannot read. A range may be a terabyte, and
    /// somebody may fault meanwhile.
    fn poison_some(&mut self) {
        let Some(pages) = self.poisoned.pop() else { return };
        let some = PageRange::new(pages.start, pages.count.min(POISON_STEP));
        match self.arrived.pages.poison(some) {
            Ok(true) => {
                let end = some.start.0 + some.count;
                self.asked.retain(|page, _| !(some.start.0..end).contains(&page.0));
                self.roomless.retain(|page| !(some.start.0..end).contains(&page.0));
                self.arrived.acknowledge_complete(some);
                if pages.count > some.count {
                    let rest = PageRange::new(PageNumber(end), pages.count - some.count);
                    self.poisoned.push(rest);
                }
            }
            Ok(false) => self.poisoned.push(pages),
            // They wait, as they do where the VMM has not declared anything.
            Err(error) => drop(self.arrived.failed(error)),
        }
    }

    /// Asks for pages that nobody brings any more, though perhaps nobody waits for them.
    pub(super) fn want(&mut self, pages: PageRange) {
        if self.has_poison {
            self.poison_again(pages);
        }
        let now = Instant::now();
        self.waits_for_nothing_else();
        let asked = Asked { since: None, last: now, first: now };
        self.arrived.pages.promote(pages);
        for page in pages.iter() {
            let is_complete = self.arrived.pages.planes().is_complete(page);
            if !is_complete && !self.asked.contains_key(&page) && !self.roomless.contains(page) {
                self.asked.insert(page, asked);
                self.push_request(page);
            }
        }
    }

    /// Nobody brings these pages any more: those that the source cannot read will fail too. They
    /// may have been left out before, because somebody had claimed them.
    fn poison_again(&mut self, pages: PageRange) {
        let end = pages.start.0 + pages.count;
        let mut rest = pages;
        while let Some(run) = self.arrived.pages.unreadable().first_set_in(rest) {
            self.poisoned.push(run);
            let next = run.start.0 + run.count;
            rest = PageRange::new(PageNumber(next), end - next);
        }
    }

    /// Puts an answer in place, and lets go of who has waited for it.
    pub(super) fn place(&mut self, page: PageNumber, content: &[u8]) -> io::Result<()> {
        match self.arrived.pages.urgent(page, content) {
            Ok(Urgent::Installed | Urgent::Discarded) => {
                // The page is there and who waited is awake: the rest is bookkeeping.
                self.waited(page);
                self.arrived.acknowledge(PageRange::one(page));
            }
            Ok(Urgent::Late | Urgent::BeingWritten) => drop(self.asked.remove(&page)),
            Ok(Urgent::EventPending) => self.held.push(Held { page, content: content.to_vec() }),
            Err(InstallError::NoMemory { .. }) if self.arrived.pages.planes().is_complete(page) => {
                // It was discarded meanwhile, and became complete when it was given back.
                self.waited(page);
                self.arrived.acknowledge(PageRange::one(page));
            }
            Err(error @ InstallError::NoMemory { .. }) => self.has_no_room(page, error),
            Err(error) => return Err(self.arrived.failed(error)),
        }
        Ok(())
    }

    /// Pages are zero.
    pub(super) fn take_zeros(&mut self, pages: PageRange) {
        self.arrived.pages.zero_urgent(pages);
        for page in pages.iter() {
            self.waited(page);
        }
        self.arrived.acknowledge_complete(pages);
    }

    /// A page is there that somebody may have waited for.
    pub(super) fn waited(&mut self, page: PageNumber) {
        let waited = self.roomless.let_go(page);
        if let Some(Asked { since: Some(since), .. }) = self.asked.remove(&page).or(waited) {
            self.arrived.counters.waited(since.elapsed());
        }
    }
}
