//! `page-client`: serves the memory of a guest that another process runs, from its source.
//!
//! Answers for the command line, for the VMM and the keeper, and for when to stop; how pages
//! come is the engine's affair. It knows no VMM: whoever registers memory and speaks
//! [`attachment`](crate::attachment) can be served.
//!
//! Invariant: killed at any moment, it leaves at the keeper and in the state file all that a
//! successor needs; and it serves only what no other process can be serving, because it has
//! claimed it there and locked the state file.

mod adapter;
mod door;
mod drivers;
mod ending;
mod farewell;
mod guest;
pub mod options;
mod origin;
mod party;
mod report;
mod serving;

use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use afterimage::{
    Address, Checksums, Destination, DestinationMemory, DestinationOptions, DestinationOwnership,
    DestinationRecord, DestinationStateFile, Endpoint, FirstConnection, Listener, Plaintext,
};
use clap::Parser;

use crate::attachment::{Arrival, DrivenBy, Offer};
use crate::control::{Control, Desk, DestinationControl, Identity, Phase};
use crate::keeper::{Place, place_path};
use crate::logging;
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;
use crate::page_server::{Failure, Notice, check_connect, listen_privately};
use adapter::{Adapter, AfterRefusal, Firecracker, HangUp, Native, NoArrival, Placement};
use door::{Door, News};
use drivers::Waiting;
use guest::Served;
use options::Options;
use origin::{FileServer, Origin};
pub(crate) use report::Work;
use report::{Journal, Outcome, Report};
use serving::{Serving, Session};

/// Runs the command with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    logging::start("warn");
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
/// [`Failure`], also where it has ended before every page was in place, although the guest runs
/// here.
pub fn run(
    options: &Options,
    pause: Duration,
    hear: impl Fn(Notice) + 'static,
) -> Result<Ran, Failure> {
    match serve(options, Progress::to_often(hear, pause))?.outcome() {
        Outcome::Finished => Ok(Ran::Here),
        Outcome::NotHere => Ok(Ran::NotHere),
        _ => Err(Failure::new("ended before every page was in place")),
    }
}

/// Whether the guest is where its memory was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// It runs here, and has every page.
    Here,
    /// It runs elsewhere: it was taken back, or has never come.
    NotHere,
}

fn serve(options: &Options, progress: Progress) -> Result<Report, Failure> {
    let waiter = Waiter::new().map_err(Failure::of("wait for signals"))?;
    let identity = Identity { tool: "page-client", role: "destination" };
    let control = Control::open(&options.control, identity)?;
    let report = serve_at(options, progress, waiter, control.desk())?;
    control.close(report.outcome().name());
    Ok(report)
}

fn serve_at(
    options: &Options,
    progress: Progress,
    mut waiter: Waiter,
    desk: Desk,
) -> Result<Report, Failure> {
    let mut journal = Journal::new();
    let state = options.state.as_deref().map(DestinationStateFile::open).transpose();
    let state = state.map_err(Failure::of("use the state file"))?;
    let mut place = place(options)?;
    if let Some(outcome) = state.as_ref().and_then(farewell::ended_as) {
        farewell::after_the_end(outcome, options, state.as_ref(), place, &mut waiter, &progress);
        return Ok(journal.close(outcome, None));
    }
    let origin = Origin::open(options, &progress)?;
    let door = Door::new(waiter.waker());
    let (address, listener, adapter) = entrance(options)?;
    door.open(listener, Arc::clone(&adapter)).map_err(Failure::of("start a thread"))?;
    let visitors = Visitors { address, adapter: &*adapter, door: &door, progress: &progress };
    let taken = visitors.find_guest(options, &mut waiter, place.as_mut(), state.as_ref())?;
    let Some(Taken { served, memory, mut with, socket, driver }) = taken else {
        return Ok(journal.close(Outcome::NotHere, None));
    };
    let runs = with.record.ownership == DestinationOwnership::Running;
    let is_held = with.first_connection == FirstConnection::OnRecover;
    let bytes = memory.layout().bytes();
    if adapter.manner().hang_up == HangUp::IsTheEnd {
        // Who comes now would wait for an answer that nobody gives.
        door.close();
    }
    let watched = served.vmm.try_clone().and_then(|vmm| door.watch(vmm));
    let started = watched.map_err(Failure::of("watch the VMM")).and_then(|()| {
        let (endpoint, file_server) = origin.endpoint(options, memory.layout())?;
        with.image = file_server.as_ref().map(FileServer::memory);
        let started = Destination::start(memory, endpoint, with);
        started.map(|it| (it, file_server)).map_err(Failure::of("start serving"))
    });
    let ((destination, events), file_server) = started.inspect_err(|failure| {
        if let Some(socket) = &socket {
            turn_away(&*adapter, socket, failure, place.as_mut(), &progress);
        }
    })?;
    let destination = Arc::new(destination);
    let plaintext = plaintext(options);
    let subject = DestinationControl { destination: Arc::clone(&destination), plaintext };
    let phase = if runs { Phase::Running } else { Phase::Connecting };
    desk.begin(phase, bytes, Arc::new(subject));
    journal.serves(served.pid, socket.is_none());
    let what = if socket.is_some() { "serving" } else { "taking over" };
    progress.say(&format!("{what} the guest {:?} of process {}", served.name, served.pid));
    let session = Session {
        adapter,
        destination,
        events,
        door,
        waiter,
        progress,
        journal,
        desk,
        file_server,
        is_taken_over: socket.is_none(),
        is_held,
    };
    let mut serving = Serving::new(session, served, place, state, runs);
    if let Some(socket) = socket {
        serving.greet(socket);
    }
    if let Some(driver) = driver {
        serving.greet_driver(driver);
    }
    serving.run()
}

/// Where VMMs come in, and what they speak.
fn entrance(options: &Options) -> Result<(&Address, UnixListener, Arc<dyn Adapter>), Failure> {
    match (&options.firecracker, &options.attach) {
        (Some(address), _) => {
            let placement = match options.memory {
                Some(_) => Placement::AsInTheFile,
                None => Placement::AsInAPc,
            };
            let adapter = Firecracker { on_exit: options.on_exit, placement };
            Ok((address, listen_privately(address, "--firecracker")?, Arc::new(adapter)))
        }
        (None, Some(address)) => {
            Ok((address, listen_privately(address, "--attach")?, Arc::new(Native)))
        }
        (None, None) => Err(Failure::usage("give --attach or --firecracker")),
    }
}

/// A guest that is to be served, and how.
struct Taken {
    served: Served,
    memory: DestinationMemory,
    with: DestinationOptions,
    /// To its VMM, which has just handed it over.
    socket: Option<UnixStream>,
    /// To the process that drives it, if that has come first.
    driver: Option<UnixStream>,
}

/// The guest's place at a keeper, if there is to be one.
fn place(options: &Options) -> Result<Option<Place>, Failure> {
    let (Some(address), Some(guest)) = (&options.keeper, &options.guest) else { return Ok(None) };
    let path = place_path(address).map_err(Failure::usage)?;
    let place = Place::connect(path, guest, "page-client");
    place.map(Some).map_err(Failure::of("use the keeper"))
}

/// What a process before this one has left; `None` if there was none.
fn fetch(place: &mut Place) -> Result<Option<Served>, Failure> {
    let Some(set) = place.fetch().map_err(Failure::of("take the guest over"))? else {
        return Ok(None);
    };
    let served = Served::kept(&set)?;
    place.holds_this(set);
    Ok(Some(served))
}

/// A record without a guest is of memory that is gone. If the guest has not run in it, another
/// may begin.
fn check_no_record(state: Option<&DestinationStateFile>) -> Result<(), Failure> {
    let has_run = |state: &&DestinationStateFile| {
        state.record().is_some_and(|record| record.ownership != DestinationOwnership::Waiting)
    };
    let Some(state) = state.filter(has_run) else { return Ok(()) };
    if farewell::is_given_back(state) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the state file {} is of a guest whose memory is at no keeper any more: if it ran here it \
         is lost here, and unless the source runs it already it can be fenced there; remove the file \
         to begin with another",
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

/// Those who come before there is a guest.
struct Visitors<'a> {
    address: &'a Address,
    adapter: &'a dyn Adapter,
    door: &'a Door,
    progress: &'a Progress,
}

impl Visitors<'_> {
    /// The guest of a process before this one, or one that comes; `None` if a signal came first.
    fn find_guest(
        &self,
        options: &Options,
        waiter: &mut Waiter,
        mut place: Option<&mut Place>,
        state: Option<&DestinationStateFile>,
    ) -> Result<Option<Taken>, Failure> {
        if let Some(served) = place.as_deref_mut().map(fetch).transpose()?.flatten() {
            let (memory, with) = prepare(options, &served, None, state)?;
            return Ok(Some(Taken { served, memory, with, socket: None, driver: None }));
        }
        check_no_record(state)?;
        self.progress.open(self.address);
        self.wait(options, waiter, place, state)
    }

    /// Waits for a VMM with a guest that can be served; `None` if a signal came first. Others hear
    /// why not, and keep theirs.
    fn wait(
        &self,
        options: &Options,
        waiter: &mut Waiter,
        mut place: Option<&mut Place>,
        state: Option<&DestinationStateFile>,
    ) -> Result<Option<Taken>, Failure> {
        let mut drivers = Waiting::default();
        loop {
            while let Ok(news) = self.door.news.try_recv() {
                match news {
                    News::Arrived(Arrival::Drive { name, socket }) => {
                        drivers.add(name, socket, self.progress);
                    }
                    News::Arrived(Arrival::Offer(offer)) => {
                        let taken = self.take(options, offer, place.as_deref_mut(), state)?;
                        if let Some(mut taken) = taken {
                            taken.driver = drivers.choose(&taken.served, self.progress);
                            return Ok(Some(taken));
                        }
                    }
                    News::Arrived(Arrival::Return { name, socket }) => {
                        let reason = format!("nothing is known here of a guest {name:?}");
                        self.progress.say(&format!("a VMM was turned away: {reason}"));
                        self.adapter.refuse(&socket, &reason, self.progress);
                    }
                    News::Turned(NoArrival::Stranger(line)) => self.progress.say(&line),
                    News::Turned(NoArrival::Unservable { socket, reason }) => {
                        match self.adapter.refuse(&socket, &reason, self.progress) {
                            AfterRefusal::End => return Err(Failure::new(reason)),
                            AfterRefusal::WaitOn => self.progress.say(&reason),
                        }
                    }
                    News::Said(..) | News::HungUp(_) | News::Died => {}
                }
            }
            let interval = self.progress.interval();
            let came = waiter.wait(interval).map_err(Failure::of("wait for a VMM"))?;
            if came > 0 {
                self.progress.say("stopped before any guest came");
                return Ok(None);
            }
        }
    }

    /// Takes an offered guest: what a successor needs is kept first. `None` if it cannot be
    /// served: its VMM has been told why, and keeps its memory.
    fn take(
        &self,
        options: &Options,
        mut offer: Offer,
        mut place: Option<&mut Place>,
        state: Option<&DestinationStateFile>,
    ) -> Result<Option<Taken>, Failure> {
        let taken = Served::offered(&mut offer).map_err(Failure::of("take what is offered"));
        let taken = taken.and_then(|served| {
            let (memory, with) = prepare(options, &served, place.as_deref_mut(), state)?;
            Ok((served, memory, with))
        });
        match taken {
            Ok((served, memory, with)) => {
                let socket = Some(offer.socket);
                Ok(Some(Taken { served, memory, with, socket, driver: None }))
            }
            Err(failure) => {
                match turn_away(self.adapter, &offer.socket, &failure, place, self.progress) {
                    AfterRefusal::End => return Err(failure),
                    AfterRefusal::WaitOn => {}
                }
                self.progress.say(&format!("a guest cannot be served: {failure}"));
                Ok(None)
            }
        }
    }
}

/// Lets go of a guest that cannot be served, and says so to its VMM.
fn turn_away(
    adapter: &dyn Adapter,
    socket: &UnixStream,
    failure: &Failure,
    place: Option<&mut Place>,
    progress: &Progress,
) -> AfterRefusal {
    // First: a successor must not find what its VMM has taken back.
    if let Some(place) = place {
        place.remove(|line| progress.say(line));
    }
    adapter.refuse(socket, &failure.to_string(), progress)
}

/// The guest's memory, and how it is to be served. With a place it is new, and stored there;
/// without, it was found there, or there is none.
fn prepare(
    options: &Options,
    served: &Served,
    place: Option<&mut Place>,
    state: Option<&DestinationStateFile>,
) -> Result<(DestinationMemory, DestinationOptions), Failure> {
    let mut with = DestinationOptions::default();
    with.polling = options.polling;
    with.checksums = if options.checksums { Checksums::On } else { Checksums::Off };
    with.plaintext = plaintext(options);
    with.record.incarnation = served.incarnation;
    if let Some(state) = state {
        if let Some(place) = place {
            let set = served.set().map_err(Failure::of("describe the guest"))?;
            // Said where it is looked at next.
            let stored = place.store(set, &[], |line| tracing::warn!("{line}"));
            stored.map_err(|why| Failure::new(format!("could not store the guest: {why}")))?;
        }
        // Before anybody begins to serve the memory: what has begun has its record.
        with.record = record_of(served, state, with.record)?;
        with.ledger = state.ledger();
    }
    let is_here = with.record.ownership != DestinationOwnership::Waiting;
    if served.driven_by == DrivenBy::Driver && !is_here {
        // The source may stop its guest for us, and nobody is there yet to restore it.
        with.first_connection = FirstConnection::OnRecover;
    }
    Ok((served.attach()?, with))
}

/// The record of this memory: the one that is there, or `fresh` where nobody has begun to serve
/// it. A process may have died between storing a guest and recording it; what it found recorded
/// then is of a guest that never ran, and is gone.
fn record_of(
    served: &Served,
    state: &DestinationStateFile,
    fresh: DestinationRecord,
) -> Result<DestinationRecord, Failure> {
    let failed = || Failure::of("use the state file");
    let layout = served.layout()?;
    let has_begun = served.has_begun().map_err(Failure::of("look at what the keeper holds"))?;
    match state.record() {
        None if has_begun => Err(Failure::new(format!(
            "the keeper has a guest that was served already, and {} records nothing: give the \
             state file of that guest; without it nobody knows whether the guest has run",
            state.path().display()
        ))),
        Some(_) if !has_begun && farewell::is_given_back(state) => {
            state.begin_anew(&layout, fresh).map_err(failed())
        }
        Some(record) if has_begun || record.ownership != DestinationOwnership::Waiting => {
            if record.incarnation == served.incarnation {
                return state.begin(&layout, fresh).map_err(failed());
            }
            Err(Failure::new(format!(
                "{} is of the memory {}, and what the keeper has is the memory {}: give the state \
                 file of this guest, or the name of that one",
                state.path().display(),
                record.incarnation,
                served.incarnation
            )))
        }
        _ => state.begin_anew(&layout, fresh).map_err(failed()),
    }
}
