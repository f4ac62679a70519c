//! `page-server`: serves the memory of a stopped guest, or of a snapshot, from files or from
//! what a VMM hands over.
//!
//! Answers for the command line, for what is said and reported, and for when to stop; how
//! memory is served is the engine's affair.
//!
//! Invariant: a destination that lacks pages is not left alone before a second signal.

pub(crate) mod failure;
mod fence;
pub(crate) mod happened;
mod holding;
pub mod memory;
mod migration;
pub mod options;
mod probing;
pub(crate) mod progress;
mod report;
mod snapshot;
mod survival;
pub(crate) mod wait;
mod waiting;

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use afterimage::{
    AfterRefusal, Checksums, Endpoint, Listener, Plaintext, Release, ReleaseLedger, SnapshotServer,
    Source, SourceMemory, SourceOptions, SourceOwnership, SourceRecord,
};
use clap::Parser;

use crate::control::{
    Control, Desk, GoingBack, Identity, Phase, SnapshotControl, SourceControl, Switching,
};
use crate::handoff::Offer;
use crate::logging;
pub use failure::Failure;
pub(crate) use failure::check_connect;
use holding::Kept;
use memory::{Access, Image};
use migration::{Migration, Origin};
use options::Options;
pub use progress::Notice;
use progress::Progress;
pub(crate) use report::Counts as PageCounts;
use report::{Counts, Journal, Mode, Outcome, Report};
use snapshot::Snapshot;
use survival::{Memory, Past, Survival};
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
    logging::start("warn");
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
    if options.silence <= options.heartbeat {
        return Err(Failure::usage("--silence must be longer than --heartbeat"));
    }
    let waiter = Waiter::new().map_err(Failure::of("wait for signals"))?;
    let journal = Journal::new(mode(options));
    if options.fence {
        return fence::fence(options, &progress, journal);
    }
    let role = if options.snapshot { "snapshot" } else { "source" };
    let control = Control::open(&options.control, Identity { tool: "page-server", role })?;
    let report = serve_at(options, Parts { waiter, progress, journal, desk: control.desk() })?;
    control.close(report.outcome().name());
    Ok(report)
}

fn serve_at(options: &Options, parts: Parts) -> Result<Report, Failure> {
    let Parts { mut waiter, progress, journal, desk } = parts;
    let mode = mode(options);
    // Everything that can be wrong with the command line shows before anything is served.
    let mut survival = Survival::open(options)?;
    match survival.past()? {
        Past::Open => {}
        Past::Fenced => {
            let parts = Parts { waiter, progress, journal, desk };
            return fence::refuse(&survival, listen(options, &parts.progress)?, options, parts);
        }
        Past::Complete if survival.can_say_bye(options, &progress) => {}
        Past::Complete | Past::Finished => {
            return Ok(finished_before(survival, options, &progress, journal));
        }
    }
    let from_files = files(options)?;
    survival.connect(options)?;
    let kept = survival.fetch(options)?;
    if options.release {
        progress.say(
            "--release: pages are freed here once they have arrived; if the destination dies after \
             it ran the guest, the guest is lost",
        );
    }
    let door = options.handoff.as_ref().filter(|_| kept.is_none());
    let door = door.map(Doorway::open).transpose()?;
    if let Some(door) = &door {
        progress.say(&format!("a VMM can hand its guest over at {}", door.address()));
    }
    let endpoint = listen(options, &progress)?;
    let (memory, supply) = match (from_files, kept, door) {
        (Some(image), ..) if mode == Mode::Snapshot => {
            return snapshot(options, image, endpoint, Parts { waiter, progress, journal, desk });
        }
        (Some(image), ..) => (Arc::new(image.memory), Supply::Files),
        (None, Some(kept), _) => waiting::map_kept(kept)?,
        (None, None, Some(door)) => match door.wait(&mut waiter, &progress)? {
            None => return Ok(journal.stopped()),
            Some(Guest { memory, offer }) => (memory, Supply::Offered(offer)),
        },
        (None, None, None) => {
            return Err(Failure::usage("give --memory, --layout, --handoff or --keeper"));
        }
    };
    migrate(options, memory, supply, endpoint, survival, Parts { waiter, progress, journal, desk })
}

/// The address, which is said where it is listened on.
fn listen(options: &Options, progress: &Progress) -> Result<Endpoint, Failure> {
    let endpoint = endpoint(options)?;
    if let Endpoint::Listen(listener) = &endpoint {
        progress.listening(listener.address());
    }
    Ok(endpoint)
}

/// A session that was over before this process was started.
fn finished_before(
    mut survival: Survival,
    options: &Options,
    progress: &Progress,
    mut journal: Journal,
) -> Report {
    let session = survival.record().map(|record| record.session.to_string()).unwrap_or_default();
    journal.begin(&session, 0);
    progress.say(&format!(
        "session {session} is finished: the destination has everything, and there is nothing to \
         do; for another guest give another --state"
    ));
    // The process before this one may have died before it could.
    survival.tidy(options, progress);
    journal.close(Outcome::Finished, Counts::default(), Vec::new())
}

/// Where the guest comes from.
enum Supply {
    /// Files; the state is the VMM's affair.
    Files,
    /// A VMM that waits to hear that it was taken.
    Offered(Offer),
    /// The keeper, from a process before this one.
    Kept(Kept),
}

/// What both ways of serving need.
struct Parts {
    waiter: Waiter,
    progress: Progress,
    journal: Journal,
    desk: Desk,
}

type State = (Vec<afterimage::StateSection>, Origin);

/// Serves one destination.
fn migrate(
    options: &Options,
    memory: Arc<SourceMemory>,
    supply: Supply,
    endpoint: Endpoint,
    mut survival: Survival,
    parts: Parts,
) -> Result<Report, Failure> {
    let Parts { waiter, progress, mut journal, desk } = parts;
    let (pages, bytes) = (memory.layout().page_count(), memory.layout().bytes());
    let mut source_options = source_options(options);
    let which = if matches!(supply, Supply::Offered(_)) { Memory::New } else { Memory::Same };
    let before = survival.begin(memory.layout(), which, &mut source_options)?;
    if let Endpoint::Connect(address) = &endpoint {
        progress.say(&format!("connecting to {address}"));
    }
    let (source, events) =
        Source::start(memory, endpoint, source_options).map_err(Failure::of("start serving"))?;
    let source = Arc::new(source);
    let session = source.session().to_string();
    journal.begin(&session, pages);
    desk.name(&session);
    let (sections, origin) = match supply {
        Supply::Files => {
            survival.note_files(options, &progress);
            (Vec::new(), Origin::Files)
        }
        Supply::Offered(offer) => {
            waiting::take(offer, &session, &mut survival, &progress, &mut journal)?
        }
        Supply::Kept(kept) => waiting::resume(kept, &session, &mut survival, &progress)?,
    };
    let ownership = before.map_or(SourceOwnership::Owner, |record| record.ownership);
    if let Some(record) = before {
        journal.note("resumed", None);
        progress.say(&resumed(&record));
    }
    // One that is over needs no state, and takes none.
    if ownership != SourceOwnership::Finished {
        source.switch_over(sections).map_err(Failure::of("switch over"))?;
    }
    let subject = controlled(options, &source, pages, origin);
    let phase = match ownership {
        SourceOwnership::Given => Phase::Given,
        SourceOwnership::Finished => Phase::Finished,
        _ => Phase::Connecting,
    };
    desk.begin(phase, bytes, Arc::new(subject));
    Migration { source, events, waiter, progress, journal, desk, origin, survival, ownership }.run()
}

/// What can be asked for at the control socket.
fn controlled(
    options: &Options,
    source: &Arc<Source>,
    pages: u64,
    origin: Origin,
) -> SourceControl {
    SourceControl {
        source: Arc::clone(source),
        pages,
        plaintext: plaintext(options),
        streams: options.streams,
        bandwidth: Mutex::new(options.bandwidth),
        going_back: match origin {
            Origin::Files => GoingBack::Possible,
            Origin::HandedOver => GoingBack::Impossible(
                "the VMM that ran the guest has given it away, and here it cannot run: end \
                 page-server, and declare the destination dead with page-server --fence, which \
                 says where the guest is",
            ),
        },
        switching: Switching::Over(
            "page-server serves a guest that is stopped already: it was switched over when its \
             session began",
        ),
        before_run: None,
    }
}

fn resumed(record: &SourceRecord) -> String {
    let (session, epoch) = (record.session, record.epoch.0);
    let where_it_is = match record.ownership {
        SourceOwnership::Owner => "the guest was not given away yet",
        SourceOwnership::Finished => "the destination has everything, and may not know it",
        _ => "the guest was given to the destination",
    };
    format!("going on with session {session} after epoch {epoch}: {where_it_is}")
}

fn snapshot(
    options: &Options,
    image: Image,
    endpoint: Endpoint,
    parts: Parts,
) -> Result<Report, Failure> {
    let Parts { waiter, progress, mut journal, desk } = parts;
    let Endpoint::Listen(listener) = endpoint else {
        return Err(Failure::usage("--snapshot needs --listen"));
    };
    let Image { memory, session } = image;
    let (pages, bytes) = (memory.layout().page_count(), memory.layout().bytes());
    let most = options.max_destinations;
    let mut source = source_options(options);
    source.record = SourceRecord::new(session);
    let (server, events) = SnapshotServer::start(Arc::new(memory), listener, source, most)
        .map_err(Failure::of("start serving"))?;
    let session = server.session().to_string();
    journal.begin(&session, pages);
    let server = Arc::new(server);
    let subject = SnapshotControl {
        server: Arc::clone(&server),
        pages,
        streams: options.streams,
        bandwidth: Mutex::new(options.bandwidth),
    };
    desk.name(&session);
    desk.begin(Phase::Serving, bytes, Arc::new(subject));
    Snapshot::new(server, events, Parts { waiter, progress, journal, desk }).run()
}

fn files(options: &Options) -> Result<Option<Image>, Failure> {
    let placed = match &options.layout {
        Some(path) => memory::read_layout(path)?,
        None if options.memory.is_empty() => return Ok(None),
        None => memory::place(&options.memory, options.hole)?,
    };
    let access = if options.release { Access::Release } else { Access::Read };
    Ok(Some(memory::image(&placed, access)?))
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
    // Who has handed it over is gone, or reads files: nobody would run it here.
    source.after_refusal = AfterRefusal::OfferAgain;
    if options.release {
        source.release = Release::Free(ReleaseLedger::volatile());
    }
    source
}
