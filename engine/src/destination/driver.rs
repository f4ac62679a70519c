//! The destination's session thread: carries out what the session says; its data channels are
//! in `channels`.

mod by_hand;
mod channels;
mod passes;
mod state;

use super::arrivals::{Arrivals, Arrived};
use super::faults::Order;
use super::pages::InstallError;
use super::{DestinationEvent, DestinationLedger, DestinationOptions, UnreadablePages};
use crate::events::EventSender;
use crate::inbox::{Inbox, Outlet};
use crate::ledger::Ledger;
use crate::reconnect::{Reconnect, is_paused_here};
use crate::session_link::{Beat, SessionLink};
use crate::slots::Slots;
use crate::source::{CallError, Endpoint, StateSection};
use crate::steps;
use crate::transport::{Accepted, ConnectError, Dialed, Stream, answer_with, refuse};
use afterimage_protocol::bitmap::{MAX_SEGMENT_PAGES, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationAction, DestinationEvent as Said, DestinationRecord, DestinationSession,
    PersistFailed, Pulse,
};
use afterimage_protocol::wire::{
    Capabilities, Channel, ControlFrame, Hello, Refusal, RefuseCode, Stamp,
};
use channels::Background;
use crossbeam_channel::Sender;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long acknowledgements may wait for company, unless they are many. Each look takes a
/// core from whoever faults, on both sides.
const ACK_PAUSE: Duration = Duration::from_millis(20);
/// Frames of acknowledgements of one look, so that a flood of them keeps nobody from the rest.
const ACK_FRAMES: usize = 16;

/// Where the outcome of a call goes.
pub(super) type Reply = Sender<Result<(), CallError>>;

/// What comes to the session thread.
#[derive(Debug)]
pub(crate) enum Input {
    /// A greeted connection that a peer made.
    Accepted(Accepted),
    /// A connection that this side made, or could not make.
    Dialed(Dialed),
    /// A data channel is at its end.
    DataEnded { channel: Channel, stamp: Stamp },
    /// A channel broke in the middle of these pages.
    GivenBack(PageRange),
    /// Every page is complete.
    AllComplete,
    /// Many runs wait to be acknowledged.
    ManyAcks,
    /// The source cannot read these pages.
    Unreadable(PageRange),
    /// A page cannot be put in place.
    InstallFailed(InstallError),
    /// The fault thread cannot go on.
    FaultsFailed(io::Error),
    /// The VMM has restored the device state.
    Ready(Reply),
    /// The VMM will not run the guest.
    Refuse(Reply),
    /// Nobody needs the rest of a snapshot.
    Leave(Reply),
    /// The VMM wants no connection.
    Pause(Reply),
    /// The VMM wants a connection again, perhaps somewhere else.
    Recover(Option<Endpoint>, Reply),
    /// The end.
    Stop,
}

pub(super) struct Driver {
    session: DestinationSession,
    link: SessionLink,
    inbox: Inbox<Input>,
    outlet: Outlet<Input>,
    arrived: Arc<Arrived>,
    faults: Outlet<Order>,
    options: DestinationOptions,
    ledger: Ledger<DestinationRecord>,
    events: EventSender<DestinationEvent>,
    /// The present epoch, once data channels may be opened.
    arrivals: Option<Arrivals>,
    slots: Slots,
    background: BTreeMap<Channel, Background>,
    /// Threads of replaced channels; they end by themselves.
    ended: Vec<JoinHandle<()>>,
    state: Vec<StateSection>,
    state_bytes: usize,
    is_section_open: bool,
    /// A section was told that comes again if the connection breaks.
    has_told_section: bool,
    /// Why this side was turned away, if the VMM has been told and nothing has changed.
    turned_away: Option<Refusal>,
    /// Maps what came by early copies.
    mapper: Option<JoinHandle<()>>,
}

impl Driver {
    #[expect(clippy::too_many_arguments, reason = "the parts of one thread, put together once")]
    pub(super) fn new(
        session: DestinationSession,
        link: SessionLink,
        inbox: Inbox<Input>,
        outlet: Outlet<Input>,
        arrived: Arc<Arrived>,
        faults: Outlet<Order>,
        mut options: DestinationOptions,
        events: EventSender<DestinationEvent>,
    ) -> Self {
        let volatile = DestinationLedger::volatile();
        let callback = std::mem::replace(&mut options.ledger, volatile).0;
        let ledger = Ledger::new(callback, options.threads.clone());
        Self {
            ledger,
            session,
            link,
            inbox,
            outlet,
            arrived,
            faults,
            options,
            events,
            arrivals: None,
            slots: Slots::default(),
            background: BTreeMap::new(),
            ended: Vec::new(),
            state: Vec::new(),
            state_bytes: 0,
            is_section_open: false,
            has_told_section: false,
            turned_away: None,
            mapper: None,
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) {
        self.pause_if_to_wait();
        if self.link.dials() && !self.link.is_paused() {
            let hello = self.session.open();
            self.link.dial(hello);
        }
        loop {
            self.act();
            let mut due = self.session.next_tick();
            if self.arrivals.is_some() {
                let soon = self.link.now() + ACK_PAUSE;
                due = Some(due.map_or(soon, |due| due.min(soon)));
            }
            let due = SessionLink::unless_waiting(due, &self.inbox);
            if let Err(error) = self.link.wait(due) {
                tracing::error!(%error, "the destination's session thread cannot wait; it stops");
                break;
            }
            while let Some(input) = self.inbox.next() {
                if matches!(input, Input::Stop) {
                    self.stop();
                    return;
                }
                self.take(input);
                self.act();
            }
            // What lies in the socket is read before anybody judges how long the peer has been
            // silent: this thread may have been kept from its work.
            let looked = self.link.now();
            self.receive();
            if self.link.take_heard() {
                // A long frame may take longer than the silence on a slow link.
                self.session.heard(self.link.now());
            }
            self.send_acks();
            self.session.tick(looked);
            while let Some((channel, epoch)) = self.link.data.due() {
                self.dial_data(channel, epoch);
            }
            if self.link.redial_is_due() && !self.session.is_over() {
                let hello = self.session.open();
                self.link.dial(hello);
            }
        }
        self.stop();
    }

    fn stop(&mut self) {
        self.stop_mapping();
        self.hang_up(Some(Refusal::new(RefuseCode::Failed, "the destination was shut down")));
        if self.arrived.pages.remaining() > 0 {
            self.events.send(DestinationEvent::Abandoned);
        } else {
            // The news that the last page has arrived may still be in the inbox; without
            // this, nobody would answer a fault on what has arrived and was never touched.
            self.arrived.pages.memory().unregister();
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Accepted(accepted) if self.link.is_paused() && !self.session.is_over() => {
                refuse(&accepted.stream, is_paused_here());
            }
            Input::Accepted(accepted) if accepted.hello.channel == Channel::Control => {
                self.accept_control(&accepted);
            }
            Input::Accepted(Accepted { stream, hello }) => self.accept_data(stream, hello),
            // It may have been under way when something else was wished for.
            Input::Dialed(dialed) if !self.link.wants(&dialed) => {}
            Input::Dialed(Dialed { hello, outcome, .. }) => self.dialed(hello, outcome),
            Input::DataEnded { channel, stamp } => self.data_ended(channel, stamp),
            Input::GivenBack(pages) => drop(self.faults.send(Order::Want(pages))),
            Input::AllComplete => self.all_complete(),
            Input::Unreadable(pages) => {
                if self.options.unreadable == UnreadablePages::Poison {
                    self.faults.send(Order::Poison(pages));
                }
                self.events.send(DestinationEvent::Unreadable {
                    first_page: pages.start.0,
                    pages: pages.count,
                });
            }
            Input::InstallFailed(error) => {
                tracing::error!(%error, "a page cannot be put in place");
                self.events.send(DestinationEvent::Failed(error.to_string()));
            }
            Input::FaultsFailed(error) => {
                self.events.send(DestinationEvent::Failed(format!(
                    "faults are not answered any more: {error}"
                )));
            }
            Input::Ready(reply) => {
                let result = self.session.ready().map_err(CallError::from);
                // The caller may have given up; likewise below.
                let _ = reply.send(result);
            }
            Input::Leave(reply) => {
                let result = self.session.leave().map_err(CallError::from);
                // Said before it is dropped, which says something else.
                self.act();
                let _ = reply.send(result);
            }
            Input::Refuse(reply) => {
                let result = self.session.refuse().map_err(CallError::from);
                // Who asks may be killed as soon as it hears of it.
                self.act();
                let _ = reply.send(result);
            }
            Input::Pause(reply) => drop(reply.send(self.pause())),
            Input::Recover(endpoint, reply) => drop(reply.send(self.recover(endpoint))),
            // Acknowledgements are sent after each round of news; who stops is not here.
            Input::ManyAcks | Input::Stop => {}
        }
    }

    fn all_complete(&mut self) {
        // Faults are the kernel's from here; events are still read meanwhile.
        self.arrived.pages.memory().unregister();
        self.send_acks();
        self.events.send(DestinationEvent::AllArrived);
        self.session.all_complete();
    }

    fn accept_control(&mut self, accepted: &Accepted) {
        if let Err(refusal) = self.session.admits(&accepted.hello) {
            refuse(&accepted.stream, refusal);
            return;
        }
        if self.options.reconnect == Reconnect::ByHand && self.arrivals.is_some() {
            // The source has noticed first that the link is lost.
            self.session.disconnected();
            self.act();
            refuse(&accepted.stream, is_paused_here());
            return;
        }
        let hello = self.session.open();
        self.act();
        match answer_with(&accepted.stream, hello) {
            Ok(()) => self.greeted(accepted.stream.clone(), &accepted.hello),
            Err(error) => {
                tracing::info!(%error, "a source went away while it was greeted");
                self.session.disconnected();
            }
        }
    }

    fn dialed(&mut self, ours: Hello, outcome: Result<(Stream, Hello), ConnectError>) {
        match (ours.channel, outcome) {
            (Channel::Control, Ok((stream, theirs))) => self.greeted(stream, &theirs),
            (Channel::Control, Err(ConnectError::Refused(refusal))) => {
                tracing::warn!(%refusal, "the source refuses");
                self.session.refused(refusal);
                self.session.disconnected();
                self.link.redial_refused();
            }
            (Channel::Control, Err(error)) => {
                let error: &dyn std::error::Error = &error;
                tracing::info!(error, "no connection to the source yet");
                self.session.disconnected();
                self.link.redial_later();
            }
            (channel, Ok((stream, _))) => self.open_data(channel, stream, ours.stamp),
            (channel, Err(error)) => {
                let error: &dyn std::error::Error = &error;
                tracing::info!(error, %channel, "no data channel yet");
                self.dial_data(channel, ours.stamp.epoch);
            }
        }
    }

    fn greeted(&mut self, stream: Stream, theirs: &Hello) {
        if let Err(refusal) = self.session.greeted(theirs, self.link.now()) {
            refuse(&stream, refusal);
            self.link.redial_refused();
            return;
        }
        let common = self.session.capabilities().common(theirs.capabilities);
        self.arrived.agreed.set(common);
        let checksums = common.has(Capabilities::CHECKSUMS);
        let (stamp, silence) = (self.session.stamp(), self.silence());
        if let Err(error) = self.link.connected(stream, stamp, checksums, silence) {
            tracing::warn!(%error, "a control connection cannot be used");
            self.session.disconnected();
        }
    }

    /// What the sides have agreed on, or what this side begins with.
    fn silence(&self) -> Duration {
        self.session.pulse().map_or(self.options.silence, Pulse::silence)
    }

    /// Carries out everything the session wants.
    fn act(&mut self) {
        while let Some(action) = self.session.poll() {
            steps::pass("destination", &action);
            match action {
                DestinationAction::Persist(record) => self.persist(record),
                DestinationAction::Send(frame) => self.link.send(&frame),
                DestinationAction::SendReceived => self.send_received(),
                DestinationAction::OpenData { stamp, streams, shards: _ } => {
                    self.open_channels(stamp, streams);
                }
                DestinationAction::Renew { channel, generation } => self.renew(channel, generation),
                DestinationAction::ResetState => self.reset_state(),
                DestinationAction::Section { name, version, last, bytes } => {
                    self.take_section(name, version, last, &bytes);
                }
                DestinationAction::Stale { range, segment } => self.stale(range, &segment),
                DestinationAction::Pass { number, last } => self.pass(number, last),
                DestinationAction::ForgetEarly => self.forget_early(),
                DestinationAction::Event(event) => self.tell(event),
                DestinationAction::HangUp(refusal) => self.hang_up(refusal),
                other => tracing::error!(?other, "an action of a newer protocol"),
            }
        }
        if self.link.flush().is_err() {
            self.session.disconnected();
            self.hang_up(None);
        }
    }

    fn persist(&mut self, record: DestinationRecord) {
        let mut beat = self.session.pulse().map(Beat::after);
        let (ledger, link, arrived) = (&mut self.ledger, &mut self.link, &self.arrived);
        // The source must not take its streams for dead meanwhile.
        let acknowledges = self.arrivals.is_some();
        let meanwhile = || {
            if acknowledges {
                push_acks(arrived, link);
            }
            link.stay_alive(&mut beat, acknowledges.then_some(ACK_PAUSE))
        };
        let result = ledger.record(&record, &self.outlet, meanwhile).map_err(|error| {
            tracing::error!(%error, "the ownership record could not be made durable");
            PersistFailed
        });
        self.session.persisted(record, result);
    }

    /// What is complete now. Pages that become complete from here on are acknowledged.
    fn send_received(&mut self) {
        self.arrived.forget_acks();
        if self.prepare_received().is_err() {
            return;
        }
        let arrived = Arc::clone(&self.arrived);
        let pages = arrived.pages.planes().pages();
        let segments = (0..pages).step_by(MAX_SEGMENT_PAGES as usize).map(move |start| {
            let count = MAX_SEGMENT_PAGES.min(pages - start);
            let range = PageRange::new(PageNumber(start), count);
            let segment = Segment::encode(arrived.pages.present(), range);
            ControlFrame::Received { range, segment, last: start + count == pages }
        });
        self.link.send_stream(segments);
    }

    fn receive(&mut self) {
        for () in self.link.round() {
            match self.link.receive() {
                Ok(Some(frame)) => {
                    self.session.frame(frame, self.link.now());
                    self.act();
                }
                Ok(None) => return,
                Err(refusal) => {
                    if let Some(refusal) = &refusal {
                        tracing::warn!(%refusal, "the source breaks the protocol");
                    }
                    self.hang_up(refusal);
                    self.session.disconnected();
                    self.act();
                    return;
                }
            }
        }
    }

    /// Tells the source what has become complete.
    fn send_acks(&mut self) {
        // A page may become complete where nobody looks whether it was the last.
        self.arrived.note_progress();
        if self.arrivals.is_none() {
            return;
        }
        if self.arrived.take_lost_acks() {
            tracing::warn!(
                "the control channel does not carry acknowledgements off; it is renewed"
            );
            self.session.disconnected();
            self.act();
            return;
        }
        push_acks(&self.arrived, &mut self.link);
        if self.link.flush().is_err() {
            self.session.disconnected();
        }
        self.act();
    }

    fn tell(&mut self, said: Said) {
        let event = match said {
            Said::Attached(session) => {
                self.link.agreed();
                self.turned_away = None;
                self.arrived.note_attached();
                DestinationEvent::Attached(session)
            }
            Said::Disconnected => {
                self.events.send(DestinationEvent::Disconnected);
                self.pause_if_by_hand();
                return;
            }
            Said::Stopped => DestinationEvent::SourceStopped,
            Said::StateComplete => DestinationEvent::State(std::mem::take(&mut self.state)),
            Said::Run => {
                self.arrived.note_running();
                DestinationEvent::Run
            }
            Said::Refused => DestinationEvent::Refused,
            Said::Fenced => DestinationEvent::Fenced,
            Said::Ended(refusal) => DestinationEvent::Ended(refusal.reason),
            // Whoever turns this side away does so at every attempt: it is told once.
            Said::TurnedAway(refusal) if self.turned_away.as_ref() == Some(&refusal) => return,
            Said::TurnedAway(refusal) => {
                self.turned_away = Some(refusal.clone());
                DestinationEvent::TurnedAway(refusal.reason)
            }
            Said::Finished => DestinationEvent::Finished,
            Said::PersistFailed => DestinationEvent::PersistFailed,
            other => {
                tracing::error!(?other, "an event of a newer protocol");
                return;
            }
        };
        self.events.send(event);
    }
}

/// Says what has become complete, as far as the peer reads it: what waits in `arrived` is
/// bounded.
fn push_acks(arrived: &Arrived, link: &mut SessionLink) {
    for _ in 0..ACK_FRAMES {
        if !arrived.has_acks() || !link.has_room() {
            return;
        }
        let runs = arrived.take_acks();
        if !runs.is_empty() {
            link.send(&ControlFrame::Ack(runs));
        }
    }
}
