//! Which source a destination lets in, and what a refusal by one means to it.

use super::super::DestinationOwnership;
use super::{DestinationAction, DestinationEvent, DestinationSession, Link};
use crate::wire::{Channel, Hello, Refusal, RefuseCode, Role, SessionId};

impl DestinationSession {
    /// Whether a peer that says hello on a control connection may have it.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admits(&self, peer: &Hello) -> Result<(), Refusal> {
        let refuse = |code, reason: String| Err(Refusal::new(code, reason));
        if peer.role != Role::Source {
            return refuse(
                RefuseCode::Role,
                "both sides are destinations: one must be a source".to_owned(),
            );
        }
        if peer.channel != Channel::Control {
            return refuse(
                RefuseCode::Protocol,
                "a session begins with its control channel".to_owned(),
            );
        }
        if self.record.session != SessionId::UNKNOWN && peer.session != self.record.session {
            return refuse(
                RefuseCode::UnknownSession,
                format!(
                    "this destination belongs to session {}, not to {}",
                    self.record.session, peer.session
                ),
            );
        }
        // What has been greeted is on record only once it has attached.
        let mut seen = self.record.epoch;
        if matches!(self.link, Link::Greeted | Link::Attached | Link::Up)
            && peer.session == self.peer
        {
            seen = seen.max(self.stamp.epoch);
        }
        if peer.stamp.epoch <= seen {
            return refuse(
                RefuseCode::Stale,
                format!(
                    "epoch {} has passed, this destination has seen {}",
                    peer.stamp.epoch.0, seen.0
                ),
            );
        }
        if self.over {
            return refuse(RefuseCode::Ended, "the session is over at the destination".to_owned());
        }
        Ok(())
    }

    /// The peer refused, in its greeting or by a frame.
    ///
    /// A destination whose guest runs waits for its source whatever is said, unless it was
    /// fenced: its faults have nobody else to be answered by. One that knows its session does
    /// not listen to refusals that any stranger at the address would give.
    pub fn refused(&mut self, refusal: Refusal) {
        if self.over {
            return;
        }
        let owns = self.told_to_run || self.record.ownership == DestinationOwnership::Running;
        let is_bound = self.record.session != SessionId::UNKNOWN;
        let event = match refusal.code {
            RefuseCode::Fenced => Some((true, DestinationEvent::Fenced)),
            RefuseCode::Ended | RefuseCode::Incarnation | RefuseCode::Layout if !owns => {
                Some((true, DestinationEvent::Ended(refusal)))
            }
            RefuseCode::Version | RefuseCode::Role | RefuseCode::UnknownSession if !is_bound => {
                Some((true, DestinationEvent::Ended(refusal)))
            }
            RefuseCode::Ended
            | RefuseCode::Incarnation
            | RefuseCode::Layout
            | RefuseCode::Version
            | RefuseCode::Role
            | RefuseCode::UnknownSession => Some((false, DestinationEvent::TurnedAway(refusal))),
            // Stale, too many, protocol, failed: another attempt may fare better.
            _ => None,
        };
        if let Some((ends, event)) = event {
            self.over = ends;
            self.actions.push_back(DestinationAction::Event(event));
        }
        self.disconnected();
    }
}
