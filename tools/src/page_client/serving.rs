//! Serving one guest until every page is in place and the source knows it.

mod giving_back;
mod news;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::{
    Destination, DestinationEvent, DestinationOwnership, DestinationStateFile, Events, StateSection,
};

use super::Failure;
use super::adapter::{Adapter, Manner, Native, OnFailure, Restoring};
use super::door::Door;
use super::ending::Ending;
use super::farewell;
use super::guest::Served;
use super::origin::FileServer;
use super::party::Party;
use super::report::{Journal, Outcome, Report};
use crate::attachment::{DrivenBy, Word};
use crate::control::Desk;
use crate::keeper::Place;
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;

/// How long a VMM that may have ended has for it to show.
pub(super) const DEATH_SHOWS: Duration = Duration::from_secs(1);
/// Between looks meanwhile.
const DEATH_LOOK: Duration = Duration::from_millis(50);
/// News of VMMs before the rest has its turn.
const ROUND: usize = 16;

/// What every session has.
pub(super) struct Session {
    pub(super) adapter: Arc<dyn Adapter>,
    /// Also what is driven from the control socket.
    pub(super) destination: Arc<Destination>,
    pub(super) events: Events<DestinationEvent>,
    pub(super) door: Door,
    pub(super) waiter: Waiter,
    pub(super) progress: Progress,
    pub(super) journal: Journal,
    pub(super) desk: Desk,
    /// The source, if it is in this process.
    pub(super) file_server: Option<FileServer>,
    /// The guest was served by a process before this one.
    pub(super) is_taken_over: bool,
    /// The destination was started paused: the source is connected to when a driver is there.
    pub(super) is_held: bool,
}

/// Whether a guest that its VMM does not drive needs somebody who does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DriverNeed {
    /// It does.
    Unsaid,
    /// It does, and it was said that one is waited for.
    Said,
    /// One has said that it has started the guest.
    Over,
}

/// What has become of the guest at its source, as far as this process knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AtSource {
    /// It runs there, or will by itself.
    Runs,
    /// It may have been stopped, and given away: it stands still until somebody says what becomes
    /// of it.
    Stopped,
}

pub(super) struct Serving {
    adapter: Arc<dyn Adapter>,
    manner: Manner,
    destination: Arc<Destination>,
    events: Events<DestinationEvent>,
    door: Door,
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
    desk: Desk,
    file_server: Option<FileServer>,
    served: Served,
    place: Option<Place>,
    record: Option<DestinationStateFile>,
    vmm: Party,
    /// Only of a guest that its VMM does not drive.
    driver: Party,
    /// Grows with each connection of either.
    connections: u64,
    need: DriverNeed,
    is_held: bool,
    /// Device state. A VMM needs it until its guest runs; a driver, as long as one may come: it
    /// says what the one before has restored.
    state: Option<Vec<StateSection>>,
    runs: bool,
    has_all: bool,
    at_source: AtSource,
    /// Why the guest does not run here, if it is so.
    not_here: Option<String>,
    ending: Option<Ending>,
    /// It ends then, if it does not show before that its VMM has.
    fails_at: Option<Instant>,
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
        let Session {
            adapter,
            destination,
            events,
            door,
            waiter,
            progress,
            journal,
            desk,
            file_server,
            is_taken_over,
            is_held,
        } = session;
        let is_refused = record
            .as_ref()
            .and_then(DestinationStateFile::record)
            .is_some_and(|it| it.ownership == DestinationOwnership::Refused);
        let need = match &record {
            Some(record) if runs && farewell::was_started(record) => DriverNeed::Over,
            _ => DriverNeed::Unsaid,
        };
        let manner = adapter.manner();
        // Of a snapshot nothing is given.
        let at_source = if is_taken_over && manner.restoring == Restoring::IsSaid {
            AtSource::Stopped
        } else {
            AtSource::Runs
        };
        let mut serving = Self {
            manner,
            destination,
            events,
            door,
            waiter,
            progress,
            journal,
            desk,
            file_server,
            served,
            place,
            record,
            vmm: Party::new("the VMM", Arc::clone(&adapter)),
            driver: Party::new("the driver", Arc::new(Native)),
            adapter,
            connections: 0,
            need,
            is_held,
            state: None,
            runs,
            has_all: false,
            at_source,
            not_here: None,
            ending: None,
            fails_at: None,
            signals: 0,
        };
        if is_refused {
            serving.refused();
        }
        serving
    }

    /// Serves to the end.
    pub(super) fn run(mut self) -> Result<Report, Failure> {
        if self.is_held {
            self.need = DriverNeed::Said;
            let name = &self.served.name;
            self.progress.say(&format!(
                "waiting for the process that drives the guest {name:?}; the source is connected \
                 to when it is there"
            ));
        }
        let outcome = self.until_the_end();
        let is_cared_for = match outcome {
            Ok(Outcome::Abandoned | Outcome::Failed | Outcome::NotHere) | Err(_) => self.has_all,
            Ok(_) => true,
        };
        if !is_cared_for {
            self.adapter.forsake(self.served.vmm.as_fd(), &self.progress);
            self.leave_snapshot();
        }
        let outcome = outcome?;
        let stats = self.destination.stats();
        let Self { journal, progress, mut place, record, desk, file_server, .. } = self;
        // Before the destination, which would turn it away.
        drop(file_server);
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
            if self.fails_at.is_some_and(|at| Instant::now() >= at) {
                return Ok(Outcome::Failed);
            }
            if let Some(place) = &mut self.place {
                place.look(|line| self.progress.say(line));
            }
            let stats = self.destination.stats();
            self.progress.update(stats.pages_complete, stats.pages_total);
            self.progress.count(&stats);
            let is_busy = !self.door.news.is_empty();
            let interval = match self.fails_at {
                _ if is_busy => Duration::ZERO,
                Some(_) => DEATH_LOOK,
                None => self.progress.interval(),
            };
            let came = self.waiter.wait(interval).map_err(Failure::of("wait for the session"))?;
            if came > 0
                && let Some(outcome) = self.signalled(came)
            {
                return Ok(outcome);
            }
        }
    }

    /// The outcome, once whoever is to know it does, or has had its time.
    fn ended(&mut self) -> Option<Outcome> {
        let mut ending = self.ending.take()?;
        ending.tell_vmm(&mut self.vmm, &self.progress);
        if self.is_driven() {
            ending.tell_driver(&mut self.driver, self.need, &self.progress);
        }
        if ending.is_known() {
            return Some(ending.outcome);
        }
        self.ending = Some(ending);
        None
    }

    fn end(&mut self, outcome: Outcome, last_word: Word) {
        farewell::note_end(self.record.as_ref(), outcome, &self.progress);
        self.ending = Some(Ending::new(outcome, last_word, self.served.driven_by));
    }

    fn is_driven(&self) -> bool {
        self.served.driven_by == DrivenBy::Driver
    }

    /// Says something to the VMM, and to the driver if it has another one.
    fn tell(&mut self, word: &Word) {
        self.vmm.tell(word, &self.progress);
        if self.is_driven() {
            let is_heard = self.driver.tell(word, &self.progress);
            self.expect_driver(is_heard);
        }
    }

    /// A driver is there.
    fn release(&mut self) {
        if !std::mem::take(&mut self.is_held) {
            return;
        }
        // An operator may have done it before.
        if let Err(error) = self.destination.recover(None) {
            tracing::info!(%error, "the source is connected to already");
        }
    }

    /// Says that a driver is waited for, if there is none that hears.
    fn expect_driver(&mut self, is_heard: bool) {
        if !is_heard && self.need == DriverNeed::Unsaid {
            self.need = DriverNeed::Said;
            let name = &self.served.name;
            self.progress.say(&format!("waiting for the process that drives the guest {name:?}"));
        }
    }

    fn tell_state(&mut self) {
        let Some(state) = &self.state else { return };
        if self.served.driven_by == DrivenBy::Vmm {
            self.vmm.tell_state(state, &self.progress);
            return;
        }
        let is_heard = self.driver.tell_state(state, &self.progress);
        self.expect_driver(is_heard);
    }

    fn take_event(&mut self, event: DestinationEvent) {
        if let DestinationEvent::Attached(session) = &event {
            self.desk.name(&session.to_string());
        }
        self.desk.note(&event);
        match event {
            DestinationEvent::Attached(session) => self.attached(&session.to_string()),
            DestinationEvent::Disconnected => {
                self.note("disconnected", "the source is away; waiting for it to come back");
            }
            DestinationEvent::Paused => {
                self.note("paused", "paused at the control socket; recover goes on");
            }
            // Its device state follows.
            DestinationEvent::SourceStopped | DestinationEvent::Section(_)
                if self.manner.restoring == Restoring::IsSaid =>
            {
                self.at_source = AtSource::Stopped;
            }
            DestinationEvent::State(_) if self.manner.restoring == Restoring::IsNotOurs => {
                self.take_ready("ready");
            }
            DestinationEvent::State(state) => {
                self.note("state", "the device state has arrived");
                self.at_source = AtSource::Stopped;
                self.state = Some(state);
                self.tell_state();
            }
            DestinationEvent::Run => {
                let line = match self.manner.restoring {
                    Restoring::IsSaid => "the guest runs here",
                    Restoring::IsNotOurs => "missing pages are brought from here on",
                };
                self.note("run", line);
                self.runs = true;
                if !self.is_driven() {
                    self.state = None;
                }
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
            DestinationEvent::Refused => self.refused(),
            DestinationEvent::Fenced => self.not_here("an operator has fenced this side"),
            DestinationEvent::Ended(reason) => {
                self.not_here(&format!("the source has ended the session: {reason}"));
            }
            DestinationEvent::TurnedAway(reason) => self.turned_away(&reason),
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

    fn attached(&mut self, session: &str) {
        // Perhaps because an operator wanted it, who may also pause it from now on.
        self.is_held = false;
        self.journal.attached(session);
        self.journal.note("attached");
        self.progress.count(&self.destination.stats());
        self.progress.attached();
    }

    /// The wrong source, or one that was started again and may have other memory now. The right
    /// one may be there later, for who waits for it.
    fn turned_away(&mut self, reason: &str) {
        let line = format!("the source turns this side away: {reason}");
        self.note("turned_away", &line);
        self.end_if_it_cannot_go_on(&line);
    }

    fn note(&mut self, event: &'static str, line: &str) {
        self.journal.note(event);
        self.progress.say(line);
    }

    fn fail(&mut self, reason: &str) {
        self.note("failed", reason);
        self.tell(&Word::Failed { reason: reason.to_owned() });
        self.end_if_it_cannot_go_on(reason);
    }

    /// Pages may fail to be placed because the VMM has just ended, which is no failure.
    fn end_if_it_cannot_go_on(&mut self, reason: &str) {
        if self.manner.failure == OnFailure::End {
            self.journal.failed(reason);
            self.fails_at.get_or_insert_with(|| Instant::now() + DEATH_SHOWS);
        }
    }

    /// The session is over, and the guest is elsewhere, as the source knows.
    fn not_here(&mut self, reason: &str) {
        if self.ending.as_ref().is_some_and(Ending::waits_for_source) {
            return self.source_knows();
        }
        self.note("not_here", &format!("the guest does not run here: {reason}"));
        if self.manner.failure == OnFailure::End {
            return self.end_if_it_cannot_go_on(reason);
        }
        self.not_here = Some(reason.to_owned());
        let word = Word::NotHere { reason: reason.to_owned() };
        if self.runs {
            // It waits for its pages: nobody may let go of its memory while it is there.
            self.tell(&word);
        } else {
            self.end(Outcome::NotHere, word);
        }
    }

    fn signalled(&mut self, came: usize) -> Option<Outcome> {
        self.signals += came;
        if let Some(ending) = self.ending.as_ref().and_then(Ending::refusal) {
            return self.signalled_at_the_end(ending);
        }
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
            let line = format!(
                "a second signal, and {missing} of {} pages are missing: {}",
                stats.pages_total, self.manner.after_the_end
            );
            self.note("signal", &line);
            return Some(Outcome::Abandoned);
        }
        self.note(
            "signal",
            &format!(
                "not stopping: {missing} of {} pages are missing; after a second signal {}",
                stats.pages_total, self.manner.after_the_end
            ),
        );
        None
    }
}
