//! A destination that is attacked.

use super::peer::HandSource;
use super::{EventLog, Kind, Memory, Setup, session};
use afterimage::{
    Address, Destination, DestinationEvent, DiscardNotice, Endpoint, GuestAddress, GuestLayout,
    SessionId, Source, SourceEvent,
};
use afterimage_protocol::layout::{Backing, PageSize, Region};
use afterimage_protocol::wire::Epoch;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
/// The session that it belongs to.
pub const SESSION: SessionId = SessionId([6; 16]);

/// A destination that listens.
pub struct Attacked {
    pub destination: Destination,
    pub events: EventLog<DestinationEvent>,
    pub new: Arc<Memory>,
    pub setup: Setup,
    pub address: Address,
    pub layout: GuestLayout,
    pub epoch: u32,
}

pub fn layout_of(length: u64) -> GuestLayout {
    let region = Region::new(GuestAddress(0), length, PageSize::KIB_4, Backing::Anonymous);
    GuestLayout::new(vec![region]).expect("a layout")
}

impl Attacked {
    pub fn start(kind: Kind) -> Self {
        Self::start_with(kind, DiscardNotice::Called)
    }

    pub fn start_with(kind: Kind, discards: DiscardNotice) -> Self {
        let setup = Setup { kinds: vec![(kind, 4 * MIB)], streams: 1, ..Setup::default() };
        let new = Memory::new(&setup.kinds);
        let memory = new.register(discards).expect("registered memory");
        let listener = session::listen();
        let address = listener.address().clone();
        let options = session::destination_options(&setup);
        let (destination, events) =
            Destination::start(memory, Endpoint::Listen(listener), options).expect("started");
        let (events, layout) = (EventLog::new(events), layout_of(4 * MIB));
        Self { destination, events, new, setup, address, layout, epoch: 0 }
    }

    /// A source of the right session that has begun, by hand.
    pub fn attach(&mut self) -> HandSource {
        self.epoch += 1;
        let mut hand = HandSource::greet(&self.address, SESSION, self.epoch);
        hand.begin(&self.layout);
        hand
    }

    /// A proper source of the session comes and completes the migration.
    pub fn gets_served_properly(self) {
        let Self { destination, events, new, setup, address, epoch, .. } = self;
        let old = Memory::new(&setup.kinds);
        old.fill(setup.seed, setup.content);
        let mut options = session::source_options(&setup);
        options.record.session = SESSION;
        options.record.epoch = Epoch(epoch + 10);
        let (source, at_source) =
            Source::start(old.as_source(), Endpoint::Connect(address), options).expect("a source");
        let at_source = EventLog::new(at_source);
        let dump =
            || format!("{:?} {:?} {:?}", source.stats(), destination.stats(), at_source.rest());
        source.switch_over(vec![]).expect("may switch over");
        let state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
        events.wait("device state", dump, state);
        destination.ready().expect("may be ready");
        events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
        at_source.wait("the end", dump, |event| *event == SourceEvent::Finished);
        new.check(setup.seed, setup.content);
    }
}
