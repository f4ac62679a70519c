//! Serving many destinations until a signal.

use std::collections::BTreeMap;
use std::sync::Arc;

use afterimage::{Events, Incarnation, SnapshotServer, SourceEvent};

use super::Parts;
use super::failure::Failure;
use super::progress::Progress;
use super::report::{Counts, DestinationReport, Journal, Outcome, Report};
use super::wait::Waiter;
use crate::control::{Desk, Happening};

/// Destinations that are remembered for the report; beyond, those that are done go first.
const MAX_REMEMBERED: usize = 4096;

type Event = (Incarnation, SourceEvent);

pub(super) struct Snapshot {
    /// Also what is driven from the control socket.
    server: Arc<SnapshotServer>,
    events: Events<Event>,
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
    desk: Desk,
    destinations: BTreeMap<Incarnation, Known>,
    is_unreadable: bool,
}

/// What is known of a destination, which the server forgets when it needs its place.
struct Known {
    presence: Presence,
    pages: Counts,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    Connected,
    Away,
    Done,
}

impl Snapshot {
    pub(super) fn new(server: Arc<SnapshotServer>, events: Events<Event>, parts: Parts) -> Self {
        let Parts { waiter, progress, journal, desk } = parts;
        let (destinations, is_unreadable) = (BTreeMap::new(), false);
        Self { server, events, waiter, progress, journal, desk, destinations, is_unreadable }
    }

    pub(super) fn run(mut self) -> Result<Report, Failure> {
        self.waiter.watch(&self.events).map_err(Failure::of("wait for destinations"))?;
        let mut signals = 0;
        loop {
            while let Some((name, event)) = self.events.try_next() {
                self.take(name, &event);
            }
            self.refresh();
            if signals > 0 && self.owed().next().is_none() {
                return Ok(self.close(Outcome::Finished));
            }
            let interval = self.progress.interval();
            let came = self.waiter.wait(interval).map_err(Failure::of("wait for destinations"))?;
            let is_first = signals == 0 && came > 0;
            signals += came;
            if signals > 1 {
                self.refresh();
                if self.owed().next().is_none() {
                    return Ok(self.close(Outcome::Finished));
                }
                self.progress.say("a second signal: what has not arrived is abandoned");
                return Ok(self.close(Outcome::Abandoned));
            }
            if is_first {
                self.first_signal();
            }
        }
    }

    fn take(&mut self, name: Incarnation, event: &SourceEvent) {
        self.desk.note(Happening::of_snapshot(name, event));
        let (word, line, presence) = match event {
            SourceEvent::Attached(_) => ("attached", "is attached", Presence::Connected),
            SourceEvent::Disconnected => ("disconnected", "is away", Presence::Away),
            SourceEvent::Finished => ("finished", "has every page", Presence::Done),
            SourceEvent::Left => ("left", "needs no more: its VM has ended", Presence::Done),
            _ => return,
        };
        let known = self.destinations.entry(name);
        let known = known.or_insert(Known { presence, pages: Counts::default() });
        if known.presence == Presence::Done && presence != Presence::Connected {
            return;
        }
        known.presence = presence;
        self.journal.note(word, Some(name.to_string()));
        self.progress.say(&format!("destination {name} {line}"));
        if self.destinations.len() > MAX_REMEMBERED {
            self.destinations.retain(|_, it| it.presence != Presence::Done);
        }
        if self.destinations.len() > MAX_REMEMBERED {
            // Far more than can be connected: they have died without a word.
            self.destinations.retain(|_, it| it.presence == Presence::Connected);
        }
    }

    /// Learns what has been sent.
    fn refresh(&mut self) {
        let (mut arrived, mut total) = (0, 0);
        for (name, stats) in self.server.stats().destinations {
            let Some(known) = self.destinations.get_mut(&name) else { continue };
            known.pages = Counts::of(&stats, self.journal.pages);
            if known.presence == Presence::Connected {
                total += known.pages.pages_total;
                arrived += known.pages.pages_total - known.pages.pages_missing;
            }
            if stats.pages_unreadable > 0 && !self.is_unreadable {
                self.is_unreadable = true;
                self.progress.say(
                    "some pages cannot be read here (was a file cut short?); whoever touches one \
                     at a destination waits",
                );
            }
        }
        self.progress.update(arrived, total);
    }

    /// Destinations that lack pages, whether connected or away.
    fn owed(&self) -> impl Iterator<Item = &Known> {
        self.destinations.values().filter(|it| it.presence != Presence::Done)
    }

    fn first_signal(&mut self) {
        self.journal.note("signal", None);
        self.refresh();
        let missing: u64 = self.owed().map(|it| it.pages.pages_missing).sum();
        let count = self.owed().count();
        if count > 0 {
            let away = self.owed().filter(|it| it.presence == Presence::Away).count();
            self.progress.say(&format!(
                "not stopping: destinations that lack pages: {count} ({away} of them away), \
                 {missing} pages; a second signal abandons them"
            ));
        }
    }

    fn close(mut self, outcome: Outcome) -> Report {
        self.refresh();
        let destinations = self.destinations.iter().map(|(name, known)| DestinationReport {
            incarnation: name.to_string(),
            state: match known.presence {
                Presence::Connected => "connected",
                Presence::Away => "away",
                Presence::Done => "done",
            },
            pages: known.pages,
        });
        let destinations = destinations.collect();
        let pages = Counts::sum(self.destinations.values().map(|known| known.pages));
        self.desk.detach();
        self.journal.close(outcome, pages, destinations)
    }
}
