//! The destination's process: it gets the guest, lets it run on, and verifies.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use afterimage::{DestinationMemory, DiscardNotice, FaultScope, MemoryError, StateSection};

use super::error::DemoError;
use super::messages::{Command, Done, Line, Message, Progress, Setup, Step, deadline, now_us};
use super::options::Role;
use super::report::hex;
use super::served::{Happening, Served};
use super::source::{allocate, driven};
use super::trial::{check, corrupt_one_byte, run_a_round};
use crate::guest::{Guest, GuestKind, ThreadsGuest, digest};
use crate::microvm::PreparedVm;
use crate::migrate;
use crate::ram::GuestRam;
use crate::sampling::{self, ArrivalSample};

/// Plays the destination.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let ram = allocate(setup)?;
    // Ends before the memory goes, with the last handle of the destination.
    let control = driven(setup, Role::Destination)?;
    let memory = register(setup, &ram)?;
    let mut place = Place::prepare(setup, &ram)?;
    line.say(&Message::Prepared);
    let served = loop {
        match line.command(setup.limit)? {
            Command::Connect(address) => {
                break Served::here(memory, &address, setup, control.desk())?;
            }
            Command::Attach(path) => break Served::elsewhere(memory, &path)?,
            Command::StaysAtSource => {
                control.close("not_here");
                return Ok(());
            }
            Command::HandOver | Command::SourceExited => {}
        }
    };
    let arrival = Arrival { line, setup, served: &served };
    let (guest, samples) = arrival.receive_and_sample(&mut place)?;
    let Some(mut guest) = guest else {
        drop(served);
        control.close("not_here");
        return Ok(());
    };

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
    arrival.tell(Some(&*guest));
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
        rounds: guest.rounds(),
        operations_at_source_exit,
        operations: state.operations(),
        stopped_at_us,
        samples,
    })));
    drop(served);
    control.close("finished");
    Ok(())
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

/// The guest, which runs; `None` if it was taken back.
type Arrived = Option<Box<dyn Guest>>;

/// How the arrival of a guest ends.
enum Ending {
    /// Everything is here, and the source knows it.
    Finished,
    /// It was taken back.
    NotHere,
}

/// The time in which the guest arrives.
struct Arrival<'a> {
    line: &'a Line,
    setup: &'a Setup,
    served: &'a Served,
}

impl Arrival<'_> {
    /// Receives, and samples meanwhile what arrives if that is wanted.
    fn receive_and_sample(
        &self,
        place: &mut Place,
    ) -> Result<(Arrived, Vec<ArrivalSample>), DemoError> {
        let Some(destination) = self.served.destination().filter(|_| self.setup.takes_samples)
        else {
            return Ok((self.receive(place)?, Vec::new()));
        };
        thread::scope(|scope| {
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

    /// Does what is said until the session is over.
    fn receive(&self, place: &mut Place) -> Result<Arrived, DemoError> {
        let mut guest = None;
        let result = self.receive_into(&mut guest, place);
        if !matches!(result, Ok(Ending::Finished)) {
            // A vCPU that waits for a page cannot be stopped: it ends with the process.
            std::mem::forget(guest.take());
        }
        match result? {
            Ending::NotHere => Ok(None),
            Ending::Finished => guest.map(Some).ok_or_else(|| {
                DemoError::Failed("the session was over before a guest came".to_owned())
            }),
        }
    }

    fn receive_into(
        &self,
        guest: &mut Option<Box<dyn Guest>>,
        place: &mut Place,
    ) -> Result<Ending, DemoError> {
        let mut is_running = false;
        loop {
            let running = guest.as_deref().filter(|_| is_running);
            match self.next(running)? {
                Happening::State(sections) => {
                    *guest = Some(place.restore(&sections)?);
                    self.served.ready()?;
                }
                Happening::Run => {
                    let guest = guest.as_mut().ok_or_else(|| {
                        DemoError::Failed("the guest was to run before it came".to_owned())
                    })?;
                    guest
                        .start()
                        .map_err(|error| DemoError::failed("cannot start the guest", &error))?;
                    self.line.say(&Message::Running { at_us: now_us() });
                    is_running = true;
                }
                Happening::AllArrived => {
                    self.line.say(&Message::AllArrived { at_us: now_us() });
                }
                Happening::Finished if is_running => return Ok(Ending::Finished),
                Happening::Finished => {
                    let what = "the session was over before the guest ran";
                    return Err(DemoError::Failed(what.to_owned()));
                }
                Happening::Attached => {
                    self.tell(running);
                    self.line.say(&Message::Attached);
                }
                Happening::NotHere(reason) => {
                    // The parent has heard it of the source, or this is a failure.
                    while !self.line.stays_at_source() {
                        self.line.command(self.setup.limit).map_err(|_| {
                            DemoError::Failed(format!("the guest must not run here: {reason}"))
                        })?;
                    }
                    return Ok(Ending::NotHere);
                }
                Happening::Other => {}
            }
        }
    }

    /// Tells how far things are.
    fn tell(&self, running: Option<&dyn Guest>) {
        self.line.say(&Message::Progress(Box::new(Progress {
            at_us: now_us(),
            operations: running.map(Guest::operations),
            stats: self.served.stats(),
        })));
    }

    /// What happens next; tells of the progress meanwhile.
    fn next(&self, running: Option<&dyn Guest>) -> Result<Happening, DemoError> {
        // Who has no count of pages sees by its guest that they come.
        let done = || {
            // Before the switchover nothing is complete, but much may come.
            let pages = self.served.destination().map(|it| {
                let stats = it.stats();
                (stats.pages_complete, stats.bytes_received)
            });
            (pages, running.map(Guest::operations))
        };
        let (mut before, mut deadline) = (done(), deadline(self.setup.limit));
        loop {
            if let Some(happening) = self.served.next(self.setup.progress_pause)? {
                return Ok(happening);
            }
            // A link that is paused, or down, tells nothing.
            if self.line.stays_at_source() {
                return Ok(Happening::NotHere("the source has said so".to_owned()));
            }
            if running.is_some() || self.setup.tells_of_passes {
                self.tell(running);
            }
            if let Some(failure) = running.and_then(Guest::failure) {
                return Err(DemoError::Failed(format!("the guest failed: {failure}")));
            }
            let now = done();
            let is_forward = if now.0.is_some() { now.0 > before.0 } else { now.1 > before.1 };
            if is_forward {
                before = now;
                deadline = self::deadline(self.setup.limit);
            }
            if Instant::now() > deadline {
                return Err(self.standstill());
            }
        }
    }

    fn standstill(&self) -> DemoError {
        let seconds = self.setup.limit.as_secs();
        DemoError::Failed(self.served.stats().map_or_else(
            || format!("nothing came from the page-client for {seconds} s"),
            |stats| {
                format!(
                    "no page came for {seconds} s; {} of {} are there, {} faults were answered",
                    stats.pages_complete, stats.pages_total, stats.latency.count
                )
            },
        ))
    }
}
