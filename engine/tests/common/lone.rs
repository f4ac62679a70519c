//! One side of a migration whose other side is in another process.

use super::{EventLog, Memory, Setup, session};
use afterimage::{
    Destination, DestinationEvent, Endpoint, Source, SourceEvent, SourceOptions, StateSection,
};
use std::sync::Arc;

/// A source, and the guest's memory there.
pub struct LoneSource {
    // Dropped in this order: the engine before the memory that it serves.
    pub source: Source,
    pub events: EventLog<SourceEvent>,
    pub old: Arc<Memory>,
}

impl LoneSource {
    pub fn start(
        setup: &Setup,
        endpoint: Endpoint,
        change: impl FnOnce(&mut SourceOptions),
    ) -> Self {
        let old = Memory::new(&setup.kinds);
        old.fill(setup.seed, setup.content);
        let mut options = session::source_options(setup);
        change(&mut options);
        let (source, events) = Source::start(old.as_source(), endpoint, options).expect("a source");
        Self { source, events: EventLog::new(events), old }
    }

    pub fn dump(&self) -> String {
        format!("source: {:?}, events {:?}", self.source.stats(), self.events.rest())
    }

    pub fn switch_over(&self, state: Vec<StateSection>) {
        self.source.switch_over(state).expect("may switch over");
    }

    pub fn wait(&self, wanted: &SourceEvent) {
        self.events.wait(&format!("{wanted:?}"), || self.dump(), |event| event == wanted);
    }
}

/// A destination, and the guest's memory there.
pub struct LoneDestination {
    // In this order, as above.
    pub destination: Destination,
    pub events: EventLog<DestinationEvent>,
    pub new: Arc<Memory>,
}

impl LoneDestination {
    pub fn start(setup: &Setup, endpoint: Endpoint) -> Self {
        let new = Memory::new(&setup.kinds);
        let memory = new.register(setup.discards).expect("registered memory");
        let options = session::destination_options(setup);
        let (destination, events) =
            Destination::start(memory, endpoint, options).expect("a destination");
        Self { destination, events: EventLog::new(events), new }
    }

    pub fn dump(&self) -> String {
        format!("destination: {:?}, events {:?}", self.destination.stats(), self.events.rest())
    }

    pub fn wait(&self, wanted: &DestinationEvent) {
        self.events.wait(&format!("{wanted:?}"), || self.dump(), |event| event == wanted);
    }

    /// Until the guest may run here.
    pub fn wait_to_run(&self) {
        let is_state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
        self.events.wait("device state", || self.dump(), is_state);
        self.destination.ready().expect("may be ready");
        self.wait(&DestinationEvent::Run);
    }
}
