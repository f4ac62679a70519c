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
use super::{precopy, stopped};
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
    let address: Address = listen.parse().doing("the address of the source")?;
    if let Some(path) = listen.strip_prefix("unix:") {
        // Left by the unit before this one.
        let _ = std::fs::remove_file(path);
    }
    // Without encryption on purpose: the other side is on this machine.
    let listener = Listener::bind(&address, Plaintext::Anywhere);
    let listener = listener.doing(&format!("listening at {listen}"))?;
    let bound = listener.address().to_string();
    let footprint = Footprint::start()?;
    // SAFETY: `memory` outlives the source, which is dropped below; its guest, if there is one,
    // has stopped before the switchover.
    let served = unsafe { migrate::source_memory(memory.ram()) }.doing("the source's memory")?;
    let mut options = options(unit, setup);
    options.precopy = precopy::of(unit, memory)?;
    let (source, events) = Source::start(Arc::new(served), Endpoint::Listen(listener), options)
        .doing("starting the source")?;
    listening(bound)?;
    until(&events, |event| matches!(event, SourceEvent::Attached(_)))?;
    let (bytes, times) = match unit {
        Unit::Moving(plan) => {
            let guest = HotGuest::new(memory);
            precopy::work(&guest, plan, &source, &events)?;
            let times = stopped::measure(&source, &events)?;
            (guest.state(), Some(times))
        }
        _ => (vec![7; STATE_BYTES], None),
    };
    let state = StateSection { name: "vcpus".into(), version: 1, bytes };
    let last = if unit.is_given_up() { SourceEvent::Running } else { SourceEvent::Finished };
    let resident = matches!(unit, Unit::ResidentSource(_)).then(|| Resident::start(memory));
    let resident = resident.transpose()?;
    let is_over = AtomicBool::new(false);
    let (at, reading, extra, samples) = thread::scope(|scope| {
        let (source, is_over) = (&source, &is_over);
        let watch = matches!(unit, Unit::Footprint(_))
            .then(|| scope.spawn(move || footprint.watch(|| 0, is_over)));
        let resident = resident.map(|it| scope.spawn(move || it.watch(source, is_over)));
        let meter = Meter::start();
        let at = sys::now_ns();
        let served = source
            .switch_over(vec![state])
            .doing("switching over")
            .and_then(|()| echo.map_or(Ok(()), |echo| send_all_after(echo, source)))
            .and_then(|()| until(&events, |event| *event == last));
        let reading = meter.read();
        is_over.store(true, Ordering::Release);
        let extra = watch.map(|watch| watch.join().expect("watching does not panic"));
        let samples = resident.map(|watch| watch.join().expect("watching does not panic"));
        served.and_then(|()| Ok((at, reading, extra, samples.transpose()?)))
    })?;
    drop(source);
    let mut outcome = Outcome::default().metered(reading).with(Figure::AtNanoseconds, at as f64);
    if let Some(extra) = extra {
        outcome = outcome.with(Figure::ExtraBytes, extra as f64);
    }
    if let Some(times) = times {
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        outcome =
            outcome.with(Figure::StoppedUs, us(times.stopped)).with(Figure::WakeUs, us(times.wake));
    }
    outcome.resident = samples.unwrap_or_default();
    Ok(outcome)
}

/// Sends nothing by itself until the destination has measured enough.
fn send_all_after(echo: &Echo, source: &Source) -> Result<(), BenchError> {
    echo.wait(LIMIT)?;
    source.set_background(Background::Unlimited);
    Ok(())
}

fn options(unit: Unit, setup: Setup) -> SourceOptions {
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
    options
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
