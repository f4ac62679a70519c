//! Waiting for the engine's events and for signals at once.
//!
//! Signals are blocked before any thread is started and read from a descriptor: nothing
//! runs in a handler.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

const SIGNALS: Token = Token(0);
const EVENTS: Token = Token(1);
const WAKER: Token = Token(2);

/// Waits for one source of events and for SIGINT and SIGTERM.
#[derive(Debug)]
pub(crate) struct Waiter {
    poll: Poll,
    events: Events,
    signals: SignalFd,
    waker: Arc<Waker>,
}

impl Waiter {
    /// Blocks SIGINT and SIGTERM for this thread and those it starts, so call it before any
    /// is started.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn new() -> io::Result<Self> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let poll = Poll::new()?;
        let raw = signals.as_raw_fd();
        poll.registry().register(&mut SourceFd(&raw), SIGNALS, Interest::READABLE)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        Ok(Self { poll, events: Events::with_capacity(8), signals, waker })
    }

    /// Wakes also when `events` is readable.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn watch(&self, events: &impl AsFd) -> io::Result<()> {
        let raw = events.as_fd().as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&raw), EVENTS, Interest::READABLE)
    }

    /// Wakes the waiter from another thread.
    #[must_use]
    pub(crate) fn waker(&self) -> Arc<Waker> {
        Arc::clone(&self.waker)
    }

    /// Waits until something happens, or for `most`; returns how many signals came.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn wait(&mut self, most: Duration) -> io::Result<usize> {
        match self.poll.poll(&mut self.events, Some(most)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        let mut count = 0;
        while self.signals.read_signal()?.is_some() {
            count += 1;
        }
        Ok(count)
    }
}
