//! How much memory a process needs while it serves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::error::{BenchError, Doing};
use crate::sys;

/// Between two looks.
const EVERY: Duration = Duration::from_millis(2);

/// Looks again and again at the memory of this process, page tables included.
#[derive(Debug)]
pub(super) struct Sampler {
    before: u64,
    most: Arc<AtomicU64>,
    guest: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Sampler {
    /// What is in use now does not count.
    pub(super) fn start() -> Result<Self, BenchError> {
        let before = sys::resident().doing("the memory of this process")?;
        let most = Arc::new(AtomicU64::new(0));
        let guest = Arc::new(AtomicU64::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        let thread = {
            let (most, guest, is_over) = (most.clone(), guest.clone(), is_over.clone());
            thread::spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    look(before, &most, &guest);
                    thread::sleep(EVERY);
                }
            })
        };
        Ok(Self { before, most, guest, is_over, thread })
    }

    /// Where the guest's own share is noted, page tables included, before each look.
    pub(super) fn guest(&self) -> &AtomicU64 {
        &self.guest
    }

    /// The most that was in use beside the guest's share, which `guest` tells once more.
    pub(super) fn stop(self, guest: impl FnOnce() -> u64) -> u64 {
        self.guest.fetch_max(guest(), Ordering::Relaxed);
        look(self.before, &self.most, &self.guest);
        self.is_over.store(true, Ordering::Relaxed);
        // It does not panic; if it did, what it saw is there.
        let _ = self.thread.join();
        self.most.load(Ordering::Relaxed)
    }
}

fn look(before: u64, most: &AtomicU64, guest: &AtomicU64) {
    // The guest's share first: it only grows, so the rest is rather too much than too little.
    let guest = guest.load(Ordering::Relaxed);
    if let Ok(now) = sys::resident() {
        most.fetch_max(now.saturating_sub(before + guest), Ordering::Relaxed);
    }
}
