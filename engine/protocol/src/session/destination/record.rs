//! What a destination puts on record, and what follows once it is there.

use super::super::{DestinationRecord, PersistFailed};
use super::{DestinationAction, DestinationEvent, DestinationSession, Link, Pending};
use crate::wire::ControlFrame;

impl DestinationSession {
    pub(super) fn persist(&mut self, next: DestinationRecord, why: Pending) {
        self.pending = Some(why);
        self.actions.push_back(DestinationAction::Persist(next));
    }

    /// The record of the last [`DestinationAction::Persist`] is durable, or could not be
    /// made so.
    pub fn persisted(&mut self, record: DestinationRecord, result: Result<(), PersistFailed>) {
        let Some(why) = self.pending.take() else { return };
        if result.is_err() {
            self.actions.push_back(DestinationAction::Event(DestinationEvent::PersistFailed));
            self.lose_link(None);
            return;
        }
        self.record = record;
        match why {
            Pending::Bound => self.attach(),
            Pending::Running => {
                self.run();
                if self.link == Link::Up {
                    self.send(ControlFrame::Running);
                    if self.complete {
                        self.send(ControlFrame::Complete);
                    }
                }
            }
            Pending::Refused => {
                self.actions.push_back(DestinationAction::Event(DestinationEvent::Refused));
                if self.link == Link::Up {
                    self.send(ControlFrame::TakeBackAgreed);
                }
            }
        }
    }
}
