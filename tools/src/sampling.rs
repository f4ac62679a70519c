//! Samples of a migration as it goes on, taken from outside of the engine.
//!
//! Responsible for when samples are taken and which are kept; what is drawn of them is the
//! affair of [`report_page`](crate::report_page).
//!
//! Invariant: a migration of any length leaves at most [`MOST_SAMPLES`], evenly spread, and
//! taking them costs the destination next to nothing.

use std::time::{Duration, Instant};

use afterimage::{Destination, DestinationStats};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use serde::{Deserialize, Serialize};

/// How many samples are kept at most.
pub const MOST_SAMPLES: usize = 400;

/// The parts that memory is cut into, to say which have arrived.
pub const PARTS: usize = 96;

/// The pause between samples at first.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
/// A sample may take this part of the time: it reads a bit of every page, and there may be
/// many.
const REST: u32 = 50;

/// What had arrived at a moment, since the start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ArrivalSample {
    /// The moment, in microseconds of whatever clock the sampler was given.
    pub at_us: u64,
    /// Pages put in place because they were asked for.
    pub pages_requested: u64,
    /// Pages put in place from background streams.
    pub pages_background: u64,
    /// Pages of which a copy that was sent before the switchover turned out to be right.
    pub pages_precopy: u64,
    /// Pages that are zero, of which no content was sent.
    pub pages_zero: u64,
    /// How long vCPUs had waited for pages, all waits that were over added up, in
    /// microseconds.
    pub stall_us: f64,
    /// For parts of memory of equal length, in order, how much of each had arrived, in
    /// percent: 0 only for nothing, 100 only for all.
    pub arrived_percent: Vec<u8>,
}

impl ArrivalSample {
    fn new(at_us: u64, stats: &DestinationStats, shares: &[f64]) -> Self {
        Self {
            at_us,
            pages_requested: stats.pages_requested,
            pages_background: stats.pages_background,
            pages_precopy: stats.pages_precopy,
            pages_zero: stats.pages_zero,
            stall_us: stats.fault_latency.total.as_nanos() as f64 / 1000.0,
            arrived_percent: shares.iter().copied().map(percent).collect(),
        }
    }

    fn has_nothing(&self) -> bool {
        self.arrived_percent.iter().all(|percent| *percent == 0)
    }
}

/// A share in percent, rounded so that 0 and 100 mean what they say.
fn percent(share: f64) -> u8 {
    match share {
        _ if share <= 0.0 => 0,
        _ if share >= 1.0 => 100,
        _ => ((share * 100.0) as u8).clamp(1, 99),
    }
}

/// Takes samples of a destination in the calling thread until every page has arrived, or
/// somebody says something, or drops it, at the other end of `stop`. `clock` gives the time
/// in microseconds.
///
/// Samples begin with the last one before the first page. They are taken every 5 ms at
/// first, and less often the longer it takes.
#[must_use]
pub fn watch(
    destination: &Destination,
    stop: &Receiver<()>,
    clock: impl Fn() -> u64,
) -> Vec<ArrivalSample> {
    let mut history = History::new();
    let mut is_last = false;
    loop {
        let begun = Instant::now();
        let stats = destination.stats();
        is_last |= stats.pages_complete == stats.pages_total;
        let shares = destination.arrived_shares(PARTS);
        history.push(ArrivalSample::new(clock(), &stats, &shares));
        if is_last {
            return history.samples;
        }
        let pause = history.pause.max(begun.elapsed() * REST);
        is_last = stop.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
    }
}

/// Samples that grow fewer as they grow old.
#[derive(Debug)]
struct History {
    samples: Vec<ArrivalSample>,
    pause: Duration,
}

impl History {
    const fn new() -> Self {
        Self { samples: Vec::new(), pause: FIRST_PAUSE }
    }

    /// Keeps a sample. Where there is no room, every second one goes, and they are to be
    /// taken half as often from then on.
    fn push(&mut self, sample: ArrivalSample) {
        if self.samples.len() == MOST_SAMPLES {
            let mut index = 0;
            self.samples.retain(|_| {
                index += 1;
                index % 2 == 1
            });
            self.pause *= 2;
        }
        if sample.has_nothing() {
            // Nothing had arrived before either: that can be said once.
            self.samples.clear();
        }
        self.samples.push(sample);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_us: u64, percent: u8) -> ArrivalSample {
        ArrivalSample { at_us, arrived_percent: vec![percent; 2], ..Default::default() }
    }

    #[test]
    fn a_long_history_is_thinned_evenly_and_keeps_its_ends() {
        let mut history = History::new();
        let mut at = 0;
        while at < 1_000_000 {
            at += history.pause.as_millis() as u64;
            history.push(sample(at, 50));
            assert!(history.samples.len() <= MOST_SAMPLES);
        }
        let times: Vec<_> = history.samples.iter().map(|sample| sample.at_us).collect();
        assert_eq!((times[0], times.last()), (5, Some(&at)));
        assert!(times.len() >= MOST_SAMPLES / 2, "{} samples", times.len());
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        let longest = gaps.clone().max().unwrap();
        assert_eq!(u128::from(longest), history.pause.as_millis());
        assert!(gaps.min().unwrap() * 2 >= longest);
    }

    #[test]
    fn the_wait_for_the_first_page_is_one_sample() {
        let mut history = History::new();
        for at in 0..1000 {
            history.push(sample(at, 0));
        }
        history.push(sample(1000, 1));
        let times: Vec<_> = history.samples.iter().map(|sample| sample.at_us).collect();
        assert_eq!(times, [999, 1000]);
        assert_eq!(history.pause, FIRST_PAUSE);
    }

    #[test]
    fn a_share_is_none_or_all_only_if_it_is() {
        assert_eq!([0.0, 1e-9, 0.5, 0.9999, 1.0].map(percent), [0, 1, 50, 99, 100]);
    }
}
