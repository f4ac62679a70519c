//! What both hosts watch on a clock beside the session's own heartbeats: connection attempts
//! that nobody answers, and data channels over which nothing moves.

use crate::mutant::Mutant;
use crate::network::{Connection, Side};
use crate::source::SourceChannel;
use crate::world::World;
use afterimage_protocol::session::{DestinationSession, SourceSession};
use afterimage_protocol::wire::Channel;
use std::time::Duration;

/// An attempt that has not been answered after so many steps is given up.
const ATTEMPT_LIMIT: u64 = 250;
impl World {
    /// Time passes for both sessions.
    pub(crate) fn tick(&mut self) {
        if self.breaks(Mutant::SilenceIgnored) {
            return;
        }
        let is_due = |next: Option<Duration>, now| next.is_some_and(|next| next <= now);
        if !self.is_idle(Side::Source) && is_due(self.source.session.next_tick(), self.now) {
            let half = self.is_half_open(self.source.control);
            self.with_source("tick", SourceSession::tick);
            self.note_silence(half, self.source.session.link_name());
        }
        if !self.is_idle(Side::Destination)
            && is_due(self.destination.session.next_tick(), self.now)
        {
            let half = self.is_half_open(self.destination.control);
            self.with_destination("tick", DestinationSession::tick);
            self.note_silence(half, self.destination.session.link_name());
        }
    }

    fn is_half_open(&self, control: Option<usize>) -> bool {
        control.and_then(|id| self.network.get(id)).is_some_and(Connection::is_half_open)
    }

    fn note_silence(&mut self, was_half_open: bool, link: &str) {
        if link == "down" {
            self.situation(if was_half_open {
                "silence ended a half-open link"
            } else {
                "silence ended a link"
            });
        }
    }

    /// Gives up what has taken too long.
    pub(crate) fn watch(&mut self) {
        if !self.breaks(Mutant::AttemptWithoutEnd) {
            self.watch_attempts();
        }
        if !self.breaks(Mutant::StallIgnored) {
            self.watch_channels_of_source();
            self.watch_channels_of_destination();
        }
    }

    fn watch_attempts(&mut self) {
        for side in [Side::Source, Side::Destination] {
            if !self.is_idle(side) {
                self.watch_data_attempts(side, ATTEMPT_LIMIT);
            }
        }
        let is_late = |since: u64| self.steps >= since + ATTEMPT_LIMIT;
        let source = &self.source;
        let source_waits = source.control.is_some() && source.session.link_name() == "greeting";
        let gives_up = source_waits && is_late(source.since);
        let destination = &self.destination;
        let waits = destination.control.is_some() && destination.session.link_name() == "greeting";
        let too_gives_up = waits && is_late(destination.since);
        if gives_up && !self.is_idle(Side::Source) {
            self.situation("an attempt without an answer was given up");
            self.with_source("disconnected", |session, _| session.disconnected());
        }
        if too_gives_up && !self.is_idle(Side::Destination) {
            self.situation("an attempt without an answer was given up");
            self.with_destination("disconnected", |session, _| session.disconnected());
        }
    }

    /// A background channel on which something is under way and nothing is acknowledged.
    fn watch_channels_of_source(&mut self) {
        if self.is_idle(Side::Source) {
            return;
        }
        let (step, source) = (self.steps, &self.source);
        let is_late = |channel: &Channel, data: &SourceChannel| {
            let patience = source.patience.get(channel).copied().unwrap_or_default();
            matches!(channel, Channel::Background(_))
                && !data.in_flight.is_empty()
                && step >= data.moved + patience.lasts()
        };
        let late = source.channels.iter().find(|(channel, data)| is_late(channel, data));
        if let Some((&channel, _)) = late {
            self.situation("the source gave up a channel over which nothing moved");
            self.source.patience.entry(channel).or_default().exhausted();
            self.end_data(Side::Source, channel);
        }
    }

    /// The request channel, when something was asked for that nobody brings.
    fn watch_channels_of_destination(&mut self) {
        // Before it runs the source may be waiting for its own switchover.
        if self.is_idle(Side::Destination) || !self.destination.runs || !self.asks() {
            return;
        }
        let channel = Channel::Request(0);
        let data = self.destination.channels.get(&channel);
        let Some(since) = data.and_then(|data| data.waits_since) else { return };
        if self.steps >= since + self.destination.patience.lasts() {
            self.situation("the destination gave up a channel over which nothing moved");
            self.destination.patience.exhausted();
            self.end_data(Side::Destination, channel);
        }
    }
}
