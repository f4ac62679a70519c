//! A thread that connects, so that the session's thread need not wait for it.

use super::{Address, ConnectError, Plaintext, Stream, connect};
use crate::threads::{self, ThreadHook, ThreadRole};
use afterimage_protocol::wire::Hello;
use crossbeam_channel::Sender;
use std::io;
use std::thread::JoinHandle;
use std::time::Duration;

/// After a failed attempt the next outcome is told only after a pause, which doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// The outcome of one attempt.
#[derive(Debug)]
pub(crate) struct Dialed {
    /// What this side said.
    pub(crate) hello: Hello,
    /// The connection, and what the peer said.
    pub(crate) outcome: Result<(Stream, Hello), ConnectError>,
}

/// Connects to one address, one connection after the other. Dropped, it joins its thread,
/// which may take as long as a connection attempt.
#[derive(Debug)]
pub(crate) struct Dialer {
    jobs: Option<Sender<Hello>>,
    thread: Option<JoinHandle<()>>,
}

impl Dialer {
    /// Hands the outcome of each attempt to `deliver`, on the dialer's thread.
    pub(crate) fn start(
        address: Address,
        plaintext: Plaintext,
        hook: &ThreadHook,
        deliver: impl Fn(Dialed) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, todo) = crossbeam_channel::unbounded::<Hello>();
        let thread = threads::spawn(hook, ThreadRole::Acceptor, 1, move || {
            let mut pause = FIRST_PAUSE;
            for hello in todo {
                let outcome = connect(&address, plaintext, hello);
                if outcome.is_ok() {
                    pause = FIRST_PAUSE;
                } else {
                    // Whoever asked will ask again.
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LAST_PAUSE);
                }
                deliver(Dialed { hello, outcome });
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Makes a connection and says this hello on it.
    pub(crate) fn dial(&self, hello: Hello) {
        if let Some(jobs) = &self.jobs {
            // The thread ends only after `jobs` is dropped.
            let _ = jobs.send(hello);
        }
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            threads::join(thread);
        }
    }
}
