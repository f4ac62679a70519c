//! Latencies of one loop, carried from the process that measured them to the one that
//! reports.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest that is told apart from longer ones.
const LONGEST_NS: u64 = 100_000_000_000;

/// A histogram of nanoseconds, exact to three digits.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        Self(histogram.expect("the bounds and three digits are valid"))
    }
}

impl From<Vec<(u64, u64)>> for Latencies {
    fn from(counts: Vec<(u64, u64)>) -> Self {
        let mut latencies = Self::default();
        for (nanoseconds, count) in counts {
            latencies.0.saturating_record_n(nanoseconds, count);
        }
        latencies
    }
}

impl From<Latencies> for Vec<(u64, u64)> {
    fn from(latencies: Latencies) -> Self {
        let steps = latencies.0.iter_recorded();
        steps.map(|step| (step.value_iterated_to(), step.count_at_value())).collect()
    }
}

impl Latencies {
    /// One more.
    pub fn record(&mut self, time: Duration) {
        self.0.saturating_record(time.as_nanos() as u64);
    }

    /// All of another loop too.
    pub fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("the same bounds");
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// All of them together, in microseconds.
    #[must_use]
    pub fn total_us(&self) -> f64 {
        self.mean_us() * self.count() as f64
    }

    /// The mean in microseconds.
    #[must_use]
    pub fn mean_us(&self) -> f64 {
        self.0.mean() / 1000.0
    }

    /// What `quantile` (0 to 1) of them do not exceed, in microseconds.
    #[must_use]
    pub fn quantile_us(&self, quantile: f64) -> f64 {
        self.0.value_at_quantile(quantile) as f64 / 1000.0
    }

    /// The longest, in microseconds.
    #[must_use]
    pub fn max_us(&self) -> f64 {
        self.0.max() as f64 / 1000.0
    }

    /// How many took at least 2ⁿ and less than 2ⁿ⁺¹ microseconds (the first: less than 2),
    /// by n.
    #[must_use]
    pub fn buckets(&self) -> Vec<u64> {
        let mut buckets = Vec::new();
        for step in self.0.iter_recorded() {
            let index = (step.value_iterated_to() / 1000).max(1).ilog2() as usize;
            if buckets.len() <= index {
                buckets.resize(index + 1, 0);
            }
            buckets[index] += step.count_at_value();
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_on_the_way() {
        let mut latencies = Latencies::default();
        for micros in [1, 9, 9, 80, 5000] {
            latencies.record(Duration::from_micros(micros));
        }
        let text = serde_json::to_string(&latencies).unwrap();
        let back: Latencies = serde_json::from_str(&text).unwrap();
        assert_eq!(back.count(), 5);
        assert_eq!(back.buckets(), latencies.buckets());
        assert!((back.quantile_us(0.5) - 9.0).abs() < 0.1, "{}", back.quantile_us(0.5));
    }
}
