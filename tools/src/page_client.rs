//! `page-client`: serves the memory of a guest that another process runs, from its source.
//!
//! Answers for the command line, for the VMM and the keeper, and for when to stop; how pages
//! come is the engine's affair. It knows no VMM: whoever registers memory and speaks
//! [`attachment`](crate::attachment) can be served.
//!
//! Invariant: killed at any moment, it leaves at the keeper and in the state file all that a
//! successor needs; and it serves only what no other process can be serving, because it has
//! claimed it there and locked the state file.

mod door;
mod guest;
pub mod options;
mod report;
mod serving;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use afterimage::{
    Checksums, Destination, DestinationMemory, DestinationOptions, DestinationStateFile, Endpoint,
    Listener, Plaintext,
};
use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::attachment::{Arrival, Offer, Word};
use crate::handoff::framing;
use crate::keeper::{Keeper, Why};
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;
use crate::page_server::{Failure, Notice, check_connect, listen_privately};
use door::{Door, News};
use guest::Served;
use options::Options;
use report::{Journal, Outcome, Report};
use serving::Serving;

/// In the state file: how it ended.
const ENDED: &str = "ended";

/// Runs the command with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let report = serve(&options, Progress::new("page-client")).unwrap_or_else(|failure| {
        eprintln!("page-client: {failure}");
        Report::failed(&failure)
    });
    if options.json {
        println!("{}", report.to_json());
    }
    report.exit_code()
}

/// Does in another program what the command does, but tells `hear` what the command says on the
/// standard error, and what it has counted: at every event, and each time that a `pause` has gone
/// by.
///
/// Blocks until every page is in place. SIGINT and SIGTERM are blocked for this thread and for
/// those that it starts, and taken as the command takes them.
///
/// # Errors
/// [`Failure`], also where it has ended before every page was in place.
pub fn run(
    options: &Options,
    pause: Duration,
    hear: impl Fn(Notice) + 'static,
) -> Result<(), Failure> {
    let report = serve(options, Progress::to_often(hear, pause))?;
    if report.is_finished() {
        return Ok(());
    }
    Err(Failure::new("ended before every page was in place"))
}

fn serve(options: &Options, progress: Progress) -> Result<Report, Failure> {
    let mut waiter = Waiter::new().map_err(Failure::of("wait for signals"))?;
    let mut journal = Journal::new();
    let state = options.state.as_deref().map(DestinationStateFile::open).transpose();
    let state = state.map_err(Failure::of("use the state file"))?;
    if let Some(how) = state.as_ref().and_then(|state| state.noted(ENDED)) {
        progress.say(&format!("nothing is left to do: the state file says {how:?}"));
        return Ok(journal.close(Outcome::Finished, None));
    }
    let mut shelf = Shelf::open(options)?;
    let endpoint = endpoint(options, &progress)?;
    let door = Door::new(waiter.waker());
    let listener = listen_privately(&options.attach, "--attach")?;
    door.open(listener).map_err(Failure::of("start a thread"))?;
    let (served, offer) = match shelf.as_mut().map(Shelf::fetch).transpose()?.flatten() {
        Some(served) => (served, None),
        None => {
            check_no_record(state.as_ref())?;
            progress.open(&options.attach);
            match wait_for_offer(&door, &mut waiter, &progress)? {
                Some((served, offer)) => (served, Some(offer)),
                None => return Ok(journal.close(Outcome::NotHere, None)),
            }
        }
    };
    let begun = begin(options, &served, offer.as_ref(), shelf.as_mut(), state.as_ref(), endpoint);
    let (destination, events) = match begun {
        Ok(begun) => begun,
        Err(failure) => {
            if let Some(offer) = offer {
                turn_down(&offer, &failure, shelf.as_mut());
            }
            return Err(failure);
        }
    };
    journal.serves(served.pid, offer.is_none());
    let who = format!("the guest {:?} of process {}", served.name, served.pid);
    progress.say(&if offer.is_some() {
        format!("serving {who}")
    } else {
        format!("taking over {who}")
    });
    door.watch(served.vmm).map_err(Failure::of("watch the VMM"))?;
    let mut serving = Serving {
        destination,
        events,
        door,
        waiter,
        progress,
        journal,
        name: served.name,
        vmm: None,
        connection: 0,
        state: None,
        runs: false,
        has_all: false,
        not_here: None,
        ending: None,
        signals: 0,
    };
    if let Some(offer) = offer {
        serving.greet(offer.socket)?;
    }
    let outcome = serving.run()?;
    let done = serving.destination.stats();
    let Serving { journal, progress, .. } = serving;
    finish(outcome, shelf.as_mut(), state.as_ref(), &progress);
    Ok(journal.close(outcome, Some(&done)))
}

/// The guest's place at a keeper.
struct Shelf {
    keeper: Keeper,
    path: PathBuf,
    guest: String,
}

impl Shelf {
    fn open(options: &Options) -> Result<Option<Self>, Failure> {
        let (Some(address), Some(guest)) = (&options.keeper, &options.guest) else {
            return Ok(None);
        };
        let afterimage::Address::Unix(path) = address else {
            return Err(Failure::usage(format!(
                "--keeper {address}: descriptors only travel over Unix sockets; give unix:PATH"
            )));
        };
        let keeper = Self::connect(path)?;
        Ok(Some(Self { keeper, path: path.clone(), guest: guest.clone() }))
    }

    fn connect(path: &Path) -> Result<Keeper, Failure> {
        Keeper::connect(path, "page-client").map_err(Failure::of("use the keeper"))
    }

    /// What a process before this one has left; `None` if there was none.
    fn fetch(&mut self) -> Result<Option<Served>, Failure> {
        match self.keeper.claim(&self.guest) {
            Ok(()) => {}
            Err(error) if error.is(Why::NotThere) => return Ok(None),
            Err(error) => return Err(Failure::of("take the guest over")(error)),
        }
        let set = self.keeper.fetch(&self.guest).map_err(Failure::of("take the guest over"))?;
        Served::kept(set).map(Some)
    }

    /// Stores a guest that has come. A keeper does not wait so long for clients that have no
    /// guest there, and may have been started again in the meantime.
    fn store(&mut self, served: &Served) -> Result<(), Failure> {
        self.keeper = Self::connect(&self.path)?;
        served.store(&mut self.keeper, &self.guest)
    }

    fn remove(&mut self) {
        if let Err(error) = self.keeper.remove(&self.guest) {
            tracing::warn!(%error, "the keeper still holds the guest; remove it there");
        }
    }
}

/// A record without a guest is of memory that is gone.
fn check_no_record(state: Option<&DestinationStateFile>) -> Result<(), Failure> {
    let Some(state) = state.filter(|state| state.record().is_some()) else { return Ok(()) };
    Err(Failure::new(format!(
        "the state file {} is of a guest whose memory is at no keeper any more: if it ran here it \
         is lost here, and the source can be fenced; remove the file to begin with another",
        state.path().display()
    )))
}

fn endpoint(options: &Options, progress: &Progress) -> Result<Endpoint, Failure> {
    let plaintext = plaintext(options);
    match (&options.connect, &options.listen) {
        (Some(address), _) => {
            check_connect(address, plaintext)?;
            Ok(Endpoint::Connect(address.clone()))
        }
        (None, Some(address)) => {
            let listener = Listener::bind(address, plaintext)
                .map_err(|error| Failure::listen(address, &error))?;
            progress.listening(listener.address());
            Ok(Endpoint::Listen(listener))
        }
        (None, None) => Err(Failure::usage("give --connect or --listen")),
    }
}

fn plaintext(options: &Options) -> Plaintext {
    if options.insecure_plaintext { Plaintext::Anywhere } else { Plaintext::LoopbackOnly }
}

/// Waits for a VMM with a guest; `None` if a signal came first.
fn wait_for_offer(
    door: &Door,
    waiter: &mut Waiter,
    progress: &Progress,
) -> Result<Option<(Served, Offer)>, Failure> {
    loop {
        while let Ok(news) = door.news.try_recv() {
            match news {
                News::Arrived(Arrival::Offer(mut offer)) => match Served::offered(&mut offer) {
                    Ok(served) => return Ok(Some((served, offer))),
                    Err(error) => progress.say(&format!("a guest cannot be served: {error}")),
                },
                News::Arrived(Arrival::Return { name, socket }) => {
                    let reason = format!("nothing is known here of a guest {name:?}");
                    progress.say(&format!("a VMM was turned away: {reason}"));
                    // It may have gone.
                    let _ = framing::send(&socket, &Word::Refused { reason });
                }
                News::Turned(line) => progress.say(&line),
                News::Said(..) | News::HungUp(_) | News::Died => {}
            }
        }
        let came = waiter.wait(progress.interval()).map_err(Failure::of("wait for a VMM"))?;
        if came > 0 {
            progress.say("stopped before any guest came");
            return Ok(None);
        }
    }
}

type Begun = (Destination, afterimage::Events<afterimage::DestinationEvent>);

/// Serves the guest from here on: what a successor needs is kept first.
fn begin(
    options: &Options,
    served: &Served,
    offer: Option<&Offer>,
    shelf: Option<&mut Shelf>,
    state: Option<&DestinationStateFile>,
    endpoint: Endpoint,
) -> Result<Begun, Failure> {
    if let (Some(shelf), Some(_)) = (shelf, offer) {
        shelf.store(served)?;
    }
    let memory = served.attach()?;
    let options = destination_options(options, state, &memory)?;
    Destination::start(memory, endpoint, options).map_err(Failure::of("start serving"))
}

fn destination_options(
    options: &Options,
    state: Option<&DestinationStateFile>,
    memory: &DestinationMemory,
) -> Result<DestinationOptions, Failure> {
    let mut destination = DestinationOptions::default();
    destination.polling = options.polling;
    destination.checksums = if options.checksums { Checksums::On } else { Checksums::Off };
    destination.plaintext = plaintext(options);
    if let Some(state) = state {
        destination.record = state
            .begin(memory.layout(), destination.record)
            .map_err(Failure::of("use the state file"))?;
        destination.ledger = state.ledger();
    }
    Ok(destination)
}

/// The VMM keeps its memory, of which nothing has arrived.
fn turn_down(offer: &Offer, failure: &Failure, shelf: Option<&mut Shelf>) {
    // It may have gone.
    let _ = framing::send(&offer.socket, &Word::Refused { reason: failure.to_string() });
    if let Some(shelf) = shelf {
        shelf.remove();
    }
}

/// Leaves nothing behind that nobody needs.
fn finish(
    outcome: Outcome,
    shelf: Option<&mut Shelf>,
    state: Option<&DestinationStateFile>,
    progress: &Progress,
) {
    let how = match outcome {
        Outcome::Finished => "every page is in place",
        Outcome::NotHere => "the guest does not run here",
        Outcome::VmmDied => "the process that ran the guest has ended",
        // A successor goes on.
        Outcome::Abandoned | Outcome::Failed => return,
    };
    if let Some(Err(error)) = state.map(|state| state.note(ENDED, how)) {
        progress.say(&format!("the end could not be recorded: {error}"));
    }
    if let Some(shelf) = shelf {
        shelf.remove();
    }
}
