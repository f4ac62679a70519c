//! The destination's state machine.

mod action;
mod admission;
mod passes;

pub use action::{DestinationAction, DestinationConfig, DestinationEvent};

use super::pulse::{Due, Pulse};
use super::{DestinationOwnership, DestinationRecord, NotNow, PersistFailed};
use crate::wire::{
    Attach, Capabilities, Channel, ControlFrame, Hello, Phase, Refusal, RefuseCode, Role,
    SessionId, SessionKind, Stamp,
};
use std::collections::VecDeque;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    Greeting,
    /// Greeted; the offer is awaited.
    Greeted,
    /// Attached; `Begin` is awaited.
    Attached,
    Up,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    /// Which session this memory belongs to, and its epoch.
    Bound,
    Running,
    Refused,
}

/// The destination's side of a session.
///
/// Between a [`DestinationAction::Persist`] and [`persisted`](Self::persisted) nothing else
/// may be called: who owns the guest is not known in between.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each learned once")]
pub struct DestinationSession {
    config: DestinationConfig,
    record: DestinationRecord,
    kind: Option<SessionKind>,
    link: Link,
    /// The session of the source on this connection.
    peer: SessionId,
    stamp: Stamp,
    pulse: Option<Pulse>,
    streams: u16,
    shards: u16,
    sections: u32,
    /// What both sides of this connection can do.
    common: Capabilities,
    /// What has arrived is for good.
    settled: bool,
    state_complete: bool,
    ready: bool,
    /// What the last attach said.
    announced: Phase,
    /// `Run` has been said since this process began.
    told_to_run: bool,
    complete: bool,
    over: bool,
    pending: Option<Pending>,
    actions: VecDeque<DestinationAction>,
}

impl DestinationSession {
    /// A session with what was durably recorded of it.
    #[must_use]
    pub fn new(config: DestinationConfig, record: DestinationRecord) -> Self {
        Self {
            config,
            kind: None,
            link: Link::Down,
            peer: SessionId::UNKNOWN,
            stamp: Stamp::default(),
            pulse: None,
            streams: 1,
            shards: 1,
            sections: 0,
            common: Capabilities::default(),
            settled: record.ownership != DestinationOwnership::Waiting,
            state_complete: false,
            ready: false,
            announced: Phase::Fresh,
            told_to_run: false,
            complete: false,
            over: false,
            pending: None,
            record,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// What is durably recorded.
    #[must_use]
    pub const fn record(&self) -> &DestinationRecord {
        &self.record
    }

    /// Whether the session is over.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.over
    }

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

    fn lose_link(&mut self, refusal: Option<Refusal>) {
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

    /// A frame with the connection's stamp has arrived.
    pub fn frame(&mut self, frame: ControlFrame, now: Duration) {
        if matches!(self.link, Link::Down | Link::Greeting) {
            return;
        }
        self.heard(now);
        if let Err(refusal) = self.take_frame(frame, now) {
            if refusal.code == RefuseCode::Layout {
                let event = DestinationEvent::TurnedAway(refusal.clone());
                self.actions.push_back(DestinationAction::Event(event));
            }
            self.lose_link(Some(refusal));
        }
    }

    fn take_frame(&mut self, frame: ControlFrame, now: Duration) -> Result<(), Refusal> {
        match (frame, self.link) {
            (ControlFrame::Heartbeat { token }, _) => {
                self.send(ControlFrame::HeartbeatReply { token });
            }
            (ControlFrame::HeartbeatReply { .. }, _) => {}
            (ControlFrame::Renew { channel, generation }, Link::Up) => {
                self.actions.push_back(DestinationAction::Renew { channel, generation });
            }
            (ControlFrame::Refuse(refusal), _) => self.refused(refusal),
            (ControlFrame::Offer(offer), Link::Greeted) => {
                offer
                    .layout
                    .serving(&self.config.layout)
                    .map_err(|error| Refusal::new(RefuseCode::Layout, error.to_string()))?;
                if self.kind.is_some_and(|kind| kind != offer.kind) {
                    return Err(Refusal::new(
                        RefuseCode::Protocol,
                        "a session stays a migration or a snapshot, whichever it began as",
                    ));
                }
                self.kind = Some(offer.kind);
                self.settle_without_passes();
                (self.streams, self.shards) = (offer.streams, offer.shards);
                let millis = |value: u32| Duration::from_millis(value.into());
                self.pulse =
                    Some(Pulse::new(millis(offer.heartbeat_ms), millis(offer.silence_ms), now));
                // No page may arrive before it is on record whose it is.
                let (session, epoch) = (self.peer, self.stamp.epoch);
                self.persist(DestinationRecord { session, epoch, ..self.record }, Pending::Bound);
            }
            (ControlFrame::Begin, Link::Attached) => self.begin(),
            (ControlFrame::Stale { range, segment }, Link::Up) if !self.settled => {
                self.check_stale(range)?;
                self.actions.push_back(DestinationAction::Stale { range, segment });
            }
            (ControlFrame::Pass { number, last }, Link::Up) if !self.settled => {
                self.pass(number, last);
            }
            (ControlFrame::Section { name, version, last, bytes }, Link::Up)
                if self.wants_state() && self.settled =>
            {
                self.sections += u32::from(last);
                self.actions.push_back(DestinationAction::Section { name, version, last, bytes });
            }
            // The source may not know yet that all of it has arrived, or that the guest runs.
            (ControlFrame::Section { .. } | ControlFrame::StateEnd { .. }, Link::Up)
                if !self.wants_state() => {}
            (ControlFrame::StateEnd { sections }, Link::Up) if self.settled => {
                self.state_end(sections)?;
            }
            (ControlFrame::Go, Link::Up) if !self.is_snapshot() => self.go()?,
            (ControlFrame::TakeBack, Link::Up) if !self.is_snapshot() => self.take_back(),
            (ControlFrame::Bye, Link::Up) if self.complete && self.owes_nothing() => {
                self.over = true;
                self.actions.push_back(DestinationAction::Event(DestinationEvent::Finished));
                self.lose_link(None);
            }
            (frame, link) => {
                return Err(Refusal::new(
                    RefuseCode::Protocol,
                    format!("{:?} is out of place here ({link:?})", frame.kind()),
                ));
            }
        }
        Ok(())
    }

    fn attach(&mut self) {
        if self.link != Link::Greeted {
            return;
        }
        self.link = Link::Attached;
        self.announced = self.phase();
        let layout = self.config.layout.clone();
        self.send(ControlFrame::Attach(Attach { phase: self.announced, layout }));
        self.actions.push_back(DestinationAction::SendReceived);
    }

    fn phase(&self) -> Phase {
        match self.record.ownership {
            DestinationOwnership::Refused => Phase::Refused,
            DestinationOwnership::Running if self.complete => Phase::Complete,
            DestinationOwnership::Running => Phase::Running,
            // What is being recorded counts once it is durable.
            DestinationOwnership::Waiting if self.complete && self.is_snapshot() => Phase::Complete,
            DestinationOwnership::Waiting if self.ready => Phase::Ready,
            DestinationOwnership::Waiting if !self.settled => Phase::Early,
            DestinationOwnership::Waiting => Phase::Fresh,
        }
    }

    fn is_snapshot(&self) -> bool {
        self.kind == Some(SessionKind::Snapshot)
    }

    fn begin(&mut self) {
        self.link = Link::Up;
        if self.wants_state() {
            self.sections = 0;
            self.actions.push_back(DestinationAction::ResetState);
        }
        self.actions.push_back(DestinationAction::OpenData {
            stamp: self.stamp,
            streams: self.streams,
            shards: self.shards,
        });
        let session = self.record.session;
        self.actions.push_back(DestinationAction::Event(DestinationEvent::Attached(session)));
        match self.record.ownership {
            // The source knows from the phase; what it lacks is said again.
            DestinationOwnership::Running => {
                self.run();
                if self.complete {
                    self.send(ControlFrame::Complete);
                }
            }
            DestinationOwnership::Waiting if self.is_snapshot() => {
                self.run_snapshot_if_ready();
                if self.complete {
                    self.send(ControlFrame::Complete);
                }
            }
            // Said by the VMM after the attach.
            DestinationOwnership::Waiting if self.ready && self.announced == Phase::Fresh => {
                self.send(ControlFrame::Ready);
            }
            _ => {}
        }
    }

    /// Device state is for a guest that has not run here yet.
    fn wants_state(&self) -> bool {
        !self.state_complete && self.record.ownership == DestinationOwnership::Waiting
    }

    fn state_end(&mut self, sections: u32) -> Result<(), Refusal> {
        if sections != self.sections {
            return Err(Refusal::new(
                RefuseCode::Protocol,
                format!("{} sections of device state came, {sections} were sent", self.sections),
            ));
        }
        self.state_complete = true;
        self.actions.push_back(DestinationAction::Event(DestinationEvent::StateComplete));
        Ok(())
    }

    /// The VMM has restored everything and could run.
    ///
    /// # Errors
    /// [`NotNow`] before all device state is there, or after the session is over. A
    /// snapshot needs no device state, and may be ready after all of it has arrived.
    pub fn ready(&mut self) -> Result<(), NotNow> {
        let call = "be ready";
        // A snapshot may have arrived whole before anybody was ready to run it.
        let has_everything = self.is_snapshot() && self.complete;
        if (self.over && !has_everything) || self.record.ownership == DestinationOwnership::Refused
        {
            return Err(NotNow { call, reason: "the guest will not run here" });
        }
        if !self.state_complete
            && !self.is_snapshot()
            && self.record.ownership == DestinationOwnership::Waiting
        {
            return Err(NotNow { call, reason: "not all device state has arrived" });
        }
        if self.ready {
            return Ok(());
        }
        self.ready = true;
        if self.is_snapshot() {
            self.run_snapshot_if_ready();
        } else if self.link == Link::Up && self.record.ownership == DestinationOwnership::Waiting {
            self.send(ControlFrame::Ready);
        }
        Ok(())
    }

    fn run_snapshot_if_ready(&mut self) {
        if self.ready {
            self.run();
        }
    }

    fn go(&mut self) -> Result<(), Refusal> {
        match self.record.ownership {
            DestinationOwnership::Waiting if !self.ready => {
                return Err(Refusal::new(
                    RefuseCode::Protocol,
                    "go came before the destination was ready",
                ));
            }
            DestinationOwnership::Waiting if self.pending.is_none() => {
                let next =
                    DestinationRecord { ownership: DestinationOwnership::Running, ..self.record };
                self.persist(next, Pending::Running);
            }
            // Being recorded this moment: the answer follows.
            DestinationOwnership::Waiting => {}
            DestinationOwnership::Running => self.send(ControlFrame::Running),
            DestinationOwnership::Refused => self.send(ControlFrame::TakeBackAgreed),
        }
        Ok(())
    }

    fn take_back(&mut self) {
        match self.record.ownership {
            DestinationOwnership::Waiting if self.pending.is_none() => {
                let next =
                    DestinationRecord { ownership: DestinationOwnership::Refused, ..self.record };
                self.persist(next, Pending::Refused);
            }
            // A go was first: once it is recorded, the source hears that this side runs.
            DestinationOwnership::Waiting => {}
            DestinationOwnership::Running => self.send(ControlFrame::TakeBackDenied),
            DestinationOwnership::Refused => self.send(ControlFrame::TakeBackAgreed),
        }
    }

    fn persist(&mut self, next: DestinationRecord, why: Pending) {
        self.pending = Some(why);
        self.actions.push_back(DestinationAction::Persist(next));
    }

    /// The record of the last [`DestinationAction::Persist`] is durable, or could not be
    /// made so.
    pub fn persisted(&mut self, record: DestinationRecord, result: Result<(), PersistFailed>) {
        let Some(why) = self.pending.take() else { return };
        if result.is_err() {
            self.actions.push_back(DestinationAction::Event(DestinationEvent::PersistFailed));
            self.lose_link(None);
            return;
        }
        self.record = record;
        match why {
            Pending::Bound => self.attach(),
            Pending::Running => {
                self.run();
                if self.link == Link::Up {
                    self.send(ControlFrame::Running);
                    if self.complete {
                        self.send(ControlFrame::Complete);
                    }
                }
            }
            Pending::Refused => {
                self.actions.push_back(DestinationAction::Event(DestinationEvent::Refused));
                if self.link == Link::Up {
                    self.send(ControlFrame::TakeBackAgreed);
                }
            }
        }
    }

    fn run(&mut self) {
        if !self.told_to_run {
            self.told_to_run = true;
            self.actions.push_back(DestinationAction::Event(DestinationEvent::Run));
        }
    }

    /// Every page is complete.
    pub fn all_complete(&mut self) {
        if self.complete {
            return;
        }
        self.complete = true;
        if self.link == Link::Up && self.owes_nothing() {
            self.send(ControlFrame::Complete);
        }
    }

    /// Whether complete may be said: the guest is this side's, or nobody's.
    fn owes_nothing(&self) -> bool {
        self.is_snapshot() || self.record.ownership == DestinationOwnership::Running
    }

    fn send(&mut self, frame: ControlFrame) {
        self.actions.push_back(DestinationAction::Send(frame));
    }
}
