//! Connections that lose, delay and reorder, each an ordered stream of frames.
//!
//! What is on its way when a connection is severed is lost. A side that closes its end
//! lets the other read what was sent before. Frames of connections that have been are kept,
//! and slipped into later ones with the stamp they had.

use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::{Channel, ControlFrame, Hello, Refusal, Stamp};
use std::collections::{BTreeMap, VecDeque};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Body {
    Hello(Hello),
    Refused(Refusal),
    Control(ControlFrame),
    Request(PageRange),
    Content(PageRange, Vec<u64>),
    Zero(PageRange),
}

#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) stamp: Stamp,
    pub(crate) body: Body,
    /// It was slipped in, from a connection that has been.
    pub(crate) is_stale: bool,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    /// What its frames carry, once both have agreed on it.
    pub(crate) stamp: Option<Stamp>,
    queues: [VecDeque<Packet>; 2],
    is_open: [bool; 2],
    is_severed: bool,
    /// Severed, but nobody is told: only silence shows it.
    is_silent: bool,
}

impl Connection {
    pub(crate) const fn is_open(&self, side: Side) -> bool {
        self.is_open[side as usize]
    }

    /// Whether the side would read the end of the stream now.
    fn has_ended(&self, side: Side) -> bool {
        let other_is_gone = !self.is_open[side.other() as usize];
        (self.is_severed && !self.is_silent) || (other_is_gone && !self.is_severed)
    }
}

/// What reading from a connection gives.
#[derive(Debug)]
pub(crate) enum Read {
    Packet(Packet),
    End,
    Nothing,
}

const KEPT: usize = 96;

#[derive(Debug, Default)]
pub(crate) struct Network {
    connections: BTreeMap<usize, Connection>,
    next: usize,
    kept: VecDeque<(Channel, Side, Packet)>,
}

impl Network {
    pub(crate) fn connect(&mut self, channel: Channel, stamp: Option<Stamp>) -> usize {
        self.next += 1;
        self.connections.insert(
            self.next,
            Connection {
                channel,
                stamp,
                queues: Default::default(),
                is_open: [true; 2],
                is_severed: false,
                is_silent: false,
            },
        );
        self.next
    }

    pub(crate) fn get(&self, id: usize) -> Option<&Connection> {
        self.connections.get(&id)
    }

    pub(crate) fn set_stamp(&mut self, id: usize, stamp: Stamp) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.stamp = Some(stamp);
        }
    }

    /// Those whose end a side holds.
    pub(crate) fn of(&self, side: Side) -> Vec<usize> {
        let held = self.connections.iter().filter(|(_, connection)| connection.is_open(side));
        held.map(|(id, _)| *id).collect()
    }

    pub(crate) fn send(&mut self, id: usize, to: Side, stamp: Stamp, body: Body) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let packet = Packet { stamp, body, is_stale: false };
        if !matches!(packet.body, Body::Hello(_) | Body::Refused(_)) {
            self.kept.push_back((connection.channel, to, packet.clone()));
            if self.kept.len() > KEPT {
                self.kept.pop_front();
            }
        }
        if !connection.is_severed && connection.is_open(to) {
            connection.queues[to as usize].push_back(packet);
        }
    }

    pub(crate) fn read(&mut self, id: usize, side: Side) -> Read {
        let Some(connection) = self.connections.get_mut(&id) else { return Read::Nothing };
        if !connection.is_open(side) {
            return Read::Nothing;
        }
        match connection.queues[side as usize].pop_front() {
            Some(packet) => Read::Packet(packet),
            None if connection.has_ended(side) => Read::End,
            None => Read::Nothing,
        }
    }

    pub(crate) fn close(&mut self, id: usize, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.is_open[side as usize] = false;
        connection.queues[side as usize].clear();
        if connection.is_open == [false; 2] {
            self.connections.remove(&id);
        }
    }

    pub(crate) fn sever(&mut self, id: usize, is_silent: bool) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.is_severed = true;
            connection.is_silent = is_silent;
            connection.queues = Default::default();
        }
    }

    /// From now on every severed connection is seen to be.
    pub(crate) fn heal(&mut self) {
        for connection in self.connections.values_mut() {
            connection.is_silent = false;
        }
    }

    pub(crate) fn ids(&self) -> Vec<usize> {
        self.connections.keys().copied().collect()
    }

    /// Slips a frame of an older epoch or generation into a connection. `pick` chooses one
    /// of so many.
    pub(crate) fn slip_in(&mut self, id: usize, mut pick: impl FnMut(usize) -> usize) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        let Some(stamp) = connection.stamp.filter(|_| !connection.is_severed) else { return false };
        let older: Vec<&(Channel, Side, Packet)> = self
            .kept
            .iter()
            .filter(|(channel, _, packet)| *channel == connection.channel && packet.stamp < stamp)
            .collect();
        if older.is_empty() {
            return false;
        }
        let (_, to, packet) = older[pick(older.len())];
        let (to, packet) = (*to, Packet { is_stale: true, ..packet.clone() });
        let queue = &mut connection.queues[to as usize];
        let after_hello = queue
            .iter()
            .position(|packet| matches!(packet.body, Body::Hello(_)))
            .map_or(0, |at| at + 1);
        let at = after_hello + pick(queue.len() - after_hello + 1);
        queue.insert(at, packet);
        true
    }
}
