//! Control connections that peers make: admitted, kept waiting while the epoch is recorded, and
//! greeted.
//!
//! Recording may take longer than a destination waits, and it comes again then. Invariant: an
//! epoch that nobody was greeted with serves the newest connection of the destination for which
//! it was recorded, so that a slow disk delays it and never keeps it out.

use super::{Driver, Input};
use crate::reconnect::{Reconnect, is_paused_here};
use crate::transport::{Accepted, answer_with, refuse};
use afterimage_protocol::wire::{Channel, Hello};

impl Driver {
    pub(super) fn accept_control(&mut self, accepted: Accepted) {
        match self.session.admits(&accepted.hello) {
            Err(refusal) => refuse(&accepted.stream, refusal),
            // The destination has noticed first that the link is lost.
            Ok(()) if self.options.reconnect == Reconnect::ByHand && self.serving.is_some() => {
                self.session.disconnected();
                self.act();
                refuse(&accepted.stream, is_paused_here());
            }
            // Nobody waits for an answer any more: it costs no record.
            Ok(()) if accepted.stream.has_ended() => accepted.stream.shut_down(),
            Ok(()) => {
                self.arriving = Some(accepted);
                self.session.open();
                self.act();
            }
        }
    }

    /// The epoch is recorded: whoever is there is greeted with it.
    pub(super) fn greet(&mut self, hello: Hello) {
        let arriving = self.arriving.take().map(|first| self.newest_like(first));
        match arriving {
            None => self.link.dial(hello),
            Some(Accepted { stream, hello: theirs }) => match answer_with(&stream, hello) {
                Ok(()) => self.greeted(stream, &theirs),
                Err(error) => {
                    tracing::info!(%error, "a destination went away while it was greeted");
                    self.shared.set_away(true);
                    self.session.disconnected();
                }
            },
        }
    }

    /// The newest connection that waits, of those that the same destination made: it has given
    /// up the others.
    fn newest_like(&mut self, first: Accepted) -> Accepted {
        while let Some(input) = self.inbox.next() {
            self.backlog.push_back(input);
        }
        if self.backlog.is_empty() {
            return first;
        }
        // Whoever waits next does not know of what is taken out of the inbox here.
        self.outlet.wake();
        let is_newer = |input: &Input| {
            matches!(input, Input::Accepted(accepted)
                if accepted.hello.channel == Channel::Control
                    && accepted.hello.incarnation == first.hello.incarnation
                    && self.session.admits(&accepted.hello).is_ok()
                    && !accepted.stream.has_ended())
        };
        let newest = self.backlog.iter().rposition(is_newer);
        match newest.and_then(|at| self.backlog.remove(at)) {
            Some(Input::Accepted(newest)) => {
                first.stream.shut_down();
                newest
            }
            _ => first,
        }
    }

    /// The next message, in the order in which they came.
    pub(super) fn next_input(&mut self) -> Option<Input> {
        self.backlog.pop_front().or_else(|| self.inbox.next())
    }
}
