//! The control connection of a destination: greeted, kept alive, lost.

use super::super::pulse::{Due, Pulse};
use super::{DestinationAction, DestinationEvent, DestinationSession};
use crate::wire::{Channel, ControlFrame, Hello, Refusal, RefuseCode, Role, Stamp};
use std::time::Duration;

/// What the connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Down,
    Greeting,
    /// Greeted; the offer is awaited.
    Greeted,
    /// Attached; `Begin` is awaited.
    Attached,
    Up,
}

impl DestinationSession {
    /// What the control connection is at, in a word, for messages and statistics.
    #[must_use]
    pub const fn link_name(&self) -> &'static str {
        match self.link {
            Link::Down => "down",
            Link::Greeting => "greeting",
            Link::Greeted => "greeted",
            Link::Attached => "attached",
            Link::Up => "up",
        }
    }

    /// The stamp of the control connection.
    #[must_use]
    pub const fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// A control connection is to be made or has been accepted: the hello to send.
    pub fn open(&mut self) -> Hello {
        if self.link != Link::Down {
            self.lose_link(None);
        }
        self.link = Link::Greeting;
        Hello {
            role: Role::Destination,
            channel: Channel::Control,
            stamp: Stamp { epoch: self.record.epoch, ..Stamp::default() },
            capabilities: self.config.capabilities,
            session: self.record.session,
            incarnation: self.record.incarnation,
        }
    }

    /// The peer's hello has arrived on the connection.
    ///
    /// # Errors
    /// The refusal to send before hanging up.
    pub fn greeted(&mut self, peer: &Hello, now: Duration) -> Result<(), Refusal> {
        if self.link != Link::Greeting {
            return Err(Refusal::new(RefuseCode::Failed, "no greeting is under way"));
        }
        if let Err(refusal) = self.admits(peer) {
            self.link = Link::Down;
            return Err(refusal);
        }
        self.note_capabilities(peer);
        self.peer = peer.session;
        self.stamp = peer.stamp;
        self.link = Link::Greeted;
        // Until the offer names another.
        let silence = self.config.silence;
        self.pulse = Some(Pulse::new(silence / 4, silence, now));
        Ok(())
    }

    /// The control connection broke, or the peer refused it.
    pub fn disconnected(&mut self) {
        if self.link != Link::Down {
            self.lose_link(None);
        }
    }

    pub(super) fn lose_link(&mut self, refusal: Option<Refusal>) {
        let was_up = self.link == Link::Up;
        self.link = Link::Down;
        self.pulse = None;
        self.actions.push_back(DestinationAction::HangUp(refusal));
        if was_up && !self.over {
            self.actions.push_back(DestinationAction::Event(DestinationEvent::Disconnected));
        }
    }

    /// Time has passed: heartbeats, silence.
    pub fn tick(&mut self, now: Duration) {
        match self.pulse.as_mut().map_or(Due::Nothing, |pulse| pulse.due(now)) {
            Due::Nothing => {}
            Due::Beat => {
                if let Some(pulse) = self.pulse.as_mut() {
                    let token = pulse.next_token();
                    self.send(ControlFrame::Heartbeat { token });
                }
            }
            Due::Dead(silent) => self.lose_link(Some(Refusal::new(
                RefuseCode::Failed,
                format!("nothing was heard from the source for {silent:?}"),
            ))),
        }
    }

    /// The pulse of the control connection, once it has been greeted.
    #[must_use]
    pub const fn pulse(&self) -> Option<&Pulse> {
        self.pulse.as_ref()
    }

    /// When [`tick`](Self::tick) should be called at the latest.
    #[must_use]
    pub fn next_tick(&self) -> Option<Duration> {
        self.pulse.as_ref().map(Pulse::next)
    }

    /// Something has arrived on the control connection, be it a part of a frame: the peer is
    /// not silent.
    pub fn heard(&mut self, now: Duration) {
        if let Some(pulse) = self.pulse.as_mut() {
            pulse.heard(now);
        }
    }
}
