//! What a unit's measurements say: one figure by name, round by round.
//!
//! Invariant: a figure is the median of its rounds; what it is made of stays with it.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::outcome::{Figure, Outcome, RateWindow, ResidentSample, WireSample};
use crate::pair::Measured;

const GIB: f64 = (1u64 << 30) as f64;

/// The figures of one unit in one round, by name.
pub type Figures = BTreeMap<&'static str, f64>;

/// Works out the figures of one measurement.
#[must_use]
pub fn of(measured: &Measured) -> Figures {
    let mut figures = Figures::new();
    let Measured { source, destination } = measured;
    if let Some(latencies) = &destination.latencies {
        figures.insert("count", latencies.count() as f64);
        figures.insert("mean_us", latencies.mean_us());
        for (name, quantile) in [("p50_us", 0.5), ("p99_us", 0.99), ("p999_us", 0.999)] {
            figures.insert(name, latencies.quantile_us(quantile));
        }
        figures.insert("max_us", latencies.max_us());
    }
    let seconds = destination.get(Figure::Seconds).filter(|seconds| *seconds > 0.0);
    let mut rate = |name, bytes: Option<f64>| {
        if let (Some(bytes), Some(seconds)) = (bytes, seconds) {
            figures.insert(name, bytes / seconds);
        }
    };
    rate("bytes_per_s", destination.get(Figure::Bytes));
    rate("background_bytes_per_s", destination.get(Figure::BackgroundBytes));
    rate("operations_per_s", destination.get(Figure::Operations));
    if let Some(seconds) = seconds {
        figures.insert("seconds", seconds);
    }
    processor(&mut figures, source, destination);
    let at = |outcome: &Outcome| outcome.get(Figure::AtNanoseconds);
    if let (Some(stopped), Some(runs)) = (at(source), at(destination)) {
        figures.insert("switchover_us", (runs - stopped) / 1000.0);
    }
    footprint(&mut figures, source, destination);
    recovery(&mut figures, destination);
    moving(&mut figures, source, destination);
    limits(&mut figures, &source.limits, &destination.wire);
    if let [.., last] = source.resident[..] {
        figures.insert("resident_at_end", last.resident);
        figures.extend(resident_at_half(&source.resident).map(|it| ("resident_at_half", it)));
    }
    if let Some(duplicates) = destination.get(Figure::DuplicatePages) {
        figures.insert("duplicate_pages", duplicates);
    }
    figures
}

fn processor(figures: &mut Figures, source: &Outcome, destination: &Outcome) {
    let Some(bytes) = destination.get(Figure::Bytes).filter(|bytes| *bytes > 0.0) else { return };
    let names = ["cpu_source_s_per_gib", "cpu_destination_s_per_gib"];
    for (name, outcome) in names.into_iter().zip([source, destination]) {
        if let Some(seconds) = outcome.get(Figure::CpuSeconds) {
            figures.insert(name, seconds * GIB / bytes);
        }
    }
}

fn footprint(figures: &mut Figures, source: &Outcome, destination: &Outcome) {
    let Some(pages) = destination.get(Figure::Pages) else { return };
    let names = [("extra_source_bytes", source), ("extra_destination_bytes", destination)];
    for (name, outcome) in names {
        if let Some(bytes) = outcome.get(Figure::ExtraBytes) {
            figures.insert(name, bytes);
        }
    }
    figures.insert("pages", pages);
    let zero = destination.get(Figure::ZeroPages).unwrap_or(0.0);
    figures.insert("zero_pages", zero);
    let moved = destination.get(Figure::Bytes).unwrap_or(0.0);
    if let Some(wire) = destination.get(Figure::WireBytes) {
        figures.insert("wire_bytes", wire);
        figures.insert("wire_overhead_bytes", wire - moved);
    }
}

fn recovery(figures: &mut Figures, destination: &Outcome) {
    let names = [
        ("round_trip_us", Figure::RoundTripUs),
        ("pause_us", Figure::PauseUs),
        ("agreement_us", Figure::AgreementUs),
        ("request_us", Figure::RequestUs),
    ];
    for (name, figure) in names {
        figures.extend(destination.get(figure).map(|value| (name, value)));
    }
}

fn moving(figures: &mut Figures, source: &Outcome, destination: &Outcome) {
    let names = [
        ("remote_faults", destination, Figure::RemoteFaults),
        ("stall_us", destination, Figure::StallUs),
        ("stopped_us", source, Figure::StoppedUs),
        ("wake_us", source, Figure::WakeUs),
    ];
    for (name, side, figure) in names {
        figures.extend(side.get(figure).map(|value| (name, value)));
    }
}

/// By how much what crossed the wire while a limit held was more or less than that, in percent.
fn limits(figures: &mut Figures, limits: &[RateWindow], wire: &[WireSample]) {
    let names = ["off_before_percent", "off_after_percent", "off_changed_percent"];
    for (name, limit) in names.into_iter().zip(limits) {
        let bytes = bytes_at(wire, limit.until_ns) - bytes_at(wire, limit.from_ns);
        let seconds = (limit.until_ns - limit.from_ns) as f64 / 1e9;
        let allowed = limit.bytes_per_second as f64 * seconds;
        figures.insert(name, 100.0 * (bytes as f64 / allowed - 1.0).abs());
    }
}

fn bytes_at(wire: &[WireSample], at_ns: u64) -> u64 {
    let index = wire.partition_point(|sample| sample.at_ns <= at_ns);
    index.checked_sub(1).map_or(0, |last| wire[last].bytes)
}

/// What was left when half of the pages were acknowledged, between the two samples around that
/// moment.
fn resident_at_half(samples: &[ResidentSample]) -> Option<f64> {
    let index = samples.iter().position(|sample| sample.acknowledged >= 0.5)?;
    let after = samples[index];
    let before = samples[index.saturating_sub(1)];
    let way = after.acknowledged - before.acknowledged;
    if way <= 0.0 {
        return Some(after.resident);
    }
    let part = (0.5 - before.acknowledged) / way;
    Some(before.resident + part * (after.resident - before.resident))
}

/// A figure over all rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// The median.
    pub median: f64,
    /// The smallest and the largest.
    pub spread: [f64; 2],
    /// Round by round.
    pub rounds: Vec<f64>,
}

impl Summary {
    /// Of at least one round.
    #[must_use]
    pub fn of(rounds: Vec<f64>) -> Option<Self> {
        let mut sorted = rounds.clone();
        sorted.sort_by(f64::total_cmp);
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, spread: [first, last], rounds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latency::Latencies;
    use std::time::Duration;

    #[test]
    fn the_median_does_not_mind_one_bad_round() {
        let summary = Summary::of(vec![1.0, 100.0, 3.0, 2.0, 4.0]).unwrap();
        assert!((summary.median - 3.0).abs() < 1e-9);
        assert_eq!(format!("{:?}", summary.spread), "[1.0, 100.0]");
        assert_eq!(summary.rounds.len(), 5);
        assert!((Summary::of(vec![1.0, 2.0]).unwrap().median - 1.5).abs() < 1e-9);
        assert_eq!(Summary::of(vec![]), None);
    }

    #[test]
    fn what_is_left_at_the_half_is_between_two_samples() {
        let sample =
            |acknowledged, resident| ResidentSample { seconds: 0.0, acknowledged, resident };
        let samples = [sample(0.0, 1.0), sample(0.4, 0.7), sample(0.6, 0.5), sample(1.0, 0.1)];
        assert!((resident_at_half(&samples).unwrap() - 0.6).abs() < 1e-9);
        assert!((resident_at_half(&samples[3..]).unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(resident_at_half(&samples[..2]), None);
    }

    #[test]
    fn what_crosses_within_a_limit_is_compared_with_it() {
        let wire: Vec<_> =
            (1..=40).map(|ms| WireSample { at_ns: ms * 1_000_000, bytes: ms * 100 }).collect();
        let limit = |from_ms: u64, until_ms: u64, bytes_per_second| RateWindow {
            from_ns: from_ms * 1_000_000,
            until_ns: until_ms * 1_000_000,
            bytes_per_second,
        };
        let mut figures = Figures::new();
        let all = [limit(0, 10, 100_000), limit(10, 20, 125_000), limit(30, 40, 80_000)];
        limits(&mut figures, &all, &wire);
        assert!(figures["off_before_percent"].abs() < 1e-9);
        assert!((figures["off_after_percent"] - 20.0).abs() < 1e-9);
        assert!((figures["off_changed_percent"] - 25.0).abs() < 1e-9);
    }

    #[test]
    fn rates_and_latencies_are_worked_out() {
        let mut latencies = Latencies::default();
        latencies.record(Duration::from_micros(10));
        let destination = Outcome::of(latencies)
            .with(Figure::Seconds, 2.0)
            .with(Figure::CpuSeconds, 1.0)
            .with(Figure::Bytes, GIB);
        let figures = of(&Measured { source: Outcome::default(), destination });
        assert!((figures["bytes_per_s"] - GIB / 2.0).abs() < 1.0);
        assert!((figures["cpu_destination_s_per_gib"] - 1.0).abs() < 1e-9);
        assert!((figures["p50_us"] - 10.0).abs() < 0.1);
        assert!(!figures.contains_key("cpu_source_s_per_gib"));
    }
}
