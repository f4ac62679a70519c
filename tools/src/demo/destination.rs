//! The destination's process: it gets the guest, lets it run on, and verifies.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{
    Destination, DestinationEvent, DestinationMemory, DestinationOptions, DestinationStats,
    DiscardNotice, Endpoint, Events, FaultScope, MemoryError, NoEvent, StateSection,
};

use super::error::DemoError;
use super::messages::{
    Command, Done, Latency, Line, Message, Progress, Setup, Stats, Step, deadline, micros, now_us,
};
use super::report::hex;
use super::source::{allocate, checksums};
use crate::guest::{Guest, GuestKind, MachineState, ThreadsGuest, digest, verify};
use crate::microvm::PreparedVm;
use crate::migrate;
use crate::ram::GuestRam;
use crate::sampling::{self, ArrivalSample};

/// How often the parent is told how far things are.
const PROGRESS_PAUSE: Duration = Duration::from_millis(50);

/// Plays the destination.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let ram = allocate(setup)?;
    let memory = register(setup, &ram)?;
    let mut place = Place::prepare(setup, &ram)?;
    line.say(&Message::Prepared);
    let address = loop {
        if let Command::Connect(address) = line.command(setup.limit)? {
            break address;
        }
    };
    let address = address
        .parse()
        .map_err(|error| DemoError::failed("cannot connect to the source", &error))?;
    let mut options = DestinationOptions::default();
    options.checksums = checksums(setup);
    let started_at_us = now_us();
    let (destination, events) = Destination::start(memory, Endpoint::Connect(address), options)
        .map_err(|error| DemoError::failed("cannot start the destination", &error))?;
    let arrival = Arrival { line, setup, destination: &destination, events };
    let (mut guest, samples) = arrival.receive_and_sample(&mut place)?;

    // The process that served ends next. The guest has nobody left to ask.
    loop {
        if line.command(setup.limit)? == Command::SourceExited {
            break;
        }
    }
    let operations_at_source_exit = guest.operations();
    if let Err(error) = run_a_round(&mut *guest, operations_at_source_exit, setup.limit) {
        // What does not run cannot be stopped either.
        std::mem::forget(guest);
        return Err(error);
    }
    let statistics = destination.stats();
    line.say(&Message::Progress(progress(&statistics, &*guest)));
    let stopped = guest.stop().map_err(|error| DemoError::failed("the guest did not stop", &error));
    let state = stopped?;
    let stopped_at_us = now_us();
    line.say(&Message::Step(Step::VerifiesMemory));
    if setup.corrupt_one_byte {
        corrupt_one_byte(&ram, &state);
    }
    let spec = state.spec();
    let untouched = spec.worked_pages()..spec.geometry().pages;
    line.say(&Message::Done(Box::new(Done {
        verified: check(&*guest, &state),
        sha256: hex(&digest(&ram, spec, untouched)),
        page_bytes: setup.backing.page_bytes(),
        stats: collect(&statistics, started_at_us),
        rounds: guest.rounds(),
        operations_at_source_exit,
        operations: state.operations(),
        stopped_at_us,
        samples,
    })));
    Ok(())
}

/// Verifies every page of a stopped guest; in words, what was verified or what is wrong.
fn check(guest: &dyn Guest, state: &MachineState) -> Result<String, String> {
    if let Some(failure) = guest.failure() {
        return Err(failure);
    }
    verify(guest.ram(), state)
        .map(|report| report.to_string())
        .map_err(|error| super::error::one_line(&error))
}

fn register(setup: &Setup, ram: &Arc<GuestRam>) -> Result<DestinationMemory, DemoError> {
    let scope = if setup.user_faults_only && setup.guest == GuestKind::Threads {
        FaultScope::UserOnly
    } else {
        FaultScope::KernelAndUser
    };
    // SAFETY: `run` keeps the RAM until after the destination has been dropped; nobody has
    // a reference into it before the guest runs, and the guest has only atomics.
    unsafe { migrate::destination_memory(ram, scope, DiscardNotice::Called) }.map_err(|error| {
        match &error {
            MemoryError::Uffd(_) => DemoError::lacking("cannot register guest memory", &error),
            _ => DemoError::failed("cannot register guest memory", &error),
        }
    })
}

/// Where the guest will run: what can be built before its state is there.
enum Place {
    Kvm(Option<PreparedVm>),
    Threads(Arc<GuestRam>),
}

impl Place {
    fn prepare(setup: &Setup, ram: &Arc<GuestRam>) -> Result<Self, DemoError> {
        Ok(match setup.guest {
            GuestKind::Threads => Self::Threads(ram.clone()),
            GuestKind::Kvm => {
                let machine = PreparedVm::new(ram.clone(), setup.vcpus)
                    .map_err(|error| DemoError::failed("cannot prepare a machine", &error))?;
                Self::Kvm(Some(machine))
            }
        })
    }

    fn restore(&mut self, sections: &[StateSection]) -> Result<Box<dyn Guest>, DemoError> {
        let failed = |error: &dyn std::error::Error| {
            DemoError::failed("the state that arrived cannot be restored", error)
        };
        let state = migrate::state_from(sections).map_err(|error| failed(&error))?;
        Ok(match self {
            Self::Threads(ram) => {
                let guest = ThreadsGuest::restore(ram.clone(), &state);
                Box::new(guest.map_err(|error| failed(&error))?)
            }
            Self::Kvm(machine) => {
                let machine = machine
                    .take()
                    .ok_or_else(|| DemoError::Failed("the state arrived twice".to_owned()))?;
                Box::new(machine.restore(&state).map_err(|error| failed(&error))?)
            }
        })
    }
}

/// The time in which the guest arrives.
struct Arrival<'a> {
    line: &'a Line,
    setup: &'a Setup,
    destination: &'a Destination,
    events: Events<DestinationEvent>,
}

impl Arrival<'_> {
    /// Receives, and samples meanwhile what arrives if that is wanted.
    fn receive_and_sample(
        &self,
        place: &mut Place,
    ) -> Result<(Box<dyn Guest>, Vec<ArrivalSample>), DemoError> {
        if !self.setup.takes_samples {
            return Ok((self.receive(place)?, Vec::new()));
        }
        thread::scope(|scope| {
            let destination = self.destination;
            let (stop, stopped) = crossbeam_channel::bounded(0);
            let watcher = thread::Builder::new()
                .name("sampler".to_owned())
                .spawn_scoped(scope, move || sampling::watch(destination, &stopped, now_us))
                .map_err(|error| DemoError::failed("cannot start a thread", &error))?;
            let guest = self.receive(place);
            drop(stop);
            let samples = watcher
                .join()
                .map_err(|_| DemoError::Failed("the sampling of arrivals failed".to_owned()))?;
            Ok((guest?, samples))
        })
    }

    /// Does what the engine says until the session is over. The guest runs then.
    fn receive(&self, place: &mut Place) -> Result<Box<dyn Guest>, DemoError> {
        let mut guest = None;
        let result = self.receive_into(&mut guest, place);
        if result.is_err() {
            // A vCPU that waits for a page cannot be stopped: it ends with the process.
            std::mem::forget(guest.take());
        }
        result?;
        guest
            .ok_or_else(|| DemoError::Failed("the session was over before a guest came".to_owned()))
    }

    fn receive_into(
        &self,
        guest: &mut Option<Box<dyn Guest>>,
        place: &mut Place,
    ) -> Result<(), DemoError> {
        let mut is_running = false;
        loop {
            match self.next(guest.as_deref().filter(|_| is_running))? {
                DestinationEvent::State(sections) => {
                    *guest = Some(place.restore(&sections)?);
                    self.destination
                        .ready()
                        .map_err(|error| DemoError::failed("cannot get ready", &error))?;
                }
                DestinationEvent::Run => {
                    let guest = guest.as_mut().ok_or_else(|| {
                        DemoError::Failed("the guest was to run before it came".to_owned())
                    })?;
                    guest
                        .start()
                        .map_err(|error| DemoError::failed("cannot start the guest", &error))?;
                    self.line.say(&Message::Running { at_us: now_us() });
                    is_running = true;
                }
                DestinationEvent::AllArrived => {
                    self.line.say(&Message::AllArrived { at_us: now_us() });
                }
                DestinationEvent::Finished if is_running => return Ok(()),
                event @ (DestinationEvent::Attached(_) | DestinationEvent::Disconnected) => {
                    tracing::info!(?event, "destination");
                }
                event => {
                    return Err(DemoError::Failed(format!("the engine said {event:?}")));
                }
            }
        }
    }

    /// The next event; tells of the progress meanwhile.
    fn next(&self, running: Option<&dyn Guest>) -> Result<DestinationEvent, DemoError> {
        let mut deadline = deadline(self.setup.limit);
        let mut complete = self.destination.stats().pages_complete;
        loop {
            match self.events.next_timeout(PROGRESS_PAUSE) {
                Ok(event) => return Ok(event),
                Err(NoEvent::Ended) => {
                    return Err(DemoError::Failed("the engine ended too early".to_owned()));
                }
                Err(NoEvent::NotInTime) => {}
            }
            let stats = self.destination.stats();
            if let Some(guest) = running {
                self.line.say(&Message::Progress(progress(&stats, guest)));
                if let Some(failure) = guest.failure() {
                    return Err(DemoError::Failed(format!("the guest failed: {failure}")));
                }
            }
            if stats.pages_complete > complete {
                complete = stats.pages_complete;
                deadline = self::deadline(self.setup.limit);
            }
            if Instant::now() > deadline {
                return Err(DemoError::Failed(format!(
                    "no page came for {} s; {} of {} are there, {} faults were answered",
                    self.setup.limit.as_secs(),
                    stats.pages_complete,
                    stats.pages_total,
                    stats.fault_latency.count
                )));
            }
        }
    }
}

fn progress(stats: &DestinationStats, guest: &dyn Guest) -> Progress {
    Progress {
        at_us: now_us(),
        operations: guest.operations(),
        pages_total: stats.pages_total,
        pages_requested: stats.pages_requested,
        pages_background: stats.pages_background,
        pages_zero: stats.pages_zero,
        faults: stats.fault_latency.count,
        p50_us: micros(stats.fault_latency.p50),
        p99_us: micros(stats.fault_latency.p99),
    }
}

/// Lets the guest do a round more than `since`, so that it completes one.
fn run_a_round(guest: &mut dyn Guest, since: u64, limit: Duration) -> Result<(), DemoError> {
    let round = guest.spec().worked_pages() * u64::from(guest.spec().vcpus());
    if guest.wait_for_operations(since + round, limit) || guest.failure().is_some() {
        return Ok(());
    }
    Err(DemoError::Failed(format!(
        "the guest stands still at the destination: {} of {round} operations in {} s",
        guest.operations() - since,
        limit.as_secs()
    )))
}

/// Changes a byte that nobody writes, or one of a tag, so that verification has something
/// to notice.
fn corrupt_one_byte(ram: &GuestRam, state: &MachineState) {
    let last_page = state.spec().geometry().address(state.spec().geometry().pages - 1);
    let last_byte = crate::ram::GuestAddress(last_page.0 + crate::ram::PAGE_BYTES - 1);
    ram.byte(last_byte).fetch_xor(1, Ordering::Relaxed);
}

fn collect(stats: &DestinationStats, started_at_us: u64) -> Stats {
    let latency = &stats.fault_latency;
    Stats {
        pages_total: stats.pages_total,
        pages_requested: stats.pages_requested,
        pages_background: stats.pages_background,
        pages_zero: stats.pages_zero,
        pages_duplicate: stats.pages_duplicate,
        bytes_received: stats.bytes_received,
        recoveries: stats.recoveries,
        first_page_at_us: stats.first_page.map(|since| started_at_us + since.as_micros() as u64),
        stall_us: micros(latency.total),
        latency: Latency {
            count: latency.count,
            mean: micros(latency.mean),
            p50: micros(latency.p50),
            p99: micros(latency.p99),
            p999: micros(latency.p999),
            max: micros(latency.max),
            buckets: latency.buckets.clone(),
        },
    }
}
