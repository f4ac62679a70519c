//! Counters of both sides, and what is made of them.

use hdrhistogram::Histogram;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Counted by a source's threads.
#[derive(Debug, Default)]
pub(crate) struct SourceCounters {
    pub(crate) early: AtomicU64,
    /// Of guest memory, in background.
    pub(crate) bytes: AtomicU64,
    pub(crate) requested: AtomicU64,
    pub(crate) background: AtomicU64,
    pub(crate) zero: AtomicU64,
    pub(crate) unreadable: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) recoveries: AtomicU64,
}

/// What a source has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceStats {
    /// Pages of the guest, in the destination's page sizes; 0 before one has attached.
    pub pages_total: u64,
    /// Pages that the destination has acknowledged.
    pub pages_acknowledged: u64,
    /// Pages sent before the switchover, each time one was.
    pub pages_precopy: u64,
    /// Bytes of guest memory that were sent unasked, before the switchover and after it.
    pub bytes_sent: u64,
    /// Pages sent because they were asked for.
    pub pages_requested: u64,
    /// Pages sent in background, with content.
    pub pages_background: u64,
    /// Pages sent in background as zeros.
    pub pages_zero: u64,
    /// Pages that could not be read here, each time one was to be sent; the destination has
    /// been told, and whoever touches one there waits.
    pub pages_unreadable: u64,
    /// Frames of older connections, dropped.
    pub frames_stale: u64,
    /// How often the destination has attached again.
    pub recoveries: u64,
    /// Pages of 4 KiB, whatever the destination's page sizes are, that were freed here, by this
    /// process or one before it. See [`Release`](crate::Release).
    pub pages_released: u64,
}

/// Counted by a destination's threads, beside the counters of its pages.
#[derive(Debug)]
pub(crate) struct DestinationCounters {
    pub(crate) bytes: AtomicU64,
    pub(crate) stale: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) recoveries: AtomicU64,
    pub(crate) unreadable: AtomicU64,
    pub(crate) first_page: AtomicU64,
    latency: Mutex<Latency>,
}

#[derive(Debug)]
struct Latency {
    nanoseconds: Histogram<u64>,
    total: Duration,
}

impl DestinationCounters {
    pub(crate) fn new() -> Self {
        let nanoseconds = Histogram::new_with_bounds(1, 3_600_000_000_000, 2)
            .expect("the bounds and two digits are valid");
        Self {
            bytes: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            retried: AtomicU64::new(0),
            recoveries: AtomicU64::new(0),
            unreadable: AtomicU64::new(0),
            first_page: AtomicU64::new(0),
            latency: Mutex::new(Latency { nanoseconds, total: Duration::ZERO }),
        }
    }

    /// Somebody waited so long for a page.
    pub(crate) fn waited(&self, time: Duration) {
        let mut latency = self.latency.lock().unwrap_or_else(PoisonError::into_inner);
        latency.nanoseconds.saturating_record(time.as_nanos() as u64);
        latency.total += time;
    }

    /// Notes when the first page arrived.
    pub(crate) fn page_arrived(&self, since_start: Duration) {
        if self.first_page.load(Ordering::Relaxed) == 0 {
            let now = since_start.as_micros().max(1) as u64;
            // Whoever is second was not the first.
            let _ = self.first_page.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    pub(crate) fn latency(&self) -> FaultLatency {
        let latency = self.latency.lock().unwrap_or_else(PoisonError::into_inner);
        // Copied, so that whoever answers faults does not wait for the percentiles.
        let (nanoseconds, total) = (latency.nanoseconds.clone(), latency.total);
        drop(latency);
        FaultLatency::of(&nanoseconds, total)
    }
}

/// What a destination has done so far.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct DestinationStats {
    /// Pages of the guest.
    pub pages_total: u64,
    /// Pages that are in place.
    pub pages_complete: u64,
    /// Pages put in place because somebody waited for them: asked for, or taken from an image.
    pub pages_requested: u64,
    /// Pages put in place from background streams.
    pub pages_background: u64,
    /// Pages of which an early copy, sent before the switchover, turned out to be right.
    pub pages_precopy: u64,
    /// Pages that are zero at the source, and not among the former.
    pub pages_zero: u64,
    /// Pages that the guest gave up before they arrived.
    pub pages_discarded: u64,
    /// Pages that came although another copy was first; dropped.
    pub pages_duplicate: u64,
    /// Pages that the source could not read; whoever touches one waits.
    pub pages_unreadable: u64,
    /// Those of them that fail for whoever touches them ([`UnreadablePages::Poison`]).
    ///
    /// [`UnreadablePages::Poison`]: crate::UnreadablePages::Poison
    pub pages_poisoned: u64,
    /// Bytes of page content received.
    pub bytes_received: u64,
    /// Frames of older connections, dropped.
    pub frames_stale: u64,
    /// Requests sent again because no answer came in time.
    pub requests_retried: u64,
    /// How often the source has been attached again.
    pub recoveries: u64,
    /// When the first page was in place, since the start; `None` before.
    pub first_page: Option<Duration>,
    /// How long the guest waited for pages, from the reading of the fault to the waking.
    pub fault_latency: FaultLatency,
}

/// Fault latencies.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct FaultLatency {
    /// How many pages somebody waited for until they came, from the source or an image.
    pub count: u64,
    /// All of them together.
    pub total: Duration,
    /// The mean.
    pub mean: Duration,
    /// The median.
    pub p50: Duration,
    /// 99 % are no longer.
    pub p99: Duration,
    /// 99.9 % are no longer.
    pub p999: Duration,
    /// The longest.
    pub max: Duration,
    /// How many took less than 2ⁿ⁺¹ microseconds and at least 2ⁿ (the first: less than 2),
    /// by n.
    pub buckets: Vec<u64>,
}

impl FaultLatency {
    fn of(nanoseconds: &Histogram<u64>, total: Duration) -> Self {
        let count = nanoseconds.len();
        if count == 0 {
            return Self::default();
        }
        let at = |quantile| Duration::from_nanos(nanoseconds.value_at_quantile(quantile));
        let mut buckets = Vec::new();
        for step in nanoseconds.iter_recorded() {
            let micros = (step.value_iterated_to() / 1000).max(1);
            let index = micros.ilog2() as usize;
            if buckets.len() <= index {
                buckets.resize(index + 1, 0);
            }
            buckets[index] += step.count_at_value();
        }
        Self {
            count,
            total,
            mean: Duration::from_nanos((total.as_nanos() / u128::from(count)) as u64),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: Duration::from_nanos(nanoseconds.max()),
            buckets,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_microseconds() {
        let counters = DestinationCounters::new();
        for micros in [1, 3, 9, 10, 100] {
            counters.waited(Duration::from_micros(micros));
        }
        let latency = counters.latency();
        assert_eq!(latency.count, 5);
        assert_eq!(latency.total, Duration::from_micros(123));
        assert_eq!(latency.buckets, [1, 1, 0, 2, 0, 0, 1]);
        assert!(latency.p50 >= Duration::from_micros(9) && latency.max >= latency.p999);
    }
}
