//! The source's host: its driver, its memory, its disk. Its data channels are in `sending`.

mod passes;
mod sending;

use crate::coverage::{Happening, State};
use crate::mutant::Mutant;
use crate::network::{Body, Packet, Side};
use crate::patience::Patience;
use crate::plan::{Plan, layout};
use crate::random::Random;
use crate::slots::Slots;
use crate::world::World;
use afterimage_protocol::bitmap::words_for;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    Book, InFlight, Releasing, SourceAction, SourceConfig, SourceEvent, SourceOwnership,
    SourcePages, SourceRecord, SourceSession,
};
use afterimage_protocol::wire::{Channel, ControlFrame, Hello, Incarnation, SessionId, Stamp};
use passes::Passes;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

pub(crate) const SESSION: SessionId = SessionId([5; 16]);
/// The longest run that a background stream sends at once.
pub(crate) const PIECE: u64 = 6;

/// One data channel, as the source sees it.
#[derive(Debug)]
pub(crate) struct SourceChannel {
    connection: usize,
    pub(crate) stamp: Stamp,
    pub(crate) in_flight: InFlight,
    /// The same, for the checks.
    shadow: BTreeSet<PageNumber>,
    /// When something of it was acknowledged last, or it began to have something.
    pub(crate) moved: u64,
}

impl SourceChannel {
    pub(crate) fn new(connection: usize, stamp: Stamp, moved: u64) -> Self {
        let (in_flight, shadow) = (InFlight::default(), BTreeSet::new());
        Self { connection, stamp, in_flight, shadow, moved }
    }
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts, each learned once")]
pub(crate) struct SourceHost {
    pub(crate) is_alive: bool,
    pub(crate) session: SourceSession,
    pub(crate) pending: Option<SourceRecord>,
    /// What survives: the record, memory, and which pages are noted as freed.
    pub(crate) disk: SourceRecord,
    pub(crate) memory: Vec<Option<u64>>,
    pub(crate) released: Vec<bool>,
    /// The VMM's vCPUs run.
    pub(crate) vmm_runs: bool,
    /// The VMM has given its state to this process.
    pub(crate) gave_state: bool,
    pub(crate) book: Book<Box<[AtomicU64]>>,
    pub(crate) control: Option<usize>,
    /// Since when it has tried to be greeted.
    pub(crate) since: u64,
    /// A connection accepted, and its hello, until ours is on record.
    accepting: Option<(usize, Hello)>,
    pub(crate) slots: Slots,
    /// The memory that said hello last.
    peer: Option<Incarnation>,
    pub(crate) channels: BTreeMap<Channel, SourceChannel>,
    pub(crate) patience: BTreeMap<Channel, Patience>,
    pub(crate) destination_runs: bool,
    /// The session lets pages be freed.
    pub(crate) may_release: bool,
    /// Whose planes the book holds.
    pub(crate) known_memory: Option<Incarnation>,
    /// What was ever acknowledged, and by which memory: for the checks.
    pub(crate) ever_acked: BTreeSet<PageNumber>,
    acked_by: Option<Incarnation>,
    pub(crate) passes: Passes,
    /// Whoever drives the migration holds the guest back.
    pub(crate) holds: bool,
}

fn book(pages: u64) -> Book<Box<[AtomicU64]>> {
    let words = || (0..words_for(pages)).map(|_| AtomicU64::new(0)).collect();
    Book::over(words(), words(), pages)
}

fn config(plan: &Plan) -> SourceConfig {
    SourceConfig {
        kind: plan.kind,
        layout: layout(plan),
        streams: plan.streams,
        shards: 1,
        heartbeat: Duration::from_millis(500),
        silence: Duration::from_secs(2),
        capabilities: plan.capabilities(Side::Source),
        after_refusal: plan.after_refusal(),
        releasing: if plan.releases { Releasing::AfterRunning } else { Releasing::Never },
    }
}

impl SourceHost {
    pub(crate) fn new(plan: &Plan, random: &mut Random) -> Self {
        let disk = SourceRecord::new(SESSION);
        let content = |page: u64, random: &mut Random| {
            if random.chance(250) { 0 } else { (page + 1) << 8 }
        };
        Self {
            is_alive: true,
            session: SourceSession::new(config(plan), disk),
            pending: None,
            disk,
            memory: (0..plan.pages).map(|page| Some(content(page, random))).collect(),
            released: vec![false; plan.pages as usize],
            vmm_runs: true,
            gave_state: false,
            book: book(plan.pages),
            control: None,
            since: 0,
            accepting: None,
            slots: Slots::default(),
            peer: None,
            channels: BTreeMap::new(),
            patience: BTreeMap::new(),
            destination_runs: false,
            may_release: false,
            known_memory: None,
            ever_acked: BTreeSet::new(),
            acked_by: None,
            passes: Passes::default(),
            holds: plan.holds,
        }
    }

    /// Whether a connection is being made already.
    pub(crate) const fn is_connecting(&self) -> bool {
        self.control.is_some() || self.accepting.is_some()
    }

    pub(crate) fn is_in_flight(&self, page: PageNumber) -> bool {
        self.channels.values().any(|data| data.shadow.contains(&page))
    }

    /// Whether a page is under way on another channel than this one.
    pub(crate) fn is_in_flight_beside(&self, channel: Channel, page: PageNumber) -> bool {
        let mut others = self.channels.iter().filter(|(other, _)| **other != channel);
        others.any(|(_, data)| data.shadow.contains(&page))
    }

    /// Whether an operator has fenced the destination.
    pub(crate) fn is_fenced(&self) -> bool {
        self.session.record().ownership == SourceOwnership::Fenced
    }

    fn close_all(&mut self, forgets: bool) -> Vec<usize> {
        let mut closed = self.slots.close();
        for (_, mut data) in std::mem::take(&mut self.channels) {
            if !forgets {
                data.in_flight.requeue(&self.book);
            }
            closed.push(data.connection);
        }
        closed
    }

    fn acknowledge(&mut self, runs: &[PageRange], step: u64) {
        for run in runs {
            self.book.acknowledge(*run);
            self.ever_acked.extend(run.iter());
        }
        for (channel, data) in &mut self.channels {
            data.in_flight.settle(&self.book);
            let (book, before) = (&self.book, data.shadow.len());
            data.shadow.retain(|page| !book.is_acked(*page));
            if data.shadow.len() < before {
                self.patience.entry(*channel).or_default().rewarded(step - data.moved);
                data.moved = step;
            }
        }
    }
}

impl World {
    pub(crate) fn source_state(&self) -> State {
        let session = &self.source.session;
        let is_open = self.source.passes.open.is_some();
        let pages = match (session.is_frozen(), session.is_unsettled()) {
            (false, false) => "not frozen",
            (false, true) if is_open => "pass open",
            (false, true) => "pass said",
            (true, true) => "last pass said",
            (true, false) => "frozen",
        };
        State { link: session.link_name(), ownership: session.record().ownership as u8, pages }
    }

    /// A call of the session, and what follows from it.
    pub(crate) fn with_source<T>(
        &mut self,
        call: &'static str,
        does: impl FnOnce(&mut SourceSession, Duration) -> T,
    ) -> T {
        let (now, before) = (self.now, self.source_state());
        let result = does(&mut self.source.session, now);
        self.cover(Side::Source, before, Happening::Call(call));
        self.drain_source();
        result
    }

    fn drain_source(&mut self) {
        while self.source.pending.is_none() {
            let Some(action) = self.source.session.poll() else { return };
            self.note(|| format!("source: {action:?}"));
            self.source_action(action);
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        match action {
            SourceAction::Persist(record) => {
                crate::checks::i3_held(self, &record);
                self.source.pending = Some(record);
            }
            SourceAction::Greet(hello) => self.source_greets(hello),
            SourceAction::Send(frame) => {
                if let ControlFrame::Pass { number, last: false } = frame
                    && self.breaks(Mutant::PassNotWaitedFor)
                {
                    self.source.passes.open = Some(number);
                }
                self.send_control_from_source(frame);
            }
            SourceAction::SendState => {
                for (name, last) in [("cpu", false), ("cpu", true), ("disk", true)] {
                    let (name, version, bytes) = (name.to_owned(), 1, vec![1]);
                    self.send_control_from_source(ControlFrame::Section {
                        name,
                        version,
                        last,
                        bytes,
                    });
                }
                self.send_control_from_source(ControlFrame::StateEnd { sections: 2 });
            }
            SourceAction::ResetBook => {
                let memory = self.source.peer;
                self.source.reset_book(self.source.known_memory == memory);
                for page in std::mem::take(&mut self.destination.memory.early.forgotten) {
                    self.source.ever_acked.remove(&page);
                }
                self.source.known_memory = memory;
                if self.source.acked_by != memory {
                    self.source.ever_acked.clear();
                    self.source.acked_by = memory;
                }
            }
            SourceAction::Received { range, segment } => {
                let mut runs = Vec::new();
                let is_read = segment.decode(range, |run| runs.push(run)).is_ok();
                if is_read && !self.breaks(Mutant::ReceivedIgnored) {
                    self.source.acknowledge(&runs, self.steps);
                }
            }
            SourceAction::Acknowledge(runs) => {
                let runs = self.source.heed(&runs);
                self.source.acknowledge(&runs, self.steps);
            }
            SourceAction::TellStale => self.tell_stale(),
            SourceAction::OpenPass { number } => self.open_pass(number),
            SourceAction::Settled => self.settled(),
            SourceAction::OpenData { stamp, .. } => {
                self.source.book_is_complete();
                self.open_slots(Side::Source, stamp.epoch, self.plan.streams, 1);
            }
            SourceAction::Event(SourceEvent::Running) => self.source.destination_runs = true,
            SourceAction::Event(SourceEvent::Reclaimed) => self.source.vmm_runs = true,
            SourceAction::Event(SourceEvent::ReclaimDenied) => {
                self.source.vmm_runs |= self.breaks(Mutant::DenialIgnored);
            }
            SourceAction::Event(SourceEvent::Held) => {
                self.situation("a guest was held that was ready to go");
            }
            SourceAction::CompareReleased => self.compare_released(),
            SourceAction::Release => self.source.may_release = true,
            SourceAction::Renew { channel, generation } => {
                self.renew(Side::Source, channel, generation);
            }
            SourceAction::HangUp(refusal) => {
                self.source.may_release = false;
                if let Some(refusal) = refusal {
                    self.send_control_from_source(ControlFrame::Refuse(refusal));
                }
                self.source_hangs_up();
            }
            _ => {}
        }
    }

    fn source_hangs_up(&mut self) {
        self.source.end_passes();
        let control = self.source.control.take();
        let accepting = self.source.accepting.take().map(|(id, _)| id);
        let data = self.source.close_all(self.breaks(Mutant::RequeueForgotten));
        for id in control.into_iter().chain(accepting).chain(data) {
            self.network.close(id, Side::Source);
        }
    }

    pub(crate) fn send_control_from_source(&mut self, frame: ControlFrame) {
        if let Some(id) = self.source.control {
            let stamp = self.source.session.stamp();
            self.network.send(id, Side::Destination, stamp, Body::Control(frame));
        }
    }

    /// Our hello is on record: it leaves, on the connection accepted or on a new one.
    fn source_greets(&mut self, hello: Hello) {
        let accepted = self.source.accepting.take();
        let id = match accepted {
            Some((id, _)) => id,
            None => self.network.connect(Channel::Control, None),
        };
        self.source.control = Some(id);
        self.source.since = self.steps;
        self.network.set_stamp(id, hello.stamp);
        self.network.send(id, Side::Destination, hello.stamp, Body::Hello(hello));
        if let Some((_, theirs)) = accepted {
            self.source_is_greeted(id, &theirs);
        }
    }

    fn source_is_greeted(&mut self, id: usize, theirs: &Hello) {
        self.source.peer = Some(theirs.incarnation);
        if let Err(refusal) =
            self.with_source("greeted", |session, now| session.greeted(theirs, now))
        {
            let stamp = self.source.session.stamp();
            self.network.send(id, Side::Destination, stamp, Body::Refused(refusal));
            self.source.control = None;
            self.network.close(id, Side::Source);
        }
    }

    /// A frame has arrived at the source.
    pub(crate) fn source_receives(&mut self, id: usize, channel: Channel, packet: Packet) {
        match (packet.body, channel) {
            (Body::Hello(mut hello), Channel::Control) => {
                if self.breaks(Mutant::NewIncarnationAfterGiven)
                    && self.source.disk.ownership == SourceOwnership::Given
                {
                    hello.incarnation = self.source.disk.incarnation;
                }
                if self.source.control == Some(id) {
                    self.source_is_greeted(id, &hello);
                } else {
                    self.source_accepts(id, hello);
                }
            }
            (Body::Hello(hello), channel) => self.data_hello(Side::Source, id, channel, &hello),
            (Body::Refused(_), _) if self.source.control == Some(id) => {
                self.with_source("refused", |session, _| session.disconnected());
            }
            (Body::Control(frame), _) if self.source.control == Some(id) => {
                let stamp = self.source.session.stamp();
                if self.counts(Side::Source, stamp, packet.stamp, packet.is_stale) {
                    let (before, kind) = (self.source_state(), frame.kind() as u16);
                    self.source.session.frame(frame, self.now);
                    self.cover(Side::Source, before, Happening::Frame(kind));
                    self.drain_source();
                }
            }
            (Body::Request(pages), _) => {
                let data = self.source.channels.get(&channel);
                let Some(stamp) = data.filter(|data| data.connection == id).map(|data| data.stamp)
                else {
                    return;
                };
                if self.counts(Side::Source, stamp, packet.stamp, packet.is_stale) {
                    self.serve(channel, pages);
                }
            }
            _ => {}
        }
    }

    /// Whether a frame counts on a connection.
    pub(crate) fn counts(&mut self, side: Side, own: Stamp, theirs: Stamp, is_stale: bool) -> bool {
        let counts = own.admits(theirs).unwrap_or(false) || self.breaks(Mutant::NoEpochCheck);
        if counts {
            crate::checks::i5_fenced(self, side, is_stale);
        }
        counts
    }

    fn source_accepts(&mut self, id: usize, hello: Hello) {
        if self.refuses_by_hand(Side::Source, id) {
            return;
        }
        self.forget_the_fence();
        if let Err(refusal) = self.source.session.admits(&hello) {
            let state = self.source_state();
            self.cover(Side::Source, state, Happening::Refused(refusal.code as u16));
            let stamp = self.source.session.stamp();
            self.network.send(id, Side::Destination, stamp, Body::Refused(refusal));
            self.network.close(id, Side::Source);
            return;
        }
        // Whatever was accepted before is given up by the session's hanging up.
        self.with_source("open", |session, _| session.open());
        self.source.accepting = Some((id, hello));
    }

    /// Only with [`Mutant::FencedAnswered`].
    fn forget_the_fence(&mut self) {
        if self.breaks(Mutant::FencedAnswered) && self.source.is_fenced() {
            let record = SourceRecord { ownership: SourceOwnership::Given, ..self.source.disk };
            self.source.session = SourceSession::new(config(&self.plan), record);
        }
    }

    /// A connection has ended, as the source reads.
    pub(crate) fn source_reads_end(&mut self, id: usize, channel: Channel) {
        if self.source.control == Some(id) {
            self.with_source("disconnected", |session, _| session.disconnected());
        } else if self.source.channels.get(&channel).is_some_and(|data| data.connection == id) {
            self.end_data(Side::Source, channel);
        } else if self.source.accepting.as_ref().is_none_or(|(accepted, _)| *accepted != id) {
            self.source.slots.forget(id);
            self.network.close(id, Side::Source);
        }
    }

    /// The source's process dies.
    pub(crate) fn crash_source(&mut self) {
        self.note(|| "the source dies".to_owned());
        self.source_hangs_up();
        self.source.is_alive = false;
        self.source.pending = None;
    }

    /// Another process takes over with what is on the disk. The VMM beside it has kept its
    /// guest stopped, and gives its state again sooner or later.
    pub(crate) fn restart_source(&mut self) {
        let plan = self.plan;
        let mut record = self.source.disk;
        if self.breaks(Mutant::ReleaseForgotten) {
            record.pages = SourcePages::Whole;
        }
        self.note(|| format!("the source begins again with {record:?}"));
        self.source.session = SourceSession::new(config(&plan), record);
        self.source.book = book(plan.pages);
        self.source.known_memory = None;
        (self.source.destination_runs, self.source.may_release) = (false, false);
        self.source.gave_state = false;
        self.source.passes = Passes::default();
        self.hold_if_wanted();
        self.source.patience.clear();
        self.source.is_alive = true;
        // The VMM may not have heard that it has its guest back.
        let is_back =
            matches!(record.ownership, SourceOwnership::Reclaimed | SourceOwnership::Fenced);
        self.source.vmm_runs |= is_back;
    }

    /// Whoever drives the migration tells a new process to hold the guest back.
    pub(crate) fn hold_if_wanted(&mut self) {
        if self.source.holds && !self.breaks(Mutant::HoldIgnored) {
            self.source.session.hold();
        }
    }

    /// The disk answers the source.
    pub(crate) fn source_disk_answers(&mut self, writes: bool, says_so: bool) {
        let Some(record) = self.source.pending.take() else { return };
        let cheats = self.breaks(Mutant::OwnershipWithoutRecord)
            && record.ownership != self.source.disk.ownership;
        if writes && !cheats {
            self.source.disk = record;
        }
        self.note(|| format!("source: written {writes}, said {says_so}: {record:?}"));
        let happening = if says_so { Happening::Recorded } else { Happening::NotRecorded };
        let before = self.source_state();
        let result = says_so.then_some(()).ok_or(afterimage_protocol::session::PersistFailed);
        self.source.session.persisted(record, result);
        self.cover(Side::Source, before, happening);
        self.drain_source();
    }
}
