//! A source for others to misuse.

use super::{EventLog, Kind, Memory, Setup, session};
use afterimage::{
    Address, Destination, DestinationEvent, Endpoint, Source, SourceEvent, SourceOptions,
};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A source that listens, and what a proper destination needs.
pub struct Victim {
    pub source: Source,
    pub at_source: EventLog<SourceEvent>,
    pub old: Arc<Memory>,
    pub setup: Setup,
    pub address: Address,
}

impl Victim {
    pub fn start(change: impl FnOnce(&mut SourceOptions)) -> Self {
        let setup =
            Setup { kinds: vec![(Kind::Anonymous, 4 * MIB)], streams: 2, ..Setup::default() };
        let old = Memory::new(&setup.kinds);
        old.fill(setup.seed, setup.content);
        let listener = session::listen();
        let address = listener.address().clone();
        let mut options = session::source_options(&setup);
        change(&mut options);
        let (source, events) =
            Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
        Self { source, at_source: EventLog::new(events), old, setup, address }
    }

    /// A proper destination comes, and gets everything.
    pub fn serves_properly(self) {
        let Self { source, at_source, old, setup, address } = self;
        let new = Memory::new(&setup.kinds);
        let memory = new.register(setup.discards).expect("registered memory");
        let options = session::destination_options(&setup);
        let (destination, events) =
            Destination::start(memory, Endpoint::Connect(address), options).expect("a destination");
        let at_destination = EventLog::new(events);
        let dump = || format!("{:?} {:?}", source.stats(), destination.stats());
        // It may have been done for a stranger.
        let _ = source.switch_over(vec![]);
        let state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
        at_destination.wait("device state", dump, state);
        destination.ready().expect("may be ready");
        at_destination.wait("the end", dump, |event| *event == DestinationEvent::Finished);
        at_source.wait("the end", dump, |event| *event == SourceEvent::Finished);
        new.check(setup.seed, setup.content);
        old.check(setup.seed, setup.content);
    }
}
