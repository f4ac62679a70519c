//! A thread that touches missing pages and measures how long it waits, as a vCPU would.

pub mod hot;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{BenchError, Doing};
use crate::latency::Latencies;
use crate::memory::{Memory, PAGE, mix};
use crate::sys::PageMap;
use crate::unit::{Think, WORKING_SET};

/// Touches `pages` in their order until `done`, and measures those that are missing.
///
/// # Errors
/// If the page map cannot be read.
///
/// # Safety
/// Each address is mapped and readable; somebody serves its faults.
pub unsafe fn touch(
    pages: impl Iterator<Item = *mut u8>,
    think: Think,
    done: &AtomicBool,
) -> Result<Latencies, BenchError> {
    let map = PageMap::open().doing("/proc/self/pagemap")?;
    let mut latencies = Latencies::default();
    for page in pages {
        if done.load(Ordering::Relaxed) {
            break;
        }
        if map.is_present(page as u64) {
            continue;
        }
        let before = Instant::now();
        // SAFETY: the caller's promise.
        black_box(unsafe { page.read_volatile() });
        let after = Instant::now();
        latencies.record(after - before);
        compute(after, think.time());
    }
    Ok(latencies)
}

/// Uses the processor for so long.
fn compute(since: Instant, time: Duration) {
    let mut sum = 0u64;
    while since.elapsed() < time {
        for number in 0..200u64 {
            sum = black_box(sum.wrapping_mul(31).wrapping_add(number));
        }
    }
}

/// Operations of one run of [`work`].
const OPERATIONS: u64 = 4_000_000;

/// Adds one to the first word of a page by chance, again and again, in the working set, which
/// is the beginning of the memory; returns how long that took, in seconds, and how often it
/// met each page.
#[must_use]
pub fn work(memory: &Memory) -> (f64, Vec<u64>) {
    let pages = WORKING_SET.min(memory.plan().bytes) / PAGE;
    let mut added = vec![0; pages as usize];
    let started = Instant::now();
    for number in 0..OPERATIONS {
        let page = mix(number) % pages;
        memory.word(page).fetch_add(1, Ordering::Relaxed);
        added[page as usize] += 1;
    }
    (started.elapsed().as_secs_f64(), added)
}
