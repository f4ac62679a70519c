//! The side that has the guest's memory.

use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use afterimage::{
    Address, Background, Endpoint, Events, Listener, Plaintext, Release, ReleaseLedger, Source,
    SourceEvent, SourceOptions, StateSection,
};
use afterimage_tools::migrate;

use super::Setup;
use super::echo::Echo;
use super::footprint::Footprint;
use super::resident::Resident;
use super::{bandwidth, precopy, stopped};
use crate::error::{BenchError, Doing};
use crate::guest::hot::HotGuest;
use crate::memory::Memory;
use crate::outcome::{Figure, Meter, Outcome};
use crate::sys;
use crate::unit::{Load, Unit};

/// How long one event may be waited for.
pub(super) const LIMIT: Duration = Duration::from_mins(5);
/// As much as the state of a few vCPUs.
const STATE_BYTES: usize = 8192;

/// Serves `memory` once, from the switchover to the end of `unit`; `listening` is called with the
/// address as soon as there is one. With an `echo`, only what is asked for is sent until that has
/// heard that it is enough.
///
/// # Errors
/// If the engine fails, or the destination is not done within minutes.
pub fn serve(
    unit: Unit,
    memory: &Memory,
    setup: Setup,
    listen: &str,
    echo: Option<&Echo>,
    listening: impl FnOnce(String) -> Result<(), BenchError>,
) -> Result<Outcome, BenchError> {
    let footprint = Footprint::start()?;
    let (source, events, address) = start(unit, memory, setup, listen)?;
    listening(address)?;
    until(&events, |event| matches!(event, SourceEvent::Attached(_)))?;
    let mut outcome = Outcome::default();
    let state = before(unit, memory, (&source, &events), &mut outcome)?;
    let last = if unit.is_given_up() { SourceEvent::Running } else { SourceEvent::Finished };
    let resident = matches!(unit, Unit::ResidentSource(_)).then(|| Resident::start(memory));
    let resident = resident.transpose()?;
    let is_over = AtomicBool::new(false);
    let (at, reading, extra, samples) = thread::scope(|scope| {
        let (source, is_over) = (&source, &is_over);
        let watch = matches!(unit, Unit::Footprint(_))
            .then(|| scope.spawn(move || footprint.watch(|| 0, is_over)));
        let resident = resident.map(|it| scope.spawn(move || it.watch(source, is_over)));
        let sent = source.stats().bytes_sent;
        let meter = Meter::start();
        let at = sys::now_ns();
        let served = source
            .switch_over(vec![state])
            .doing("switching over")
            .and_then(|()| after(unit, echo, (source, sent), &mut outcome))
            .and_then(|()| until(&events, |event| *event == last));
        let reading = meter.read();
        is_over.store(true, Ordering::Release);
        let extra = watch.map(|watch| watch.join().expect("watching does not panic"));
        let samples = resident.map(|watch| watch.join().expect("watching does not panic"));
        served.and_then(|()| Ok((at, reading, extra, samples.transpose()?)))
    })?;
    drop(source);
    outcome = outcome.metered(reading).with(Figure::AtNanoseconds, at as f64);
    if let Some(extra) = extra {
        outcome = outcome.with(Figure::ExtraBytes, extra as f64);
    }
    outcome.resident = samples.unwrap_or_default();
    Ok(outcome)
}

/// A source that listens, and where.
fn start(
    unit: Unit,
    memory: &Memory,
    setup: Setup,
    listen: &str,
) -> Result<(Source, Events<SourceEvent>, String), BenchError> {
    let address: Address = listen.parse().doing("the address of the source")?;
    if let Some(path) = listen.strip_prefix("unix:") {
        // Left by the unit before this one.
        let _ = std::fs::remove_file(path);
    }
    // Without encryption on purpose: the other side is on this machine.
    let listener = Listener::bind(&address, Plaintext::Anywhere);
    let listener = listener.doing(&format!("listening at {listen}"))?;
    let bound = listener.address().to_string();
    // SAFETY: `memory` outlives the source, which its caller drops first; its guest, if there is
    // one, has stopped before the switchover.
    let served = unsafe { migrate::source_memory(memory.ram()) }.doing("the source's memory")?;
    let endpoint = Endpoint::Listen(listener);
    let (source, events) = Source::start(Arc::new(served), endpoint, options(unit, memory, setup)?)
        .doing("starting the source")?;
    Ok((source, events, bound))
}

/// What is done before the switchover; returns the guest's state.
fn before(
    unit: Unit,
    memory: &Memory,
    (source, events): (&Source, &Events<SourceEvent>),
    outcome: &mut Outcome,
) -> Result<StateSection, BenchError> {
    let bytes = match unit {
        Unit::Moving(plan) => {
            let guest = HotGuest::new(memory);
            precopy::work(&guest, plan, source, events)?;
            *outcome = stopped::measure(source, events)?;
            guest.state()
        }
        Unit::Bandwidth(plan) => {
            outcome.limits.push(bandwidth::before(source, plan)?);
            vec![7; STATE_BYTES]
        }
        _ => vec![7; STATE_BYTES],
    };
    Ok(StateSection { name: "vcpus".into(), version: 1, bytes })
}

/// What is done from the switchover on, by which `sent` bytes had been sent.
fn after(
    unit: Unit,
    echo: Option<&Echo>,
    (source, sent): (&Source, u64),
    outcome: &mut Outcome,
) -> Result<(), BenchError> {
    if let Unit::Bandwidth(plan) = unit {
        outcome.limits.extend(bandwidth::after(source, plan, sent)?);
    }
    echo.map_or(Ok(()), |echo| send_all_after(echo, source))
}

/// Sends nothing by itself until the destination has measured enough.
fn send_all_after(echo: &Echo, source: &Source) -> Result<(), BenchError> {
    echo.wait(LIMIT)?;
    source.set_background(Background::Unlimited);
    Ok(())
}

fn options(unit: Unit, memory: &Memory, setup: Setup) -> Result<SourceOptions, BenchError> {
    let mut options = SourceOptions::default();
    options.streams = setup.streams;
    options.polling = setup.wait.polling();
    options.plaintext = Plaintext::Anywhere;
    if unit.releases() {
        options.release = Release::Free(ReleaseLedger::volatile());
    }
    options.background = match setup.background {
        Load::Idle => Background::OnRequest,
        Load::Saturating => Background::Unlimited,
        Load::Limited(rate) => {
            let bytes_per_second = NonZeroU64::new(rate).unwrap_or(NonZeroU64::MIN);
            Background::Limited { bytes_per_second }
        }
    };
    match unit {
        Unit::Moving(plan) => options.precopy = precopy::of(plan, memory)?,
        Unit::Bandwidth(_) => bandwidth::limit(&mut options, memory)?,
        _ => {}
    }
    Ok(options)
}

fn until(
    events: &Events<SourceEvent>,
    is_it: impl Fn(&SourceEvent) -> bool,
) -> Result<(), BenchError> {
    next_event(events, |event| {
        if is_it(&event) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// Takes events until one of them is what is looked for.
pub(super) fn next_event<T>(
    events: &Events<SourceEvent>,
    look: impl Fn(SourceEvent) -> ControlFlow<T>,
) -> Result<T, BenchError> {
    loop {
        let event = events.next_timeout(LIMIT).doing("waiting for the source")?;
        if event == SourceEvent::PersistFailed {
            return Err(BenchError::Failed("the source gave up".into()));
        }
        if let ControlFlow::Break(found) = look(event) {
            return Ok(found);
        }
    }
}
