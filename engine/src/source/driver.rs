//! The source's session thread: carries out what the session says; its data channels are in
//! `channels`.

mod arriving;
mod by_hand;
mod calls;
mod channels;
mod passes;
mod releasing;
mod stalled;

use super::memory::SourceMemory;
use super::serving::Serving;
use super::{CallError, SourceEvent, SourceLedger, SourceOptions, SourceShared};
use crate::events::EventSender;
use crate::inbox::{Inbox, Outlet};
use crate::ledger::Ledger;
use crate::patience::Patience;
use crate::reconnect::is_paused_here;
use crate::session_link::{Beat, SessionLink};
use crate::slots::Slots;
use crate::steps;
use crate::sys::words::LazyWords;
use crate::transport::{Accepted, ConnectError, Dialed, Stream, refuse};
use afterimage_protocol::bitmap::words_for;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    Book, LostPages, PersistFailed, SourceAction, SourceEvent as Said, SourceOwnership,
    SourceRecord, SourceSession,
};
use afterimage_protocol::wire::{
    Capabilities, Channel, ControlFrame, Epoch, Hello, Refusal, RefuseCode, Stamp,
};
pub(crate) use calls::Call;
use calls::StateOut;
use channels::DataChannel;
use crossbeam_channel::Sender;
pub(super) use passes::Passing;
use releasing::Releasing;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a source that is done waits for the destination to have heard so.
const LINGER: Duration = Duration::from_secs(2);

/// What comes to the session thread.
#[derive(Debug)]
pub(crate) enum Input {
    /// A greeted connection that a peer made.
    Accepted(Accepted),
    /// A connection that this side made, or could not make.
    Dialed(Dialed),
    /// A data channel is at its end.
    DataEnded { channel: Channel, stamp: Stamp },
    /// Writes of the guest are tracked from now on, or cannot be.
    TrackingStarted(io::Result<()>),
    /// What the guest has written is known, or it is not known any more.
    Collected(io::Result<()>),
    /// The thread that frees pages is at its end.
    ReleaseEnded(Epoch),
    /// The VMM calls.
    Call(Call, Sender<Result<(), CallError>>),
    /// The end.
    Stop,
}

#[expect(clippy::struct_excessive_bools, reason = "independent facts, each learned once")]
pub(super) struct Driver {
    session: SourceSession,
    link: SessionLink,
    inbox: Inbox<Input>,
    outlet: Outlet<Input>,
    /// What was looked through and is still to be taken, before the inbox.
    backlog: VecDeque<Input>,
    memory: Arc<SourceMemory>,
    options: SourceOptions,
    ledger: Ledger<SourceRecord>,
    shared: Arc<SourceShared>,
    events: EventSender<SourceEvent>,
    /// An accepted control connection that waits for the epoch to be recorded.
    arriving: Option<Accepted>,
    serving: Option<Arc<Serving>>,
    slots: Slots,
    data: BTreeMap<Channel, DataChannel>,
    /// Replaced channels whose threads have not ended.
    retired: Vec<(Channel, DataChannel)>,
    releasing: Option<Releasing>,
    /// Of an earlier connection: its thread has not ended.
    retired_releasing: Option<Releasing>,
    /// The session lets pages be freed, as long as this connection lasts.
    may_release: bool,
    state: StateOut,
    passing: Option<Passing>,
    /// What data channels say that this side can do.
    capabilities: Capabilities,
    /// Somebody holds the guest where it is.
    is_held: bool,
    /// The destination has said that the session is over for it.
    is_dismissed: bool,
    /// The destination has hung up on a session that is over.
    was_heard: bool,
    attachments: u64,
    /// How long nothing may come of each background channel.
    patience: BTreeMap<Channel, Patience>,
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
        mut options: SourceOptions,
        shared: Arc<SourceShared>,
        events: EventSender<SourceEvent>,
        passing: Option<Passing>,
    ) -> Self {
        let volatile = SourceLedger::volatile();
        let callback = std::mem::replace(&mut options.ledger, volatile).0;
        let (capabilities, is_held) = (session.capabilities(), options.hold);
        let ledger = Ledger::new(callback, options.threads.clone());
        Self {
            ledger,
            session,
            link,
            inbox,
            outlet,
            backlog: VecDeque::new(),
            memory,
            options,
            shared,
            events,
            arriving: None,
            serving: None,
            slots: Slots::default(),
            data: BTreeMap::new(),
            retired: Vec::new(),
            releasing: None,
            retired_releasing: None,
            may_release: false,
            state: StateOut::default(),
            capabilities,
            is_held,
            passing,
            is_dismissed: false,
            was_heard: false,
            attachments: 0,
            patience: BTreeMap::new(),
            refused: None,
        }
    }

    /// Runs until it is stopped.
    pub(super) fn run(mut self) {
        if self.link.dials() {
            self.session.open();
        }
        while self.round(None).is_continue() {}
        self.stop();
    }

    /// Waits for news, until `most` at most, and deals with all of it.
    fn round(&mut self, most: Option<Duration>) -> ControlFlow<()> {
        self.act();
        let now = (!self.backlog.is_empty()).then_some(Duration::ZERO);
        let wanted = most.into_iter().chain(now).chain(self.next_look());
        let due = self.session.next_tick().into_iter().chain(wanted).min();
        if let Err(error) = self.link.wait(SessionLink::unless_waiting(due, &self.inbox)) {
            tracing::error!(%error, "the source's session thread cannot wait; it stops");
            return ControlFlow::Break(());
        }
        while let Some(input) = self.next_input() {
            if matches!(input, Input::Stop) {
                return ControlFlow::Break(());
            }
            self.take(input);
            self.act();
        }
        // What lies in the socket is read before anybody judges how long the peer has been
        // silent: this thread may have been kept from its work.
        let (looked, looked_at) = (self.link.now(), Instant::now());
        self.receive();
        if self.link.take_heard() {
            // A long frame may take longer than the silence on a slow link.
            self.session.heard(self.link.now());
        }
        self.give_up_stalled(looked_at);
        self.look_again();
        self.session.tick(looked);
        while let Some((channel, epoch)) = self.link.data.due() {
            self.dial_data(channel, epoch);
        }
        if self.link.redial_is_due() && self.wants_link() {
            self.session.open();
        }
        ControlFlow::Continue(())
    }

    /// Whether a connection is to be made. A bye may have been lost, and a destination that
    /// listens cannot ask for it: who has finished comes back until he is told to stay away.
    pub(super) fn wants_link(&self) -> bool {
        let has_finished = self.session.record().ownership == SourceOwnership::Finished;
        !self.session.is_over() || (has_finished && !self.is_dismissed)
    }

    /// Whether the destination may not know that it has everything.
    fn owes_bye(&self) -> bool {
        self.session.is_finished() && !self.was_heard && !self.is_dismissed
    }

    fn stop(&mut self) {
        // Who has not heard the bye comes back for it, and finds nobody if this side is quicker.
        let end = self.link.now() + LINGER;
        while self.owes_bye() && self.link.now() < end {
            if self.round(Some(end)).is_break() {
                break;
            }
        }
        self.hang_up(Some(Refusal::new(RefuseCode::Failed, "the source was shut down")));
        self.leave_releasing();
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Accepted(accepted) if self.link.is_paused() && !self.session.is_over() => {
                refuse(&accepted.stream, is_paused_here());
            }
            Input::Accepted(accepted) if accepted.hello.channel == Channel::Control => {
                self.accept_control(accepted);
            }
            Input::Accepted(Accepted { stream, hello }) => self.accept_data(stream, hello),
            // It may have been under way when something else was wished for.
            Input::Dialed(dialed) if !self.link.wants(&dialed) => {}
            Input::Dialed(Dialed { hello, outcome, .. }) => self.dialed(hello, outcome),
            Input::DataEnded { channel, stamp } => self.data_ended(channel, stamp),
            Input::ReleaseEnded(epoch) => self.release_ended(epoch),
            Input::TrackingStarted(result) => self.tracking_started(result),
            Input::Collected(result) => self.collected(result),
            Input::Call(call, reply) => {
                let result = self.call(call);
                // The caller may have given up.
                let _ = reply.send(result);
            }
            Input::Stop => {}
        }
    }

    fn dialed(&mut self, ours: Hello, outcome: Result<(Stream, Hello), ConnectError>) {
        match (ours.channel, outcome) {
            (Channel::Control, Ok((stream, theirs))) => self.greeted(stream, &theirs),
            (Channel::Control, Err(error)) => {
                self.session.disconnected();
                if let ConnectError::Refused(refusal) = &error {
                    self.is_dismissed = refusal.code == RefuseCode::Ended;
                    self.link.redial_refused();
                } else {
                    self.link.redial_later();
                }
                let error: &dyn std::error::Error = &error;
                tracing::info!(error, "no connection to the destination yet");
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
            self.link.redial_refused();
            return;
        }
        self.was_heard = false;
        let common = self.capabilities.common(theirs.capabilities);
        self.shared.agreed.set(common);
        let checksums = common.has(Capabilities::CHECKSUMS);
        let connected =
            self.link.connected(stream, self.session.stamp(), checksums, self.options.silence);
        self.shared.set_away(connected.is_err());
        if let Err(error) = connected {
            tracing::warn!(%error, "a control connection cannot be used");
            self.session.disconnected();
        }
    }

    /// Carries out everything the session wants.
    fn act(&mut self) {
        while let Some(action) = self.session.poll() {
            steps::pass("source", &action);
            match action {
                SourceAction::Persist(record) => self.persist(record),
                SourceAction::Greet(hello) => self.greet(hello),
                SourceAction::Send(frame) => self.link.send(&frame),
                SourceAction::SendState => self.send_all_state(),
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
                SourceAction::TellStale => self.tell_stale(),
                SourceAction::OpenPass { number } => self.open_pass(number),
                SourceAction::Settled => self.settled(),
                SourceAction::Acknowledge(runs) => self.acknowledge(&runs),
                SourceAction::CompareReleased => self.compare_released(),
                SourceAction::Release => self.start_releasing(),
                SourceAction::OpenData { stamp, layout } => self.open_channels(stamp, layout),
                SourceAction::Renew { channel, generation } => self.renew(channel, generation),
                SourceAction::DropState => self.state.forget(),
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
        let mut beat = self.session.pulse().map(Beat::after);
        let (ledger, link) = (&mut self.ledger, &mut self.link);
        let meanwhile = || link.stay_alive(&mut beat, None);
        let result = ledger.record(&record, &self.outlet, meanwhile).map_err(|error| {
            tracing::error!(%error, "the ownership record could not be made durable");
            PersistFailed
        });
        if result.is_err() {
            // Without an answer it would wait for one, instead of trying again.
            self.arriving = None;
        }
        self.session.persisted(record, result);
    }

    fn reset_book(&mut self) {
        let before = self.shared.book();
        let pages = self.session.served().page_count();
        let words = || LazyWords::new(pages);
        match (words(), words()) {
            (Ok(sent), Ok(acked)) => {
                self.shared.set_book(Arc::new(Book::over(sent, acked, pages)));
                self.passes_attach(before);
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, words = words_for(pages), "no memory for bitmaps");
                self.session.disconnected();
            }
        }
    }

    fn acknowledge(&mut self, runs: &[PageRange]) {
        for run in runs {
            self.believed(*run, |run| self.shared.acknowledge(run));
        }
        if let (Some(book), Some(serving)) = (self.shared.book(), &self.serving) {
            for channel in self.data.values() {
                channel.underway.settle(&book);
            }
            serving.signal.look_again();
        }
        self.note_arrived(runs);
        self.end_pass_if_over();
        self.proceed_if_all_is_there();
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
                    // After its bye the destination hangs up.
                    self.was_heard |= self.session.is_finished();
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
            if self.session.is_snapshot() && refusal.code == RefuseCode::Ended {
                // Its guest has ended, and the caller is told.
                tracing::info!(%refusal, "the destination needs no more");
            } else {
                tracing::warn!(%refusal, "the destination refuses this source");
            }
            self.refused = Some(refusal.clone());
        }
    }

    fn tell(&mut self, said: Said) {
        let event = match said {
            Said::Attached(incarnation) => {
                self.link.agreed();
                self.attachments += 1;
                self.note_lack_of_precopy();
                self.send_sections();
                if self.attachments > 1 {
                    self.shared.counters.recoveries.fetch_add(1, Ordering::Relaxed);
                }
                SourceEvent::Attached(incarnation)
            }
            Said::Disconnected => {
                self.events.send(SourceEvent::Disconnected);
                self.pause_if_by_hand();
                return;
            }
            // It was told at once.
            Said::Stopped => return,
            // It waits for its last pages, and for nobody.
            Said::Held if !self.is_held => return,
            Said::Held => SourceEvent::Held,
            Said::Ready => {
                self.events.send(SourceEvent::Ready);
                self.proceed_if_all_is_there();
                return;
            }
            Said::Given => SourceEvent::Given,
            Said::Running => {
                if let Some(serving) = &self.serving {
                    serving.signal.state_is_restored();
                }
                SourceEvent::Running
            }
            Said::Reclaimed => {
                self.drop_passes();
                SourceEvent::Reclaimed
            }
            Said::Left => SourceEvent::Left,
            Said::Refused => SourceEvent::Refused,
            Said::ReclaimDenied => SourceEvent::ReclaimDenied,
            Said::Finished => {
                self.acknowledge_all();
                SourceEvent::Finished
            }
            Said::PersistFailed => SourceEvent::PersistFailed,
            Said::Lost(LostPages { first, count }) => {
                tracing::error!(%first, count, "the destination lacks pages that were freed here");
                SourceEvent::Lost { first, count }
            }
            other => {
                tracing::error!(?other, "an event of a newer protocol");
                return;
            }
        };
        self.events.send(event);
    }
}
