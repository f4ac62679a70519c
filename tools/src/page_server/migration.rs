//! Serving one destination until it has everything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::{Events, Source, SourceEvent, SourceOwnership};

use super::failure::Failure;
use super::progress::Progress;
use super::report::{Counts, Journal, Outcome, Report};
use super::survival::{IsInFiles, Survival};
use super::wait::Waiter;
use crate::control::Desk;

/// How long a destination that has everything, and may not know it, is waited for. It comes
/// back within a second if it lives.
const FAREWELL: Duration = Duration::from_secs(10);

/// How long a destination that has everything can come back to hear so, if its connection was
/// lost in the meantime, for instance while a record was flushed to a slow disk.
const GRACE: Duration = Duration::from_millis(1200);

/// Where the guest came from, and so what stopping early would lose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Files, which stay.
    Files,
    /// A VMM that has exited: this process has the only copy, and the keeper if there is one.
    HandedOver,
}

pub(super) struct Migration {
    /// Also what is driven from the control socket.
    pub(super) source: Arc<Source>,
    pub(super) events: Events<SourceEvent>,
    pub(super) waiter: Waiter,
    pub(super) progress: Progress,
    pub(super) journal: Journal,
    pub(super) desk: Desk,
    pub(super) origin: Origin,
    pub(super) survival: Survival,
    /// What was recorded before this process.
    pub(super) ownership: SourceOwnership,
}

impl Migration {
    pub(super) fn run(mut self) -> Result<Report, Failure> {
        self.waiter.watch(&self.events).map_err(Failure::of("wait for the session"))?;
        let (mut signals, mut unreadable) = (0, 0);
        let mut is_given = self.ownership != SourceOwnership::Owner;
        let is_farewell = self.ownership == SourceOwnership::Finished;
        let farewell = is_farewell.then(|| Instant::now() + FAREWELL);
        loop {
            while let Some(event) = self.events.try_next() {
                self.desk.note(&event);
                is_given |= matches!(event, SourceEvent::Given | SourceEvent::Running);
                is_given &= event != SourceEvent::Refused;
                if let Some(outcome) = self.take(&event) {
                    return Ok(self.close(outcome));
                }
            }
            if farewell.is_some_and(|end| end <= Instant::now()) {
                self.progress.say("the destination has everything, and has not come back");
                self.journal.pages = 0;
                return Ok(self.close(Outcome::Finished));
            }
            if let Some(holding) = &mut self.survival.holding {
                holding.look(&self.progress);
            }
            let stats = self.source.stats();
            self.progress.update(stats.pages_acknowledged, stats.pages_total);
            if stats.pages_unreadable > 0 && unreadable == 0 {
                unreadable = stats.pages_unreadable;
                self.progress.say(
                    "some pages cannot be read here (was a file cut short?); whoever touches one \
                     at the destination waits, and the migration cannot finish",
                );
            }
            let interval = self.progress.interval();
            let came = self.waiter.wait(interval).map_err(Failure::of("wait for the session"))?;
            signals += came;
            match (came, signals) {
                (0, _) => {}
                _ if is_farewell => return Ok(self.close(Outcome::Stopped)),
                (_, 1) => self.first_signal(is_given),
                _ if self.has_successor() => {
                    self.progress.say(
                        "a second signal: stopped; the destination waits, and the same command \
                         line goes on",
                    );
                    return Ok(self.close(Outcome::Stopped));
                }
                _ => {
                    self.progress.say("a second signal: what has not arrived is abandoned");
                    return Ok(self.close(Outcome::Abandoned));
                }
            }
        }
    }

    /// The outcome, if this event is the last.
    fn take(&mut self, event: &SourceEvent) -> Option<Outcome> {
        let (name, line, outcome) = match event {
            SourceEvent::Attached(_) => ("attached", "a destination is attached", None),
            SourceEvent::Disconnected => {
                ("disconnected", "the destination is away; waiting for it to come back", None)
            }
            SourceEvent::Paused => {
                ("paused", "paused at the control socket; recover goes on", None)
            }
            SourceEvent::Ready => ("ready", "the destination has restored the guest", None),
            SourceEvent::Given => ("given", "the guest is given to the destination", None),
            SourceEvent::Running => ("running", "the guest runs at the destination", None),
            SourceEvent::Finished => {
                let line = "every page has arrived; the guest is the destination's";
                ("finished", line, Some(Outcome::Finished))
            }
            SourceEvent::Reclaimed => {
                let line =
                    "stopped: the guest is this side's, as of the switchover; nothing is lost";
                ("reclaimed", line, Some(Outcome::Stopped))
            }
            SourceEvent::Lost { first, count } => {
                self.journal.note("lost", None);
                self.progress.say(&format!(
                    "the destination lacks {count} pages, from page {first} on, that were freed \
                     here: bring back the memory that the guest ran in; it is refused until then"
                ));
                return None;
            }
            SourceEvent::Refused => {
                let line = "the destination will not run the guest (see what it says there); the next \
                            one may have it";
                ("refused", line, None)
            }
            SourceEvent::ReclaimDenied => {
                ("reclaim_denied", "the destination runs the guest already and keeps it", None)
            }
            SourceEvent::PersistFailed => (
                "persist_failed",
                "warning: the state file could not be written; what needed it did not happen, and \
                 is tried again with the next connection",
                None,
            ),
            _ => return None,
        };
        self.journal.note(name, None);
        self.progress.say(line);
        outcome
    }

    /// Stops where nothing is lost by it, else says what would be.
    fn first_signal(&mut self, is_given: bool) {
        self.journal.note("signal", None);
        let pages = self.pages();
        let second = if self.has_successor() {
            "stops this process, and the same command line goes on"
        } else if is_given || self.origin == Origin::Files {
            "abandons them"
        } else {
            "abandons it"
        };
        if self.origin == Origin::Files && !is_given && self.source.reclaim().is_ok() {
            self.progress.say("stopping: taking the guest back");
        } else if is_given || self.origin == Origin::Files {
            self.progress.say(&format!(
                "not stopping: the guest is at the destination, and {} of its {} pages are \
                 missing there; a second signal {second}",
                pages.pages_missing, pages.pages_total
            ));
        } else {
            self.progress.say(&format!(
                "not stopping: this process has the only copy of the stopped guest{}, {} pages; a \
                 second signal {second}",
                if self.has_successor() { " beside the keeper" } else { "" },
                pages.pages_total
            ));
        }
    }

    fn pages(&self) -> Counts {
        Counts::of(&self.source.stats(), self.journal.pages)
    }

    /// Whether page-server, started again, would go on.
    fn has_successor(&self) -> bool {
        let is_in_files = match self.origin {
            Origin::Files => IsInFiles::Yes,
            Origin::HandedOver => IsInFiles::No,
        };
        self.survival.has_successor(is_in_files)
    }

    fn close(self, outcome: Outcome) -> Report {
        let pages = self.pages();
        let Self { source, events, mut waiter, journal, desk, mut survival, progress, .. } = self;
        let until = Instant::now() + GRACE;
        // Where nothing is recorded, nothing is flushed.
        let mut is_waiting = outcome == Outcome::Finished && survival.state_file().is_some();
        while is_waiting && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            // A signal ends it, and so does what makes waiting impossible.
            is_waiting = waiter.wait(left).is_ok_and(|signals| signals == 0);
            while let Some(event) = events.try_next() {
                desk.note(&event);
            }
        }
        desk.detach();
        // Waits until the destination has heard that it is over.
        drop(source);
        if outcome == Outcome::Finished {
            survival.said_bye(&progress);
        }
        journal.close(outcome, pages, Vec::new())
    }
}
