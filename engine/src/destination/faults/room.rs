//! Pages that came, and for which there was no room.
//!
//! Invariants: nobody waits for them but who touches them, so the request channel is kept, and few
//! of them are asked for again at a time: some each second, those first that somebody waits for,
//! each in its turn; more and more as long as there is room. The VMM is told once until one of them
//! has been placed.

use super::{Asked, FaultThread};
use crate::destination::pages::InstallError;
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::collections::{HashMap, HashSet};
use std::time::Instant;

/// So many pages are tried at once as long as it is not known whether there is room. A larger page
/// than of 4 KiB is tried alone: it may take 63 ms until it is sure that there is none.
const FEW: usize = 8;
/// And so many where there is.
const MANY: usize = 256;

/// Pages that wait for room.
#[derive(Debug)]
pub(super) struct Roomless {
    waiting: HashMap<PageNumber, Asked>,
    /// Those that have been asked for again.
    tried: HashSet<PageNumber>,
    /// How many may be tried at once.
    most: usize,
    /// One of them has been placed.
    found: bool,
    has_told: bool,
}

impl Default for Roomless {
    fn default() -> Self {
        let (waiting, tried) = (HashMap::new(), HashSet::new());
        Self { waiting, tried, most: FEW, found: false, has_told: false }
    }
}

impl Roomless {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn contains(&self, page: PageNumber) -> bool {
        self.waiting.contains_key(&page)
    }

    /// Whether this page waits for room; somebody waits for it since `now` at the latest.
    pub(super) fn waits(&mut self, page: PageNumber, now: Instant) -> bool {
        let Some(asked) = self.waiting.get_mut(&page) else { return false };
        asked.since.get_or_insert(now);
        true
    }

    /// Only these still do.
    pub(super) fn retain(&mut self, does: impl Fn(PageNumber) -> bool) {
        self.waiting.retain(|page, _| does(*page));
        self.tried.retain(|page| does(*page));
    }

    /// A page is in place: what was known of it, if it waited here.
    pub(super) fn let_go(&mut self, page: PageNumber) -> Option<Asked> {
        let waited = self.waiting.remove(&page);
        if self.tried.remove(&page) || waited.is_some() {
            (self.most, self.found, self.has_told) = ((2 * self.most).min(MANY), true, false);
        }
        waited
    }

    /// So many of them: those first that somebody waits for, then those that were tried longest ago.
    fn next(&self, most: usize) -> Vec<PageNumber> {
        let key = |asked: &Asked| (asked.since.is_none(), asked.last);
        let mut all: Vec<_> = self.waiting.iter().map(|(page, it)| (key(it), *page)).collect();
        if all.len() > most {
            all.select_nth_unstable(most);
            all.truncate(most);
        }
        all.sort_unstable();
        all.into_iter().map(|(_, page)| page).collect()
    }
}

impl FaultThread {
    /// There is no room for a page that has come: whoever waits for it goes on waiting.
    pub(super) fn has_no_room(&mut self, page: PageNumber, error: InstallError) {
        let now = Instant::now();
        // The others may have come in another way, or been given up.
        self.roomless.has_told &= !(self.roomless.is_empty() && self.roomless.tried.is_empty());
        self.roomless.tried.remove(&page);
        self.roomless.most = FEW;
        if let Some(asked) = self.asked.remove(&page) {
            self.roomless.waiting.insert(page, Asked { last: now, ..asked });
        } else if let Some(asked) = self.roomless.waiting.get_mut(&page) {
            // It came twice.
            asked.last = now;
        }
        if !std::mem::replace(&mut self.roomless.has_told, true) {
            drop(self.arrived.failed(error));
        }
    }

    /// Asks for some of them again. The caller flushes.
    pub(super) fn look_for_room(&mut self, now: Instant) {
        let Self { asked, roomless, .. } = self;
        // Of some it has turned out that they do not come.
        roomless.tried.retain(|page| asked.contains_key(page));
        let most = roomless.most.saturating_sub(roomless.tried.len());
        for page in self.roomless.next(most) {
            if self.page_bytes(page) > 4096 && !self.roomless.tried.is_empty() {
                continue;
            }
            let Some(asked) = self.roomless.waiting.remove(&page) else { continue };
            self.waits_for_nothing_else();
            self.asked.insert(page, Asked { last: now, first: now, ..asked });
            self.roomless.tried.insert(page);
            self.push_request(page);
        }
    }

    /// Goes on at once when there was room for one of them.
    pub(super) fn use_room(&mut self) {
        if std::mem::take(&mut self.roomless.found) && !self.roomless.is_empty() {
            self.look_for_room(Instant::now());
            self.flush();
        }
    }

    fn page_bytes(&self, page: PageNumber) -> u64 {
        let run = self.arrived.pages.layout().split(PageRange::one(page)).next();
        run.map_or(0, |run| run.length)
    }
}
