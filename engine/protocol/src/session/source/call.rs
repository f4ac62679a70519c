//! What the VMM of a source wants: to switch over, to take its guest back, to fence.

use super::super::{NotNow, SourceOwnership, SourcePages};
use super::{Link, Pending, SourceAction, SourceEvent, SourceSession};
use crate::wire::ControlFrame;

/// Why a guest of which pages were freed stays where it is.
const RELEASED: &str = "pages were freed here after the destination ran the guest: it is at the \
                        destination alone, and has to go on there";

impl SourceSession {
    /// The VMM has stopped its vCPUs: from here memory is final.
    ///
    /// # Errors
    /// [`NotNow`] if that has been said already, or the session is over.
    pub fn freeze(&mut self) -> Result<(), NotNow> {
        let call = "stop";
        if self.is_over() {
            return Err(NotNow { call, reason: "the session is over" });
        }
        if self.frozen {
            return Err(NotNow { call, reason: "it has been done already" });
        }
        self.frozen = true;
        self.actions.push_back(SourceAction::Event(SourceEvent::Stopped));
        self.end_passes();
        Ok(())
    }

    /// Whether sections of device state may be sent that are there already, before
    /// [`bring_state`](Self::bring_state) says that all are.
    #[must_use]
    pub const fn takes_sections(&self) -> bool {
        self.wants_state && self.frozen && !self.has_state && !self.reclaim_wanted
    }

    /// Device state is there. [Freezes](Self::freeze) too if that has not been said.
    ///
    /// # Errors
    /// [`NotNow`] if that has been said already, or the session is over.
    pub fn bring_state(&mut self) -> Result<(), NotNow> {
        let call = "switch over";
        if self.is_over() {
            return Err(NotNow { call, reason: "the session is over" });
        }
        if self.has_state {
            return Err(NotNow { call, reason: "it has been done already" });
        }
        if !self.frozen {
            self.freeze()?;
        }
        self.has_state = true;
        if self.link == Link::Up {
            if self.destination_ready {
                // From a process before this one.
                self.ready();
            } else {
                self.actions.push_back(SourceAction::SendState);
            }
        }
        Ok(())
    }

    /// The VMM wants its guest back. Before the guest was given this takes effect as soon
    /// as it is recorded; afterwards it needs the destination's agreement, and [`Reclaimed`](SourceEvent::Reclaimed)
    /// or [`ReclaimDenied`](SourceEvent::ReclaimDenied) follows, when it is connected.
    ///
    /// # Errors
    /// [`NotNow`] if the destination is known to run it, the session is over, or pages may
    /// have been freed.
    pub fn reclaim(&mut self) -> Result<(), NotNow> {
        let call = "take the guest back";
        if self.is_over() {
            return Err(NotNow { call, reason: "the session is over" });
        }
        if self.record.pages == SourcePages::Released {
            return Err(NotNow { call, reason: RELEASED });
        }
        if self.destination_running {
            return Err(NotNow {
                call,
                reason: "the destination runs it: past the point of no return",
            });
        }
        if self.is_snapshot() {
            return Err(NotNow { call, reason: "a snapshot gives nothing away" });
        }
        if self.was_given() || self.pending == Some(Pending::Given) {
            self.reclaim_wanted = true;
            if self.link == Link::Up && self.pending.is_none() {
                self.send(ControlFrame::TakeBack);
            }
        } else {
            self.agreed();
        }
        Ok(())
    }

    /// An operator declares that the destination is dead and will never run the guest. He
    /// is believed: whoever fences a destination that runs has two guests.
    ///
    /// # Errors
    /// [`NotNow`] if the session is over or a snapshot, or pages may have been freed: the
    /// guest cannot go on here, whatever has become of the destination.
    pub fn fence(&mut self) -> Result<(), NotNow> {
        let call = "fence the destination";
        if self.is_over() {
            return Err(NotNow { call, reason: "the session is over" });
        }
        if self.is_snapshot() {
            return Err(NotNow { call, reason: "a snapshot gives nothing away" });
        }
        if self.record.pages == SourcePages::Released {
            return Err(NotNow { call, reason: RELEASED });
        }
        let mut next = self.record;
        next.epoch = next.epoch.next();
        next.ownership = SourceOwnership::Fenced;
        self.persist(next, Pending::Fenced);
        Ok(())
    }
}
