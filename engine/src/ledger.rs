//! Making records durable on a thread of their own, so that a slow disk does not silence the
//! session thread.
//!
//! Invariant: one record at a time, and nobody goes on before its outcome is known.

use crate::inbox::Outlet;
use crate::threads::{self, ThreadHook, ThreadRole};
use crossbeam_channel::{Receiver, Sender, TryRecvError};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A callback that makes a record durable.
type Callback<R> = Box<dyn FnMut(&R) -> io::Result<()> + Send>;

/// The same; without one, nothing is made durable.
pub(crate) type Record<R> = Option<Callback<R>>;

/// The ledger of one session.
pub(crate) struct Ledger<R> {
    /// Kept here too: where its thread cannot be started, no record counts as durable.
    callback: Option<Arc<Mutex<Callback<R>>>>,
    thread: Option<LedgerThread<R>>,
    hook: ThreadHook,
}

/// Started with the first record: most sessions of snapshots never write one.
struct LedgerThread<R> {
    jobs: Option<Sender<R>>,
    outcomes: Receiver<io::Result<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Wakes the session thread, also where the callback panics.
struct WakeAtEnd<T>(Outlet<T>);

impl<T> Drop for WakeAtEnd<T> {
    fn drop(&mut self) {
        self.0.wake();
    }
}

impl<R: Copy + Send + 'static> Ledger<R> {
    pub(crate) fn new(callback: Record<R>, hook: ThreadHook) -> Self {
        let callback = callback.map(|callback| Arc::new(Mutex::new(callback)));
        Self { callback, thread: None, hook }
    }

    /// Makes a record durable. Calls `meanwhile` until that is done; it waits until something
    /// happens, of which `outlet` tells it when the record is durable. If it cannot wait, the
    /// caller does.
    pub(crate) fn record<T: Send + 'static>(
        &mut self,
        record: &R,
        outlet: &Outlet<T>,
        mut meanwhile: impl FnMut() -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(callback) = &self.callback else { return Ok(()) };
        if self.thread.is_none() {
            let callback = Arc::clone(callback);
            self.thread = Some(LedgerThread::start(callback, &self.hook, outlet.clone())?);
        }
        let has_panicked = || io::Error::other("the ledger has panicked");
        let Some(LedgerThread { jobs: Some(jobs), outcomes, .. }) = &self.thread else {
            return Err(has_panicked());
        };
        jobs.send(*record).map_err(|_| has_panicked())?;
        loop {
            match outcomes.try_recv() {
                Ok(outcome) => return outcome,
                Err(TryRecvError::Disconnected) => return Err(has_panicked()),
                Err(TryRecvError::Empty) => {}
            }
            if let Err(error) = meanwhile() {
                tracing::error!(%error, "nothing is said while a record is written");
                return outcomes.recv().unwrap_or_else(|_| Err(has_panicked()));
            }
        }
    }
}

impl<R: Send + 'static> LedgerThread<R> {
    fn start<T: Send + 'static>(
        callback: Arc<Mutex<Callback<R>>>,
        hook: &ThreadHook,
        outlet: Outlet<T>,
    ) -> io::Result<Self> {
        let (jobs, todo) = crossbeam_channel::bounded::<R>(1);
        let (done, outcomes) = crossbeam_channel::bounded(1);
        let thread = threads::spawn(hook, ThreadRole::Ledger, 0, move || {
            // Dropped last: whoever is woken finds the channel closed.
            let wake = WakeAtEnd(outlet);
            let done = done;
            // Its only user: whoever finds it poisoned has panicked himself.
            let mut callback = callback.lock().unwrap_or_else(PoisonError::into_inner);
            for record in todo {
                if done.send((*callback)(&record)).is_err() {
                    return;
                }
                wake.0.wake();
            }
        })?;
        Ok(Self { jobs: Some(jobs), outcomes, thread: Some(thread) })
    }
}

impl<R> Drop for LedgerThread<R> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            threads::join(thread);
        }
    }
}
