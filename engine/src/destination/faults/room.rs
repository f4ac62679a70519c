//! Pages that came, and for which there is no room.
//!
//! Invariants: nobody waits for them but who touches them, so the request channel is kept; one of
//! them a second is asked for again, each in its turn, so that many of them do not keep the source
//! busy; when there was room for it, all of them are.

use super::{Asked, FaultThread};
use crate::destination::pages::InstallError;
use afterimage_protocol::layout::PageNumber;
use std::collections::HashMap;
use std::time::Instant;

/// Pages that wait for room.
#[derive(Debug, Default)]
pub(super) struct Roomless {
    pages: HashMap<PageNumber, Asked>,
    /// The one that was asked for to see whether there is room.
    probe: Option<PageNumber>,
}

impl Roomless {
    pub(super) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    pub(super) fn contains(&self, page: PageNumber) -> bool {
        self.pages.contains_key(&page)
    }

    /// Whether this page waits for room; somebody waits for it since `now` at the latest.
    pub(super) fn waits(&mut self, page: PageNumber, now: Instant) -> bool {
        let Some(asked) = self.pages.get_mut(&page) else { return false };
        asked.since.get_or_insert(now);
        true
    }

    /// Only these still do.
    pub(super) fn retain(&mut self, does: impl Fn(PageNumber) -> bool) {
        self.pages.retain(|page, _| does(*page));
    }
}

impl FaultThread {
    /// There is no room for a page that has come: whoever waits for it goes on waiting.
    pub(super) fn has_no_room(&mut self, page: PageNumber, error: InstallError) {
        drop(self.arrived.failed(error));
        let now = Instant::now();
        let asked = self.asked.remove(&page);
        let asked = asked.unwrap_or(Asked { since: None, last: now, first: now });
        self.roomless.pages.insert(page, Asked { last: now, ..asked });
        self.roomless.probe.take_if(|probe| *probe == page);
    }

    /// Asks for the page that has waited longest for room.
    pub(super) fn look_for_room(&mut self, now: Instant) {
        let longest = self.roomless.pages.iter().min_by_key(|(_, asked)| asked.last);
        let Some((&page, _)) = longest else { return };
        self.roomless.probe = Some(page);
        self.ask_again(page, now);
    }

    /// A page was put in place: if it was to show whether there is room, there is.
    pub(super) fn has_room(&mut self, page: PageNumber) {
        if self.roomless.probe.take_if(|probe| *probe == page).is_none() {
            return;
        }
        let now = Instant::now();
        let pages: Vec<_> = self.roomless.pages.keys().copied().collect();
        for page in pages {
            self.ask_again(page, now);
        }
    }

    fn ask_again(&mut self, page: PageNumber, now: Instant) {
        if let Some(asked) = self.roomless.pages.remove(&page) {
            self.waits_for_nothing_else();
            self.asked.insert(page, Asked { last: now, first: now, ..asked });
            self.push_request(page);
        }
    }
}
