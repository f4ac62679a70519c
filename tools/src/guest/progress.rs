//! What a running guest tells its host: counters, failures, and a way to await them.
//!
//! Invariant: counters of a vCPU only grow, and the first failure stays.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::{GuestSpec, VcpuProgress};

/// Progress of a guest, shared between its vCPUs and whoever watches it.
#[derive(Debug)]
pub struct Progress {
    operations: Vec<AtomicU64>,
    pages_per_round: u64,
    failure: OnceLock<String>,
    waiting: AtomicUsize,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Progress {
    /// Starts from what the vCPUs had done before.
    pub(crate) fn new(spec: &GuestSpec, vcpus: &[VcpuProgress]) -> Self {
        Self {
            operations: vcpus.iter().map(|vcpu| AtomicU64::new(vcpu.operations)).collect(),
            pages_per_round: spec.worked_pages(),
            failure: OnceLock::new(),
            waiting: AtomicUsize::new(0),
            lock: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// See [`super::Guest::operations`].
    #[must_use]
    pub fn operations(&self) -> u64 {
        let each = self.operations.iter();
        each.map(|vcpu| vcpu.load(Ordering::Relaxed)).sum()
    }

    /// Operations of one vCPU, as last reported.
    ///
    /// # Panics
    /// If there is no such vCPU.
    #[must_use]
    pub fn operations_of(&self, vcpu: u32) -> u64 {
        self.operations[vcpu as usize].load(Ordering::Relaxed)
    }

    /// See [`super::Guest::rounds`].
    #[must_use]
    pub fn rounds(&self) -> u64 {
        let each = self.operations.iter();
        each.map(|vcpu| vcpu.load(Ordering::Relaxed) / self.pages_per_round).sum()
    }

    /// See [`super::Guest::failure`].
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    /// See [`super::Guest::wait_for_operations`].
    pub fn wait_for_operations(&self, target: u64, limit: Duration) -> bool {
        self.wait(limit, || self.operations() >= target)
    }

    /// Waits until a failure is reported or `limit` has passed.
    pub fn wait_for_failure(&self, limit: Duration) -> Option<String> {
        self.wait(limit, || false);
        self.failure()
    }

    fn wait(&self, limit: Duration, reached: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + limit;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.guard();
        while !reached() && self.failure.get().is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            guard =
                self.changed.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(guard);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        reached()
    }

    /// Records how many operations a vCPU has done in all.
    pub(crate) fn report(&self, vcpu: u32, operations: u64) {
        self.operations[vcpu as usize].store(operations, Ordering::SeqCst);
        self.wake();
    }

    /// Records a failure, unless there is one already.
    pub(crate) fn fail(&self, what: String) {
        let _ = self.failure.set(what);
        self.wake();
    }

    fn wake(&self) {
        // A waiter counts itself before it looks at the counters, and they were
        // changed before this looks at the count: one of the two sees the other.
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(self.guard());
            self.changed.notify_all();
        }
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
