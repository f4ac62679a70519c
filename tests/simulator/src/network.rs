//! Connections that lose, delay and reorder, each an ordered stream of frames.
//!
//! A connection is **cut** (both ends read that it broke), or one or both of its ways die:
//! what was sent on a dead way before may still arrive, nothing after it does, and nobody is
//! told. Kernels notice that of a data channel after a while, each in its own time; of a
//! control connection they never do here, so that only the session's own heartbeats can. A way that
//! is **stuck** is noticed by no kernel at all. While the hosts are **parted** everything
//! waits, in one direction or both, connection attempts too, and goes on afterwards: so the
//! hello of an attempt that was given up long ago arrives late.
//!
//! A side that closes its end lets the other read what was sent before. Frames of
//! connections that have been are kept, and slipped into later ones with the stamp they had;
//! hellos are kept too, and come again as connections with nobody at the other end.

use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::{Channel, ControlFrame, Hello, Refusal, Stamp};
use std::collections::{BTreeMap, VecDeque};

/// After so many steps a kernel gives up a data connection with a dead way, at the earliest:
/// that of the other side may take longer.
const KERNEL_LIMIT: u64 = 300;
const KERNEL_LAG: u64 = 300;
/// How late what was sent on a closed data connection may arrive, in quarters less one.
const CLOSED_LAG: u64 = 300;

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
    /// With the precopy pass, if the guest may have written these pages since.
    Content(PageRange, Vec<u64>, Option<u16>),
    Zero(PageRange, Option<u16>),
}

#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) stamp: Stamp,
    pub(crate) body: Body,
    /// It was slipped in, from a connection that has been.
    pub(crate) is_stale: bool,
    /// It arrives at this step.
    arrives: u64,
}

impl Packet {
    /// Whether it only says that its sender is there.
    pub(crate) const fn is_beat(&self) -> bool {
        matches!(
            self.body,
            Body::Control(ControlFrame::Heartbeat { .. } | ControlFrame::HeartbeatReply { .. })
        )
    }
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Open,
    /// Nothing sent after this step arrives.
    Dead(u64),
    /// Nothing arrives, and kernels are told that it did.
    Stuck,
}

#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    /// What its frames carry, once both have agreed on it.
    pub(crate) stamp: Option<Stamp>,
    queues: [VecDeque<Packet>; 2],
    is_open: [bool; 2],
    /// By the side at which they end.
    ways: [Way; 2],
    /// After how many steps each side's kernel gives up.
    limits: [u64; 2],
    is_cut: bool,
}

impl Connection {
    fn new(channel: Channel, stamp: Option<Stamp>, number: u64) -> Self {
        let limit = |lag| KERNEL_LIMIT + lag % 3 * KERNEL_LAG;
        Self {
            limits: [limit(number), limit(number / 3)],
            channel,
            stamp,
            queues: Default::default(),
            is_open: [true; 2],
            ways: [Way::Open; 2],
            is_cut: false,
        }
    }

    pub(crate) const fn is_open(&self, side: Side) -> bool {
        self.is_open[side as usize]
    }

    pub(crate) fn is_data(&self) -> bool {
        self.channel != Channel::Control
    }

    /// Whether frames go in one direction only.
    pub(crate) fn is_half_open(&self) -> bool {
        !self.is_cut && (self.ways[0] == Way::Open) != (self.ways[1] == Way::Open)
    }

    /// Whether the kernel tells a side that it broke.
    fn has_broken(&self, now: u64, side: Side) -> bool {
        let limit = self.limits[side as usize];
        let is_late = |way: &Way| matches!(way, Way::Dead(since) if now >= since + limit);
        self.is_cut || (self.is_data() && self.ways.iter().any(is_late))
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
const KEPT_HELLOS: usize = 24;

#[derive(Debug, Default)]
pub(crate) struct Network {
    connections: BTreeMap<usize, Connection>,
    next: usize,
    kept: VecDeque<(Channel, Side, Packet)>,
    hellos: VecDeque<(Channel, Side, Packet)>,
    /// Until when nothing arrives, by the side at which it would.
    parted_until: [u64; 2],
    latency: [u64; 2],
    now: u64,
}

impl Network {
    pub(crate) fn new(latency: [u64; 2]) -> Self {
        Self { latency, ..Self::default() }
    }

    pub(crate) const fn advance_to(&mut self, step: u64) {
        self.now = step;
    }

    pub(crate) fn connect(&mut self, channel: Channel, stamp: Option<Stamp>) -> usize {
        self.next += 1;
        self.connections.insert(self.next, Connection::new(channel, stamp, self.next as u64));
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
        let arrives = self.now + self.latency[to as usize];
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let packet = Packet { stamp, body, is_stale: false, arrives };
        let (kept, most) = match packet.body {
            Body::Hello(_) => (&mut self.hellos, KEPT_HELLOS),
            _ => (&mut self.kept, KEPT),
        };
        if !matches!(packet.body, Body::Refused(_)) {
            kept.push_back((connection.channel, to, packet.clone()));
            if kept.len() > most {
                kept.pop_front();
            }
        }
        let goes = !connection.is_cut && connection.ways[to as usize] == Way::Open;
        if goes && connection.is_open(to) {
            connection.queues[to as usize].push_back(packet);
        }
    }

    pub(crate) fn read(&mut self, id: usize, side: Side) -> Read {
        let (now, is_parted) = (self.now, self.is_parted(side));
        let Some(connection) = self.connections.get_mut(&id) else { return Read::Nothing };
        if !connection.is_open(side) {
            return Read::Nothing;
        }
        if connection.has_broken(now, side) {
            return Read::End;
        }
        let way = connection.ways[side as usize];
        if is_parted || way == Way::Stuck {
            return Read::Nothing;
        }
        let queue = &mut connection.queues[side as usize];
        if queue.front().is_some_and(|packet| packet.arrives > now) {
            return Read::Nothing;
        }
        match queue.pop_front() {
            Some(packet) => Read::Packet(packet),
            None if way == Way::Open && !connection.is_open(side.other()) => Read::End,
            None => Read::Nothing,
        }
    }

    /// Whether the rest of a frame that has begun to arrive goes on arriving.
    pub(crate) fn flows(&self, id: usize, side: Side) -> bool {
        self.connections.get(&id).is_some_and(|connection| {
            connection.ways[side as usize] == Way::Open && !self.has_broken(id, side)
        }) && !self.is_parted(side)
    }

    /// Whether a side's kernel knows that a connection broke.
    pub(crate) fn has_broken(&self, id: usize, side: Side) -> bool {
        self.connections.get(&id).is_none_or(|connection| connection.has_broken(self.now, side))
    }

    fn is_parted(&self, side: Side) -> bool {
        self.now < self.parted_until[side as usize]
    }

    pub(crate) fn close(&mut self, id: usize, side: Side) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.is_open[side as usize] = false;
        connection.queues[side as usize].clear();
        if connection.is_data() {
            // What is on its way from who gives a channel up may take its time.
            let late = self.now + id as u64 % 4 * CLOSED_LAG;
            for packet in &mut connection.queues[side.other() as usize] {
                packet.arrives = packet.arrives.max(late);
            }
        }
        if connection.is_open == [false; 2] {
            self.connections.remove(&id);
        }
    }

    /// Both ends learn that the connection broke; what was on its way is lost.
    pub(crate) fn cut(&mut self, id: usize) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.is_cut = true;
            connection.queues = Default::default();
        }
    }

    /// Nothing arrives at a side any more, but the first `left` frames that were on their way.
    pub(crate) fn kill_way(&mut self, id: usize, to: Side, left: usize) {
        let now = self.now;
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.ways[to as usize] == Way::Open
        {
            connection.ways[to as usize] = Way::Dead(now);
            connection.queues[to as usize].truncate(left);
        }
    }

    /// Nothing arrives at a side any more, and no kernel notices. Data channels only.
    pub(crate) fn get_stuck(&mut self, id: usize, to: Side) -> bool {
        let found = self.connections.get_mut(&id);
        let Some(data) = found.filter(|connection| connection.is_data()) else {
            return false;
        };
        data.ways[to as usize] = Way::Stuck;
        true
    }

    /// Nothing arrives at a side for so many steps.
    pub(crate) fn part(&mut self, to: Side, steps: u64) {
        self.parted_until[to as usize] = self.now + steps;
    }

    /// Everything that waits arrives. What died stays dead, and has to be noticed.
    pub(crate) fn heal(&mut self) {
        self.parted_until = [0; 2];
    }

    pub(crate) fn ids(&self) -> Vec<usize> {
        self.connections.keys().copied().collect()
    }

    /// A hello of before comes once more, over a connection whose other end nobody holds:
    /// with `is_quiet` not even its end is read. `pick` chooses one of so many.
    pub(crate) fn repeat_hello(
        &mut self,
        is_quiet: bool,
        mut pick: impl FnMut(usize) -> usize,
    ) -> bool {
        if self.hellos.is_empty() {
            return false;
        }
        let (channel, to, packet) = self.hellos[pick(self.hellos.len())].clone();
        let id = self.connect(channel, None);
        let now = self.now;
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.is_open[to.other() as usize] = false;
            connection.queues[to as usize].push_back(Packet { is_stale: true, ..packet });
            if is_quiet {
                connection.ways[to as usize] = Way::Dead(now);
            }
        }
        true
    }

    /// Slips a frame of an older epoch or generation into a connection. `pick` chooses one
    /// of so many.
    pub(crate) fn slip_in(&mut self, id: usize, mut pick: impl FnMut(usize) -> usize) -> bool {
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        let Some(stamp) = connection.stamp.filter(|_| !connection.is_cut) else { return false };
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
        if connection.ways[to as usize] != Way::Open {
            return false;
        }
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
