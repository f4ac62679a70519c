//! How much memory a process needs while it serves.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::error::{BenchError, Doing};
use crate::sys;

/// Between two looks.
const EVERY: Duration = Duration::from_millis(2);
/// How much the guest may grow during a look: where the thread lost its processor meanwhile,
/// the look says nothing.
const BLUR: u64 = 256 << 10;

/// Memory of this process, page tables included, beside what was there before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Footprint {
    before: u64,
}

impl Footprint {
    /// What is in use now does not count.
    pub(super) fn start() -> Result<Self, BenchError> {
        Ok(Self { before: sys::resident().doing("the memory of this process")? })
    }

    /// The most that is in use at a time beside the guest's share, which `guest` tells and
    /// which only grows, until `is_over`; at least one look.
    pub(super) fn watch(self, guest: impl Fn() -> u64, is_over: &AtomicBool) -> u64 {
        let mut most = 0;
        loop {
            let is_last = is_over.load(Ordering::Acquire);
            let share = guest();
            // What the kernel does not say it said at the start: this does not fail.
            let now = sys::resident().unwrap_or(0);
            if guest() - share <= BLUR {
                most = most.max(now.saturating_sub(self.before + share));
            }
            if is_last {
                return most;
            }
            thread::sleep(EVERY);
        }
    }
}
