//! The destination's host: its driver, its memory, its disk, and the faults it answers.

use crate::coverage::Happening;
use crate::memory::{Memory, Piece};
use crate::mutant::Mutant;
use crate::network::{Body, Packet, Side};
use crate::world::{Plan, World, layout};
use afterimage_protocol::bitmap::{Bitmap, PageState, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationAction, DestinationConfig, DestinationEvent, DestinationOwnership,
    DestinationRecord, DestinationSession, PersistFailed,
};
use afterimage_protocol::wire::{
    Capabilities, Channel, ControlFrame, Epoch, Generation, Hello, Incarnation, Role, SessionId,
    SessionKind, Stamp,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// After so many steps a page is asked for again.
const RETRY: u64 = 150;

#[derive(Debug)]
pub(crate) struct DestinationChannel {
    connection: usize,
    pub(crate) stamp: Stamp,
    piece: Option<Piece>,
}

pub(crate) struct DestinationHost {
    pub(crate) is_alive: bool,
    pub(crate) session: DestinationSession,
    pub(crate) pending: Option<DestinationRecord>,
    pub(crate) disk: DestinationRecord,
    pub(crate) memory: Memory,
    pub(crate) control: Option<usize>,
    /// The data channels' epoch, and how many of each kind.
    serving: Option<(Stamp, u16, u16)>,
    pub(crate) channels: BTreeMap<Channel, DestinationChannel>,
    generations: BTreeMap<Channel, u32>,
    /// The guest has been told to run by this process.
    pub(crate) runs: bool,
    pub(crate) knows_it_is_complete: bool,
    /// Pages waited for, and when they were asked for.
    pub(crate) faults: BTreeMap<PageNumber, Option<u64>>,
}

fn config(plan: &Plan) -> DestinationConfig {
    DestinationConfig {
        layout: layout(plan),
        capabilities: Capabilities::CHECKSUMS,
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
            memory: Memory::new(plan.pages, plan.first_alias, mutant),
            control: None,
            serving: None,
            channels: BTreeMap::new(),
            generations: BTreeMap::new(),
            runs: false,
            knows_it_is_complete: false,
            faults: BTreeMap::new(),
        }
    }

    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.channels.values().filter_map(|data| data.piece.as_ref())
    }

    pub(crate) fn is_receiving(&self, page: PageNumber) -> bool {
        self.pieces().flat_map(|piece| &piece.won).any(|run| run.contains(page))
    }

    pub(crate) fn one_being_received(&self) -> Option<PageNumber> {
        self.pieces().flat_map(|piece| &piece.won).map(|run| run.start).next()
    }

    pub(crate) fn pages_being_received(&self) -> usize {
        self.pieces().flat_map(|piece| &piece.won).map(|run| run.count as usize).sum()
    }
}

impl World {
    fn cover_destination(&mut self, happening: Happening) {
        let session = &self.destination.session;
        let ownership = session.record().ownership as u8;
        let kind = self.plan.kind as u8;
        self.coverage.note(Side::Destination, session.link_name(), ownership, kind, happening);
    }

    /// A call of the session, and what follows from it.
    pub(crate) fn with_destination<T>(
        &mut self,
        call: &'static str,
        does: impl FnOnce(&mut DestinationSession, Duration) -> T,
    ) -> T {
        self.cover_destination(Happening::Call(call));
        let now = self.now;
        let result = does(&mut self.destination.session, now);
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
            DestinationAction::Persist(record) => self.destination.pending = Some(record),
            DestinationAction::Send(frame) => self.send_control_from_destination(frame),
            DestinationAction::SendReceived => self.send_received(),
            DestinationAction::OpenData { stamp, streams, shards } => {
                self.destination.serving = Some((stamp, streams, shards));
                self.destination.generations.clear();
                for channel in self.wanted_channels() {
                    self.open_data(channel);
                }
            }
            DestinationAction::Event(DestinationEvent::Run) => {
                if self.source.is_fenced() {
                    self.violated("i3_one_owner", "a fenced destination is told to run");
                }
                self.destination.runs = true;
            }
            DestinationAction::Event(DestinationEvent::Fenced | DestinationEvent::Ended(_)) => {
                self.destination.runs = false;
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
        if let Some(id) = self.destination.control.take() {
            self.network.close(id, Side::Destination);
        }
        self.destination.serving = None;
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
        let nothing = Bitmap::new(self.plan.pages);
        let segment = if self.breaks(Mutant::PlanesNotSent) {
            Segment::encode(&nothing, range)
        } else {
            Segment::encode(self.destination.memory.planes.completed(), range)
        };
        self.destination.memory.to_acknowledge.clear();
        self.send_control_from_destination(ControlFrame::Received { range, segment, last: true });
    }

    fn wanted_channels(&self) -> Vec<Channel> {
        let Some((_, streams, shards)) = self.destination.serving else { return Vec::new() };
        let requests = (0..shards).map(Channel::Request);
        requests.chain((0..streams).map(Channel::Background)).collect()
    }

    /// The next generation of a data channel.
    fn open_data(&mut self, channel: Channel) {
        let Some((stamp, _, _)) = self.destination.serving else { return };
        let generation = self.destination.generations.entry(channel).or_insert(0);
        *generation += 1;
        let stamp = Stamp { epoch: stamp.epoch, generation: Generation(*generation) };
        let connection = self.network.connect(channel, Some(stamp));
        let record = self.destination.session.record();
        let hello = Hello {
            role: Role::Destination,
            channel,
            stamp,
            capabilities: Capabilities::CHECKSUMS,
            session: record.session,
            incarnation: record.incarnation,
        };
        self.network.send(connection, Side::Source, stamp, Body::Hello(hello));
        let data = DestinationChannel { connection, stamp, piece: None };
        self.destination.channels.insert(channel, data);
        if matches!(channel, Channel::Request(_)) {
            // What was asked for on the one before may be lost.
            self.destination.faults.values_mut().for_each(|asked| *asked = None);
        }
    }

    pub(crate) fn reopen_data(&mut self) {
        for channel in self.wanted_channels() {
            if !self.destination.channels.contains_key(&channel) {
                self.open_data(channel);
            }
        }
    }

    pub(crate) fn lose_destination_channel(&mut self, channel: Channel) {
        if let Some(data) = self.destination.channels.remove(&channel) {
            self.network.close(data.connection, Side::Destination);
            if let Some(piece) = data.piece {
                self.note(|| format!("destination gives {:?} back", piece.won));
                self.destination.memory.give_back(&piece);
            }
        }
    }

    /// A frame has arrived at the destination. `false` if it cannot be taken now.
    pub(crate) fn destination_receives(&mut self, id: usize, channel: Channel, packet: Packet) {
        let is_control = self.destination.control == Some(id);
        match packet.body {
            Body::Hello(hello) if is_control => self.destination_is_greeted(id, &hello),
            Body::Hello(hello) => self.destination_accepts(id, &hello),
            Body::Refused(refusal) if is_control => {
                self.cover_destination(Happening::Refused(refusal.code as u16));
                self.destination.session.refused(refusal);
                self.drain_destination();
            }
            Body::Control(frame) if is_control => {
                let stamp = self.destination.session.stamp();
                if self.counts(Side::Destination, stamp, packet.stamp, packet.is_stale) {
                    self.cover_destination(Happening::Frame(frame.kind() as u16));
                    let now = self.now;
                    self.destination.session.frame(frame, now);
                    self.drain_destination();
                }
            }
            Body::Content(..) | Body::Zero(..) => {
                let Some(data) = self.destination.channels.get(&channel) else { return };
                let stamp = data.stamp;
                if self.counts(Side::Destination, stamp, packet.stamp, packet.is_stale) {
                    self.take_pages(channel, packet.body);
                }
            }
            _ => {}
        }
    }

    fn take_pages(&mut self, channel: Channel, body: Body) {
        self.note(|| format!("destination takes {body:?} on {channel}"));
        let is_urgent = matches!(channel, Channel::Request(_));
        let memory = &mut self.destination.memory;
        match body {
            Body::Content(pages, values) if is_urgent => {
                for (page, value) in pages.iter().zip(values) {
                    memory.urgent(page, value);
                }
            }
            Body::Content(pages, values) => {
                let piece = memory.begin(pages, values);
                if let Some(data) = self.destination.channels.get_mut(&channel) {
                    data.piece = Some(piece);
                }
            }
            Body::Zero(pages) => {
                memory.zero(pages);
                if is_urgent {
                    memory.woken.extend(pages.iter());
                }
            }
            _ => {}
        }
    }

    fn destination_is_greeted(&mut self, id: usize, hello: &Hello) {
        let result = self.with_destination("greeted", |session, now| session.greeted(hello, now));
        if let Err(refusal) = result {
            let stamp = self.destination.session.stamp();
            self.network.send(id, Side::Source, stamp, Body::Refused(refusal));
            self.destination.control = None;
            self.network.close(id, Side::Destination);
        }
    }

    /// The source has connected.
    fn destination_accepts(&mut self, id: usize, hello: &Hello) {
        if let Err(refusal) = self.destination.session.admits(hello) {
            self.cover_destination(Happening::Refused(refusal.code as u16));
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
        self.network.send(id, Side::Source, ours.stamp, Body::Hello(ours));
    }

    /// A connection has ended, as the destination reads.
    pub(crate) fn destination_reads_end(&mut self, id: usize, channel: Channel) {
        let data = self.destination.channels.get(&channel);
        if self.destination.control == Some(id) {
            self.with_destination("disconnected", |session, _| session.disconnected());
        } else if data.is_some_and(|data| data.connection == id) {
            self.lose_destination_channel(channel);
        } else {
            self.network.close(id, Side::Destination);
        }
    }

    /// Whether a channel still works at a piece, so that its next frame has to wait.
    pub(crate) fn is_busy(&self, id: usize) -> bool {
        let mut channels = self.destination.channels.values();
        channels.any(|data| data.connection == id && data.piece.is_some())
    }

    /// More of a background piece arrives.
    pub(crate) fn advance_piece(&mut self) {
        if !self.destination.is_alive || self.destination.pending.is_some() {
            return;
        }
        let slot = self.random.below(u64::from(self.plan.streams)) as u16;
        let Some(data) = self.destination.channels.get_mut(&Channel::Background(slot)) else {
            return;
        };
        if let Some(mut piece) = data.piece.take()
            && !self.destination.memory.advance(&mut piece)
        {
            data.piece = Some(piece);
        }
    }

    /// What has become complete is acknowledged.
    pub(crate) fn acknowledge(&mut self) {
        let is_idle = !self.destination.is_alive || self.destination.pending.is_some();
        let runs = &mut self.destination.memory.to_acknowledge;
        if is_idle || self.destination.serving.is_none() || runs.is_empty() {
            return;
        }
        let runs = std::mem::take(runs);
        self.send_control_from_destination(ControlFrame::Ack(runs));
    }

    /// The fault thread looks at one fault.
    pub(crate) fn answer_fault(&mut self) {
        let pages: Vec<PageNumber> = self.destination.faults.keys().copied().collect();
        let Some(&page) = self.random.pick(&pages) else { return };
        if !self.destination.is_alive || self.destination.pending.is_some() {
            return;
        }
        match self.destination.memory.planes.state(page) {
            PageState::Complete => {
                self.destination.memory.answer(page);
                self.destination.faults.remove(&page);
            }
            PageState::Claimed if self.destination.memory.is_alias(page) => {
                self.destination.faults.remove(&page);
            }
            PageState::Claimed | PageState::Free => self.ask(page),
        }
    }

    fn ask(&mut self, page: PageNumber) {
        let Some(data) = self.destination.channels.get(&Channel::Request(0)) else { return };
        let asked = self.destination.faults.get(&page).copied().flatten();
        if asked.is_some_and(|step| self.steps < step + RETRY) {
            return;
        }
        let (id, stamp) = (data.connection, data.stamp);
        self.network.send(id, Side::Source, stamp, Body::Request(PageRange::one(page)));
        self.destination.faults.insert(page, Some(self.steps));
    }

    /// The destination's process dies. Memory, planes and the vCPUs that wait stay.
    pub(crate) fn crash_destination(&mut self) {
        self.note(|| "the destination dies".to_owned());
        if let Some(id) = self.destination.control.take() {
            self.network.close(id, Side::Destination);
        }
        self.destination.serving = None;
        for (_, data) in std::mem::take(&mut self.destination.channels) {
            self.network.close(data.connection, Side::Destination);
        }
        self.destination.faults.clear();
        self.destination.runs = false;
        self.destination.is_alive = false;
        self.destination.pending = None;
    }

    /// Another process takes over memory and record.
    pub(crate) fn restart_destination(&mut self) {
        let plan = self.plan;
        let record = self.destination.disk;
        self.note(|| format!("the destination begins again with {record:?}"));
        self.destination.session = DestinationSession::new(config(&plan), record);
        self.destination.memory.take_over();
        self.destination.knows_it_is_complete = false;
        self.destination.is_alive = true;
        self.guest.wake_all();
    }

    /// Memory is gone with the process; another begins with none.
    pub(crate) fn replace_destination(&mut self) {
        let plan = self.plan;
        let next = self.destination.disk.incarnation.0[0].wrapping_add(1);
        self.note(|| format!("the destination begins again with empty memory {next}"));
        if self.destination.disk.ownership == DestinationOwnership::Running {
            self.guest.lost_in = Some(self.destination.disk.incarnation);
        }
        self.destination = DestinationHost::new(&plan, self.mutant, next);
        self.guest.begin_again(&self.source.memory);
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
        self.cover_destination(if says_so { Happening::Recorded } else { Happening::NotRecorded });
        let result = says_so.then_some(()).ok_or(PersistFailed);
        self.destination.session.persisted(record, result);
        self.drain_destination();
    }

    pub(crate) fn is_migration(&self) -> bool {
        self.plan.kind == SessionKind::Migration
    }
}
