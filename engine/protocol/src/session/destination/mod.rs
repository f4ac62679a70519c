//! The destination's state machine: which frame means what, and when. Its connection is in
//! `link`, who is let in in `admission`, whose the guest is in `ownership`, and what is made
//! durable in `record`.

mod action;
mod admission;
mod link;
mod ownership;
mod passes;
mod record;

pub use action::{DestinationAction, DestinationConfig, DestinationEvent};

use super::pulse::Pulse;
use super::{DestinationOwnership, DestinationRecord};
use crate::wire::{
    Attach, Capabilities, ControlFrame, Phase, Refusal, RefuseCode, SessionId, SessionKind, Stamp,
};
use link::Link;
use std::collections::VecDeque;
use std::time::Duration;

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
    /// The guest is not wanted here, whether or not that is on record yet.
    refuses: bool,
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
            refuses: false,
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
            // One that is to be refused, and could not be yet, is not asked for.
            DestinationOwnership::Waiting if self.ready && !self.refuses => Phase::Ready,
            DestinationOwnership::Waiting if !self.settled => Phase::Early,
            DestinationOwnership::Waiting => Phase::Fresh,
        }
    }

    /// Whether the source serves a snapshot, and not a guest that moves. `false` before one has been
    /// connected.
    #[must_use]
    pub fn is_snapshot(&self) -> bool {
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
            // It could not be recorded on the connection before.
            DestinationOwnership::Waiting if self.refuses => self.persist_refused(),
            // Said by the VMM after the attach.
            DestinationOwnership::Waiting if self.ready && self.announced == Phase::Fresh => {
                self.send(ControlFrame::Ready);
            }
            // Refused after the attach.
            DestinationOwnership::Refused if self.announced != Phase::Refused => {
                self.send(ControlFrame::TakeBackAgreed);
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

    fn send(&mut self, frame: ControlFrame) {
        self.actions.push_back(DestinationAction::Send(frame));
    }
}
