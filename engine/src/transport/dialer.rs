//! A thread that connects, so that the session's thread need not wait for it.

use super::{Address, ConnectError, Plaintext, Stream, connect};
use crate::threads::{self, ThreadHook, ThreadRole};
use afterimage_protocol::wire::{Channel, Hello};
use crossbeam_channel::Sender;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
    jobs: Option<Sender<(u64, Hello)>>,
    /// Grows when what was asked for before is not wanted any more.
    round: Arc<AtomicU64>,
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
        let (jobs, todo) = crossbeam_channel::unbounded::<(u64, Hello)>();
        let round = Arc::new(AtomicU64::new(0));
        let present = Arc::clone(&round);
        let thread = threads::spawn(hook, ThreadRole::Acceptor, 1, move || {
            let mut pause = FIRST_PAUSE;
            for (asked_in, hello) in todo {
                if asked_in != present.load(Ordering::Acquire) {
                    continue;
                }
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
        Ok(Self { jobs: Some(jobs), round, thread: Some(thread) })
    }

    /// Makes a connection and says this hello on it. A session begins anew with its control
    /// connection: whatever else was asked for before is forgotten then.
    pub(crate) fn dial(&self, hello: Hello) {
        if hello.channel == Channel::Control {
            self.round.fetch_add(1, Ordering::AcqRel);
        }
        let round = self.round.load(Ordering::Acquire);
        if let Some(jobs) = &self.jobs {
            // The thread ends only after `jobs` is dropped.
            let _ = jobs.send((round, hello));
        }
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        self.round.fetch_add(1, Ordering::AcqRel);
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            threads::join(thread);
        }
    }
}
