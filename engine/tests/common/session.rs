//! Both sides of a migration over a real socket, and waiting for their events.

use super::{Content, Kind, Memory, PATIENCE};
use afterimage::{
    Address, Checksums, Destination, DestinationEvent, DestinationOptions, DestinationStats,
    DiscardNotice, Endpoint, Events, Listener, NoEvent, Plaintext, Source, SourceEvent,
    SourceOptions, StateSection,
};
use std::cell::RefCell;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Unix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listening {
    Source,
    Destination,
}

/// Events of one side. Those that were not waited for yet are kept.
pub struct EventLog<T> {
    events: Events<T>,
    seen: RefCell<Vec<T>>,
}

impl<T: Debug + Clone> EventLog<T> {
    pub fn new(events: Events<T>) -> Self {
        Self { events, seen: RefCell::default() }
    }

    /// Takes the first event that is wanted, whether it has come already or is to come.
    pub fn wait(&self, what: &str, dump: impl Fn() -> String, is_wanted: impl Fn(&T) -> bool) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(event) = self.take(&is_wanted) {
                return event;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.next_timeout(left) {
                Ok(event) => self.seen.borrow_mut().push(event),
                Err(reason) => panic!(
                    "waiting for {what}: {reason}; other events: {:?}\n{}",
                    self.seen.borrow(),
                    dump()
                ),
            }
        }
    }

    fn take(&self, is_wanted: &impl Fn(&T) -> bool) -> Option<T> {
        let mut seen = self.seen.borrow_mut();
        let at = seen.iter().position(is_wanted)?;
        Some(seen.remove(at))
    }

    /// What has come and was not waited for.
    pub fn rest(&self) -> Vec<T> {
        while let Some(event) = self.events.try_next() {
            self.seen.borrow_mut().push(event);
        }
        self.seen.borrow().clone()
    }

    /// Waits until no event can come any more, and returns what has not been waited for.
    pub fn until_end(&self) -> Vec<T> {
        loop {
            match self.events.next_timeout(PATIENCE) {
                Ok(event) => self.seen.borrow_mut().push(event),
                Err(NoEvent::Ended) => return self.seen.borrow().clone(),
                Err(other) => panic!("waiting for the last event: {other}"),
            }
        }
    }

    pub const fn events(&self) -> &Events<T> {
        &self.events
    }
}

/// What a migration is to be like.
#[derive(Clone, Debug)]
pub struct Setup {
    pub kinds: Vec<(Kind, u64)>,
    pub content: Content,
    pub seed: u64,
    pub streams: u16,
    pub checksums: Checksums,
    pub transport: Transport,
    pub listening: Listening,
    pub discards: DiscardNotice,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            kinds: vec![(Kind::Anonymous, 8 << 20)],
            content: Content::Dense,
            seed: 1,
            streams: 1,
            checksums: Checksums::Off,
            transport: Transport::Tcp,
            listening: Listening::Source,
            discards: DiscardNotice::Called,
        }
    }
}

/// A migration under way: both sides, and the guest's memory on both.
pub struct Pair {
    // Dropped in this order: the engine before the memory that it serves.
    pub source: Source,
    pub destination: Destination,
    pub at_source: EventLog<SourceEvent>,
    pub at_destination: EventLog<DestinationEvent>,
    pub old: Arc<Memory>,
    pub new: Arc<Memory>,
    pub setup: Setup,
    _directory: Option<tempfile::TempDir>,
}

pub fn source_options(setup: &Setup) -> SourceOptions {
    let mut options = SourceOptions::default();
    options.streams = setup.streams;
    options.checksums = setup.checksums;
    // A machine that builds and tests at once leaves a thread waiting for longer than a
    // second now and then.
    options.silence = std::time::Duration::from_secs(4);
    options
}

pub fn destination_options(setup: &Setup) -> DestinationOptions {
    let mut options = DestinationOptions::default();
    options.checksums = setup.checksums;
    options.silence = std::time::Duration::from_secs(4);
    options
}

/// A listener on a free port of loopback.
pub fn listen() -> Listener {
    Listener::bind(&"tcp:127.0.0.1:0".parse().expect("an address"), Plaintext::LoopbackOnly)
        .expect("a free port")
}

pub fn listen_at(address: &Address) -> Listener {
    Listener::bind(address, Plaintext::LoopbackOnly).expect("a free address")
}

/// A listener and the address to connect to, with the directory that a Unix socket is in.
pub fn listener(transport: Transport) -> (Listener, Address, Option<tempfile::TempDir>) {
    let (listener, directory) = match transport {
        Transport::Tcp => (listen(), None),
        Transport::Unix => {
            let directory = tempfile::tempdir().expect("a directory");
            let path = directory.path().join("socket");
            let listener = Listener::bind(&Address::Unix(path), Plaintext::LoopbackOnly);
            (listener.expect("a socket"), Some(directory))
        }
    };
    let address = listener.address().clone();
    (listener, address, directory)
}

impl Pair {
    /// Starts both sides; `None` where the machine lacks huge pages for it.
    pub fn start(setup: &Setup) -> Option<Self> {
        Self::start_with(setup, |_, _| (), |address| address)
    }

    /// The same after a change of the options, and with the connecting side sent to another
    /// address than the listening one's: a proxy.
    pub fn start_with(
        setup: &Setup,
        change: impl FnOnce(&mut SourceOptions, &mut DestinationOptions),
        detour: impl FnOnce(Address) -> Address,
    ) -> Option<Self> {
        Self::start_on(setup, |_, source, destination| change(source, destination), detour)
    }

    /// The same where a change needs to know the guest's memory at the source.
    pub fn start_on(
        setup: &Setup,
        change: impl FnOnce(&Arc<Memory>, &mut SourceOptions, &mut DestinationOptions),
        detour: impl FnOnce(Address) -> Address,
    ) -> Option<Self> {
        let old = Memory::try_new(&setup.kinds)?;
        let new = Memory::try_new(&setup.kinds)?;
        old.fill(setup.seed, setup.content);
        let (listener, address, directory) = listener(setup.transport);
        let listen = Endpoint::Listen(listener);
        let connect = Endpoint::Connect(detour(address));
        let (at_source, at_destination) = match setup.listening {
            Listening::Source => (listen, connect),
            Listening::Destination => (connect, listen),
        };
        let (mut for_source, mut for_destination) =
            (source_options(setup), destination_options(setup));
        change(&old, &mut for_source, &mut for_destination);
        let (source, source_events) =
            Source::start(old.as_source(), at_source, for_source).expect("a source");
        let memory = new.register(setup.discards).expect("registered memory");
        let (destination, destination_events) =
            Destination::start(memory, at_destination, for_destination).expect("a destination");
        Some(Self {
            source,
            destination,
            at_source: EventLog::new(source_events),
            at_destination: EventLog::new(destination_events),
            old,
            new,
            setup: setup.clone(),
            _directory: directory,
        })
    }

    pub fn dump(&self) -> String {
        format!(
            "source: {:?}, events {:?}\ndestination: {:?}, events {:?}",
            self.source.stats(),
            self.at_source.rest(),
            self.destination.stats(),
            self.at_destination.rest(),
        )
    }

    pub fn wait_source(&self, wanted: &SourceEvent) {
        let what = format!("{wanted:?} at the source");
        self.at_source.wait(&what, || self.dump(), |event| event == wanted);
    }

    pub fn wait_destination(&self, wanted: &DestinationEvent) {
        let what = format!("{wanted:?} at the destination");
        self.at_destination.wait(&what, || self.dump(), |event| event == wanted);
    }

    pub fn wait_state(&self) -> Vec<StateSection> {
        let event = self.at_destination.wait(
            "device state",
            || self.dump(),
            |event| matches!(event, DestinationEvent::State(_)),
        );
        let DestinationEvent::State(sections) = event else { unreachable!("just matched") };
        sections
    }

    /// From the switchover until the destination is ready.
    pub fn prepare(&self, state: &[StateSection]) {
        self.source.switch_over(state.to_vec()).expect("may switch over");
        assert_eq!(self.wait_state(), state, "device state arrives as it was sent");
        self.destination.ready().expect("may be ready");
    }

    /// From the switchover until the guest may run at the destination.
    pub fn switch(&self, state: &[StateSection]) {
        self.prepare(state);
        self.wait_destination(&DestinationEvent::Run);
    }

    /// Until both sides know that everything has arrived.
    pub fn finish(&self) {
        self.wait_destination(&DestinationEvent::AllArrived);
        self.wait_destination(&DestinationEvent::Finished);
        self.wait_source(&SourceEvent::Finished);
    }

    /// Every page was counted once.
    pub fn check_counts(&self) -> DestinationStats {
        let stats = self.destination.stats();
        assert_eq!(stats.pages_total, self.new.pages());
        assert_eq!(stats.pages_complete, stats.pages_total, "{}", self.dump());
        let once = stats.pages_requested
            + stats.pages_background
            + stats.pages_precopy
            + stats.pages_zero
            + stats.pages_discarded;
        assert_eq!(once, stats.pages_total, "each page is counted once\n{}", self.dump());
        let at_source = self.source.stats();
        assert_eq!(at_source.pages_total, stats.pages_total);
        assert_eq!(at_source.pages_acknowledged, stats.pages_total, "{}", self.dump());
        stats
    }

    pub fn check_content(&self) {
        self.new.check(self.setup.seed, self.setup.content);
    }
}
