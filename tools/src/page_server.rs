//! `page-server`: serves the memory of a stopped guest, or of a snapshot, from files or from
//! what a VMM hands over.
//!
//! Answers for the command line, for what is said and reported, and for when to stop; how
//! memory is served is the engine's affair.
//!
//! Invariant: a destination that lacks pages is not left alone before a second signal.

pub(crate) mod failure;
pub mod memory;
mod migration;
pub mod options;
mod probing;
pub(crate) mod progress;
mod report;
mod snapshot;
pub(crate) mod wait;
mod waiting;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use afterimage::{
    Checksums, Endpoint, Listener, Plaintext, Release, ReleaseLedger, SnapshotServer, Source,
    SourceMemory, SourceOptions,
};
use clap::Parser;
use tracing_subscriber::EnvFilter;

pub use failure::Failure;
pub(crate) use failure::check_connect;
use memory::Access;
use migration::{Migration, Origin};
use options::Options;
pub use progress::Notice;
use progress::Progress;
use report::{Journal, Mode, Report};
use snapshot::Snapshot;
use wait::Waiter;
pub(crate) use waiting::listen_privately;
use waiting::{Doorway, Guest};

/// Runs the command with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    if options.probe {
        return probing::show(options.json);
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let report = serve(&options, Progress::new("page-server")).unwrap_or_else(|failure| {
        eprintln!("page-server: {failure}");
        Report::failed(mode(&options), &failure)
    });
    if options.json {
        println!("{}", report.to_json());
    }
    report.exit_code()
}

/// Does in another program what the command does, but tells `hear` what the command says
/// on the standard error.
///
/// Blocks until the destination has everything. SIGINT and SIGTERM are blocked for this
/// thread and for those that it starts, and taken as the command takes them.
///
/// # Errors
/// [`Failure`], also where signals have ended it before everything had arrived.
pub fn run(options: &Options, hear: impl Fn(Notice) + 'static) -> Result<(), Failure> {
    let report = serve(options, Progress::to(hear))?;
    if report.is_finished() {
        return Ok(());
    }
    Err(Failure::new("stopped by a signal before everything had arrived"))
}

const fn mode(options: &Options) -> Mode {
    if options.snapshot { Mode::Snapshot } else { Mode::Migration }
}

fn serve(options: &Options, progress: Progress) -> Result<Report, Failure> {
    let mode = mode(options);
    if options.silence <= options.heartbeat {
        return Err(Failure::usage("--silence must be longer than --heartbeat"));
    }
    let mut waiter = Waiter::new().map_err(Failure::of("wait for signals"))?;
    let journal = Journal::new(mode);
    // Everything that can be wrong with the command line shows before anything is served.
    let from_files = files(options)?.map(Arc::new);
    let door = options.handoff.as_ref().map(Doorway::open).transpose()?;
    let endpoint = endpoint(options)?;
    if options.release {
        progress.say(
            "--release: pages are freed here once they have arrived; if the destination dies after \
             it ran the guest, the guest is lost",
        );
    }
    if let Some(door) = &door {
        progress.say(&format!("a VMM can hand its guest over at {}", door.address()));
    }
    if let Endpoint::Listen(listener) = &endpoint {
        progress.listening(listener.address());
    }
    match (from_files, door) {
        (Some(memory), _) if mode == Mode::Snapshot => {
            snapshot(options, memory, endpoint, Parts { waiter, progress, journal })
        }
        (Some(memory), _) => {
            let parts = Parts { waiter, progress, journal };
            migrate(options, memory, endpoint, parts, |_, _, _| Ok((Vec::new(), Origin::Files)))
        }
        (None, Some(door)) => match door.wait(&mut waiter, &progress)? {
            None => Ok(journal.stopped()),
            Some(Guest { memory, offer }) => {
                let parts = Parts { waiter, progress, journal };
                migrate(options, memory, endpoint, parts, |session, progress, journal| {
                    waiting::take(offer, session, progress, journal)
                })
            }
        },
        (None, None) => Err(Failure::usage("give --memory, --layout or --handoff")),
    }
}

/// What both ways of serving need.
struct Parts {
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
}

type State = (Vec<afterimage::StateSection>, Origin);

/// Serves one destination. `state` gets the guest's state when a session is there.
fn migrate(
    options: &Options,
    memory: Arc<SourceMemory>,
    endpoint: Endpoint,
    parts: Parts,
    state: impl FnOnce(&str, &Progress, &mut Journal) -> Result<State, Failure>,
) -> Result<Report, Failure> {
    let Parts { waiter, progress, mut journal } = parts;
    let pages = memory.layout().page_count();
    if let Endpoint::Connect(address) = &endpoint {
        progress.say(&format!("connecting to {address}"));
    }
    let (source, events) = Source::start(memory, endpoint, source_options(options))
        .map_err(Failure::of("start serving"))?;
    let session = source.session().to_string();
    journal.begin(&session, pages);
    let (sections, origin) = state(&session, &progress, &mut journal)?;
    source.switch_over(sections).map_err(Failure::of("switch over"))?;
    Migration { source, events, waiter, progress, journal, origin }.run()
}

fn snapshot(
    options: &Options,
    memory: Arc<SourceMemory>,
    endpoint: Endpoint,
    parts: Parts,
) -> Result<Report, Failure> {
    let Parts { waiter, progress, mut journal } = parts;
    let Endpoint::Listen(listener) = endpoint else {
        return Err(Failure::usage("--snapshot needs --listen"));
    };
    let pages = memory.layout().page_count();
    let most = options.max_destinations;
    let (server, events) = SnapshotServer::start(memory, listener, source_options(options), most)
        .map_err(Failure::of("start serving"))?;
    journal.begin(&server.session().to_string(), pages);
    Snapshot::new(server, events, waiter, progress, journal).run()
}

fn files(options: &Options) -> Result<Option<SourceMemory>, Failure> {
    let placed = match &options.layout {
        Some(path) => memory::read_layout(path)?,
        None if options.memory.is_empty() => return Ok(None),
        None => memory::place(&options.memory, options.hole)?,
    };
    let access = if options.release { Access::Release } else { Access::Read };
    Ok(Some(memory::map(&placed, access)?))
}

fn endpoint(options: &Options) -> Result<Endpoint, Failure> {
    let plaintext = plaintext(options);
    match (&options.listen, &options.connect) {
        (Some(address), _) => {
            let listener = Listener::bind(address, plaintext)
                .map_err(|error| Failure::listen(address, &error))?;
            Ok(Endpoint::Listen(listener))
        }
        (None, Some(address)) => {
            failure::check_connect(address, plaintext)?;
            Ok(Endpoint::Connect(address.clone()))
        }
        (None, None) => Err(Failure::usage("give --listen or --connect")),
    }
}

fn plaintext(options: &Options) -> Plaintext {
    if options.insecure_plaintext { Plaintext::Anywhere } else { Plaintext::LoopbackOnly }
}

fn source_options(options: &Options) -> SourceOptions {
    let mut source = SourceOptions::default();
    source.streams = options.streams;
    source.background = options.bandwidth.into();
    source.polling = options.polling;
    source.heartbeat = options.heartbeat;
    source.silence = options.silence;
    source.checksums = if options.checksums { Checksums::On } else { Checksums::Off };
    source.plaintext = plaintext(options);
    if options.release {
        source.release = Release::Free(ReleaseLedger::volatile());
    }
    source
}

/// Microseconds since `start`.
fn micros_since(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}
