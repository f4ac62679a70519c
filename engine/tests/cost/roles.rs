//! The two sides, each in a process of its own, and how they talk to the tracer: by a system
//! call that means nothing to anybody else.

use super::common::children::argument;
use super::common::{self, Content, EventLog, Kind, Memory, Setup};
use afterimage::{
    Destination, DestinationEvent, DiscardNotice, Endpoint, Source, SourceEvent, ThreadHook,
    ThreadRole,
};
use std::sync::atomic::Ordering;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// The group of a process with a number that none has: the tracer knows it by its upper byte.
const CALL: i64 = libc::SYS_getpgid;
const MAGIC: u32 = 0x5a << 24;
/// Between two touched pages of 4 KiB: no two make a run.
const STRIDE: u64 = 7;

/// What kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Acceptor,
    Control,
    Fault,
    Request,
    Background,
    Other,
}

impl Who {
    const ALL: [Self; 6] =
        [Self::Acceptor, Self::Control, Self::Fault, Self::Request, Self::Background, Self::Other];

    fn of(role: ThreadRole) -> Self {
        match role {
            ThreadRole::Acceptor => Self::Acceptor,
            ThreadRole::Control => Self::Control,
            ThreadRole::Fault => Self::Fault,
            ThreadRole::Request => Self::Request,
            ThreadRole::Background => Self::Background,
            _ => Self::Other,
        }
    }
}

/// What a traced thread tells the tracer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// This thread is one of the engine's, and what it calls from here is the engine's.
    Thread(Who),
    /// The source listens on this port.
    Listening(u16),
    /// The next step is reached; the thread waits until the tracer lets it go on.
    Step,
    /// The machine has not got the memory for it.
    Lacking,
}

impl Mark {
    fn say(self) {
        let (kind, value) = match self {
            Self::Thread(who) => (0, who as u16),
            Self::Listening(port) => (1, port),
            Self::Step => (2, 0),
            Self::Lacking => (3, 0),
        };
        let number = MAGIC | kind << 16 | u32::from(value);
        // SAFETY: asks for the process group of a process that does not exist.
        unsafe { libc::syscall(CALL, number) };
    }

    /// The mark that a call is, if it is one.
    pub(crate) fn heard(number: u64, arguments: &[u64; 6]) -> Option<Self> {
        let said = arguments[0] as u32;
        if number as i64 != CALL || said & 0xff << 24 != MAGIC {
            return None;
        }
        match (said >> 16) & 0xff {
            0 => Who::ALL.get((said & 0xffff) as usize).copied().map(Self::Thread),
            1 => Some(Self::Listening(said as u16)),
            2 => Some(Self::Step),
            _ => Some(Self::Lacking),
        }
    }
}

/// What is moved, and what the guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) kind: Kind,
    pub(crate) content: Content,
    pub(crate) bytes: u64,
    /// Pages that are touched, one after the other, each after a step.
    pub(crate) touched: u64,
    pub(crate) heartbeat: Duration,
}

impl Scenario {
    /// As words, for a child.
    fn write(&self) -> String {
        let kind = match self.kind {
            Kind::Anonymous => 'a',
            Kind::Memfd => 'm',
            Kind::Huge => 'h',
        };
        let content = match self.content {
            Content::Dense => 'd',
            Content::ZeroRuns => 'z',
            Content::Sparse => 's',
            Content::Scattered => 'f',
            Content::Zeros => 'n',
            Content::Empty => 'e',
        };
        let Self { bytes, touched, heartbeat, .. } = self;
        format!("{kind} {content} {bytes} {touched} {}", heartbeat.as_millis())
    }

    fn read<'a>(words: &mut impl Iterator<Item = &'a str>) -> Self {
        let kind = match words.next() {
            Some("a") => Kind::Anonymous,
            Some("m") => Kind::Memfd,
            _ => Kind::Huge,
        };
        let content = match words.next() {
            Some("d") => Content::Dense,
            Some("z") => Content::ZeroRuns,
            Some("s") => Content::Sparse,
            Some("f") => Content::Scattered,
            Some("n") => Content::Zeros,
            _ => Content::Empty,
        };
        let mut number = || words.next().and_then(|word| word.parse().ok()).expect("a number");
        let (bytes, touched) = (number(), number());
        Self { kind, content, bytes, touched, heartbeat: Duration::from_millis(number()) }
    }

    pub(crate) const fn page_bytes(&self) -> u64 {
        match self.kind {
            Kind::Huge => 2 * MIB,
            _ => 4096,
        }
    }

    /// For [`child_source`].
    pub(crate) fn source_argument(&self) -> String {
        self.write()
    }

    /// For [`child_destination`].
    pub(crate) fn destination_argument(&self, port: u16) -> String {
        format!("{} {port}", self.write())
    }

    fn setup(&self) -> Setup {
        Setup { kinds: vec![(self.kind, self.bytes)], content: self.content, ..Setup::default() }
    }
}

fn hook() -> ThreadHook {
    ThreadHook::new(|role, _| Mark::Thread(Who::of(role)).say())
}

/// The source: serves until everything has arrived.
#[test]
fn child_source() {
    let Some(argument) = argument("roles::child_source") else { return };
    let scenario = Scenario::read(&mut argument.split(' '));
    let setup = scenario.setup();
    let Some(old) = Memory::try_new(&setup.kinds) else { return Mark::Lacking.say() };
    old.fill(setup.seed, setup.content);
    let listener = common::session::listen();
    let address = listener.address().to_string();
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
    let mut options = common::session::source_options(&setup);
    options.polling = Duration::ZERO;
    options.heartbeat = scenario.heartbeat;
    // A traced process is slow, and its threads are held.
    options.silence = options.silence.max(3 * scenario.heartbeat);
    options.threads = hook();
    let (source, events) =
        Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
    Mark::Listening(port).say();
    source.switch_over(vec![]).expect("may switch over");
    let dump = || format!("{:?}", source.stats());
    EventLog::new(events).wait("the end", dump, |event| *event == SourceEvent::Finished);
}

/// The destination: touches what it shall touch, gets the rest, and verifies all of it.
#[test]
fn child_destination() {
    let Some(argument) = argument("roles::child_destination") else { return };
    let mut words = argument.split(' ');
    let scenario = Scenario::read(&mut words);
    let address = format!("tcp:127.0.0.1:{}", words.next().expect("a port"));
    let setup = scenario.setup();
    let Some(new) = Memory::try_new(&setup.kinds) else { return Mark::Lacking.say() };
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let mut options = common::session::destination_options(&setup);
    options.polling = Duration::ZERO;
    options.threads = hook();
    let endpoint = Endpoint::Connect(address.parse().expect("an address"));
    let (destination, events) =
        Destination::start(memory, endpoint, options).expect("a destination");
    let events = EventLog::new(events);
    let dump = || format!("{:?}", destination.stats());
    let wait = |what, is_wanted: &dyn Fn(&DestinationEvent) -> bool| {
        events.wait(what, dump, is_wanted);
    };
    wait("device state", &|event| matches!(event, DestinationEvent::State(_)));
    destination.ready().expect("may be ready");
    wait("run", &|event| *event == DestinationEvent::Run);
    Mark::Step.say();
    let small_pages = scenario.page_bytes() / 4096;
    for touch in 0..scenario.touched {
        new.word(touch * STRIDE * small_pages % new.small_pages(), 3).load(Ordering::Relaxed);
        Mark::Step.say();
    }
    wait("all pages", &|event| *event == DestinationEvent::AllArrived);
    Mark::Step.say();
    wait("the end", &|event| *event == DestinationEvent::Finished);
    new.check(setup.seed, setup.content);
    assert_eq!(destination.stats().pages_complete, new.pages());
}
