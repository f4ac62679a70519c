//! When pages may be freed at the source, and what follows for who comes back.
//!
//! The record that pages may be gone comes before the first of them, and is made only when the
//! destination is known to run the guest. It stays; so a destination that attaches later is
//! compared with what was freed before anything is sent to it.

use super::super::{LostPages, SourcePages};
use super::{Link, Pending, Phase, Releasing, SourceAction, SourceEvent, SourceSession};
use crate::wire::{Refusal, RefuseCode};
use std::time::Duration;

impl SourceSession {
    pub(super) fn all_received(&mut self, phase: Phase) {
        if self.record.pages == SourcePages::Released {
            self.link = Link::Comparing(phase);
            self.actions.push_back(SourceAction::CompareReleased);
        } else {
            self.begin(phase);
        }
    }

    /// Answers [`SourceAction::CompareReleased`], before anything else is called: the pages
    /// that were freed here and that the destination lacks, if there are any. Such a
    /// destination is refused.
    pub fn compared(&mut self, lost: Option<LostPages>, now: Duration) {
        let Link::Comparing(phase) = self.link else { return };
        let Some(pages) = lost else {
            self.begin(phase);
            self.release_if_due(now);
            return;
        };
        if self.told_lost.replace(pages) != lost {
            self.actions.push_back(SourceAction::Event(SourceEvent::Lost(pages)));
        }
        self.lose_link(Some(Refusal::new(
            RefuseCode::Released,
            format!(
                "{} pages from page {} on were freed at the source after this destination had \
                 them, and it has them no more: bring back the memory that the guest ran in",
                pages.count, pages.first
            ),
        )));
    }

    /// Records that pages may be freed, as soon as that may be. A disk that fails is asked
    /// again after a while.
    pub(super) fn release_if_due(&mut self, now: Duration) {
        let may = self.config.releasing == Releasing::AfterRunning
            && !self.is_snapshot()
            && self.link == Link::Up
            && self.destination_running
            && !self.is_over()
            && self.pending.is_none();
        if !may || self.releases {
            return;
        }
        if self.record.pages == SourcePages::Released {
            self.let_release();
        } else if now >= self.release_after {
            self.release_after = now + self.config.silence;
            let mut next = self.record;
            next.pages = SourcePages::Released;
            self.persist(next, Pending::Released);
        }
    }

    pub(super) fn let_release(&mut self) {
        if self.link == Link::Up {
            self.releases = true;
            self.actions.push_back(SourceAction::Release);
        }
    }
}
