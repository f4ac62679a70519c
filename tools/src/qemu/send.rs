//! The source's side: the guest is stopped, its device state goes, and its memory is served until
//! the destination has all of it.
//!
//! Invariant: the guest goes on here only after the engine has said that it is this side's again,
//! and is stopped only while a destination is there to take it.

mod ending;
mod sending;

use std::sync::{Arc, Mutex};

use afterimage::{
    Checksums, Endpoint, Listener, Plaintext, Source, SourceMemory, SourceOptions as EngineOptions,
};

use super::companion::Companion;
use super::machine::Machine;
use super::options::SourceOptions;
use super::past::{Past, Record};
use super::report::{Journal, Report};
use super::{precopy, ram};
use crate::control::{Desk, GoingBack, Phase, SourceControl, Switching};
use crate::page_server::Failure;
use crate::page_server::failure::check_connect;
use crate::page_server::memory::{self, Access};
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;
use ending::{over, resume_only};
use sending::{At, Due, Sending};

/// What the source's side is made of.
pub(super) struct Parts {
    pub(super) waiter: Waiter,
    pub(super) progress: Progress,
    pub(super) journal: Journal,
    pub(super) desk: Desk,
    pub(super) record: Record,
    pub(super) machine: Machine,
    /// Where one process is both sides.
    pub(super) companion: Option<Companion>,
}

/// Gives the guest away, or goes on with that.
pub(super) fn run(options: &SourceOptions, mut parts: Parts) -> Result<Report, Failure> {
    let past = parts.record.past();
    // Of a session that is over nothing is left to be undone.
    if past != Past::Over
        && let Some(settings) = parts.record.settings()
    {
        settings.were(&mut parts.machine);
    }
    match past {
        Past::Open | Past::Over => {
            parts.machine.check_can_leave()?;
        }
        Past::TakenBack(vcpus) => return Ok(resume_only(parts, vcpus)),
        Past::Interrupted(_) => {}
        Past::Given | Past::Complete => check_stands_still(&mut parts.machine)?,
        Past::Finished | Past::Fenced => return Ok(over(parts, past, options)),
    }
    let before = if past == Past::Over { None } else { parts.record.before() };
    let memory = memory_of(options, &parts.machine)?;
    let pages = memory.layout().page_count();
    let bytes = memory.layout().bytes();
    let mut engine = engine_options(options);
    // Only a guest that still runs here.
    if matches!(past, Past::Open | Past::Over) {
        engine.precopy = precopy::begin(options, &parts.machine, memory.layout())?;
    }
    let due = if engine.precopy.is_some() { Due::AfterPasses } else { Due::Now };
    parts.record.begin(memory.layout(), &mut engine)?;
    let endpoint = endpoint(options, &parts.progress)?;
    let (source, events) =
        Source::start(memory, endpoint, engine).map_err(Failure::of("start serving"))?;
    let source = Arc::new(source);
    let session = source.session().to_string();
    parts.desk.name(&session);
    parts.journal.begin(session);
    let phase = if past == Past::Given { Phase::Given } else { Phase::Connecting };
    parts.desk.begin(phase, bytes, Arc::new(controlled(options, &source, pages)));
    let mut sending = Sending {
        is_armed: parts.companion.is_none(),
        parts,
        source,
        events,
        ready_within: options.ready_within,
        pages,
        at: At::Here,
        before,
        due,
        is_attached: false,
        stopped: None,
        reason: None,
        signals: 0,
        farewell: None,
        has_unreadable: false,
    };
    sending.go_on_from(past)?;
    let outcome = sending.until_the_end()?;
    Ok(sending.close(outcome, options))
}

/// Whose guest is elsewhere must not run it.
fn check_stands_still(machine: &mut Machine) -> Result<(), Failure> {
    let status = machine.status()?;
    if status == "running" {
        return Err(Failure::new(format!(
            "the guest runs in {}, although it was given to the destination: somebody has said cont \
             there; stop it at once, it may run twice",
            machine.qmp.name()
        )));
    }
    Ok(())
}

fn memory_of(options: &SourceOptions, machine: &Machine) -> Result<Arc<SourceMemory>, Failure> {
    let pieces = ram::pieces(machine, &options.memory)?;
    let placed = memory::place(&pieces, options.hole)?;
    Ok(Arc::new(memory::map(&placed, Access::Read)?))
}

fn plaintext(options: &SourceOptions) -> Plaintext {
    if options.insecure_plaintext { Plaintext::Anywhere } else { Plaintext::LoopbackOnly }
}

fn endpoint(options: &SourceOptions, progress: &Progress) -> Result<Endpoint, Failure> {
    let plaintext = plaintext(options);
    match (&options.listen, &options.connect) {
        (Some(address), _) => {
            let listener = Listener::bind(address, plaintext)
                .map_err(|error| Failure::listen(address, &error))?;
            progress.listening(listener.address());
            Ok(Endpoint::Listen(listener))
        }
        (None, Some(address)) => {
            check_connect(address, plaintext)?;
            progress.say(&format!("connecting to {address}"));
            Ok(Endpoint::Connect(address.clone()))
        }
        (None, None) => Err(Failure::usage("give --listen or --connect")),
    }
}

fn engine_options(options: &SourceOptions) -> EngineOptions {
    let mut engine = EngineOptions::default();
    engine.streams = options.streams;
    engine.background = options.bandwidth.into();
    engine.precopy_background = options.precopy_bandwidth.map(Into::into);
    engine.checksums = if options.checksums { Checksums::On } else { Checksums::Off };
    engine.plaintext = plaintext(options);
    engine
}

fn controlled(options: &SourceOptions, source: &Arc<Source>, pages: u64) -> SourceControl {
    SourceControl {
        source: Arc::clone(source),
        pages,
        plaintext: plaintext(options),
        streams: options.streams,
        bandwidth: Mutex::new(options.bandwidth),
        going_back: GoingBack::Possible,
        switching: Switching::Vmm,
        before_run: None,
    }
}
