//! The engine's threads: named, deaf to signals, and open to the VMM's hook.

use crate::sys::scheduling;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// What a thread of the engine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ThreadRole {
    /// Accepts connections and hears their hellos.
    Acceptor,
    /// Drives the session: the control channel, ownership, heartbeats.
    Control,
    /// Makes ownership records durable; started with the first, if there is a ledger.
    Ledger,
    /// Reads faults and puts in place what was asked for. The latency of a fault hangs on
    /// it.
    Fault,
    /// At a source: answers page requests. The latency of a fault hangs on it.
    Request,
    /// Sends or receives one background stream.
    Background,
    /// At a source: frees pages that have arrived.
    Release,
    /// At a source: finds out what the guest has written, between precopy passes.
    Precopy,
    /// At a destination: maps what came by precopy, after the switchover.
    Map,
}

impl ThreadRole {
    const fn name(self) -> &'static str {
        match self {
            Self::Acceptor => "ai-accept",
            Self::Control => "ai-control",
            Self::Ledger => "ai-ledger",
            Self::Fault => "ai-fault",
            Self::Request => "ai-request",
            Self::Background => "ai-backgr",
            Self::Release => "ai-release",
            Self::Precopy => "ai-precopy",
            Self::Map => "ai-map",
        }
    }
}

/// Called on every thread that the engine starts before it does any work, with its role and
/// its number among those of that role: to pin it, to set its scheduling, to confine it with
/// seccomp.
///
/// The engine has asked for scheduling by then (`sched_setattr`, which needs no right): short
/// slices for threads on the fault path, so that they are not kept waiting when they are
/// woken, and `SCHED_BATCH` for streams and what frees pages. A hook that sets something else has the last word;
/// where the VMM's threads are not under `SCHED_OTHER`, the engine asks for nothing.
#[derive(Clone, Default)]
pub struct ThreadHook(Option<Arc<dyn Fn(ThreadRole, usize) + Send + Sync>>);

impl ThreadHook {
    /// A hook that calls `function`.
    pub fn new(function: impl Fn(ThreadRole, usize) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(function)))
    }
}

impl std::fmt::Debug for ThreadHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "ThreadHook(set)" } else { "ThreadHook(none)" })
    }
}

/// Starts a thread on which no signal is ever delivered: a VMM's handlers run on its own
/// threads.
pub(crate) fn spawn(
    hook: &ThreadHook,
    role: ThreadRole,
    number: usize,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
    let hook = hook.clone();
    // Blocked here, so that there is no moment at which the new thread could get one.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    let spawned =
        thread::Builder::new().name(format!("{}-{number}", role.name())).spawn(move || {
            if let Err(error) = scheduling::suit(role) {
                tracing::debug!(%error, ?role, "scheduled like any thread");
            }
            if let Some(hook) = &hook.0 {
                hook(role, number);
            }
            body();
        });
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    spawned
}

/// Waits for a thread to end. A panic in it is told to the log; the panic itself said more.
pub(crate) fn join(thread: JoinHandle<()>) {
    let name = thread.thread().name().unwrap_or("?").to_owned();
    if thread.join().is_err() {
        tracing::error!(name, "a thread of the engine panicked");
    }
}
