//! The link is cut while a guest waits in a fault, and comes back.
//!
//! Invariant: the page that the guest waits for is missing until the link is back, so whatever
//! ends its wait came over new connections.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{DestinationEvent, Events};
use crossbeam_channel::{Receiver, Sender, bounded};

use super::destination::{LIMIT, until};
use super::echo;
use super::relay::Relay;
use crate::error::{BenchError, Doing};
use crate::latency::Latencies;
use crate::memory::{self, Memory};
use crate::sys::PageMap;
use crate::unit::Outage;

/// Round trips before each cut.
const PINGS: usize = 5;

/// What the cuts came to; each figure is the median of them.
#[derive(Debug)]
pub(super) struct Recoveries {
    /// From the link's return to the answer of the fault, cut by cut.
    pub(super) latencies: Latencies,
    /// One round trip over the same link, on a new connection.
    pub(super) round_trip: Duration,
    /// From the link's return to the connection of the control channel.
    pub(super) pause: Duration,
    /// From there to the connection of the first data channel: greetings, planes, Begin.
    pub(super) agreement: Duration,
    /// From there to the answer: its greeting, the request, the page.
    pub(super) request: Duration,
}

/// One cut.
#[derive(Clone, Copy, Debug)]
struct Recovery {
    answered: Duration,
    pause: Duration,
    agreement: Duration,
    request: Duration,
}

/// A link that can be cut, and the events of a destination that uses it.
#[derive(Debug)]
pub(super) struct Cuts<'a> {
    relay: &'a mut Relay,
    /// Towards the source's [`echo::Echo`], over as much of a link.
    echo: Relay,
    events: &'a Events<DestinationEvent>,
    memory: &'a Memory,
}

impl<'a> Cuts<'a> {
    /// `relay` is what the destination connects to; at `echo` its source echoes.
    pub(super) fn new(
        relay: &'a mut Relay,
        echo: &str,
        events: &'a Events<DestinationEvent>,
        memory: &'a Memory,
    ) -> Result<Self, BenchError> {
        Ok(Self { relay, echo: Relay::start(echo)?, events, memory })
    }

    /// Cuts the link as often as is planned while a guest runs, and lets the source send all
    /// afterwards.
    pub(super) fn measure(mut self, outage: Outage) -> Result<Recoveries, BenchError> {
        let memory = self.memory;
        let (order, pages) = bounded(0);
        let (sender, touches) = bounded(1);
        let measured = thread::scope(|scope| {
            scope.spawn(move || touch(memory, &pages, &sender));
            // The guest ends when nobody orders any more.
            self.each(outage, &Guest { order, touches })
        });
        echo::enough(&self.echo.address())?;
        measured
    }

    fn each(&mut self, outage: Outage, guest: &Guest) -> Result<Recoveries, BenchError> {
        let mut pages = memory::shuffled(self.memory.plan().content_end()).into_iter();
        let mut next = || pages.next().ok_or_else(|| BenchError::Failed("no page is left".into()));
        let (mut round_trips, mut recoveries) = (Vec::new(), Vec::new());
        for time in outage.times() {
            // The session works, and has no request under way.
            guest.begin(next()?)?;
            guest.end(self.memory)?;
            for _ in 0..PINGS {
                round_trips.push(echo::round_trip(&self.echo.address())?);
            }
            recoveries.push(self.one(next()?, time, guest)?);
        }
        let mut latencies = Latencies::default();
        for recovery in &recoveries {
            latencies.record(recovery.answered);
        }
        let of = |part: fn(&Recovery) -> Duration| median(recoveries.iter().map(part).collect());
        Ok(Recoveries {
            latencies,
            round_trip: median(round_trips),
            pause: of(|it| it.pause),
            agreement: of(|it| it.agreement),
            request: of(|it| it.request),
        })
    }

    /// One cut of this length.
    fn one(&mut self, page: u64, length: Duration, guest: &Guest) -> Result<Recovery, BenchError> {
        let cut = Instant::now();
        self.relay.cut()?;
        guest.begin(page)?;
        until(self.events, |event| *event == DestinationEvent::Disconnected)?;
        // Not to wait for anything: how long the link is away is what is measured at.
        thread::sleep(length.saturating_sub(cut.elapsed()));
        let map = PageMap::open().doing("/proc/self/pagemap")?;
        if map.is_present(self.memory.address(page) as u64) {
            return Err(BenchError::Failed(format!("page {page} came over a link that was cut")));
        }
        let up = self.relay.restore()?;
        let answered = guest.end(self.memory)?;
        until(self.events, |event| matches!(event, DestinationEvent::Attached(_)))?;
        let connected = self.relay.connected();
        let [control, data, ..] = connected[..] else {
            return Err(BenchError::Failed(format!("page {page} came over no new connection")));
        };
        Ok(Recovery {
            answered: answered - up,
            pause: control - up,
            agreement: data - control,
            request: answered - data,
        })
    }
}

/// A thread that touches pages as it is told.
#[derive(Debug)]
struct Guest {
    order: Sender<u64>,
    touches: Receiver<Touch>,
}

#[derive(Debug)]
enum Touch {
    Begins,
    Ended { page: u64, word: u64, at: Instant },
}

fn touch(memory: &Memory, pages: &Receiver<u64>, touches: &Sender<Touch>) {
    for page in pages {
        // If nobody listens any more, nobody sends a page either.
        let _ = touches.send(Touch::Begins);
        let word = memory.word(page).load(Ordering::Relaxed);
        let _ = touches.send(Touch::Ended { page, word, at: Instant::now() });
    }
}

impl Guest {
    /// Touches a page, and returns when it is about to.
    fn begin(&self, page: u64) -> Result<(), BenchError> {
        self.order.send(page).doing("telling the guest")?;
        self.touches.recv_timeout(LIMIT).doing("waiting for the guest").map(drop)
    }

    /// Waits until the page is there, and says when it was.
    fn end(&self, memory: &Memory) -> Result<Instant, BenchError> {
        match self.touches.recv_timeout(LIMIT).doing("waiting for a page")? {
            Touch::Ended { page, word, at } if memory.plan().content(page) == Some(word) => Ok(at),
            Touch::Ended { page, word, .. } => {
                Err(BenchError::Wrong(format!("page {page} begins with {word:#018x}")))
            }
            Touch::Begins => Err(BenchError::Failed("the guest lost its place".into())),
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
