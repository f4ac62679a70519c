//! The control socket: a manager drives a migration and sees its state, by lines of JSON
//! (docs/control.md).
//!
//! Answers for who may connect, what is said, and that it is said in time; what a verb does in a
//! role is said by whoever implements [`Controlled`].
//!
//! Invariants: the thread that talks to clients never waits for the session, so it answers while
//! the data path is stuck; no client can make it use more than so much memory, nor keep it from
//! the others; and who subscribes gets the state as of one moment and every event after it.

mod board;
mod capabilities;
mod client;
mod connection;
mod controlled;
mod destination;
mod happening;
mod options;
mod scrape;
mod server;
mod snapshot;
mod source;
mod state;
mod words;
mod worker;

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use afterimage::Address;

use crate::page_server::{Failure, listen_privately};
pub use board::Desk;
use board::{Board, Outlet};
pub use controlled::{Controlled, Counts, Parameters};
pub(crate) use destination::DestinationControl;
pub use happening::Happening;
pub use options::ControlOptions;
use server::{Door, Doors, Server};
pub(crate) use snapshot::SnapshotControl;
pub(crate) use source::{GoingBack, Hold, SourceControl, Switching};
pub(crate) use state::Image;
pub use state::{Link, Phase};
pub use words::{Change, Code, Greeting, Recovery, Refusal, SCHEMA_VERSION, Verb};

/// Who speaks at a control socket.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// The program.
    pub tool: &'static str,
    /// What it is in the migration: `source`, `destination` or `snapshot`.
    pub role: &'static str,
}

/// The control socket and the metrics of this process, as far as they are wanted.
///
/// Dropped, or [closed](Self::close), it tells all clients, and takes its sockets away.
#[derive(Debug)]
pub struct Control {
    desk: Desk,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    outlet: Outlet,
    threads: Vec<JoinHandle<()>>,
    paths: Vec<PathBuf>,
}

impl Control {
    /// Listens where the options say. Call it before any thread is started that makes files,
    /// and with those signals blocked that other threads are to have.
    ///
    /// # Errors
    /// [`Failure`]: an address that cannot be listened on, or is not allowed.
    pub fn open(options: &ControlOptions, identity: Identity) -> Result<Self, Failure> {
        let mut doors = Doors::default();
        let mut paths = Vec::new();
        if let Some(address) = &options.control {
            doors.control = Some(Door::from(listen_privately(address, "--control")?));
            paths.extend(path_of(address));
        }
        if let Some(address) = &options.metrics {
            doors.metrics = Some(options::listen_for_scrapes(address, options)?);
            paths.extend(path_of(address));
        }
        if doors.is_empty() {
            return Ok(Self { desk: Desk::new(Board::new(identity, None)), running: None });
        }
        let failed = |error: io::Error| Failure::of("start answering at the control socket")(error);
        let (server, outlet) = Server::new(doors).map_err(failed)?;
        let board = Arc::new(Board::new(identity, Some(outlet.clone())));
        let (jobs, work) = crossbeam_channel::bounded(worker::MOST_JOBS);
        let desk = Desk::shared(Arc::clone(&board));
        let for_worker = (Arc::clone(&board), outlet.clone());
        let worker = spawn("calls", move || worker::run(&for_worker.0, &work, &for_worker.1))?;
        let server = spawn("control", move || server.run(&board, jobs))?;
        let threads = vec![server, worker];
        Ok(Self { desk, running: Some(Running { outlet, threads, paths }) })
    }

    /// Where happenings are told.
    #[must_use]
    pub fn desk(&self) -> Desk {
        self.desk.clone()
    }

    /// Tells all clients how it ended, and hangs up. Waits for those that read, but not long.
    pub fn close(mut self, outcome: &str) {
        self.shut(outcome);
    }

    fn shut(&mut self, outcome: &str) {
        // Also where nobody can ask: whoever tells events must not keep the session from its end.
        self.desk.detach();
        let Some(Running { outlet, threads, paths }) = self.running.take() else { return };
        outlet.stop(outcome);
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a thread of the control socket has panicked");
            }
        }
        for path in paths {
            // Somebody may have removed it already.
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.shut("failed");
    }
}

fn path_of(address: &Address) -> Option<PathBuf> {
    match address {
        Address::Unix(path) => Some(path.clone()),
        _ => None,
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Failure> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    thread.map_err(Failure::of("start a thread"))
}
