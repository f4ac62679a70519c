//! The data channels of both sides: made by whoever makes the connections of the session,
//! accepted by the other in their epoch and generation, and replaced one by one. `slots.rs` and
//! the drivers' `channels.rs` in the engine.

use crate::destination::DestinationChannel;
use crate::mutant::Mutant;
use crate::network::{Body, Side};
use crate::source::{SESSION, SourceChannel};
use crate::world::World;
use afterimage_protocol::wire::{Capabilities, Channel, Epoch, Generation, Hello, Role, Stamp};
use std::collections::BTreeMap;

/// The slots of one side.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    epoch: Option<Epoch>,
    channels: Vec<Channel>,
    generations: BTreeMap<Channel, Generation>,
    /// Connections that this side makes, until they are greeted.
    attempts: BTreeMap<Channel, Attempt>,
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    connection: usize,
    stamp: Stamp,
    since: u64,
}

impl Slots {
    /// Whether data channels may be open.
    pub(crate) const fn is_open(&self) -> bool {
        self.epoch.is_some()
    }

    /// No data channel may be open. Returns the connections that were being made.
    pub(crate) fn close(&mut self) -> Vec<usize> {
        self.epoch = None;
        std::mem::take(&mut self.attempts).into_values().map(|attempt| attempt.connection).collect()
    }

    fn next(&mut self, channel: Channel) -> Option<Stamp> {
        let epoch = self.epoch?;
        let generation = self.generations.entry(channel).or_default();
        generation.0 += 1;
        Some(Stamp { epoch, generation: *generation })
    }

    fn is_newer(&self, channel: Channel, generation: Generation) -> bool {
        generation > self.generations.get(&channel).copied().unwrap_or_default()
    }

    /// Forgets a connection that was being made.
    pub(crate) fn forget(&mut self, id: usize) {
        self.attempts.retain(|_, attempt| attempt.connection != id);
    }
}

impl World {
    /// Whether a side makes the connections of the session.
    pub(crate) fn dials(&self, side: Side) -> bool {
        (side == Side::Destination) == self.plan.destination_connects
    }

    const fn slots(&mut self, side: Side) -> &mut Slots {
        match side {
            Side::Source => &mut self.source.slots,
            Side::Destination => &mut self.destination.slots,
        }
    }

    fn has_channel(&self, side: Side, channel: Channel) -> bool {
        match side {
            Side::Source => self.source.channels.contains_key(&channel),
            Side::Destination => self.destination.channels.contains_key(&channel),
        }
    }

    /// The channels of a new epoch may be opened.
    pub(crate) fn open_slots(&mut self, side: Side, epoch: Epoch, streams: u16, shards: u16) {
        let background = (0..streams).map(Channel::Background);
        let channels = (0..shards).map(Channel::Request).chain(background).collect();
        *self.slots(side) = Slots { epoch: Some(epoch), channels, ..Slots::default() };
        self.dial_missing(side);
    }

    /// Makes the connections that are missing, if this side makes them.
    pub(crate) fn dial_missing(&mut self, side: Side) {
        if !self.dials(side) {
            return;
        }
        for channel in self.slots(side).channels.clone() {
            let is_made = self.slots(side).attempts.contains_key(&channel);
            if !is_made && !self.has_channel(side, channel) {
                self.dial(side, channel);
            }
        }
    }

    fn dial(&mut self, side: Side, channel: Channel) {
        let Some(stamp) = self.slots(side).next(channel) else { return };
        let connection = self.network.connect(channel, Some(stamp));
        let since = self.steps;
        self.slots(side).attempts.insert(channel, Attempt { connection, stamp, since });
        self.send_data_hello(side, connection, channel, stamp);
    }

    fn send_data_hello(&mut self, side: Side, id: usize, channel: Channel, stamp: Stamp) {
        let (role, session, incarnation) = match side {
            Side::Source => (Role::Source, SESSION, self.source.known_memory.unwrap_or_default()),
            Side::Destination => {
                let record = self.destination.session.record();
                (Role::Destination, record.session, record.incarnation)
            }
        };
        let capabilities = Capabilities::CHECKSUMS;
        let hello = Hello { role, channel, stamp, capabilities, session, incarnation };
        self.network.send(id, side.other(), stamp, Body::Hello(hello));
    }

    /// A hello on a data connection: the answer to this side's, or the first of the other's.
    pub(crate) fn data_hello(&mut self, side: Side, id: usize, channel: Channel, hello: &Hello) {
        let attempt = self.slots(side).attempts.get(&channel).copied();
        if let Some(attempt) = attempt.filter(|attempt| attempt.connection == id) {
            self.slots(side).attempts.remove(&channel);
            return self.open_data(side, channel, id, attempt.stamp);
        }
        let generation = hello.stamp.generation;
        let is_newer = self.slots(side).is_newer(channel, generation);
        let is_let_in = is_newer || self.breaks(Mutant::OlderGenerationAccepted);
        if !is_let_in || !self.is_ours(side, hello) {
            self.situation("a data hello that is out of date was turned away");
            return self.network.close(id, side);
        }
        crate::checks::i5_newer(self, side, is_newer);
        self.send_data_hello(side, id, channel, hello.stamp);
        self.slots(side).generations.insert(channel, generation);
        self.open_data(side, channel, id, hello.stamp);
    }

    fn is_ours(&mut self, side: Side, hello: &Hello) -> bool {
        let is_known = match side {
            Side::Source => {
                hello.role == Role::Destination
                    && self.source.known_memory == Some(hello.incarnation)
            }
            Side::Destination => hello.role == Role::Source,
        };
        let is_present = self.slots(side).epoch == Some(hello.stamp.epoch);
        is_known && is_present && hello.session == SESSION && !self.dials(side)
    }

    /// Both have said hello on a data connection, which takes the place of the one before.
    fn open_data(&mut self, side: Side, channel: Channel, connection: usize, stamp: Stamp) {
        match side {
            Side::Source => {
                self.lose_source_channel(channel);
                let data = SourceChannel::new(connection, stamp, self.steps);
                self.source.channels.insert(channel, data);
            }
            Side::Destination => {
                self.lose_destination_channel(channel);
                let data = DestinationChannel::new(connection, stamp);
                self.destination.channels.insert(channel, data);
                if matches!(channel, Channel::Request(_)) {
                    // What was asked for on the one before may be lost.
                    let host = &mut self.destination;
                    host.faults.values_mut().for_each(|asked| *asked = None);
                    host.wanted.values_mut().for_each(|asked| *asked = None);
                }
            }
        }
    }

    /// Gives up the connections that nobody has greeted for so many steps.
    pub(crate) fn watch_data_attempts(&mut self, side: Side, limit: u64) {
        let step = self.steps;
        let attempts = &self.slots(side).attempts;
        let late: Vec<usize> = attempts
            .values()
            .filter(|attempt| step >= attempt.since + limit)
            .map(|attempt| attempt.connection)
            .collect();
        for id in late {
            self.situation("a data connection that nobody greeted was given up");
            self.slots(side).forget(id);
            self.network.close(id, side);
        }
    }
}
