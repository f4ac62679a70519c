//! The source's process: it has a running guest, and gives it away.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage::{
    Checksums, Endpoint, Listener, Plaintext, Precopy, Source, SourceEvent, SourceOptions,
};

use super::error::DemoError;
use super::hearing::{Hearing, NotMoved};
use super::messages::{Line, Message, Setup, Stayed, Step, Stopped, deadline, now_us};
use super::options::{HoldPoint, Role};
use super::precopy::{Cause, Pass, PassesWanted};
use super::report::hex;
use super::trial::{check, corrupt_one_byte, run_a_round};
use crate::control::{
    Control, Desk, GoingBack, Happening, Hold, Identity, Phase, SourceControl, Switching,
};
use crate::guest::{Guest, GuestKind, GuestSpec, ThreadsGuest, TrackerKind, digest, init_ram};
use crate::microvm::KvmGuest;
use crate::migrate;
use crate::ram::GuestRam;

/// How often a source that is held looks whether it still is.
const LOOK: Duration = Duration::from_millis(5);

/// Plays the source.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let Running { ram, spec, mut guest, precopy } = boot(line, setup)?;
    // Ends before the memory goes, with the last handle of the source.
    let control = driven(setup, Role::Source)?;
    let served = serve(setup, &ram, line, precopy, &control)?;
    let mut halted_at_us = None;
    match give_away(line, setup, &served, &mut *guest, &mut halted_at_us) {
        Ok(()) => {}
        Err(NotMoved::TakenBack) => {
            go_on(line, setup, &mut *guest, halted_at_us)?;
            control.close("reclaimed");
            return Ok(());
        }
        Err(NotMoved::Failed(error)) => return Err(error),
    }
    // Only now: to read holes fills them, and the destination needed the processor.
    let untouched = spec.worked_pages()..spec.geometry().pages;
    line.say(&Message::Served { sha256: hex(&digest(&ram, &spec, untouched)) });
    control.close("finished");
    Ok(())
}

/// Moves a running guest. `halted_at_us` is when its vCPUs were stopped, once they were.
fn give_away(
    line: &Line,
    setup: &Setup,
    served: &Served,
    guest: &mut dyn Guest,
    halted_at_us: &mut Option<u64>,
) -> Result<(), NotMoved> {
    let Served { heard, desk, hold, .. } = served;
    if hold.is_none() {
        run_for_a_while(guest, setup.limit)?;
    }
    heard.wait(setup.limit, "a destination connects", |event| {
        matches!(event, SourceEvent::Attached(_))
    })?;
    let cause = run_until_due(line, setup, heard)?;
    if let Some(hold) = hold {
        wait_for_leave(hold, heard, desk, setup.limit)?;
    }
    *halted_at_us = Some(now_us());
    switch_over(line, setup, served, guest, cause)?;
    if setup.holds(HoldPoint::BeforeRun) {
        heard.wait(setup.limit, "somebody asks for continue at the control socket", |event| {
            *event == SourceEvent::Given
        })?;
    }
    heard.wait(setup.limit, "the destination has everything", |event| {
        *event == SourceEvent::Finished
    })?;
    Ok(())
}

/// Lets a guest that was taken back run on here, as if nothing had happened, and verifies it.
fn go_on(
    line: &Line,
    setup: &Setup,
    guest: &mut dyn Guest,
    halted_at_us: Option<u64>,
) -> Result<(), DemoError> {
    let taken_back_at_us = now_us();
    let rounds_before = guest.rounds();
    if halted_at_us.is_some() {
        guest.start().map_err(|error| DemoError::failed("the guest does not go on", &error))?;
    }
    let blackout_us = halted_at_us.map(|halted| now_us().saturating_sub(halted));
    line.say(&Message::Step(Step::GoesOnAtSource));
    let operations = guest.operations();
    run_a_round(guest, operations, setup.limit)?;
    let state =
        guest.stop().map_err(|error| DemoError::failed("the guest did not stop", &error))?;
    line.say(&Message::Step(Step::VerifiesAtSource));
    if setup.corrupt_one_byte {
        corrupt_one_byte(guest.ram(), &state);
    }
    let spec = state.spec();
    let untouched = spec.worked_pages()..spec.geometry().pages;
    line.say(&Message::Stayed(Box::new(Stayed {
        verified: check(guest, &state),
        taken_back_at_us,
        blackout_us,
        rounds_before,
        rounds: guest.rounds(),
        sha256: hex(&digest(guest.ram(), spec, untouched)),
    })));
    Ok(())
}

/// The control socket of a role.
pub(super) fn driven(setup: &Setup, role: Role) -> Result<Control, DemoError> {
    let identity = Identity { tool: "demo", role: role.name() };
    Control::open(&setup.control(role), identity)
        .map_err(|error| DemoError::failed("cannot be driven", &error))
}

/// Lets somebody at the control socket decide when it goes on.
fn wait_for_leave(
    hold: &Hold,
    heard: &Hearing,
    desk: &Desk,
    limit: Duration,
) -> Result<(), NotMoved> {
    let what = "somebody asks for switchover at the control socket";
    hold.begin();
    desk.note(Happening::held("before_switchover"));
    let until = deadline(limit);
    while !hold.is_over() {
        if Instant::now() >= until {
            let what = format!("waited {} s until {what}", limit.as_secs());
            return Err(DemoError::Failed(what).into());
        }
        heard.next(Instant::now() + LOOK, what)?;
    }
    desk.note(Happening::released());
    Ok(())
}

/// Lets the guest run while its memory is sent, until it is time to stop it.
fn run_until_due(line: &Line, setup: &Setup, heard: &Hearing) -> Result<Option<Cause>, NotMoved> {
    let Some(precopy) = &setup.precopy else { return Ok(None) };
    line.say(&Message::Step(Step::SendsPasses));
    let mut until = deadline(setup.limit);
    let mut last: Option<Pass> = None;
    while let Some((_, event)) = heard.next(until, "it is time to stop the guest")? {
        match event {
            SourceEvent::PassEnded(report) => {
                line.say(&Message::Pass(*last.insert(Pass::of(&report))));
                // Passes that do not converge would go on for ever.
                if precopy.passes != PassesWanted::Converged {
                    until = deadline(setup.limit);
                }
            }
            SourceEvent::SwitchoverDue(cause) => return Ok(Some(Cause::of(cause))),
            _ => {}
        }
    }
    let last = last.map_or_else(|| "no pass has ended".to_owned(), |pass| pass.to_string());
    Err(DemoError::Failed(format!(
        "it was not time to stop the guest within {} s ({last}), and it still runs at the source: \
         use --passes auto, which switches over all the same, or a larger --precopy-bandwidth",
        setup.limit.as_secs()
    ))
    .into())
}

/// Stops the guest, and gives it away.
fn switch_over(
    line: &Line,
    setup: &Setup,
    Served { source, heard, .. }: &Served,
    guest: &mut dyn Guest,
    cause: Option<Cause>,
) -> Result<(), NotMoved> {
    let stops = |error| DemoError::failed("the guest did not stop", &error);
    let gives = |error| heard.refused(setup.limit, "cannot switch over", &error);
    let at_us = now_us();
    guest.halt().map_err(stops)?;
    let halted_at_us = now_us();
    source.stopped().map_err(gives)?;
    let sections = migrate::state_sections(&guest.save().map_err(stops)?);
    let state_bytes = sections.iter().map(|section| section.bytes.len() as u64).sum();
    source.switch_over(sections).map_err(gives)?;
    // What follows does not lengthen the blackout.
    let told_at_us =
        heard.wait(setup.limit, "the engine knows that the guest is stopped", |it| {
            *it == SourceEvent::Stopped
        })?;
    line.say(&Message::Stopped(Stopped {
        at_us,
        rounds: guest.rounds(),
        state_bytes,
        event_us: Some(told_at_us.saturating_sub(halted_at_us)),
        cause,
    }));
    match guest.failure() {
        None => Ok(()),
        Some(failure) => {
            let what = format!("the guest failed before it moved: {failure}");
            Err(DemoError::Failed(what).into())
        }
    }
}

/// A guest that runs.
pub(super) struct Running {
    pub(super) ram: Arc<GuestRam>,
    pub(super) spec: GuestSpec,
    pub(super) guest: Box<dyn Guest>,
    /// What is to be done before it stops, if anything.
    pub(super) precopy: Option<Precopy>,
}

/// Fills memory, and lets a guest run in it.
pub(super) fn boot(line: &Line, setup: &Setup) -> Result<Running, DemoError> {
    let ram = allocate(setup)?;
    let spec = spec(&ram, setup)?;
    line.say(&Message::Step(Step::FillsMemory));
    init_ram(&ram, &spec);
    let mut guest = build(setup, &ram, &spec)?;
    // Some trackers must be known to the vCPUs before they run.
    let precopy = precopy(setup, &mut *guest)?;
    guest.start().map_err(|error| DemoError::failed("cannot start the guest", &error))?;
    line.say(&Message::Step(Step::RunsGuest));
    Ok(Running { ram, spec, guest, precopy })
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
            let has_rings = setup.precopy.is_some_and(|it| it.tracker == TrackerKind::Ring);
            let guest = if has_rings {
                KvmGuest::with_dirty_rings(ram.clone(), spec.clone(), RING_ENTRIES)
            } else {
                KvmGuest::new(ram.clone(), spec.clone())
            };
            guest.map(|guest| Box::new(guest) as Box<_>)
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
    precopy: Option<Precopy>,
    control: &Control,
) -> Result<Served, DemoError> {
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
    options.precopy = precopy;
    options.hold = setup.holds(HoldPoint::BeforeRun);
    options.precopy_background =
        setup.precopy.and_then(|precopy| precopy.bandwidth).map(Into::into);
    let (pages, bytes) = (memory.layout().page_count(), memory.layout().bytes());
    let (source, events) = Source::start(Arc::new(memory), Endpoint::Listen(listener), options)
        .map_err(|error| DemoError::failed("cannot start the source", &error))?;
    let hold = setup.holds(HoldPoint::BeforeSwitchover).then(Arc::<Hold>::default);
    let before_run = setup.holds(HoldPoint::BeforeRun).then(Arc::<Hold>::default);
    let source = Arc::new(source);
    let subject = SourceControl {
        source: Arc::clone(&source),
        pages,
        plaintext: Plaintext::LoopbackOnly,
        streams: setup.streams,
        bandwidth: Mutex::new(setup.bandwidth),
        going_back: GoingBack::ByAgreement(
            "the demo watches its destination, which lives: a fence would let the guest run twice; \
             use cancel",
        ),
        switching: hold.clone().map_or(Switching::Vmm, Switching::VmmWithLeave),
        before_run: before_run.clone(),
    };
    let desk = control.desk();
    desk.name(&source.session().to_string());
    desk.begin(Phase::Connecting, bytes, Arc::new(subject));
    line.say(&Message::Listening(address));
    let heard = Hearing::start(events, desk.clone(), before_run)?;
    Ok(Served { source, heard, desk, hold })
}

/// A source at work.
struct Served {
    source: Arc<Source>,
    heard: Hearing,
    desk: Desk,
    hold: Option<Arc<Hold>>,
}

/// What the engine is to do before the guest stops, if anything.
fn precopy(setup: &Setup, guest: &mut dyn Guest) -> Result<Option<Precopy>, DemoError> {
    let Some((wanted, passes)) =
        setup.precopy.and_then(|wanted| Some((wanted, wanted.passes.passes()?)))
    else {
        return Ok(None);
    };
    let tracker =
        guest.tracker(wanted.tracker).map_err(|error| DemoError::lacking("no precopy", &error))?;
    let mut precopy = Precopy::new(tracker);
    precopy.passes = passes;
    Ok(Some(precopy))
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

/// Of each vCPU's dirty ring: 64 KiB.
const RING_ENTRIES: u32 = 4096;
