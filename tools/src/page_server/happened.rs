//! What has happened in a run, and when, as reports show it.

use std::time::Instant;

use serde::Serialize;

/// Events that are reported; a connection that breaks for days must not fill memory.
const MAX_EVENTS: usize = 256;

/// One event.
#[derive(Debug, Serialize)]
pub(crate) struct EventReport {
    event: &'static str,
    at_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<String>,
}

/// The first events since the run began.
#[derive(Debug)]
pub(crate) struct Happened {
    begun: Instant,
    events: Vec<EventReport>,
}

impl Happened {
    pub(crate) fn new() -> Self {
        Self { begun: Instant::now(), events: Vec::new() }
    }

    /// How long the run has taken so far.
    pub(crate) fn elapsed_us(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    /// Notes an event, perhaps of one of several destinations.
    pub(crate) fn note(&mut self, event: &'static str, destination: Option<String>) {
        if self.events.len() < MAX_EVENTS {
            self.events.push(EventReport { event, at_us: self.elapsed_us(), destination });
        }
    }

    pub(crate) fn into_events(self) -> Vec<EventReport> {
        self.events
    }
}
