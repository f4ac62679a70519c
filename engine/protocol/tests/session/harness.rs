//! A source and a destination, a disk for each, and the frames between them, one at a time.

use afterimage_protocol::bitmap::Segment;
use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, PageNumber, PageRange, PageSize, Region,
};
use afterimage_protocol::session::{
    AfterRefusal, DestinationAction, DestinationConfig, DestinationEvent, DestinationOwnership,
    DestinationRecord, DestinationSession, LostPages, PersistFailed, Releasing, SourceAction,
    SourceConfig, SourceEvent, SourceOwnership, SourceRecord, SourceSession,
};
use afterimage_protocol::wire::{
    Capabilities, ControlFrame, Epoch, Hello, Incarnation, Refusal, SessionId, SessionKind,
};
use std::collections::VecDeque;
use std::time::Duration;

pub(crate) const PAGES: u64 = 128;
pub(crate) const SESSION: SessionId = SessionId([7; 16]);
pub(crate) const MEMORY: Incarnation = Incarnation([1; 16]);
pub(crate) const OTHER_MEMORY: Incarnation = Incarnation([2; 16]);

pub(crate) fn layout_of(pages: u64) -> GuestLayout {
    let region = Region::new(GuestAddress(0), pages * 4096, PageSize::KIB_4, Backing::Anonymous);
    GuestLayout::new(vec![region]).expect("a layout")
}

/// What may become of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Disk {
    #[default]
    Works,
    /// Nothing is written.
    Fails,
    /// It is written, but nobody can say so.
    FailsAfterWriting,
}

impl Disk {
    fn write<R>(self, slot: &mut R, record: R) -> Result<(), PersistFailed> {
        if self != Self::Fails {
            *slot = record;
        }
        if self == Self::Works { Ok(()) } else { Err(PersistFailed) }
    }
}

pub(crate) struct Pair {
    pub(crate) source: SourceSession,
    pub(crate) destination: DestinationSession,
    pub(crate) source_record: SourceRecord,
    pub(crate) destination_record: DestinationRecord,
    pub(crate) source_disk: Disk,
    pub(crate) destination_disk: Disk,
    pub(crate) to_source: VecDeque<ControlFrame>,
    pub(crate) to_destination: VecDeque<ControlFrame>,
    pub(crate) source_events: Vec<SourceEvent>,
    pub(crate) destination_events: Vec<DestinationEvent>,
    /// Everything else that was asked for, in order.
    pub(crate) source_actions: Vec<SourceAction>,
    pub(crate) destination_actions: Vec<DestinationAction>,
    pub(crate) received: Vec<PageRange>,
    pub(crate) now: Duration,
    pub(crate) connected: bool,
    /// Whether the source is to free pages, and what it then misses at the destination.
    pub(crate) releasing: Releasing,
    pub(crate) after_refusal: AfterRefusal,
    pub(crate) lost: Option<LostPages>,
    /// What each side can do, from its next process on.
    pub(crate) source_capabilities: Capabilities,
    pub(crate) destination_capabilities: Capabilities,
    greeting: Option<Hello>,
    kind: SessionKind,
}

impl Pair {
    pub(crate) fn new(kind: SessionKind) -> Self {
        Self::with_capabilities(kind, Capabilities::CHECKSUMS, Capabilities::CHECKSUMS)
    }

    /// Both sides can do precopy.
    pub(crate) fn precopy(kind: SessionKind) -> Self {
        Self::with_capabilities(kind, Capabilities::PRECOPY, Capabilities::PRECOPY)
    }

    /// A migration whose first pass is open.
    pub(crate) fn passing() -> Self {
        let mut pair = Self::precopy(SessionKind::Migration);
        pair.connect().expect("let in");
        pair.pump();
        pair
    }

    pub(crate) fn with_capabilities(
        kind: SessionKind,
        source_capabilities: Capabilities,
        destination_capabilities: Capabilities,
    ) -> Self {
        let source_record = SourceRecord::new(SESSION);
        let destination_record = DestinationRecord {
            session: SessionId::UNKNOWN,
            incarnation: MEMORY,
            epoch: Epoch::default(),
            ownership: DestinationOwnership::Waiting,
        };
        Self {
            source: SourceSession::new(
                SourceConfig { capabilities: source_capabilities, ..source_config(kind) },
                source_record,
            ),
            destination: DestinationSession::new(
                DestinationConfig {
                    capabilities: destination_capabilities,
                    ..destination_config(PAGES)
                },
                destination_record,
            ),
            source_record,
            destination_record,
            source_disk: Disk::Works,
            destination_disk: Disk::Works,
            to_source: VecDeque::new(),
            to_destination: VecDeque::new(),
            source_events: Vec::new(),
            destination_events: Vec::new(),
            source_actions: Vec::new(),
            destination_actions: Vec::new(),
            received: Vec::new(),
            now: Duration::ZERO,
            connected: false,
            releasing: Releasing::Never,
            after_refusal: AfterRefusal::TakeBack,
            lost: None,
            source_capabilities,
            destination_capabilities,
            greeting: None,
            kind,
        }
    }

    pub(crate) fn migration() -> Self {
        Self::new(SessionKind::Migration)
    }

    /// A migration up to the point where the destination could run, and go is on its way.
    pub(crate) fn go_on_its_way() -> Self {
        let mut pair = Self::restored();
        pair.destination.ready().expect("all state is there");
        pair.drain();
        pair.deliver_to_source();
        assert_eq!(pair.to_destination, [ControlFrame::Go]);
        pair
    }

    /// A migration whose device state has arrived.
    pub(crate) fn restored() -> Self {
        let mut pair = Self::migration();
        pair.connect().expect("let in");
        pair.pump();
        pair.source.bring_state().expect("not yet frozen");
        pair.pump();
        pair
    }

    /// A migration whose guest runs at the destination, as both know.
    pub(crate) fn running() -> Self {
        let mut pair = Self::go_on_its_way();
        pair.pump();
        pair
    }

    /// The same with a source that frees what has arrived, at go.
    pub(crate) fn releasing_at_go() -> Self {
        let mut pair = Self::migration();
        pair.releasing = Releasing::AfterRunning;
        pair.restart_source();
        pair.connect().expect("let in");
        pair.pump();
        pair.source.bring_state().expect("not yet frozen");
        pair.pump();
        pair.destination.ready().expect("all state is there");
        pair.drain();
        pair.deliver_to_source();
        assert_eq!(pair.to_destination, [ControlFrame::Go]);
        pair
    }

    /// A new control connection. What is in flight on the old one is lost.
    pub(crate) fn connect(&mut self) -> Result<(), Refusal> {
        self.cut_quietly();
        let theirs = self.destination.open();
        self.drain();
        self.connected = true;
        let result = self.greet(&theirs);
        self.drain();
        if let Err(refusal) = &result {
            self.connected = false;
            self.source.disconnected();
            self.destination.refused(refusal.clone());
            self.drain();
        }
        result
    }

    fn greet(&mut self, theirs: &Hello) -> Result<(), Refusal> {
        self.source.admits(theirs)?;
        self.source.open();
        self.connected = true;
        self.drain();
        let failed = || Refusal::new(afterimage_protocol::wire::RefuseCode::Failed, "no disk");
        let ours = self.greeting.take().ok_or_else(failed)?;
        self.source.greeted(theirs, self.now)?;
        self.destination.greeted(&ours, self.now)
    }

    fn cut_quietly(&mut self) {
        self.connected = false;
        self.greeting = None;
        self.to_source.clear();
        self.to_destination.clear();
    }

    /// The connection breaks, and both notice.
    pub(crate) fn cut(&mut self) {
        self.cut_quietly();
        self.source.disconnected();
        self.destination.disconnected();
        self.drain();
    }

    /// Until nothing more is said.
    pub(crate) fn pump(&mut self) {
        self.drain();
        for _ in 0..1000 {
            if self.to_source.is_empty() && self.to_destination.is_empty() {
                return;
            }
            self.deliver_to_source();
            self.deliver_to_destination();
        }
        panic!("they never stop: {:?} {:?}", self.to_source, self.to_destination);
    }

    /// One frame after the other, until something holds.
    pub(crate) fn pump_until(&mut self, holds: impl Fn(&Self) -> bool) {
        for _ in 0..1000 {
            if holds(self) {
                return;
            }
            if self.to_destination.is_empty() {
                self.deliver_to_source();
            } else {
                self.deliver_to_destination();
            }
        }
        panic!("it never holds");
    }

    pub(crate) fn deliver_to_source(&mut self) {
        if let Some(frame) = self.to_source.pop_front() {
            self.source.frame(frame, self.now);
        }
        self.drain();
    }

    pub(crate) fn deliver_to_destination(&mut self) {
        if let Some(frame) = self.to_destination.pop_front() {
            self.destination.frame(frame, self.now);
        }
        self.drain();
    }

    /// Does what both ask for.
    pub(crate) fn drain(&mut self) {
        loop {
            if let Some(action) = self.source.poll() {
                self.source_action(action);
            } else if let Some(action) = self.destination.poll() {
                self.destination_action(action);
            } else {
                return;
            }
        }
    }

    fn source_action(&mut self, action: SourceAction) {
        match action.clone() {
            SourceAction::Persist(record) => {
                let result = self.source_disk.write(&mut self.source_record, record);
                self.source.persisted(record, result);
            }
            SourceAction::Greet(hello) => self.greeting = Some(hello),
            SourceAction::Send(frame) if self.connected => self.to_destination.push_back(frame),
            SourceAction::SendState if self.connected => {
                self.to_destination.extend([section("cpu", true), state_end(1)]);
            }
            SourceAction::ResetBook => self.received.clear(),
            SourceAction::Received { range, segment } => {
                segment.decode(range, |run| self.received.push(run)).expect("a segment");
            }
            SourceAction::Acknowledge(runs) => self.received.extend(runs),
            SourceAction::CompareReleased => self.source.compared(self.lost, self.now),
            SourceAction::Event(event) => self.source_events.push(event),
            SourceAction::HangUp(refusal) => {
                self.to_source.clear();
                if let Some(refusal) = refusal.filter(|_| self.connected) {
                    self.to_destination.push_back(ControlFrame::Refuse(refusal));
                }
            }
            _ => {}
        }
        self.source_actions.push(action);
    }

    fn destination_action(&mut self, action: DestinationAction) {
        match action.clone() {
            DestinationAction::Persist(record) => {
                let result = self.destination_disk.write(&mut self.destination_record, record);
                self.destination.persisted(record, result);
            }
            DestinationAction::Send(frame) if self.connected => self.to_source.push_back(frame),
            DestinationAction::SendReceived if self.connected => {
                self.to_source.push_back(received_frame());
            }
            DestinationAction::Event(event) => self.destination_events.push(event),
            DestinationAction::HangUp(refusal) => {
                self.to_destination.clear();
                if let Some(refusal) = refusal.filter(|_| self.connected) {
                    self.to_source.push_back(ControlFrame::Refuse(refusal));
                }
            }
            _ => {}
        }
        self.destination_actions.push(action);
    }

    /// The source's process dies; another begins with what is on the disk.
    pub(crate) fn restart_source(&mut self) {
        self.cut_quietly();
        let config = SourceConfig {
            releasing: self.releasing,
            after_refusal: self.after_refusal,
            capabilities: self.source_capabilities,
            ..source_config(self.kind)
        };
        self.source = SourceSession::new(config, self.source_record);
        self.source_events.clear();
        self.source_actions.clear();
        self.destination.disconnected();
        self.drain();
    }

    /// The destination's process dies; another begins with what is on the disk.
    pub(crate) fn restart_destination(&mut self) {
        self.cut_quietly();
        self.destination =
            DestinationSession::new(self.destination_config(), self.destination_record);
        self.destination_events.clear();
        self.destination_actions.clear();
        self.source.disconnected();
        self.drain();
    }

    pub(crate) fn destination_config(&self) -> DestinationConfig {
        let capabilities = self.destination_capabilities;
        DestinationConfig { capabilities, ..destination_config(PAGES) }
    }

    /// The destination's process dies and its memory with it.
    pub(crate) fn lose_destination(&mut self, next: Incarnation) {
        self.destination_record = DestinationRecord {
            session: SessionId::UNKNOWN,
            incarnation: next,
            epoch: Epoch::default(),
            ownership: DestinationOwnership::Waiting,
        };
        self.restart_destination();
    }

    /// The memory of the last seconds is forgotten.
    pub(crate) fn forget(&mut self) {
        self.source_events.clear();
        self.destination_events.clear();
        self.source_actions.clear();
        self.destination_actions.clear();
    }

    pub(crate) fn may_both_run(&self) -> bool {
        self.source.may_run() && self.destination_runs()
    }

    pub(crate) fn destination_runs(&self) -> bool {
        self.destination.record().ownership == DestinationOwnership::Running
    }

    pub(crate) fn source_ownership(&self) -> SourceOwnership {
        assert_eq!(self.source.record().ownership, self.source_record.ownership);
        self.source_record.ownership
    }

    /// The refusal that one side said last.
    pub(crate) fn refusal_of_source(&self) -> Option<&Refusal> {
        self.source_actions.iter().rev().find_map(|action| match action {
            SourceAction::HangUp(refusal) => refusal.as_ref(),
            _ => None,
        })
    }

    pub(crate) fn refusal_of_destination(&self) -> Option<&Refusal> {
        self.destination_actions.iter().rev().find_map(|action| match action {
            DestinationAction::HangUp(refusal) => refusal.as_ref(),
            _ => None,
        })
    }
}

pub(crate) fn source_config(kind: SessionKind) -> SourceConfig {
    SourceConfig {
        kind,
        layout: layout_of(PAGES),
        streams: 2,
        shards: 1,
        heartbeat: Duration::from_secs(1),
        silence: Duration::from_secs(5),
        capabilities: Capabilities::CHECKSUMS,
        releasing: Releasing::Never,
        after_refusal: AfterRefusal::TakeBack,
    }
}

pub(crate) fn destination_config(pages: u64) -> DestinationConfig {
    DestinationConfig {
        layout: layout_of(pages),
        capabilities: Capabilities::CHECKSUMS,
        silence: Duration::from_secs(5),
    }
}

pub(crate) fn section(name: &str, last: bool) -> ControlFrame {
    ControlFrame::Section { name: name.to_owned(), version: 1, last, bytes: vec![1, 2] }
}

pub(crate) const fn state_end(sections: u32) -> ControlFrame {
    ControlFrame::StateEnd { sections }
}

/// Pages 3 and 4 are complete.
pub(crate) fn received_frame() -> ControlFrame {
    let range = PageRange::new(PageNumber(0), PAGES);
    let mut raw = vec![0; (PAGES / 8) as usize];
    raw[0] = 0b1_1000;
    ControlFrame::Received { range, segment: Segment::Raw(raw), last: true }
}
