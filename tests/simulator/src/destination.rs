//! The destination's host: its driver, its disk, and the VMM that it tells. Its data channels
//! are in `receiving`, the faults it answers and its deaths in `handler`.

mod handler;
mod passes;
mod receiving;

use crate::coverage::{Happening, State};
use crate::memory::{Memory, Piece};
use crate::mutant::Mutant;
use crate::network::{Body, Packet, Side};
use crate::patience::Patience;
use crate::plan::{Plan, layout};
use crate::slots::Slots;
use crate::world::World;
use afterimage_protocol::bitmap::{Bitmap, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationAction, DestinationConfig, DestinationEvent, DestinationOwnership,
    DestinationRecord, DestinationSession, PersistFailed,
};
use afterimage_protocol::wire::{
    Channel, ControlFrame, Epoch, Hello, Incarnation, SessionId, SessionKind, Stamp,
};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct DestinationChannel {
    connection: usize,
    pub(crate) stamp: Stamp,
    pub(crate) piece: Option<Piece>,
    /// Since when something was asked for and nothing has come.
    pub(crate) waits_since: Option<u64>,
}

impl DestinationChannel {
    pub(crate) const fn new(connection: usize, stamp: Stamp) -> Self {
        Self { connection, stamp, piece: None, waits_since: None }
    }
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts, each learned once")]
pub(crate) struct DestinationHost {
    pub(crate) is_alive: bool,
    pub(crate) session: DestinationSession,
    pub(crate) pending: Option<DestinationRecord>,
    pub(crate) disk: DestinationRecord,
    pub(crate) memory: Memory,
    pub(crate) control: Option<usize>,
    /// Since when it has tried to be greeted.
    pub(crate) since: u64,
    pub(crate) slots: Slots,
    pub(crate) channels: BTreeMap<Channel, DestinationChannel>,
    /// With the request channel.
    pub(crate) patience: Patience,
    /// The VMM runs the guest.
    pub(crate) runs: bool,
    /// The VMM has died.
    pub(crate) has_lost_memory: bool,
    pub(crate) knows_it_is_complete: bool,
    /// Faults that wait in the kernel to be read.
    pub(crate) unread_faults: BTreeSet<PageNumber>,
    /// Pages waited for, and when they were asked for.
    pub(crate) faults: BTreeMap<PageNumber, Option<u64>>,
    /// Pages that were given back, and when they were asked for.
    pub(crate) wanted: BTreeMap<PageNumber, Option<u64>>,
}

fn config(plan: &Plan) -> DestinationConfig {
    DestinationConfig {
        layout: layout(plan),
        capabilities: plan.capabilities(Side::Destination),
        silence: Duration::from_secs(2),
    }
}

impl DestinationHost {
    pub(crate) fn new(plan: &Plan, mutant: Option<Mutant>, memory: u8) -> Self {
        let disk = DestinationRecord {
            session: SessionId::UNKNOWN,
            incarnation: Incarnation([memory; 16]),
            epoch: Epoch::default(),
            ownership: DestinationOwnership::Waiting,
        };
        Self {
            is_alive: true,
            session: DestinationSession::new(config(plan), disk),
            pending: None,
            disk,
            memory: Memory::new(plan, mutant),
            control: None,
            since: 0,
            slots: Slots::default(),
            channels: BTreeMap::new(),
            patience: Patience::default(),
            runs: false,
            has_lost_memory: false,
            knows_it_is_complete: false,
            unread_faults: BTreeSet::new(),
            faults: BTreeMap::new(),
            wanted: BTreeMap::new(),
        }
    }
}

impl World {
    pub(crate) fn destination_state(&self) -> State {
        let session = &self.destination.session;
        let pages = if session.is_settled() { "settled" } else { "early" };
        State { link: session.link_name(), ownership: session.record().ownership as u8, pages }
    }

    /// A call of the session, and what follows from it.
    pub(crate) fn with_destination<T>(
        &mut self,
        call: &'static str,
        does: impl FnOnce(&mut DestinationSession, Duration) -> T,
    ) -> T {
        let (now, before) = (self.now, self.destination_state());
        let result = does(&mut self.destination.session, now);
        self.cover(Side::Destination, before, Happening::Call(call));
        self.drain_destination();
        result
    }

    fn drain_destination(&mut self) {
        while self.destination.pending.is_none() {
            let Some(action) = self.destination.session.poll() else { return };
            self.note(|| format!("destination: {action:?}"));
            self.destination_action(action);
        }
    }

    fn destination_action(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Persist(record) => {
                self.destination.pending = Some(record);
                let begins = record.ownership == DestinationOwnership::Running
                    && self.destination.disk.ownership != DestinationOwnership::Running;
                self.destination.runs |= begins && self.breaks(Mutant::RunBeforeRecorded);
            }
            DestinationAction::Send(frame) => self.send_control_from_destination(frame),
            DestinationAction::SendReceived => self.send_received(),
            DestinationAction::OpenData { stamp, streams, shards } => {
                self.open_slots(Side::Destination, stamp.epoch, streams, shards);
            }
            DestinationAction::Event(DestinationEvent::Run) => {
                if self.source.is_fenced() {
                    self.violated("i3_one_owner", "a fenced destination is told to run");
                }
                self.destination.runs = true;
            }
            DestinationAction::Event(DestinationEvent::Fenced) => {
                self.situation("a fenced destination came back and stays stopped");
                self.destination.runs = false;
            }
            DestinationAction::Event(DestinationEvent::Ended(_)) => self.destination.runs = false,
            DestinationAction::Stale { range, segment } => self.take_stale(range, &segment),
            DestinationAction::Pass { number, last } => self.take_pass(number, last),
            DestinationAction::ForgetEarly => {
                let is_unused = !self.destination.runs;
                self.destination.memory.forget_early(is_unused);
            }
            DestinationAction::Renew { channel, generation } => {
                self.renew(Side::Destination, channel, generation);
            }
            DestinationAction::HangUp(refusal) => {
                if let Some(refusal) = refusal {
                    self.send_control_from_destination(ControlFrame::Refuse(refusal));
                }
                self.destination_hangs_up();
            }
            _ => {}
        }
    }

    fn destination_hangs_up(&mut self) {
        self.destination.memory.begin_pass(None);
        if let Some(id) = self.destination.control.take() {
            self.network.close(id, Side::Destination);
        }
        for id in self.destination.slots.close() {
            self.network.close(id, Side::Destination);
        }
        for channel in self.destination.channels.keys().copied().collect::<Vec<_>>() {
            self.lose_destination_channel(channel);
        }
    }

    pub(crate) fn send_control_from_destination(&mut self, frame: ControlFrame) {
        if let Some(id) = self.destination.control {
            let stamp = self.destination.session.stamp();
            self.network.send(id, Side::Source, stamp, Body::Control(frame));
        }
    }

    fn send_received(&mut self) {
        let range = PageRange::new(PageNumber(0), self.plan.pages);
        let segment = if self.breaks(Mutant::PlanesNotSent) {
            Segment::encode(&Bitmap::new(self.plan.pages), range)
        } else {
            self.destination.memory.here()
        };
        self.destination.memory.to_acknowledge.clear();
        self.send_control_from_destination(ControlFrame::Received { range, segment, last: true });
    }

    /// A frame has arrived at the destination. `false` if it cannot be taken now.
    pub(crate) fn destination_receives(&mut self, id: usize, channel: Channel, packet: Packet) {
        let is_control = self.destination.control == Some(id);
        match packet.body {
            Body::Hello(hello) if is_control => self.destination_is_greeted(id, &hello),
            Body::Hello(hello) if channel == Channel::Control => {
                self.destination_accepts(id, &hello);
            }
            Body::Hello(hello) => self.data_hello(Side::Destination, id, channel, &hello),
            Body::Refused(refusal) if is_control => {
                let (before, code) = (self.destination_state(), refusal.code as u16);
                self.destination.session.refused(refusal);
                self.cover(Side::Destination, before, Happening::Refused(code));
                self.drain_destination();
            }
            Body::Control(frame) if is_control => {
                let stamp = self.destination.session.stamp();
                if self.counts(Side::Destination, stamp, packet.stamp, packet.is_stale) {
                    let (before, kind) = (self.destination_state(), frame.kind() as u16);
                    self.destination.session.frame(frame, self.now);
                    self.cover(Side::Destination, before, Happening::Frame(kind));
                    self.drain_destination();
                }
            }
            Body::Content(..) | Body::Zero(..) => {
                let data = self.destination.channels.get(&channel);
                let Some(stamp) = data.filter(|data| data.connection == id).map(|data| data.stamp)
                else {
                    return;
                };
                self.has_heard(channel);
                if self.counts(Side::Destination, stamp, packet.stamp, packet.is_stale) {
                    self.take_pages(channel, packet.body);
                }
            }
            _ => {}
        }
    }

    fn destination_is_greeted(&mut self, id: usize, hello: &Hello) {
        let is_newer = hello.stamp.epoch > self.destination.session.record().epoch;
        let hello = self.believed(*hello);
        let result = self.with_destination("greeted", |session, now| session.greeted(&hello, now));
        if let Err(refusal) = result {
            let stamp = self.destination.session.stamp();
            self.network.send(id, Side::Source, stamp, Body::Refused(refusal));
            self.destination.control = None;
            self.network.close(id, Side::Destination);
            return;
        }
        crate::checks::i5_newer(self, Side::Destination, is_newer);
    }

    /// Only with [`Mutant::OlderEpochAccepted`] another than what was said.
    fn believed(&self, mut hello: Hello) -> Hello {
        let seen = self.destination.session.record().epoch;
        if self.breaks(Mutant::OlderEpochAccepted) && hello.stamp.epoch <= seen {
            hello.stamp.epoch = seen.next();
        }
        hello
    }

    /// The source has connected.
    fn destination_accepts(&mut self, id: usize, hello: &Hello) {
        if self.refuses_by_hand(Side::Destination, id) {
            return;
        }
        if let Err(refusal) = self.destination.session.admits(&self.believed(*hello)) {
            let state = self.destination_state();
            self.cover(Side::Destination, state, Happening::Refused(refusal.code as u16));
            let stamp = self.destination.session.stamp();
            self.network.send(id, Side::Source, stamp, Body::Refused(refusal));
            self.network.close(id, Side::Destination);
            return;
        }
        let ours = self.with_destination("open", |session, _| session.open());
        self.destination.control = Some(id);
        self.network.send(id, Side::Source, ours.stamp, Body::Hello(ours));
        self.destination_is_greeted(id, hello);
    }

    /// The destination connects.
    pub(crate) fn destination_opens(&mut self) {
        let ours = self.with_destination("open", |session, _| session.open());
        let id = self.network.connect(Channel::Control, None);
        self.destination.control = Some(id);
        self.destination.since = self.steps;
        self.network.send(id, Side::Source, ours.stamp, Body::Hello(ours));
    }

    /// A connection has ended, as the destination reads.
    pub(crate) fn destination_reads_end(&mut self, id: usize, channel: Channel) {
        let data = self.destination.channels.get(&channel);
        if self.destination.control == Some(id) {
            self.with_destination("disconnected", |session, _| session.disconnected());
        } else if data.is_some_and(|data| data.connection == id) {
            self.end_data(Side::Destination, channel);
        } else {
            self.destination.slots.forget(id);
            self.network.close(id, Side::Destination);
        }
    }

    /// The disk answers the destination.
    pub(crate) fn destination_disk_answers(&mut self, writes: bool, says_so: bool) {
        let Some(record) = self.destination.pending.take() else { return };
        let cheats = self.breaks(Mutant::OwnershipWithoutRecord)
            && record.ownership != self.destination.disk.ownership;
        if writes && !cheats {
            self.destination.disk = record;
        }
        self.note(|| format!("destination: written {writes}, said {says_so}: {record:?}"));
        let happening = if says_so { Happening::Recorded } else { Happening::NotRecorded };
        let before = self.destination_state();
        let result = says_so.then_some(()).ok_or(PersistFailed);
        self.destination.session.persisted(record, result);
        self.cover(Side::Destination, before, happening);
        self.drain_destination();
    }

    pub(crate) fn is_migration(&self) -> bool {
        self.plan.kind == SessionKind::Migration
    }
}
