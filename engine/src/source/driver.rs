//! The source's session thread: carries out what the session says, and keeps the channels.

use super::background::Streamer;
use super::memory::SourceMemory;
use super::request::Responder;
use super::serving::{Serving, ServingOptions, Underway};
use super::{SourceEvent, SourceOptions, SourceShared, StateSection};
use crate::events::EventSender;
use crate::inbox::{Inbox, Outlet};
use crate::session_link::SessionLink;
use crate::sys::words::LazyWords;
use crate::threads::{self, ThreadRole};
use crate::transport::{Accepted, Dialed, Stream, answer_with, refuse};
use afterimage_protocol::bitmap::words_for;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    Book, NotNow, PersistFailed, SourceAction, SourceEvent as Said, SourceRecord, SourceSession,
};
use afterimage_protocol::wire::{
    Capabilities, Channel, ControlFrame, Generation, Hello, MAX_SECTION_BYTES, Refusal, RefuseCode,
    Role, Stamp,
};
use crossbeam_channel::Sender;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a source that is done waits for the destination to have heard so.
const LINGER: Duration = Duration::from_secs(1);

/// What comes to the session thread.
#[derive(Debug)]
pub(crate) enum Input {
    /// A greeted connection that a peer made.
    Accepted(Accepted),
    /// A connection that this side made, or could not make.
    Dialed(Dialed),
    /// A data channel is at its end.
    DataEnded { channel: Channel, stamp: Stamp },
    /// The VMM calls.
    Call(Call, Sender<Result<(), NotNow>>),
    /// The end.
    Stop,
}

/// What a VMM can ask of a running source.
#[derive(Debug)]
pub(crate) enum Call {
    SwitchOver(Vec<StateSection>),
    Reclaim,
    Fence,
}

/// One data channel of the present epoch.
struct DataChannel {
    generation: Generation,
    stream: Stream,
    underway: Underway,
    thread: JoinHandle<()>,
}

pub(super) struct Driver {
    session: SourceSession,
    link: SessionLink,
    inbox: Inbox<Input>,
    outlet: Outlet<Input>,
    memory: Arc<SourceMemory>,
    options: SourceOptions,
    shared: Arc<SourceShared>,
    events: EventSender<SourceEvent>,
    /// An accepted control connection that waits for the epoch to be recorded.
    arriving: Option<Accepted>,
    serving: Option<Arc<Serving>>,
    data: BTreeMap<Channel, DataChannel>,
    generations: BTreeMap<Channel, Generation>,
    /// Replaced channels whose threads have not ended.
    retired: Vec<(Channel, DataChannel)>,
    state: Option<Arc<Vec<StateSection>>>,
    attachments: u64,
    /// What a destination refused for last.
    refused: Option<Refusal>,
}

impl Driver {
    #[expect(clippy::too_many_arguments, reason = "the parts of one thread, put together once")]
    pub(super) fn new(
        session: SourceSession,
        link: SessionLink,
        inbox: Inbox<Input>,
        outlet: Outlet<Input>,
        memory: Arc<SourceMemory>,
        options: SourceOptions,
        shared: Arc<SourceShared>,
        events: EventSender<SourceEvent>,
    ) -> Self {
        Self {
            session,
            link,
            inbox,
            outlet,
            memory,
            options,
            shared,
            events,
            arriving: None,
            serving: None,
            data: BTreeMap::new(),
            generations: BTreeMap::new(),
            retired: Vec::new(),
            state: None,
            attachments: 0,
            refused: None,
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) {
        if self.link.dials() {
            self.session.open();
        }
        loop {
            self.act();
            if let Err(error) = self.link.wait(self.session.next_tick()) {
                tracing::error!(%error, "the source's session thread cannot wait; it stops");
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
            self.session.tick(self.link.now());
            if self.link.redial_is_due() && !self.session.is_over() {
                self.session.open();
            }
        }
        self.stop();
    }

    fn stop(&mut self) {
        if self.session.is_over() {
            self.link.linger(LINGER);
        }
        self.hang_up(Some(Refusal::new(RefuseCode::Failed, "the source was shut down")));
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Accepted(accepted) if accepted.hello.channel == Channel::Control => {
                self.accept_control(accepted);
            }
            Input::Accepted(Accepted { stream, hello }) => self.accept_data(stream, hello),
            Input::Dialed(Dialed { hello, outcome }) => self.dialed(hello, outcome),
            Input::DataEnded { channel, stamp } => self.data_ended(channel, stamp),
            Input::Call(call, reply) => {
                let result = self.call(call);
                // The caller may have given up.
                let _ = reply.send(result);
            }
            Input::Stop => {}
        }
    }

    fn call(&mut self, call: Call) -> Result<(), NotNow> {
        match call {
            Call::SwitchOver(sections) => {
                self.session.freeze()?;
                self.state = Some(Arc::new(sections));
                if let Some(serving) = &self.serving {
                    serving.signal.memory_is_final();
                }
                Ok(())
            }
            Call::Reclaim => self.session.reclaim(),
            Call::Fence => self.session.fence(),
        }
    }

    fn accept_control(&mut self, accepted: Accepted) {
        match self.session.admits(&accepted.hello) {
            Err(refusal) => refuse(&accepted.stream, refusal),
            Ok(()) => {
                self.arriving = Some(accepted);
                self.session.open();
                self.act();
            }
        }
    }

    fn dialed(
        &mut self,
        ours: Hello,
        outcome: Result<(Stream, Hello), crate::transport::ConnectError>,
    ) {
        match (ours.channel, outcome) {
            (Channel::Control, Ok((stream, theirs))) => self.greeted(stream, &theirs),
            (Channel::Control, Err(error)) => {
                self.session.disconnected();
                let error: &dyn std::error::Error = &error;
                tracing::info!(error, "no connection to the destination yet");
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

    /// Both hellos are said on a control connection.
    fn greeted(&mut self, stream: Stream, theirs: &Hello) {
        if let Err(refusal) = self.session.greeted(theirs, self.link.now()) {
            refuse(&stream, refusal);
            self.shared.set_away(true);
            self.link.redial_later();
            return;
        }
        let common = self.options.capabilities().common(theirs.capabilities);
        let checksums = common.has(Capabilities::CHECKSUMS);
        let connected = self.link.connected(stream, self.session.stamp(), checksums);
        self.shared.set_away(connected.is_err());
        if let Err(error) = connected {
            tracing::warn!(%error, "a control connection cannot be used");
            self.session.disconnected();
        }
    }

    /// Carries out everything the session wants.
    fn act(&mut self) {
        while let Some(action) = self.session.poll() {
            match action {
                SourceAction::Persist(record) => self.persist(record),
                SourceAction::Greet(hello) => self.greet(hello),
                SourceAction::Send(frame) => self.link.send(&frame),
                SourceAction::SendState => self.send_state(),
                SourceAction::ResetBook => self.reset_book(),
                SourceAction::Received { range, segment } => {
                    let book = self.shared.book();
                    if let (Some(book), Err(error)) =
                        (book, segment.decode(range, |run| self.shared.acknowledge(run)))
                    {
                        // The wire has decoded it once already.
                        tracing::error!(%error, pages = book.pages(), "a bitmap cannot be read");
                    }
                }
                SourceAction::Acknowledge(runs) => self.acknowledge(&runs),
                SourceAction::OpenData { stamp, layout } => self.open_channels(stamp, layout),
                SourceAction::DropState => self.state = None,
                SourceAction::Event(event) => self.tell(event),
                SourceAction::HangUp(refusal) => self.hang_up(refusal),
                other => tracing::error!(?other, "an action of a newer protocol"),
            }
        }
        if self.link.flush().is_err() {
            self.session.disconnected();
            self.hang_up(None);
        }
    }

    fn persist(&mut self, record: SourceRecord) {
        let result = (self.options.ledger.0)(&record).map_err(|error| {
            tracing::error!(%error, "the ownership record could not be made durable");
            PersistFailed
        });
        self.session.persisted(record, result);
    }

    fn greet(&mut self, hello: Hello) {
        match self.arriving.take() {
            None => self.link.dial(hello),
            Some(Accepted { stream, hello: theirs }) => match answer_with(&stream, hello) {
                Ok(()) => self.greeted(stream, &theirs),
                Err(error) => {
                    tracing::info!(%error, "a destination went away while it was greeted");
                    self.shared.set_away(true);
                    self.session.disconnected();
                }
            },
        }
    }

    fn send_state(&mut self) {
        let sections = self.state.clone().unwrap_or_default();
        let end = ControlFrame::StateEnd { sections: sections.len() as u32 };
        let pieces = (0..sections.len()).flat_map(move |index| {
            let sections = Arc::clone(&sections);
            // An empty section is one empty piece.
            let count = sections[index].bytes.len().div_ceil(MAX_SECTION_BYTES).max(1);
            (0..count).map(move |piece| {
                let section = &sections[index];
                let start = piece * MAX_SECTION_BYTES;
                let stop = section.bytes.len().min(start + MAX_SECTION_BYTES);
                ControlFrame::Section {
                    name: section.name.clone(),
                    version: section.version,
                    last: piece + 1 == count,
                    bytes: section.bytes[start..stop].to_vec(),
                }
            })
        });
        self.link.send_stream(pieces.chain(std::iter::once(end)));
    }

    fn reset_book(&mut self) {
        let pages = self.session.served().page_count();
        let words = || LazyWords::new(pages);
        match (words(), words()) {
            (Ok(sent), Ok(acked)) => {
                self.shared.set_book(Arc::new(Book::over(sent, acked, pages)));
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, words = words_for(pages), "no memory for bitmaps");
                self.session.disconnected();
            }
        }
    }

    fn acknowledge(&mut self, runs: &[PageRange]) {
        for run in runs {
            self.shared.acknowledge(*run);
        }
        if let (Some(book), Some(serving)) = (self.shared.book(), &self.serving) {
            for channel in self.data.values() {
                channel.underway.settle(&book);
            }
            serving.signal.look_again();
        }
    }

    fn open_channels(&mut self, stamp: Stamp, layout: afterimage_protocol::layout::GuestLayout) {
        let Some(book) = self.shared.book() else { return };
        let options =
            ServingOptions { checksums: self.link.checksums(), polling: self.options.polling };
        let serving = Arc::new(Serving::new(
            Arc::clone(&self.memory),
            layout,
            book,
            stamp.epoch,
            options,
            Arc::clone(&self.shared.counters),
            self.outlet.clone(),
        ));
        if self.session.is_frozen() {
            serving.signal.memory_is_final();
        }
        self.serving = Some(serving);
        self.generations.clear();
        if self.link.dials() {
            for channel in self.options.channels() {
                self.dial_data(channel, stamp.epoch);
            }
        }
    }

    /// Makes the next connection of a data channel's slot, if the epoch is still the same.
    fn dial_data(&mut self, channel: Channel, epoch: afterimage_protocol::wire::Epoch) {
        if self.serving.as_ref().is_none_or(|serving| serving.epoch != epoch) {
            return;
        }
        let generation = Generation(self.generations.get(&channel).map_or(1, |last| last.0 + 1));
        self.generations.insert(channel, generation);
        let stamp = Stamp { epoch, generation };
        self.link.dial(self.data_hello(channel, stamp));
    }

    fn data_hello(&self, channel: Channel, stamp: Stamp) -> Hello {
        let record = self.session.record();
        Hello {
            role: Role::Source,
            channel,
            stamp,
            capabilities: self.options.capabilities(),
            session: record.session,
            incarnation: self.session.incarnation().unwrap_or_default(),
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
        let record = self.session.record();
        if hello.role != Role::Destination {
            return refusal(RefuseCode::Role, "both sides are sources".to_owned());
        }
        if hello.session != record.session {
            let reason =
                format!("session {} is not served here, {} is", hello.session, record.session);
            return refusal(RefuseCode::UnknownSession, reason);
        }
        let known = self.session.incarnation();
        if known != Some(hello.incarnation) {
            let known = known.map_or("none".to_owned(), |known| known.to_string());
            let reason =
                format!("destination memory {} is not attached, {known} is", hello.incarnation);
            return refusal(RefuseCode::Incarnation, reason);
        }
        let epoch = self.serving.as_ref().map(|serving| serving.epoch);
        if epoch != Some(hello.stamp.epoch) {
            let present = epoch.map_or("none".to_owned(), |epoch| epoch.0.to_string());
            let reason = format!("epoch {} is not the present one, {present}", hello.stamp.epoch.0);
            return refusal(RefuseCode::Stale, reason);
        }
        if !self.options.channels().any(|channel| channel == hello.channel) {
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
        let Some(serving) = self.serving.clone() else { return };
        if serving.epoch != stamp.epoch {
            stream.shut_down();
            return;
        }
        if let Some(old) = self.data.remove(&channel) {
            old.stream.shut_down();
            self.retired.push((channel, old));
        }
        let underway = Underway::default();
        let started = self.start_data(&serving, channel, &stream, stamp.generation, &underway);
        match started {
            Ok(thread) => {
                let generation = stamp.generation;
                self.data.insert(channel, DataChannel { generation, stream, underway, thread });
            }
            Err(error) => {
                tracing::error!(%error, %channel, "a data channel cannot be served");
                stream.shut_down();
            }
        }
    }

    fn start_data(
        &self,
        serving: &Arc<Serving>,
        channel: Channel,
        stream: &Stream,
        generation: Generation,
        underway: &Underway,
    ) -> io::Result<JoinHandle<()>> {
        let (serving, stream, underway) = (Arc::clone(serving), stream.clone(), underway.clone());
        let streams = self.options.streams;
        let (role, slot) = match channel {
            Channel::Background(slot) => {
                stream.prepare_background()?;
                (ThreadRole::Background, slot)
            }
            Channel::Request(slot) => (ThreadRole::Request, slot),
            Channel::Control => {
                return Err(io::Error::other("a control channel is no data channel"));
            }
        };
        threads::spawn(&self.options.threads, role, usize::from(slot), move || {
            let ended = if role == ThreadRole::Request {
                Responder::new(&serving, stream.clone(), generation, underway).run()
            } else {
                Streamer::new(&serving, stream.clone(), slot, streams, generation, underway).run()
            };
            if let Err(error) = ended
                && !serving.is_closing()
            {
                tracing::info!(%error, %channel, "a data channel ended");
            }
            stream.shut_down();
            serving.ended(channel, generation);
        })
    }

    /// A channel's thread has ended, so that nothing more is added to what it has under way.
    fn data_ended(&mut self, channel: Channel, stamp: Stamp) {
        let is_present = self.serving.as_ref().is_some_and(|it| it.epoch == stamp.epoch)
            && self.data.get(&channel).is_some_and(|it| it.generation == stamp.generation);
        let ended = if is_present {
            self.data.remove(&channel)
        } else {
            let at = self
                .retired
                .iter()
                .position(|(retired, it)| *retired == channel && it.generation == stamp.generation);
            at.map(|at| self.retired.swap_remove(at).1)
        };
        let Some(ended) = ended else { return };
        threads::join(ended.thread);
        if let Some(book) = self.shared.book() {
            ended.underway.requeue(&book);
        }
        if let Some(serving) = &self.serving {
            serving.signal.look_again();
        }
        if is_present && self.link.dials() {
            self.dial_data(channel, stamp.epoch);
        }
    }

    fn hang_up(&mut self, refusal: Option<Refusal>) {
        if let Some(refusal) = refusal {
            self.link.send(&ControlFrame::Refuse(refusal));
        }
        self.link.disconnect();
        self.shared.set_away(true);
        if let Some(serving) = self.serving.take() {
            serving.close();
        }
        // Their sockets are shut down and they are told to close: they do not wait. What
        // they had under way is learnt from the destination's planes.
        let retired = self.retired.drain(..);
        for (_, channel) in std::mem::take(&mut self.data).into_iter().chain(retired) {
            channel.stream.shut_down();
            threads::join(channel.thread);
        }
        if !self.session.is_over() {
            self.link.redial_later();
        }
    }

    fn receive(&mut self) {
        for () in self.link.round() {
            match self.link.receive() {
                Ok(Some(frame)) => {
                    if let ControlFrame::Refuse(refusal) = &frame {
                        self.note_refusal(refusal);
                    }
                    self.session.frame(frame, self.link.now());
                    self.act();
                }
                Ok(None) => return,
                Err(refusal) => {
                    if let Some(refusal) = &refusal {
                        tracing::warn!(%refusal, "the destination breaks the protocol");
                    }
                    self.hang_up(refusal);
                    self.session.disconnected();
                    self.act();
                    return;
                }
            }
        }
    }

    /// The destination has every page. It says so even before the acks of the last ones.
    fn acknowledge_all(&self) {
        if let Some(book) = self.shared.book() {
            book.acknowledge(PageRange::new(PageNumber(0), book.pages()));
        }
    }

    /// A destination that refuses comes back and refuses again: it is told of once.
    fn note_refusal(&mut self, refusal: &Refusal) {
        if self.refused.as_ref() != Some(refusal) {
            tracing::warn!(%refusal, "the destination refuses this source");
            self.refused = Some(refusal.clone());
        }
    }

    fn tell(&mut self, said: Said) {
        let event = match said {
            Said::Attached(incarnation) => {
                self.link.agreed();
                self.attachments += 1;
                if self.attachments > 1 {
                    self.shared.counters.recoveries.fetch_add(1, Ordering::Relaxed);
                }
                SourceEvent::Attached(incarnation)
            }
            Said::Disconnected => SourceEvent::Disconnected,
            Said::Ready => SourceEvent::Ready,
            Said::Given => SourceEvent::Given,
            Said::Running => SourceEvent::Running,
            Said::Reclaimed => SourceEvent::Reclaimed,
            Said::ReclaimDenied => SourceEvent::ReclaimDenied,
            Said::Finished => {
                self.acknowledge_all();
                SourceEvent::Finished
            }
            Said::PersistFailed => SourceEvent::PersistFailed,
            other => {
                tracing::error!(?other, "an event of a newer protocol");
                return;
            }
        };
        self.events.send(event);
    }
}
