//! Serving one guest until every page is in place and the source knows it.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::{Destination, DestinationEvent, DestinationStateFile, Events, StateSection};

use super::Failure;
use super::door::{Door, News};
use super::farewell::{self, FAREWELL};
use super::guest::Served;
use super::report::{Journal, Outcome, Report};
use crate::attachment::{Arrival, Word, send_state};
use crate::control::{Desk, Happening};
use crate::handoff::framing;
use crate::keeper::Place;
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;

/// How long a VMM may take to take in a word.
const PATIENCE: Duration = Duration::from_secs(10);
/// News of VMMs before the rest has its turn.
const ROUND: usize = 16;

/// The end, which the VMM is to hear of: it may be on its way back to this process.
pub(super) struct Ending {
    outcome: Outcome,
    last_word: Word,
    until: Instant,
}

/// What every session has.
pub(super) struct Session {
    /// Also what is driven from the control socket.
    pub(super) destination: Arc<Destination>,
    pub(super) events: Events<DestinationEvent>,
    pub(super) door: Door,
    pub(super) waiter: Waiter,
    pub(super) progress: Progress,
    pub(super) journal: Journal,
    pub(super) desk: Desk,
}

pub(super) struct Serving {
    destination: Arc<Destination>,
    events: Events<DestinationEvent>,
    door: Door,
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
    desk: Desk,
    served: Served,
    place: Option<Place>,
    record: Option<DestinationStateFile>,
    vmm: Option<UnixStream>,
    /// Grows with each connection of the VMM.
    connection: u64,
    /// Device state that the VMM has not said to have restored.
    state: Option<Vec<StateSection>>,
    runs: bool,
    has_all: bool,
    /// Why the guest does not run here, if it is so.
    not_here: Option<String>,
    ending: Option<Ending>,
    signals: usize,
}

impl Serving {
    /// `runs` says whether it is on record that the guest runs here.
    pub(super) fn new(
        session: Session,
        served: Served,
        place: Option<Place>,
        record: Option<DestinationStateFile>,
        runs: bool,
    ) -> Self {
        let Session { destination, events, door, waiter, progress, journal, desk } = session;
        Self {
            destination,
            events,
            door,
            waiter,
            progress,
            journal,
            desk,
            served,
            place,
            record,
            vmm: None,
            connection: 0,
            state: None,
            runs,
            has_all: false,
            not_here: None,
            ending: None,
            signals: 0,
        }
    }

    /// Serves to the end.
    pub(super) fn run(mut self) -> Result<Report, Failure> {
        let outcome = self.until_the_end()?;
        let stats = self.destination.stats();
        let Self { journal, progress, mut place, record, desk, .. } = self;
        // Whoever it was taken apart for by now is gone; it ends with the last handle.
        desk.detach();
        if !matches!(outcome, Outcome::Abandoned | Outcome::Failed) {
            farewell::note_end(record.as_ref(), outcome, &progress);
            farewell::leave(record.as_ref(), place.as_mut(), &progress);
        }
        Ok(journal.close(outcome, Some(&stats)))
    }

    fn until_the_end(&mut self) -> Result<Outcome, Failure> {
        self.waiter.watch(&self.events).map_err(Failure::of("wait for the session"))?;
        loop {
            while let Some(event) = self.events.try_next() {
                self.take_event(event);
            }
            for _ in 0..ROUND {
                let Ok(news) = self.door.news.try_recv() else { break };
                if let Some(outcome) = self.take_news(news) {
                    return Ok(outcome);
                }
            }
            if let Some(outcome) = self.ended() {
                return Ok(outcome);
            }
            if let Some(place) = &mut self.place {
                place.look(|line| self.progress.say(line));
            }
            let stats = self.destination.stats();
            self.progress.update(stats.pages_complete, stats.pages_total);
            self.progress.count(&stats);
            let is_busy = !self.door.news.is_empty();
            let interval = if is_busy { Duration::ZERO } else { self.progress.interval() };
            let came = self.waiter.wait(interval).map_err(Failure::of("wait for the session"))?;
            if came > 0
                && let Some(outcome) = self.signalled(came)
            {
                return Ok(outcome);
            }
        }
    }

    /// The outcome, once the VMM has heard the last word or has had its time.
    fn ended(&mut self) -> Option<Outcome> {
        let Ending { outcome, last_word, until } = self.ending.take()?;
        if self.tell(&last_word) {
            return Some(outcome);
        }
        if Instant::now() >= until {
            self.progress.say("the VMM has not come back, and was not told that this is the end");
            return Some(outcome);
        }
        self.ending = Some(Ending { outcome, last_word, until });
        None
    }

    fn end(&mut self, outcome: Outcome, last_word: Word) {
        farewell::note_end(self.record.as_ref(), outcome, &self.progress);
        self.ending = Some(Ending { outcome, last_word, until: Instant::now() + FAREWELL });
    }

    /// Says something to the VMM; `false` if it is not connected.
    fn tell(&mut self, word: &Word) -> bool {
        let Some(vmm) = &self.vmm else { return false };
        if let Err(error) = framing::send(vmm, word) {
            self.give_up_vmm(&error);
        }
        self.vmm.is_some()
    }

    /// Hangs up, so that the VMM notices, and comes back.
    fn give_up_vmm(&mut self, error: &io::Error) {
        self.progress.say(&format!("the VMM does not listen ({error}); it may come back"));
        self.hang_up();
    }

    fn hang_up(&mut self) {
        if let Some(vmm) = self.vmm.take() {
            // Another handle of it waits to read; it may have ended already.
            let _ = vmm.shutdown(Shutdown::Both);
        }
    }

    fn tell_state(&mut self) {
        let (Some(vmm), Some(state)) = (&self.vmm, &self.state) else { return };
        if let Err(error) = send_state(vmm, state) {
            self.give_up_vmm(&error);
        }
    }

    fn take_event(&mut self, event: DestinationEvent) {
        if let DestinationEvent::Attached(session) = &event {
            self.desk.name(&session.to_string());
        }
        self.desk.note(&event);
        match event {
            DestinationEvent::Attached(session) => {
                self.journal.attached(&session.to_string());
                self.journal.note("attached");
                self.progress.count(&self.destination.stats());
                self.progress.attached();
            }
            DestinationEvent::Disconnected => {
                self.note("disconnected", "the source is away; waiting for it to come back");
            }
            DestinationEvent::Paused => {
                self.note("paused", "paused at the control socket; recover goes on");
            }
            DestinationEvent::State(state) => {
                self.note("state", "the device state has arrived");
                self.state = Some(state);
                self.tell_state();
            }
            DestinationEvent::Run => {
                self.note("run", "the guest runs here");
                (self.runs, self.state) = (true, None);
                self.tell(&Word::Run);
            }
            DestinationEvent::AllArrived => {
                self.note("all_arrived", "every page is in place");
                self.has_all = true;
                self.tell(&Word::AllArrived);
            }
            DestinationEvent::Finished => {
                self.note("finished", "the source knows it; the session is over");
                self.end(Outcome::Finished, Word::Finished);
            }
            DestinationEvent::Refused => self.not_here("the source has taken the guest back"),
            DestinationEvent::Fenced => self.not_here("an operator has fenced this side"),
            DestinationEvent::Ended(reason) => {
                self.not_here(&format!("the source has ended the session: {reason}"));
            }
            DestinationEvent::TurnedAway(reason) => {
                self.note("turned_away", &format!("the source turns this side away: {reason}"));
            }
            DestinationEvent::Unreadable { first_page, pages } => {
                self.fail(&format!(
                    "the source cannot read {pages} pages from page {first_page} on; whoever \
                     touches one waits"
                ));
            }
            DestinationEvent::Failed(reason) => self.fail(&reason),
            DestinationEvent::PersistFailed => {
                self.fail("who owns the guest could not be recorded; it is tried again");
            }
            _ => {}
        }
    }

    fn note(&mut self, event: &'static str, line: &str) {
        self.journal.note(event);
        self.progress.say(line);
    }

    fn fail(&mut self, reason: &str) {
        self.note("failed", reason);
        self.tell(&Word::Failed { reason: reason.to_owned() });
    }

    fn not_here(&mut self, reason: &str) {
        self.note("not_here", &format!("the guest does not run here: {reason}"));
        self.not_here = Some(reason.to_owned());
        let word = Word::NotHere { reason: reason.to_owned() };
        if self.runs {
            // It waits for its pages: nobody may let go of its memory while it is there.
            self.tell(&word);
        } else {
            self.end(Outcome::NotHere, word);
        }
    }

    fn take_news(&mut self, news: News) -> Option<Outcome> {
        match news {
            News::Arrived(Arrival::Return { name, socket })
                if name == self.served.name && self.served.is_the_vmm(&socket) =>
            {
                self.greet(socket);
            }
            News::Arrived(Arrival::Return { name, socket }) => {
                self.refuse(&socket, &name);
            }
            News::Arrived(Arrival::Offer(offer)) if self.served.is_offered_again(&offer) => {
                self.greet(offer.socket);
            }
            News::Arrived(Arrival::Offer(offer)) => self.refuse(&offer.socket, &offer.name),
            News::Turned(line) => self.progress.say(&line),
            News::Said(number, word) if number == self.connection => return self.hear(&word),
            News::HungUp(number) if number == self.connection => {
                self.hang_up();
                self.journal.note("vmm_hung_up");
                self.desk.note(Happening::new("vmm_hung_up"));
            }
            News::Said(..) | News::HungUp(_) => {}
            News::Died if self.ending.is_some() => {
                self.note(
                    "vmm_died",
                    "the process that ran the guest has ended, after the session",
                );
                return self.ending.take().map(|ending| ending.outcome);
            }
            News::Died => {
                let line = if self.runs {
                    "the process that ran the guest has ended; without release the source can be \
                     fenced, and goes on from the switchover"
                } else {
                    "the process that was to run the guest has ended before it did"
                };
                self.note("vmm_died", line);
                self.desk.note(Happening::new("vmm_died"));
                return Some(Outcome::VmmDied);
            }
        }
        None
    }

    fn refuse(&self, socket: &UnixStream, name: &str) {
        let reason = format!(
            "this page-client serves the guest {:?}, not {name:?}: start another",
            self.served.name
        );
        self.progress.say(&format!("a VMM was turned away: {reason}"));
        // It may have gone.
        let _ = framing::send(socket, &Word::Refused { reason });
    }

    /// Takes a connection of the guest's VMM in the place of any before, and says again what
    /// it may have missed.
    pub(super) fn greet(&mut self, socket: UnixStream) {
        self.hang_up();
        let hearing = socket.set_write_timeout(Some(PATIENCE)).and_then(|()| socket.try_clone());
        self.connection += 1;
        let heard = hearing.and_then(|hearing| self.door.listen(self.connection, hearing));
        self.vmm = Some(socket);
        if let Err(error) = heard {
            return self.give_up_vmm(&error);
        }
        self.tell(&Word::Attached);
        self.journal.note("vmm_attached");
        self.desk.note(Happening::new("vmm_attached"));
        self.tell_state();
        if self.runs {
            self.tell(&Word::Run);
        }
        if self.has_all {
            self.tell(&Word::AllArrived);
        }
        if let Some(reason) = self.not_here.clone() {
            self.tell(&Word::NotHere { reason });
        }
    }

    fn hear(&mut self, word: &Word) -> Option<Outcome> {
        match word {
            Word::Ready => {
                // Said before the state has come again, it is said again with it.
                if let Err(error) = self.destination.ready() {
                    tracing::info!(%error, "the VMM is ready too early");
                } else {
                    self.journal.note("vmm_ready");
                }
            }
            Word::Withdrawn if !self.runs => {
                let line = "the VMM has failed to attach, and given its guest up before it ran; \
                            started again, page-client takes another";
                self.note("withdrawn", line);
                return Some(Outcome::Withdrawn);
            }
            other => tracing::warn!(?other, "the VMM says this out of turn"),
        }
        None
    }

    fn signalled(&mut self, came: usize) -> Option<Outcome> {
        self.signals += came;
        let stats = self.destination.stats();
        let missing = stats.pages_total - stats.pages_complete;
        if self.has_all {
            self.note(
                "signal",
                "stopping: every page is in place, and the guest needs nothing more; started again, \
                 page-client lets the source know",
            );
            return Some(Outcome::Abandoned);
        }
        if self.signals > 1 {
            self.note("signal", "a second signal: whoever touches a missing page waits");
            return Some(Outcome::Abandoned);
        }
        self.note(
            "signal",
            &format!(
                "not stopping: {missing} of {} pages are missing; after a second signal whoever \
                 touches one waits until page-client is started again",
                stats.pages_total
            ),
        );
        None
    }
}
