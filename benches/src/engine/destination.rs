//! The side that gets the guest.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use afterimage::{
    Address, Destination, DestinationEvent, DestinationOptions, DestinationStats, DiscardNotice,
    Endpoint, Events, FaultScope, Plaintext,
};
use afterimage_tools::ram::Backing;
use afterimage_tools::sampling::ArrivalSample;
use afterimage_tools::{migrate, sampling};

use super::Setup;
use super::footprint::Footprint;
use super::recovery::{Cuts, Recoveries};
use super::relay::Relay;
use crate::error::{BenchError, Doing};
use crate::guest;
use crate::latency::Latencies;
use crate::memory::{self, Memory, PAGE};
use crate::outcome::{Figure, Meter, Outcome, Reading};
use crate::sys;
use crate::unit::Unit;
use crate::worker::Listening;

/// How long one event may be waited for.
pub(super) const LIMIT: Duration = Duration::from_mins(5);
/// Bytes of an entry in a page table.
const ENTRY: u64 = 8;

/// Gets a guest from `source`, lets it do what the unit says, and verifies its memory.
///
/// # Errors
/// If the engine fails, the guest is not here within minutes, or a page is not what it must
/// be.
pub fn receive(unit: Unit, setup: Setup, source: &Listening) -> Result<Outcome, BenchError> {
    let is_relayed = matches!(unit, Unit::Wire(_) | Unit::Recovery(_) | Unit::Bandwidth(_));
    let mut relay = is_relayed.then(|| Relay::start(&source.address)).transpose()?;
    let address = relay.as_ref().map_or_else(|| source.address.clone(), Relay::address);
    let memory = Memory::empty(setup.memory)?;
    let footprint = Footprint::start()?;
    // SAFETY: `memory` outlives the destination; it is reached by raw pointers and atomics.
    let registered = unsafe {
        migrate::destination_memory(memory.ram(), FaultScope::UserOnly, DiscardNotice::Called)
    }
    .doing("registering guest memory")?;
    let address: Address = address.parse().doing("the address of the source")?;
    let mut options = DestinationOptions::default();
    options.polling = setup.wait.polling();
    options.plaintext = Plaintext::Anywhere;
    let (destination, events) = Destination::start(registered, Endpoint::Connect(address), options)
        .doing("starting the destination")?;
    let begun = begin(&destination, &events)?;
    let (at, meter) = (sys::now_ns(), Meter::start());
    let recoveries = match (unit, &mut relay, &source.echo) {
        (Unit::Recovery(plan), Some(relay), Some(echo)) => {
            Some(Cuts::new(relay, echo, &events, &memory)?.measure(plan.outage)?)
        }
        _ => None,
    };
    let mut run = run(unit, &destination, &events, (&memory, &begun), (at, meter, footprint))?;
    if let Some(recoveries) = recoveries {
        run.guest = GuestOutcome::Recovered(recoveries);
    }
    let stats = destination.stats();
    drop(destination);
    if unit.is_given_up() {
        memory.verify_present()?;
    } else {
        run.guest.verify(&memory)?;
    }
    let wire = relay.as_ref().map(Relay::bytes);
    let mut outcome = outcome(run, &stats, &memory, wire);
    if let (Unit::Bandwidth(_), Some(relay)) = (unit, &relay) {
        outcome.wire = relay.samples();
    }
    Ok(outcome)
}

/// What a page costs the guest itself: its entry in the page table and, where the memory is
/// this process's own, the page.
fn guest_share(memory: &Memory) -> u64 {
    match memory.ram().backing() {
        Backing::Anonymous => PAGE + ENTRY,
        Backing::Memfd | Backing::Hugetlb => ENTRY,
    }
}

fn outcome(run: Run, stats: &DestinationStats, memory: &Memory, wire: Option<u64>) -> Outcome {
    let page = memory.ram().backing().page_bytes();
    let bytes = |pages: u64| (pages * page) as f64;
    let mut outcome = Outcome::default()
        .metered(run.reading)
        .with(Figure::AtNanoseconds, run.at as f64)
        .with(Figure::Bytes, bytes(stats.pages_requested + stats.pages_background))
        .with(Figure::BackgroundBytes, bytes(stats.pages_background))
        .with(Figure::RequestedBytes, bytes(stats.pages_requested))
        .with(Figure::DuplicatePages, stats.pages_duplicate as f64)
        .with(Figure::ZeroPages, (stats.pages_zero * page / PAGE) as f64)
        .with(Figure::Pages, (memory.plan().bytes / PAGE) as f64);
    if let Some(extra) = run.extra {
        outcome = outcome.with(Figure::ExtraBytes, extra as f64);
    }
    if let Some(wire) = wire {
        outcome = outcome.with(Figure::WireBytes, wire as f64);
    }
    outcome.samples = run.samples;
    match run.guest {
        GuestOutcome::Idle => {}
        GuestOutcome::Faulted(latencies) => outcome.latencies = Some(latencies),
        GuestOutcome::Recovered(recoveries) => {
            let us = |time: Duration| time.as_secs_f64() * 1e6;
            outcome = outcome
                .with(Figure::RoundTripUs, us(recoveries.round_trip))
                .with(Figure::PauseUs, us(recoveries.pause))
                .with(Figure::AgreementUs, us(recoveries.agreement))
                .with(Figure::RequestUs, us(recoveries.request));
            outcome.latencies = Some(recoveries.latencies);
        }
        GuestOutcome::Moved { waits, .. } => {
            outcome = outcome
                .with(Figure::RemoteFaults, stats.fault_latency.count as f64)
                .with(Figure::StallUs, waits.total_us());
            outcome.latencies = Some(waits);
        }
        GuestOutcome::Worked { seconds, added } => {
            let operations: u64 = added.iter().sum();
            outcome =
                outcome.with(Figure::Operations, operations as f64).with(Figure::Seconds, seconds);
        }
    }
    outcome
}

/// A guest that may run.
struct Begun {
    vcpus: Vec<u8>,
    /// Small memory may be there sooner than that is said.
    has_all: bool,
}

/// Until the guest may run.
fn begin(
    destination: &Destination,
    events: &Events<DestinationEvent>,
) -> Result<Begun, BenchError> {
    let mut has_all = false;
    let mut sections = next_event(events, |event| match event {
        DestinationEvent::State(sections) => ControlFlow::Break(sections),
        other => {
            has_all |= other == DestinationEvent::AllArrived;
            ControlFlow::Continue(())
        }
    })?;
    destination.ready().doing("being ready")?;
    until(events, |event| {
        has_all |= *event == DestinationEvent::AllArrived;
        *event == DestinationEvent::Run
    })?;
    let vcpus = sections.pop().map(|section| section.bytes).unwrap_or_default();
    Ok(Begun { vcpus, has_all })
}

struct Run {
    at: u64,
    reading: Reading,
    guest: GuestOutcome,
    extra: Option<u64>,
    samples: Vec<ArrivalSample>,
}

fn run(
    unit: Unit,
    destination: &Destination,
    events: &Events<DestinationEvent>,
    (memory, begun): (&Memory, &Begun),
    (at, meter, footprint): (u64, Meter, Footprint),
) -> Result<Run, BenchError> {
    if unit.is_given_up() {
        return Ok(Run {
            at,
            reading: meter.read(),
            guest: GuestOutcome::Idle,
            extra: None,
            samples: Vec::new(),
        });
    }
    let done = AtomicBool::new(false);
    let share = || {
        let stats = destination.stats();
        (stats.pages_requested + stats.pages_background) * guest_share(memory)
    };
    let (guest, reading, extra, samples) = thread::scope(|scope| {
        let guest = scope.spawn(|| work(unit, memory, &begun.vcpus, &done));
        let watch = matches!(unit, Unit::Footprint(_))
            .then(|| scope.spawn(|| footprint.watch(share, &done)));
        let (stop, stopped) = crossbeam_channel::bounded(1);
        let samples = matches!(unit, Unit::Trace(_)).then(|| {
            let clock = move || (sys::now_ns() - at) / 1000;
            scope.spawn(move || sampling::watch(destination, &stopped, clock))
        });
        let arrived = if begun.has_all {
            Ok(())
        } else {
            until(events, |event| *event == DestinationEvent::AllArrived)
        };
        let reading = meter.read();
        done.store(true, Ordering::Release);
        drop(stop);
        let samples = samples.map(|it| it.join().expect("sampling does not panic"));
        let extra = watch.map(|watch| watch.join().expect("watching does not panic"));
        // If not all has arrived, the guest may wait for ever; the process ends then.
        arrived?;
        let guest = guest.join().expect("the guest does not panic")?;
        Ok::<_, BenchError>((guest, reading, extra, samples))
    })?;
    until(events, |event| *event == DestinationEvent::Finished)?;
    Ok(Run { at, reading, guest, extra, samples: samples.unwrap_or_default() })
}

/// What the guest did meanwhile.
enum GuestOutcome {
    Idle,
    Faulted(Latencies),
    Worked { seconds: f64, added: Vec<u64> },
    Moved { waits: Latencies, added: Vec<u64> },
    Recovered(Recoveries),
}

impl GuestOutcome {
    fn verify(&self, memory: &Memory) -> Result<(), BenchError> {
        match self {
            Self::Worked { added, .. } | Self::Moved { added, .. } => {
                memory.verify_except(|page| added.get(page as usize).copied().unwrap_or(0))
            }
            _ => memory.verify(),
        }
    }
}

fn work(
    unit: Unit,
    memory: &Memory,
    vcpus: &[u8],
    done: &AtomicBool,
) -> Result<GuestOutcome, BenchError> {
    match unit {
        Unit::Faults(plan) | Unit::Trace(plan) => {
            let pages = memory::shuffled(plan.bytes / PAGE).into_iter();
            let pages = pages.map(|page| memory.address(page));
            // SAFETY: the destination serves this memory until all is here.
            unsafe { guest::touch(pages, plan.think, done) }.map(GuestOutcome::Faulted)
        }
        Unit::WorkingSet(_) => {
            let (seconds, added) = guest::work(memory);
            Ok(GuestOutcome::Worked { seconds, added })
        }
        Unit::Moving(_) => {
            let (waits, added) = guest::hot::work(memory, vcpus, done)?;
            Ok(GuestOutcome::Moved { waits, added })
        }
        _ => Ok(GuestOutcome::Idle),
    }
}

/// The same work on memory that is here from the start.
///
/// # Errors
/// If the machine has not so much, or a page is not what it must be.
pub fn resident(bytes: u64) -> Result<Outcome, BenchError> {
    let memory = Memory::filled(crate::floors::anonymous(bytes))?;
    let (seconds, added) = guest::work(&memory);
    memory.verify_except(|page| added.get(page as usize).copied().unwrap_or(0))?;
    let operations: u64 = added.iter().sum();
    Ok(Outcome::default()
        .with(Figure::Seconds, seconds)
        .with(Figure::Operations, operations as f64))
}

pub(super) fn until(
    events: &Events<DestinationEvent>,
    mut is_it: impl FnMut(&DestinationEvent) -> bool,
) -> Result<(), BenchError> {
    next_event(events, |event| {
        if is_it(&event) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// Takes events until one of them is what is looked for.
fn next_event<T>(
    events: &Events<DestinationEvent>,
    mut look: impl FnMut(DestinationEvent) -> ControlFlow<T>,
) -> Result<T, BenchError> {
    loop {
        match events.next_timeout(LIMIT).doing("waiting for the destination")? {
            DestinationEvent::Failed(why) | DestinationEvent::Ended(why) => {
                return Err(BenchError::Failed(why));
            }
            event => {
                if let ControlFlow::Break(found) = look(event) {
                    return Ok(found);
                }
            }
        }
    }
}
