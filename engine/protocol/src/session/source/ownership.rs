//! Whose the guest is: what the destination says of it, and what the source gives.

use super::super::{SourceOwnership, SourcePages};
use super::{AfterRefusal, Link, Pending, SourceAction, SourceEvent, SourceSession};
use crate::wire::{ControlFrame, Incarnation, Phase, Refusal, RefuseCode};

impl SourceSession {
    /// Whether a phase can be true, by what is known. What cannot is refused, so that a
    /// destination that has lost its record makes nobody run the guest.
    pub(super) fn believes(&self, phase: Phase) -> Result<(), Refusal> {
        let contradiction = match phase {
            Phase::Refused | Phase::Running if self.is_snapshot() => {
                "the destination says who owns the guest of a snapshot"
            }
            Phase::Running | Phase::Complete if !self.was_given() && !self.is_snapshot() => {
                "the destination says that it runs a guest which it was not given"
            }
            Phase::Early if !self.can_precopy() => {
                "the destination has early copies, and one side cannot do precopy"
            }
            Phase::Fresh | Phase::Early | Phase::Ready | Phase::Refused if self.knows_it_runs() => {
                "the destination has said that it runs the guest, and now says that it does not"
            }
            _ => return Ok(()),
        };
        Err(Refusal::new(RefuseCode::Protocol, contradiction))
    }

    pub(super) fn knows_it_runs(&self) -> bool {
        self.destination_running
            || self.record.ownership == SourceOwnership::Finished
            || self.record.pages == SourcePages::Released
    }

    pub(super) fn was_given(&self) -> bool {
        matches!(self.record.ownership, SourceOwnership::Given | SourceOwnership::Finished)
    }

    pub(super) fn ready(&mut self) {
        if !self.destination_ready {
            self.destination_ready = true;
            self.actions.push_back(SourceAction::Event(SourceEvent::Ready));
        }
        if self.is_snapshot() || !self.frozen {
            return;
        }
        if self.reclaim_wanted {
            self.send(ControlFrame::TakeBack);
        } else if self.was_given() {
            self.send(ControlFrame::Go);
        } else if !self.is_held() {
            self.give();
        }
    }

    /// The destination will not run the guest: asked, of its own accord, or by an agreement that
    /// this side has forgotten. So the guest can only go on here.
    pub(super) fn refused(&mut self) {
        if self.config.after_refusal == AfterRefusal::OfferAgain && !self.reclaim_wanted {
            self.actions.push_back(SourceAction::Event(SourceEvent::Refused));
            let mut next = self.record;
            (next.ownership, next.incarnation) = (SourceOwnership::Owner, Incarnation::default());
            return self.persist(next, Pending::Owner);
        }
        if !std::mem::replace(&mut self.reclaim_wanted, true) {
            self.actions.push_back(SourceAction::Event(SourceEvent::Refused));
        }
        self.agreed();
    }

    /// Whoever has refused the guest is told that nothing follows; other memory may have it.
    pub(super) fn offer_again(&mut self) {
        let reason = "the source has the guest, and offers it to another destination";
        self.lose_link(Some(Refusal::new(RefuseCode::Ended, reason)));
        self.incarnation = None;
        self.destination_ready = false;
    }

    fn give(&mut self) {
        let Some(incarnation) = self.incarnation else { return };
        let mut next = self.record;
        (next.ownership, next.incarnation) = (SourceOwnership::Given, incarnation);
        self.persist(next, Pending::Given);
    }

    pub(super) fn running(&mut self) {
        if !self.destination_running && !self.is_snapshot() {
            self.destination_running = true;
            self.actions.push_back(SourceAction::DropState);
            self.actions.push_back(SourceAction::Event(SourceEvent::Running));
        }
        if self.reclaim_wanted {
            self.denied();
        }
        self.finish_if_done();
    }

    pub(super) fn finish_if_done(&mut self) {
        if !self.destination_complete || !(self.destination_running || self.is_snapshot()) {
            return;
        }
        if self.record.ownership == SourceOwnership::Finished || self.is_snapshot() {
            self.finished();
        } else {
            let mut next = self.record;
            next.ownership = SourceOwnership::Finished;
            self.persist(next, Pending::Finished);
        }
    }

    pub(super) fn finished(&mut self) {
        if self.link == Link::Up {
            self.send(ControlFrame::Bye);
        }
        if !self.told_finished {
            self.told_finished = true;
            self.actions.push_back(SourceAction::Event(SourceEvent::Finished));
        }
    }
}
