//! The destination's session thread: carries out what the session says, and keeps the
//! channels.

use super::arrivals::{Arrivals, Arrived};
use super::faults::Order;
use super::pages::InstallError;
use super::receive::Receiver;
use super::{DestinationEvent, DestinationOptions};
use crate::events::EventSender;
use crate::inbox::{Inbox, Outlet};
use crate::session_link::SessionLink;
use crate::source::StateSection;
use crate::threads::{self, ThreadRole};
use crate::transport::{Accepted, ConnectError, Dialed, Stream, answer_with, refuse};
use afterimage_protocol::bitmap::{MAX_SEGMENT_PAGES, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationAction, DestinationEvent as Said, DestinationRecord, DestinationSession, NotNow,
    PersistFailed,
};
use afterimage_protocol::wire::{
    Capabilities, Channel, ControlFrame, Epoch, Generation, Hello, Refusal, RefuseCode, Role, Stamp,
};
use crossbeam_channel::Sender;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long acknowledgements may wait for company.
const ACK_PAUSE: Duration = Duration::from_millis(5);
/// The most device state that is kept for the VMM.
const MAX_STATE_BYTES: usize = 1 << 30;

/// What comes to the session thread.
#[derive(Debug)]
pub(crate) enum Input {
    /// A greeted connection that a peer made.
    Accepted(Accepted),
    /// A connection that this side made, or could not make.
    Dialed(Dialed),
    /// A data channel is at its end.
    DataEnded { channel: Channel, stamp: Stamp },
    /// Every page is complete.
    AllComplete,
    /// The source cannot read these pages.
    Unreadable(PageRange),
    /// A page cannot be put in place.
    InstallFailed(InstallError),
    /// The fault thread cannot go on.
    FaultsFailed(io::Error),
    /// The VMM has restored the device state.
    Ready(Sender<Result<(), NotNow>>),
    /// The end.
    Stop,
}

/// A background channel of the present epoch.
struct Background {
    generation: Generation,
    stream: Stream,
    thread: JoinHandle<()>,
}

pub(super) struct Driver {
    session: DestinationSession,
    link: SessionLink,
    inbox: Inbox<Input>,
    outlet: Outlet<Input>,
    arrived: Arc<Arrived>,
    faults: Outlet<Order>,
    options: DestinationOptions,
    events: EventSender<DestinationEvent>,
    /// The present epoch, once data channels may be opened.
    arrivals: Option<Arrivals>,
    channels: Vec<Channel>,
    background: BTreeMap<Channel, Background>,
    generations: BTreeMap<Channel, Generation>,
    /// Threads of replaced channels; they end by themselves.
    ended: Vec<JoinHandle<()>>,
    state: Vec<StateSection>,
    state_bytes: usize,
    is_section_open: bool,
    /// Why this side was turned away, if the VMM has been told and nothing has changed.
    turned_away: Option<Refusal>,
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
        options: DestinationOptions,
        events: EventSender<DestinationEvent>,
    ) -> Self {
        Self {
            session,
            link,
            inbox,
            outlet,
            arrived,
            faults,
            options,
            events,
            arrivals: None,
            channels: Vec::new(),
            background: BTreeMap::new(),
            generations: BTreeMap::new(),
            ended: Vec::new(),
            state: Vec::new(),
            state_bytes: 0,
            is_section_open: false,
            turned_away: None,
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) {
        if self.link.dials() {
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
            self.receive();
            self.send_acks();
            self.session.tick(self.link.now());
            if self.link.redial_is_due() && !self.session.is_over() {
                let hello = self.session.open();
                self.link.dial(hello);
            }
        }
        self.stop();
    }

    fn stop(&mut self) {
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
            Input::Accepted(accepted) if accepted.hello.channel == Channel::Control => {
                self.accept_control(&accepted);
            }
            Input::Accepted(Accepted { stream, hello }) => self.accept_data(stream, hello),
            Input::Dialed(Dialed { hello, outcome }) => self.dialed(hello, outcome),
            Input::DataEnded { channel, stamp } => self.data_ended(channel, stamp),
            Input::AllComplete => self.all_complete(),
            Input::Unreadable(pages) => {
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
                // The caller may have given up.
                let _ = reply.send(self.session.ready());
            }
            Input::Stop => {}
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
                self.link.redial_later();
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
            self.link.redial_later();
            return;
        }
        let common = self.options.capabilities().common(theirs.capabilities);
        let checksums = common.has(Capabilities::CHECKSUMS);
        if let Err(error) = self.link.connected(stream, self.session.stamp(), checksums) {
            tracing::warn!(%error, "a control connection cannot be used");
            self.session.disconnected();
        }
    }

    /// Carries out everything the session wants.
    fn act(&mut self) {
        while let Some(action) = self.session.poll() {
            match action {
                DestinationAction::Persist(record) => self.persist(record),
                DestinationAction::Send(frame) => self.link.send(&frame),
                DestinationAction::SendReceived => self.send_received(),
                DestinationAction::OpenData { stamp, streams, shards: _ } => {
                    self.open_channels(stamp, streams);
                }
                DestinationAction::ResetState => {
                    self.state.clear();
                    (self.state_bytes, self.is_section_open) = (0, false);
                }
                DestinationAction::Section { name, version, last, bytes } => {
                    self.take_section(name, version, last, &bytes);
                }
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
        let result = (self.options.ledger.0)(&record).map_err(|error| {
            tracing::error!(%error, "the ownership record could not be made durable");
            PersistFailed
        });
        self.session.persisted(record, result);
    }

    /// What is complete now. Pages that become complete from here on are acknowledged.
    fn send_received(&mut self) {
        self.arrived.forget_acks();
        let arrived = Arc::clone(&self.arrived);
        let pages = arrived.pages.planes().pages();
        let segments = (0..pages).step_by(MAX_SEGMENT_PAGES as usize).map(move |start| {
            let count = MAX_SEGMENT_PAGES.min(pages - start);
            let range = PageRange::new(PageNumber(start), count);
            let segment = Segment::encode(arrived.pages.planes().completed(), range);
            ControlFrame::Received { range, segment, last: start + count == pages }
        });
        self.link.send_stream(segments);
    }

    fn open_channels(&mut self, stamp: Stamp, streams: u16) {
        self.arrivals = Some(self.arrived.on(stamp.epoch, self.link.checksums()));
        self.generations.clear();
        self.channels = std::iter::once(Channel::Request(0))
            .chain((0..streams).map(Channel::Background))
            .collect();
        if self.link.dials() {
            for channel in self.channels.clone() {
                self.dial_data(channel, stamp.epoch);
            }
        }
    }

    /// Makes the next connection of a data channel's slot, if the epoch is still the same.
    fn dial_data(&mut self, channel: Channel, epoch: Epoch) {
        if self.arrivals.as_ref().is_none_or(|arrivals| arrivals.epoch != epoch) {
            return;
        }
        let generation = Generation(self.generations.get(&channel).map_or(1, |last| last.0 + 1));
        self.generations.insert(channel, generation);
        self.link.dial(self.data_hello(channel, Stamp { epoch, generation }));
    }

    fn data_hello(&self, channel: Channel, stamp: Stamp) -> Hello {
        let record = self.session.record();
        Hello {
            role: Role::Destination,
            channel,
            stamp,
            capabilities: self.options.capabilities(),
            session: record.session,
            incarnation: record.incarnation,
        }
    }

    fn accept_data(&mut self, stream: Stream, hello: Hello) {
        if let Err(refusal) = self.admits_data(&hello) {
            refuse(&stream, refusal);
            return;
        }
        if let Err(error) = answer_with(&stream, self.data_hello(hello.channel, hello.stamp)) {
            tracing::info!(%error, channel = %hello.channel, "a data channel broke at once");
            return;
        }
        self.generations.insert(hello.channel, hello.stamp.generation);
        self.open_data(hello.channel, stream, hello.stamp);
    }

    fn admits_data(&self, hello: &Hello) -> Result<(), Refusal> {
        let refusal = |code, reason: String| Err(Refusal::new(code, reason));
        if hello.role != Role::Source {
            return refusal(RefuseCode::Role, "both sides are destinations".to_owned());
        }
        if hello.session != self.session.record().session {
            let reason = format!(
                "this destination is not in session {} but in {}",
                hello.session,
                self.session.record().session
            );
            return refusal(RefuseCode::UnknownSession, reason);
        }
        let epoch = self.arrivals.as_ref().map(|arrivals| arrivals.epoch);
        if epoch != Some(hello.stamp.epoch) {
            let present = epoch.map_or("none".to_owned(), |epoch| epoch.0.to_string());
            let reason = format!("epoch {} is not the present one, {present}", hello.stamp.epoch.0);
            return refusal(RefuseCode::Stale, reason);
        }
        if !self.channels.contains(&hello.channel) {
            let reason = format!("there is no channel {} in this session", hello.channel);
            return refusal(RefuseCode::TooMany, reason);
        }
        let last = self.generations.get(&hello.channel).copied().unwrap_or_default();
        if hello.stamp.generation <= last {
            let reason = format!(
                "generation {} of channel {} has passed, {} is the last",
                hello.stamp.generation.0, hello.channel, last.0
            );
            return refusal(RefuseCode::Stale, reason);
        }
        Ok(())
    }

    fn open_data(&mut self, channel: Channel, stream: Stream, stamp: Stamp) {
        let Some(arrivals) = self.arrivals.clone() else { return };
        if arrivals.epoch != stamp.epoch {
            stream.shut_down();
            return;
        }
        let generation = stamp.generation;
        if matches!(channel, Channel::Request(_)) {
            self.faults.send(Order::Ask { stream, arrivals, generation });
            return;
        }
        if let Some(old) = self.background.remove(&channel) {
            old.stream.shut_down();
            self.ended.retain(|thread| !thread.is_finished());
            self.ended.push(old.thread);
        }
        match self.start_background(arrivals, channel, &stream, generation) {
            Ok(thread) => {
                self.background.insert(channel, Background { generation, stream, thread });
            }
            Err(error) => {
                tracing::error!(%error, %channel, "a data channel cannot be received");
                stream.shut_down();
            }
        }
    }

    fn start_background(
        &self,
        arrivals: Arrivals,
        channel: Channel,
        stream: &Stream,
        generation: Generation,
    ) -> io::Result<JoinHandle<()>> {
        let stream = stream.clone();
        stream.prepare_background()?;
        let driver = self.outlet.clone();
        let slot = match channel {
            Channel::Background(slot) => usize::from(slot),
            _ => 0,
        };
        threads::spawn(&self.options.threads, ThreadRole::Background, slot, move || {
            if let Err(error) = Receiver::new(&arrivals, stream.clone(), generation).run() {
                tracing::info!(%error, %channel, "a data channel ended");
            }
            stream.shut_down();
            let stamp = arrivals.stamp(generation);
            driver.send(Input::DataEnded { channel, stamp });
        })
    }

    fn data_ended(&mut self, channel: Channel, stamp: Stamp) {
        if self.arrivals.as_ref().is_none_or(|arrivals| arrivals.epoch != stamp.epoch) {
            return;
        }
        if matches!(channel, Channel::Background(_)) {
            let present = self.background.get(&channel);
            if present.is_none_or(|present| present.generation != stamp.generation) {
                return;
            }
            if let Some(ended) = self.background.remove(&channel) {
                threads::join(ended.thread);
            }
        } else if self.generations.get(&channel) != Some(&stamp.generation) {
            return;
        }
        if self.link.dials() && !self.session.is_over() {
            self.dial_data(channel, stamp.epoch);
        }
    }

    fn hang_up(&mut self, refusal: Option<Refusal>) {
        if let Some(refusal) = refusal {
            self.link.send(&ControlFrame::Refuse(refusal));
        }
        self.link.disconnect();
        self.arrivals = None;
        self.faults.send(Order::Wait);
        for (_, channel) in std::mem::take(&mut self.background) {
            channel.stream.shut_down();
            self.ended.push(channel.thread);
        }
        // Their sockets are shut down: they do not wait.
        for thread in self.ended.drain(..) {
            threads::join(thread);
        }
        if !self.session.is_over() {
            self.link.redial_later();
        }
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
        while self.arrived.has_acks() {
            let runs = self.arrived.take_acks();
            if !runs.is_empty() {
                self.link.send(&ControlFrame::Ack(runs));
            }
        }
        if self.link.flush().is_err() {
            self.session.disconnected();
        }
        self.act();
    }

    fn take_section(&mut self, name: String, version: u32, last: bool, bytes: &[u8]) {
        self.state_bytes += bytes.len();
        if self.state_bytes > MAX_STATE_BYTES {
            let reason = format!("more than {MAX_STATE_BYTES} bytes of device state");
            self.session.disconnected();
            self.hang_up(Some(Refusal::new(RefuseCode::Protocol, reason)));
            return;
        }
        match self.state.last_mut() {
            Some(open) if self.is_section_open && open.name == name => {
                open.bytes.extend_from_slice(bytes);
            }
            _ => self.state.push(StateSection { name, version, bytes: bytes.to_vec() }),
        }
        self.is_section_open = !last;
    }

    fn tell(&mut self, said: Said) {
        let event = match said {
            Said::Attached(session) => {
                self.link.agreed();
                self.turned_away = None;
                self.arrived.note_attached();
                DestinationEvent::Attached(session)
            }
            Said::Disconnected => DestinationEvent::Disconnected,
            Said::StateComplete => DestinationEvent::State(std::mem::take(&mut self.state)),
            Said::Run => DestinationEvent::Run,
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
