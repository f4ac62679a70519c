//! The source's state machine: which frame means what, and when. Its connection is in `link`,
//! who is let in in `admission`, what the VMM wants in `call`, whose the guest is in
//! `ownership`, what is made durable in `record`, and when pages may be freed in `release`.

mod action;
mod admission;
mod call;
mod link;
mod ownership;
mod passes;
mod record;
mod release;

pub use action::{AfterRefusal, Releasing, SourceAction, SourceConfig, SourceEvent};

use super::pulse::Pulse;
use super::{LostPages, SourceOwnership, SourceRecord};
use crate::layout::{GuestLayout, PageRange};
use crate::wire::{
    Attach, Capabilities, ControlFrame, Generation, Incarnation, Phase, Refusal, RefuseCode,
    SessionKind, Stamp,
};
use link::Link;
use passes::Stage;
use std::collections::VecDeque;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Epoch,
    Given,
    /// It was refused, and is to be offered again.
    Owner,
    Reclaimed,
    Fenced,
    Finished,
    Released,
}

/// The source's side of one session with one destination.
///
/// Between a [`SourceAction::Persist`] and [`persisted`](Self::persisted) nothing else may
/// be called: who owns the guest is not known in between.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, each learned once")]
pub struct SourceSession {
    config: SourceConfig,
    record: SourceRecord,
    link: Link,
    stamp: Stamp,
    pulse: Option<Pulse>,
    served: GuestLayout,
    /// What both sides of this connection can do.
    common: Capabilities,
    incarnation: Option<Incarnation>,
    /// The vCPUs are stopped; memory is final.
    frozen: bool,
    /// This process has the device state.
    has_state: bool,
    /// The destination of this connection waits for device state.
    wants_state: bool,
    stage: Stage,
    /// The number of the newest pass.
    pass: u16,
    /// The guest is not given away before somebody says so.
    holds: bool,
    told_held: bool,
    destination_ready: bool,
    destination_running: bool,
    destination_complete: bool,
    told_finished: bool,
    reclaim_wanted: bool,
    /// Pages may be freed as long as this connection lasts.
    releases: bool,
    /// When to try again to record that pages may be freed.
    release_after: Duration,
    told_lost: Option<LostPages>,
    pending: Option<Pending>,
    actions: VecDeque<SourceAction>,
}

impl SourceSession {
    /// A session with what was durably recorded of it. A snapshot is frozen from the start.
    ///
    /// After a restart in the middle, the VMM's device state must be given again by
    /// [`freeze`](Self::freeze) if the record does not say that the destination has it: the
    /// same state, of the same memory. A guest that has run here since it was first frozen
    /// needs a new session, because the destination may have pages of before.
    #[must_use]
    pub fn new(config: SourceConfig, record: SourceRecord) -> Self {
        let is_snapshot = config.kind == SessionKind::Snapshot;
        Self {
            served: config.layout.clone(),
            config,
            link: Link::Down,
            stamp: Stamp { epoch: record.epoch, generation: Generation(1) },
            pulse: None,
            common: Capabilities::default(),
            incarnation: (record.ownership != SourceOwnership::Owner).then_some(record.incarnation),
            frozen: is_snapshot || record.ownership == SourceOwnership::Given,
            has_state: is_snapshot,
            wants_state: false,
            stage: Stage::Off,
            pass: 0,
            holds: false,
            told_held: false,
            destination_ready: false,
            destination_running: false,
            destination_complete: false,
            told_finished: false,
            reclaim_wanted: false,
            releases: false,
            release_after: Duration::ZERO,
            told_lost: None,
            pending: None,
            record,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// What is durably recorded.
    #[must_use]
    pub const fn record(&self) -> &SourceRecord {
        &self.record
    }

    /// Whether the guest may run here.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        self.record.may_run() && (!self.frozen || self.is_over())
    }

    /// Whether the guest's memory is final, so that pages may be sent.
    #[must_use]
    pub const fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Whether the session is over. A destination that has not heard so is still answered.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        let is_over_for_good = matches!(
            self.record.ownership,
            SourceOwnership::Reclaimed | SourceOwnership::Fenced | SourceOwnership::Finished
        );
        is_over_for_good || (self.told_finished && self.is_snapshot())
    }

    /// Whether the session is over because the destination has everything.
    #[must_use]
    pub const fn is_finished(&self) -> bool {
        matches!(self.record.ownership, SourceOwnership::Finished)
            || (self.told_finished && self.is_snapshot())
    }

    /// The layout in which pages are served and numbered: that of the destination which
    /// attached last, or this side's own. Its page count is the size of the [`Book`] that a
    /// [`SourceAction::ResetBook`] asks for.
    ///
    /// [`Book`]: super::Book
    #[must_use]
    pub const fn served(&self) -> &GuestLayout {
        &self.served
    }

    /// The destination's memory, once one has attached.
    #[must_use]
    pub const fn incarnation(&self) -> Option<Incarnation> {
        self.incarnation
    }

    /// A frame with the connection's stamp has arrived.
    pub fn frame(&mut self, frame: ControlFrame, now: Duration) {
        if matches!(self.link, Link::Down | Link::Greeting) {
            return;
        }
        self.heard(now);
        if let Err(refusal) = self.take_frame(frame) {
            self.lose_link(Some(refusal));
        }
        self.release_if_due(now);
    }

    fn take_frame(&mut self, frame: ControlFrame) -> Result<(), Refusal> {
        match (frame, self.link) {
            (ControlFrame::Heartbeat { token }, _) => {
                self.send(ControlFrame::HeartbeatReply { token });
            }
            (ControlFrame::HeartbeatReply { .. }, _) => {}
            (ControlFrame::Renew { channel, generation }, Link::Up) => {
                self.actions.push_back(SourceAction::Renew { channel, generation });
            }
            (ControlFrame::Refuse(refusal), _) => {
                // They hang up; nothing is sent back.
                self.lose_link(None);
                if self.is_snapshot() && refusal.code == RefuseCode::Ended {
                    self.actions.push_back(SourceAction::Event(SourceEvent::Left));
                }
            }
            (ControlFrame::Attach(attach), Link::Offered) => self.attached(&attach)?,
            (ControlFrame::Received { range, segment, last }, Link::Receiving(phase)) => {
                self.check_pages(range)?;
                self.actions.push_back(SourceAction::Received { range, segment });
                if last {
                    self.all_received(phase);
                }
            }
            // A source that was restarted may not have been frozen again yet.
            (ControlFrame::Ready, Link::Up) if !self.knows_it_runs() => self.ready(),
            (ControlFrame::Running, Link::Up) if self.was_given() => self.running(),
            (ControlFrame::Ack(runs), Link::Up) => {
                for run in &runs {
                    self.check_pages(*run)?;
                }
                if self.ignores_acks() {
                    return Ok(());
                }
                self.actions.push_back(SourceAction::Acknowledge(runs));
            }
            (ControlFrame::Complete, Link::Up) if self.knows_it_runs() || self.is_snapshot() => {
                self.destination_complete = true;
                self.finish_if_done();
            }
            (ControlFrame::PassTaken { number, last }, Link::Up) => {
                self.pass_taken(number, last)?;
            }
            // Also from a destination that refuses of its own accord, or has refused before this
            // source was restarted.
            (ControlFrame::TakeBackAgreed, Link::Up)
                if !self.is_snapshot() && !self.knows_it_runs() =>
            {
                self.refused();
            }
            (ControlFrame::TakeBackDenied, Link::Up) if self.was_given() => {
                if self.reclaim_wanted {
                    self.denied();
                }
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

    fn check_pages(&self, range: PageRange) -> Result<(), Refusal> {
        if self.served.contains(range) {
            return Ok(());
        }
        Err(Refusal::new(
            RefuseCode::Protocol,
            format!("pages {range} do not exist, there are {}", self.served.page_count()),
        ))
    }

    fn attached(&mut self, attach: &Attach) -> Result<(), Refusal> {
        self.served = self
            .config
            .layout
            .serving(&attach.layout)
            .map_err(|error| Refusal::new(RefuseCode::Layout, error.to_string()))?;
        self.believes(attach.phase)?;
        self.destination_complete = attach.phase == Phase::Complete;
        self.link = Link::Receiving(attach.phase);
        self.actions.push_back(SourceAction::ResetBook);
        Ok(())
    }

    /// Whether it serves a snapshot, and not a guest that moves.
    #[must_use]
    pub const fn is_snapshot(&self) -> bool {
        matches!(self.config.kind, SessionKind::Snapshot)
    }

    /// Everything the destination has is known: go on from where it is.
    fn begin(&mut self, phase: Phase) {
        self.link = Link::Up;
        self.send(ControlFrame::Begin);
        let layout = self.served.clone();
        self.actions.push_back(SourceAction::OpenData { stamp: self.stamp, layout });
        if let Some(incarnation) = self.incarnation {
            self.actions.push_back(SourceAction::Event(SourceEvent::Attached(incarnation)));
        }
        self.begin_passes(phase);
        match phase {
            Phase::Fresh | Phase::Early => {
                self.destination_ready = false;
                self.wants_state = true;
                if self.reclaim_wanted {
                    self.send(ControlFrame::TakeBack);
                } else if self.has_state {
                    self.actions.push_back(SourceAction::SendState);
                }
            }
            Phase::Ready => self.ready(),
            Phase::Refused => self.refused(),
            Phase::Running | Phase::Complete => {
                self.running();
            }
        }
    }

    fn send(&mut self, frame: ControlFrame) {
        self.actions.push_back(SourceAction::Send(frame));
    }
}
