//! Who may connect to a source.

use super::super::SourceOwnership;
use super::{Link, Pending, SourceSession};
use crate::wire::{Channel, Hello, Incarnation, Refusal, RefuseCode, Role, SessionId};

impl SourceSession {
    /// Whether a peer that says hello on a control connection may have it. Changes nothing,
    /// so that a stranger costs no record.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admits(&self, peer: &Hello) -> Result<(), Refusal> {
        let refuse = |code, reason: &str| Err(Refusal::new(code, reason));
        if peer.role != Role::Destination {
            return refuse(RefuseCode::Role, "both sides are sources: one must be a destination");
        }
        if peer.channel != Channel::Control {
            return refuse(RefuseCode::Protocol, "a session begins with its control channel");
        }
        if peer.session != SessionId::UNKNOWN && peer.session != self.record.session {
            return Err(Refusal::new(
                RefuseCode::UnknownSession,
                format!("session {} is not served here, {} is", peer.session, self.record.session),
            ));
        }
        match self.record.ownership {
            SourceOwnership::Fenced => {
                return refuse(
                    RefuseCode::Fenced,
                    "the session was fenced: the source has the guest back, this destination \
                     must not run it",
                );
            }
            SourceOwnership::Reclaimed => {
                return refuse(RefuseCode::Ended, "the source has taken the guest back");
            }
            // A destination that has not heard the bye may ask for it again.
            SourceOwnership::Finished if self.incarnation == Some(peer.incarnation) => {}
            SourceOwnership::Finished => {
                return refuse(
                    RefuseCode::Ended,
                    "the session is over: another destination has \
                                                  everything",
                );
            }
            _ => {}
        }
        self.admits_incarnation(peer.incarnation)
    }

    fn admits_incarnation(&self, theirs: Incarnation) -> Result<(), Refusal> {
        match self.incarnation {
            Some(known) if known != theirs => {
                let given = self.record.ownership == SourceOwnership::Given;
                let pending = self.pending == Some(Pending::Given);
                if given || pending {
                    return Err(Refusal::new(
                        RefuseCode::Incarnation,
                        format!(
                            "the guest was given to the destination memory {known}, this is \
                             {theirs}: bring that one back, or fence it at the source"
                        ),
                    ));
                }
                // While greeting it is this very destination that asks.
                if !matches!(self.link, Link::Down | Link::Greeting) {
                    return Err(Refusal::new(
                        RefuseCode::TooMany,
                        format!("the session is connected to the destination memory {known}"),
                    ));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
