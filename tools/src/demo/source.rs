//! The source's process: it has a running guest, and gives it away.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage::{
    Checksums, Endpoint, Events, Listener, NoEvent, Plaintext, Source, SourceEvent, SourceOptions,
};

use super::error::DemoError;
use super::messages::{Line, Message, Setup, Step, Stopped, deadline, now_us};
use super::options::Role;
use super::report::hex;
use crate::control::{
    Control, Desk, GoingBack, Happening, Hold, Identity, Phase, SourceControl, Switching,
};
use crate::guest::{Guest, GuestKind, GuestSpec, ThreadsGuest, digest, init_ram};
use crate::microvm::KvmGuest;
use crate::migrate;
use crate::ram::GuestRam;

/// How often a source that is held looks whether it still is.
const LOOK: Duration = Duration::from_millis(5);

/// Plays the source.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let Running { ram, spec, mut guest } = boot(line, setup)?;
    // Ends before the memory goes, with the last handle of the source.
    let control = driven(setup, Role::Source)?;
    let (source, told) = serve(setup, &ram, line, &control)?;
    if !setup.holds {
        run_for_a_while(&mut *guest, setup.limit)?;
    }
    told.wait_for(setup.limit, "a destination connects", |event| {
        matches!(event, SourceEvent::Attached(_))
    })?;
    if let Some(hold) = told.hold.clone() {
        told.wait_for_leave(&hold, setup.limit)?;
    }

    let at_us = now_us();
    let state =
        guest.stop().map_err(|error| DemoError::failed("the guest did not stop", &error))?;
    let sections = migrate::state_sections(&state);
    let state_bytes = sections.iter().map(|section| section.bytes.len() as u64).sum();
    source
        .switch_over(sections)
        .map_err(|error| DemoError::failed("cannot switch over", &error))?;
    // What follows does not lengthen the blackout.
    line.say(&Message::Stopped(Stopped { at_us, rounds: guest.rounds(), state_bytes }));
    if let Some(failure) = guest.failure() {
        return Err(DemoError::Failed(format!("the guest failed before it moved: {failure}")));
    }
    told.wait_for(setup.limit, "the destination has everything", |event| {
        *event == SourceEvent::Finished
    })?;
    // Only now: to read holes fills them, and the destination needed the processor.
    let untouched = spec.worked_pages()..spec.geometry().pages;
    line.say(&Message::Served { sha256: hex(&digest(&ram, &spec, untouched)) });
    control.close("finished");
    Ok(())
}

/// The control socket of a role.
pub(super) fn driven(setup: &Setup, role: Role) -> Result<Control, DemoError> {
    let identity = Identity { tool: "demo", role: role.name() };
    Control::open(&setup.control(role), identity)
        .map_err(|error| DemoError::failed("cannot be driven", &error))
}

/// A guest that runs.
pub(super) struct Running {
    pub(super) ram: Arc<GuestRam>,
    pub(super) spec: GuestSpec,
    pub(super) guest: Box<dyn Guest>,
}

/// Fills memory, and lets a guest run in it.
pub(super) fn boot(line: &Line, setup: &Setup) -> Result<Running, DemoError> {
    let ram = allocate(setup)?;
    let spec = spec(&ram, setup)?;
    line.say(&Message::Step(Step::FillsMemory));
    init_ram(&ram, &spec);
    let mut guest = build(setup, &ram, &spec)?;
    guest.start().map_err(|error| DemoError::failed("cannot start the guest", &error))?;
    line.say(&Message::Step(Step::RunsGuest));
    Ok(Running { ram, spec, guest })
}

/// Guest memory as the setup wants it.
pub(super) fn allocate(setup: &Setup) -> Result<Arc<GuestRam>, DemoError> {
    GuestRam::allocate(setup.memory_bytes, setup.backing)
        .map(Arc::new)
        .map_err(|error| DemoError::lacking("no guest memory", &error))
}

/// What the guest does.
fn spec(ram: &GuestRam, setup: &Setup) -> Result<GuestSpec, DemoError> {
    Ok(GuestSpec::new(ram, setup.workload, setup.vcpus)
        .map_err(|error| DemoError::failed("no such guest", &error))?
        .with_worked_fraction(setup.worked_fraction)
        .with_zero_fraction(setup.zero_fraction))
}

fn build(
    setup: &Setup,
    ram: &Arc<GuestRam>,
    spec: &GuestSpec,
) -> Result<Box<dyn Guest>, DemoError> {
    let built: Result<Box<dyn Guest>, _> = match setup.guest {
        GuestKind::Kvm => {
            KvmGuest::new(ram.clone(), spec.clone()).map(|guest| Box::new(guest) as Box<_>)
        }
        GuestKind::Threads => {
            ThreadsGuest::new(ram.clone(), spec.clone()).map(|guest| Box::new(guest) as Box<_>)
        }
    };
    built.map_err(|error| DemoError::failed("cannot build the guest", &error))
}

/// Starts the engine, and says where it listens.
fn serve(
    setup: &Setup,
    ram: &Arc<GuestRam>,
    line: &Line,
    control: &Control,
) -> Result<(Arc<Source>, Told), DemoError> {
    // SAFETY: `run` keeps the RAM until after the source has been dropped, and stops the
    // guest, the only writer, before it switches over.
    let memory = unsafe { migrate::source_memory(ram) }
        .map_err(|error| DemoError::failed("cannot serve guest memory", &error))?;
    let address =
        setup.listen.parse().map_err(|error| DemoError::failed("cannot listen", &error))?;
    let listener = Listener::bind(&address, Plaintext::LoopbackOnly)
        .map_err(|error| DemoError::failed(&format!("cannot listen at {address}"), &error))?;
    let address = listener.address().to_string();
    let mut options = SourceOptions::default();
    options.streams = setup.streams;
    options.background = setup.bandwidth.into();
    options.checksums = checksums(setup);
    let (pages, bytes) = (memory.layout().page_count(), memory.layout().bytes());
    let (source, events) = Source::start(Arc::new(memory), Endpoint::Listen(listener), options)
        .map_err(|error| DemoError::failed("cannot start the source", &error))?;
    let hold = setup.holds.then(Arc::<Hold>::default);
    let source = Arc::new(source);
    let subject = SourceControl {
        source: Arc::clone(&source),
        pages,
        plaintext: Plaintext::LoopbackOnly,
        streams: setup.streams,
        bandwidth: Mutex::new(setup.bandwidth),
        going_back: GoingBack::Impossible(
            "the demo does not run its guest at the source again: interrupt the demo instead",
        ),
        switching: hold.clone().map_or(Switching::Vmm, Switching::VmmWithLeave),
    };
    let desk = control.desk();
    desk.name(&source.session().to_string());
    desk.begin(Phase::Connecting, bytes, Arc::new(subject));
    line.say(&Message::Listening(address));
    Ok((source, Told { events, desk, hold }))
}

/// Whether frames carry checksums.
pub(super) fn checksums(setup: &Setup) -> Checksums {
    if setup.checksums { Checksums::On } else { Checksums::Off }
}

/// Lets the guest go round once and a half, so that it is stopped in the midst of its work.
pub(super) fn run_for_a_while(guest: &mut dyn Guest, limit: Duration) -> Result<(), DemoError> {
    let round = guest.spec().worked_pages() * u64::from(guest.spec().vcpus());
    let target = round + round / 2;
    if guest.wait_for_operations(target, limit) {
        return Ok(());
    }
    Err(DemoError::Failed(guest.failure().map_or_else(
        || format!("the guest did less than {target} operations in {} s", limit.as_secs()),
        |failure| format!("the guest failed before it moved: {failure}"),
    )))
}

/// What the engine tells, and somebody at the control socket.
struct Told {
    events: Events<SourceEvent>,
    desk: Desk,
    hold: Option<Arc<Hold>>,
}

impl Told {
    /// Takes events until one is the awaited; an end of the migration is an error.
    fn wait_for(
        &self,
        limit: Duration,
        what: &str,
        is_awaited: impl Fn(&SourceEvent) -> bool,
    ) -> Result<(), DemoError> {
        let deadline = deadline(limit);
        loop {
            match self.events.next_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    self.take(&event, what)?;
                    if is_awaited(&event) {
                        return Ok(());
                    }
                }
                Err(why) => return Err(not_in_time(why, limit, what)),
            }
        }
    }

    /// Takes events until somebody at the control socket lets the migration go on.
    fn wait_for_leave(&self, hold: &Hold, limit: Duration) -> Result<(), DemoError> {
        let what = "somebody asks for switchover at the control socket";
        hold.begin();
        self.desk.note(Happening::held("before_switchover"));
        let deadline = deadline(limit);
        while !hold.is_over() {
            match self.events.next_timeout(LOOK) {
                Ok(event) => self.take(&event, what)?,
                Err(NoEvent::NotInTime) if Instant::now() < deadline => {}
                Err(why) => return Err(not_in_time(why, limit, what)),
            }
        }
        self.desk.note(Happening::released());
        Ok(())
    }

    fn take(&self, event: &SourceEvent, what: &str) -> Result<(), DemoError> {
        self.desk.note(event);
        match event {
            SourceEvent::Reclaimed | SourceEvent::ReclaimDenied | SourceEvent::PersistFailed => {
                let what = format!("while waiting until {what}, the engine said {event:?}");
                Err(DemoError::Failed(what))
            }
            _ => {
                tracing::info!(?event, "source");
                Ok(())
            }
        }
    }
}

fn not_in_time(why: NoEvent, limit: Duration, what: &str) -> DemoError {
    DemoError::Failed(match why {
        NoEvent::NotInTime => format!("waited {} s until {what}", limit.as_secs()),
        NoEvent::Ended => format!("the engine ended before it happened that {what}"),
    })
}
