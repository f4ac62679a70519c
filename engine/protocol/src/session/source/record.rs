//! What a source puts on record, and what follows once it is there.

use super::super::{PersistFailed, SourceOwnership, SourceRecord};
use super::{Link, Pending, SourceAction, SourceEvent, SourceSession};
use crate::wire::{ControlFrame, Generation, Refusal, RefuseCode, Stamp};

impl SourceSession {
    pub(super) fn agreed(&mut self) {
        let mut next = self.record;
        next.ownership = SourceOwnership::Reclaimed;
        self.persist(next, Pending::Reclaimed);
    }

    pub(super) fn denied(&mut self) {
        self.reclaim_wanted = false;
        self.actions.push_back(SourceAction::Event(SourceEvent::ReclaimDenied));
    }

    pub(super) fn persist(&mut self, next: SourceRecord, why: Pending) {
        debug_assert!(self.pending.is_none(), "one record at a time");
        self.pending = Some(why);
        self.actions.push_back(SourceAction::Persist(next));
    }

    /// The record of the last [`SourceAction::Persist`] is durable, or could not be made so.
    pub fn persisted(&mut self, record: SourceRecord, result: Result<(), PersistFailed>) {
        let Some(why) = self.pending.take() else { return };
        if result.is_err() && why == Pending::Released {
            // Nothing is freed; the guest at the destination goes on being served.
            self.actions.push_back(SourceAction::Event(SourceEvent::PersistFailed));
            return;
        }
        if result.is_err() {
            self.actions.push_back(SourceAction::Event(SourceEvent::PersistFailed));
            self.lose_link(None);
            return;
        }
        self.record = record;
        match why {
            Pending::Epoch => {
                self.stamp = Stamp { epoch: record.epoch, generation: Generation(1) };
                let hello = self.hello();
                self.actions.push_back(SourceAction::Greet(hello));
            }
            Pending::Given => {
                self.actions.push_back(SourceAction::Event(SourceEvent::Given));
                if self.link == Link::Up {
                    self.send(if self.reclaim_wanted {
                        ControlFrame::TakeBack
                    } else {
                        ControlFrame::Go
                    });
                }
            }
            Pending::Owner => self.offer_again(),
            Pending::Reclaimed => self
                .reclaimed(Refusal::new(RefuseCode::Ended, "the source has taken the guest back")),
            Pending::Fenced => {
                self.reclaimed(Refusal::new(RefuseCode::Fenced, "the session was fenced"));
            }
            Pending::Finished => self.finished(),
            Pending::Released => self.let_release(),
        }
    }

    fn reclaimed(&mut self, refusal: Refusal) {
        self.lose_link(Some(refusal));
        self.actions.push_back(SourceAction::DropState);
        self.actions.push_back(SourceAction::Event(SourceEvent::Reclaimed));
    }
}
