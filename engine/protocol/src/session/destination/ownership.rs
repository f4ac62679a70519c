//! Whose the guest is: what the source gives or takes back, and whether it may run here.

use super::super::{DestinationOwnership, DestinationRecord, NotNow};
use super::{DestinationAction, DestinationEvent, DestinationSession, Link, Pending};
use crate::wire::{ControlFrame, Refusal, RefuseCode, SessionId};

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
        let is_refused = self.refuses || self.record.ownership == DestinationOwnership::Refused;
        if (self.over && !has_everything) || is_refused {
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

    /// The guest will not run here, whatever the source says: it could not be restored, or the VMM
    /// that was to run it has ended. Durable before [`Refused`](DestinationEvent::Refused) is told;
    /// the source gets the guest back when it is connected, even if it has given it already, and
    /// [`Ended`](DestinationEvent::Ended) says that it has. A record that could not be made
    /// durable is tried again with the next connection; the guest does not run here meanwhile.
    ///
    /// # Errors
    /// [`NotNow`] once it is on record that the guest runs here, after the session is over, before
    /// this memory belongs to one, or for a snapshot.
    pub fn refuse(&mut self) -> Result<(), NotNow> {
        let call = "refuse the guest";
        if self.is_snapshot() {
            return Err(NotNow { call, reason: "a snapshot is given by nobody" });
        }
        match self.record.ownership {
            DestinationOwnership::Running => {
                Err(NotNow { call, reason: "it is on record that it runs here" })
            }
            DestinationOwnership::Refused => Ok(()),
            DestinationOwnership::Waiting if self.over => {
                Err(NotNow { call, reason: "the session is over" })
            }
            DestinationOwnership::Waiting if self.record.session == SessionId::UNKNOWN => {
                Err(NotNow { call, reason: "no source has offered one yet" })
            }
            DestinationOwnership::Waiting => {
                self.refuses = true;
                self.persist_refused();
                Ok(())
            }
        }
    }

    /// Nobody needs the rest of a snapshot. Its source is told so if it is connected; nothing
    /// follows.
    ///
    /// # Errors
    /// [`NotNow`] for a migration, or after the session is over.
    pub fn leave(&mut self) -> Result<(), NotNow> {
        let call = "leave the session";
        if self.over {
            return Err(NotNow { call, reason: "it is over" });
        }
        if !self.is_snapshot() {
            return Err(NotNow { call, reason: "it is not that of a snapshot" });
        }
        self.over = true;
        self.lose_link(Some(Refusal::new(RefuseCode::Ended, "nobody needs the rest")));
        Ok(())
    }

    pub(super) fn persist_refused(&mut self) {
        let next = DestinationRecord { ownership: DestinationOwnership::Refused, ..self.record };
        self.persist(next, Pending::Refused);
    }

    pub(super) fn go(&mut self) -> Result<(), Refusal> {
        match self.record.ownership {
            // It could not be recorded when it was decided.
            DestinationOwnership::Waiting if self.refuses && self.pending.is_none() => {
                self.persist_refused();
            }
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
            DestinationOwnership::Waiting if self.pending.is_none() => self.persist_refused(),
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
