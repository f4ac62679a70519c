//! The control connection of a source: greeted, kept alive, lost.

use super::super::pulse::{Due, Pulse};
use super::passes::Stage;
use super::{Pending, SourceAction, SourceEvent, SourceSession};
use crate::wire::{Channel, ControlFrame, Hello, Phase, Refusal, RefuseCode, Role, Stamp};
use std::time::Duration;

/// What the connection is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Down,
    /// The epoch is being recorded, or the greeting is under way.
    Greeting,
    /// The offer is sent.
    Offered,
    /// The destination has said what it is; its planes are coming in.
    Receiving(Phase),
    /// They are in, and compared with what was freed.
    Comparing(Phase),
    Up,
}

impl SourceSession {
    /// What the control connection is at, in a word, for messages and statistics.
    #[must_use]
    pub const fn link_name(&self) -> &'static str {
        match self.link {
            Link::Down => "down",
            Link::Greeting => "greeting",
            Link::Offered => "offered",
            Link::Receiving(_) => "receiving",
            Link::Comparing(_) => "comparing",
            Link::Up => "up",
        }
    }

    /// The stamp of the control connection.
    #[must_use]
    pub const fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// A control connection is to be made, or has been accepted from a peer that
    /// [`admits`](Self::admits) let in: the epoch grows, durably, then a hello is sent. An
    /// earlier connection is given up.
    pub fn open(&mut self) {
        if self.link != Link::Down {
            self.lose_link(None);
        }
        self.link = Link::Greeting;
        let mut next = self.record;
        next.epoch = next.epoch.next();
        self.persist(next, Pending::Epoch);
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
        if self.incarnation != Some(peer.incarnation) {
            self.incarnation = Some(peer.incarnation);
            self.destination_ready = false;
            self.told_finished = false;
        }
        self.common = self.config.capabilities.common(peer.capabilities);
        self.pulse = Some(Pulse::new(self.config.heartbeat, self.config.silence, now));
        self.link = Link::Offered;
        self.send(self.config.offer());
        Ok(())
    }

    pub(super) fn hello(&self) -> Hello {
        Hello {
            role: Role::Source,
            channel: Channel::Control,
            stamp: self.stamp,
            capabilities: self.config.capabilities,
            session: self.record.session,
            incarnation: self.incarnation.unwrap_or_default(),
        }
    }

    /// The control connection broke.
    pub fn disconnected(&mut self) {
        if self.link != Link::Down {
            self.lose_link(None);
        }
    }

    pub(super) fn lose_link(&mut self, refusal: Option<Refusal>) {
        let was_up = self.link == Link::Up;
        self.link = Link::Down;
        self.pulse = None;
        self.stage = Stage::Off;
        self.wants_state = false;
        self.releases = false;
        self.actions.push_back(SourceAction::HangUp(refusal));
        if was_up && !self.is_over() {
            self.actions.push_back(SourceAction::Event(SourceEvent::Disconnected));
        }
    }

    /// Time has passed: heartbeats, silence.
    pub fn tick(&mut self, now: Duration) {
        match self.pulse.as_mut().map_or(Due::Nothing, |pulse| pulse.due(now)) {
            Due::Nothing => {}
            Due::Beat => self.beat(),
            Due::Dead(silent) => self.lose_link(Some(Refusal::new(
                RefuseCode::Failed,
                format!("nothing was heard from the destination for {silent:?}"),
            ))),
        }
    }

    fn beat(&mut self) {
        if let Some(pulse) = self.pulse.as_mut() {
            let token = pulse.next_token();
            self.send(ControlFrame::Heartbeat { token });
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
