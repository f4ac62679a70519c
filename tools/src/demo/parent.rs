//! The parent: starts all sides, watches them, and tells the story.
//!
//! Invariant: when it returns, all processes have ended and been waited for.

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use crossbeam_channel::Receiver;
use nix::sys::signal::{SigSet, Signal};
use tempfile::TempDir;

use super::error::{DemoError, Status, one_line};
use super::machine::{self, Choice};
use super::messages::{PageClient, Setup};
use super::options::{Options, Transport, Victim};
use super::outages::Outages;
use super::precopy::{PassesWanted, PrecopySetup};
use super::progress::Bars;
use super::proxy::Proxy;
use super::report::{Failure, Report, SCHEMA_VERSION, StayedReport};
use super::watch::Watch;
use crate::report_page;
use crate::sampling::ArrivalSample;

/// How often the roles tell how far they are, to be shown.
const TO_BE_SHOWN: Duration = Duration::from_millis(50);
/// The same, where something is to be done at certain moments.
const TO_BE_FOLLOWED: Duration = Duration::from_millis(5);
/// Where any port will do.
const ANY_PORT: &str = "tcp:127.0.0.1:0";

/// Moves a guest as the options say, and reports.
pub(super) fn run(options: &Options) -> Status {
    let (mut report, samples) = match move_guest(options) {
        Ok(Told::Moved(report, samples)) => (report, samples),
        Ok(Told::Stayed(report)) => return tell_that_it_stayed(options, &report),
        Err(error) => return fail(options, &error),
    };
    let page = options.report.as_ref().map_or(Ok(()), |it| report.write_page(it, &samples));
    let text = if options.json { json(&report) } else { report.to_string() };
    // If nobody listens, the status still says how it went.
    let _ = io::stdout().write_all(text.as_bytes());
    if let Err(error) = &page {
        eprintln!("demo: {error}");
    }
    if !report.verified {
        eprintln!("demo: the memory at the destination is wrong: {}", report.verification());
        return Status::Wrong;
    }
    page.map_or_else(|error| error.status(), |()| Status::Verified)
}

/// What there is to tell in the end.
enum Told {
    Moved(Box<Report>, Vec<ArrivalSample>),
    Stayed(StayedReport),
}

fn tell_that_it_stayed(options: &Options, report: &StayedReport) -> Status {
    let text = if options.json { json(report) } else { report.to_string() };
    // If nobody listens, the status still says how it went.
    let _ = io::stdout().write_all(text.as_bytes());
    if !report.verified {
        eprintln!("demo: the memory at the source is wrong: {}", report.verification);
        return Status::Wrong;
    }
    Status::Stayed
}

fn fail(options: &Options, error: &DemoError) -> Status {
    let status = error.status();
    eprintln!("demo: {error}");
    if options.json {
        let failure = Failure {
            schema_version: SCHEMA_VERSION,
            verified: false,
            exit_status: status as u8,
            error: error.to_string(),
        };
        let _ = io::stdout().write_all(json(&failure).as_bytes());
    }
    status
}

fn json(what: &impl serde::Serialize) -> String {
    // Numbers, strings and lists of them: this cannot fail.
    serde_json::to_string(what).expect("plain data serialises") + "\n"
}

fn move_guest(options: &Options) -> Result<Told, DemoError> {
    options.check()?;
    // Before any thread is started, so that it is blocked in all of them.
    let interrupts = interrupts()?;
    if let Some(directory) = &options.report {
        report_page::prepare(directory)
            .map_err(|error| DemoError::Usage(format!("--report: {}", one_line(&error))))?;
    }
    let choice = machine::choose(options.guest)?;
    options.check_tracker(choice.kind)?;
    machine::check_memory(options)?;
    if let Some(note) = &choice.note {
        eprintln!("demo: {note}");
    }
    // Holds the sockets and the state files, and goes with all that is in it.
    let directory = (options.transport == Transport::Unix
        || options.hands_over()
        || options.kills(Victim::PageClient))
    .then(|| {
        let failed = |error| DemoError::failed("cannot make a directory for sockets", &error);
        tempfile::Builder::new().prefix("afterimage-demo-").tempdir().map_err(failed)
    })
    .transpose()?;
    let directory = directory.as_ref();
    let setup = setup(options, &choice, directory);
    let proxy = proxy(options, directory)?;
    let mut bars = Bars::new(options.backing().page_bytes());
    let story = Watch::start(setup.clone(), proxy, Outages::planned(options), interrupts)
        .and_then(|watch| watch.until_the_end(&mut bars));
    bars.clear();
    let mut story = story?;
    if let Some(stayed) = story.stayed.take() {
        return Ok(Told::Stayed(StayedReport::of(&setup, stayed, story)));
    }
    let samples = story.take_samples();
    Ok(Told::Moved(Box::new(Report::of(&setup, options, story)?), samples))
}

/// SIGINT and SIGTERM, which end the demo in order: its processes first, then its directory.
fn interrupts() -> Result<Receiver<Signal>, DemoError> {
    let failed =
        |error: &dyn std::error::Error| DemoError::failed("cannot wait for signals", error);
    let set: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    set.thread_block().map_err(|error| failed(&error))?;
    let (sender, interrupts) = crossbeam_channel::bounded(1);
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Ok(signal) = set.wait() {
                // Whoever would have to be told has ended everything.
                let _ = sender.send(signal);
            }
            // It must not look as if signals could not be waited for.
            std::thread::park();
        })
        .map_err(|error| failed(&error))?;
    Ok(interrupts)
}

fn socket(directory: Option<&TempDir>, name: &str) -> Option<PathBuf> {
    directory.map(|directory| directory.path().join(name))
}

/// Where somebody listens who is to be connected to over the network.
fn listen(options: &Options, directory: Option<&TempDir>, name: &str) -> String {
    socket(directory, name)
        .filter(|_| options.transport == Transport::Unix)
        .map_or_else(|| ANY_PORT.to_owned(), |path| format!("unix:{}", path.display()))
}

/// A network that can be cut, and held up until what is due has been done; it also finds the page
/// server again, which listens at another port after it was killed.
fn proxy(options: &Options, directory: Option<&TempDir>) -> Result<Option<Proxy>, DemoError> {
    if !options.has_outages() {
        return Ok(None);
    }
    let address = listen(options, directory, "network").parse();
    let address = address.map_err(|error| DemoError::failed("cannot be a network", &error))?;
    let started = Proxy::start(&address);
    started.map(Some).map_err(|error| DemoError::failed("cannot be a network", &error))
}

fn setup(options: &Options, choice: &Choice, directory: Option<&TempDir>) -> Setup {
    let socket = |name: &str| socket(directory, name);
    let kills = |victim| options.kills(victim);
    let has_keeper = kills(Victim::PageServer) || kills(Victim::PageClient);
    let page_client = socket("attach").zip(socket("page-client.state"));
    let page_client = page_client.map(|(attach, state)| {
        let source = String::new();
        PageClient { attach, state, source }
    });
    let follows = options.has_outages();
    Setup {
        parent: std::process::id() as i32,
        memory_bytes: options.memory.0,
        vcpus: options.vcpus,
        workload: options.workload,
        backing: options.backing(),
        guest: choice.kind,
        user_faults_only: choice.user_faults_only,
        transport: options.transport,
        streams: options.streams,
        bandwidth: options.bandwidth(),
        precopy: (options.passes != PassesWanted::None).then(|| PrecopySetup {
            passes: options.passes,
            tracker: options.tracker(choice.kind),
            bandwidth: options.precopy_bandwidth,
        }),
        checksums: options.checksums,
        worked_fraction: options.worked_fraction,
        zero_fraction: options.zero_fraction,
        listen: listen(options, directory, "pages"),
        handoff: socket("handoff").filter(|_| options.hands_over()),
        keeper: socket("keeper").filter(|_| has_keeper),
        page_server_state: socket("page-server.state").filter(|_| kills(Victim::PageServer)),
        page_client: page_client.filter(|_| kills(Victim::PageClient)),
        control: options.control.clone(),
        metrics: options.metrics.clone(),
        holds: options.hold.clone(),
        progress_pause: if follows { TO_BE_FOLLOWED } else { TO_BE_SHOWN },
        tells_of_passes: follows && options.passes != PassesWanted::None,
        takes_samples: options.report.is_some(),
        limit: options.limit(),
        corrupt_one_byte: options.corrupt_one_byte,
    }
}
