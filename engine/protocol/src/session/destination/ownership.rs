//! Whose the guest is: what the source gives or takes back, and whether it may run here.

use super::super::{DestinationOwnership, DestinationRecord, NotNow};
use super::{DestinationAction, DestinationEvent, DestinationSession, Link, Pending};
use crate::wire::{ControlFrame, Refusal, RefuseCode};

impl DestinationSession {
    /// The VMM has restored everything and could run.
    ///
    /// # Errors
    /// [`NotNow`] before all device state is there, or after the session is over. A
    /// snapshot needs no device state, and may be ready after all of it has arrived.
    pub fn ready(&mut self) -> Result<(), NotNow> {
        let call = "be ready";
        // A snapshot may have arrived whole before anybody was ready to run it.
        let has_everything = self.is_snapshot() && self.complete;
        if (self.over && !has_everything) || self.record.ownership == DestinationOwnership::Refused
        {
            return Err(NotNow { call, reason: "the guest will not run here" });
        }
        if !self.state_complete
            && !self.is_snapshot()
            && self.record.ownership == DestinationOwnership::Waiting
        {
            return Err(NotNow { call, reason: "not all device state has arrived" });
        }
        if self.ready {
            return Ok(());
        }
        self.ready = true;
        if self.is_snapshot() {
            self.run_snapshot_if_ready();
        } else if self.link == Link::Up && self.record.ownership == DestinationOwnership::Waiting {
            self.send(ControlFrame::Ready);
        }
        Ok(())
    }

    pub(super) fn go(&mut self) -> Result<(), Refusal> {
        match self.record.ownership {
            DestinationOwnership::Waiting if !self.ready => {
                return Err(Refusal::new(
                    RefuseCode::Protocol,
                    "go came before the destination was ready",
                ));
            }
            DestinationOwnership::Waiting if self.pending.is_none() => {
                let next =
                    DestinationRecord { ownership: DestinationOwnership::Running, ..self.record };
                self.persist(next, Pending::Running);
            }
            // Being recorded this moment: the answer follows.
            DestinationOwnership::Waiting => {}
            DestinationOwnership::Running => self.send(ControlFrame::Running),
            DestinationOwnership::Refused => self.send(ControlFrame::TakeBackAgreed),
        }
        Ok(())
    }

    pub(super) fn take_back(&mut self) {
        match self.record.ownership {
            DestinationOwnership::Waiting if self.pending.is_none() => {
                let next =
                    DestinationRecord { ownership: DestinationOwnership::Refused, ..self.record };
                self.persist(next, Pending::Refused);
            }
            // A go was first: once it is recorded, the source hears that this side runs.
            DestinationOwnership::Waiting => {}
            DestinationOwnership::Running => self.send(ControlFrame::TakeBackDenied),
            DestinationOwnership::Refused => self.send(ControlFrame::TakeBackAgreed),
        }
    }

    pub(super) fn run(&mut self) {
        if !self.told_to_run {
            self.told_to_run = true;
            self.actions.push_back(DestinationAction::Event(DestinationEvent::Run));
        }
    }

    pub(super) fn run_snapshot_if_ready(&mut self) {
        if self.ready {
            self.run();
        }
    }

    /// Whether complete may be said: the guest is this side's, or nobody's.
    pub(super) fn owes_nothing(&self) -> bool {
        self.is_snapshot() || self.record.ownership == DestinationOwnership::Running
    }
}
