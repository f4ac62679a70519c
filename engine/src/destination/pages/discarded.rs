//! Discards, and pages that were discarded while somebody was writing them through an alias.

use super::Pages;
use crate::sys::words::LazyWords;
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// The set of them, in words that a successor finds.
///
/// Bounded by what is being written at once, a piece for each channel: the slots are many
/// times as many.
#[derive(Debug)]
pub(super) struct DiscardedInFlight {
    slots: LazyWords,
    /// Where each stands.
    at: BTreeMap<PageNumber, usize>,
}

impl DiscardedInFlight {
    /// In these words, each a page plus one, or 0.
    pub(super) fn over(slots: LazyWords) -> Self {
        let words = slots.as_ref().iter().enumerate();
        let at = words.filter_map(|(slot, word)| {
            let page = word.load(Ordering::Acquire).checked_sub(1)?;
            Some((PageNumber(page), slot))
        });
        Self { at: at.collect(), slots }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.at.is_empty()
    }

    pub(super) fn contains(&self, page: PageNumber) -> bool {
        self.at.contains_key(&page)
    }

    pub(super) fn insert(&mut self, page: PageNumber) {
        if self.contains(page) {
            return;
        }
        let slots = self.slots.as_ref();
        let free = slots.iter().position(|word| word.load(Ordering::Relaxed) == 0);
        let Some(slot) = free else {
            // More pages than all channels can be writing. It is remembered as long as this
            // process lives.
            tracing::error!(page = page.0, "no room to keep that a page was discarded");
            self.at.insert(page, slots.len());
            return;
        };
        slots[slot].store(page.0 + 1, Ordering::Release);
        self.at.insert(page, slot);
    }

    /// `true` if it was there.
    pub(super) fn remove(&mut self, page: PageNumber) -> bool {
        let Some(slot) = self.at.remove(&page) else { return false };
        if let Some(word) = self.slots.as_ref().get(slot) {
            word.store(0, Ordering::Release);
        }
        true
    }

    /// All of them.
    pub(super) fn pages(&self) -> Vec<PageNumber> {
        self.at.keys().copied().collect()
    }
}

impl Pages {
    /// Forgets pages that the guest has given up: those that have not arrived are zero from
    /// now on, whatever is still under way. When it returns, no copy of them will be placed
    /// by the engine any more; a page that is being written through its alias this moment is
    /// emptied by its writer before anybody can see it. Whoever frees the pages does so
    /// afterwards, because until then copies of them may arrive.
    pub(crate) fn discard(&self, pages: PageRange) {
        let mut gate = self.discarding();
        self.discard_locked(pages, &mut gate);
        drop(gate);
        for run in self.layout().split(pages) {
            self.wake(&run);
        }
    }

    pub(super) fn discard_locked(&self, pages: PageRange, gate: &mut DiscardedInFlight) {
        let counter = &self.counters.discarded;
        self.promote(pages);
        for run in self.layout().split(pages) {
            if self.file_of(&run).is_none() {
                // Whoever has claimed one of these looks again, under the gate, before he
                // copies it.
                self.forget_copies(run.pages);
                self.mark_complete(run.pages, counter, |_| ());
                continue;
            }
            self.planes.claim(run.pages, |free| {
                self.forget_copies(free);
                self.mark_complete(free, counter, |_| ());
            });
            // Counted by their writers.
            self.planes.incomplete_in(run.pages, |claimed| {
                claimed.iter().for_each(|page| gate.insert(page));
            });
        }
    }
}
