//! What a migration was to the guest: figures made of the guest's own notes.
//!
//! The guest's clock stands still while its vCPUs do, so it does not see the blackout;
//! [`GuestFigures::clock_behind_us`] is the evidence. The driver knows when the guest was
//! marked, when it was stopped and when it ran again, and so finds the switch in the
//! guest's notes: what began before `stopped` happened at the source.
//!
//! A fault is a touch of a page that the guest had not touched since the switch, if it
//! took long enough to be noted. What else took long (a timer, the emulation, another
//! program on the host) is in all gaps, and in the baseline.

use std::time::Duration;

use afterimage_tools::qemu::guest::{Gap, GuestReport, Marked, Verified};
use serde::Serialize;

use super::method::Moved;

/// How long something took, over many times, in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Latency {
    /// How many there were.
    pub count: u64,
    /// All of them together, divided by their number.
    pub mean: f64,
    /// Half of them took no longer.
    pub p50: f64,
    /// One in a hundred took longer.
    pub p99: f64,
    /// One in a thousand took longer.
    pub p999: f64,
    /// The longest.
    pub max: f64,
    /// How many took less than 1 µs, then less than 2, 4, 8, and so on.
    pub buckets: Vec<u64>,
}

/// The guest before anything moves.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Baseline {
    /// Pages touched in a second.
    pub operations_per_s: f64,
    /// Noted gaps in a second.
    pub gaps_per_s: f64,
    /// Those gaps.
    pub gap_us: Latency,
}

/// The guest's work over time, for a picture. Instants are microseconds since the first
/// slot began, by the host's clock.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Work {
    /// How long a slot is, by the guest's clock.
    pub slot_us: u64,
    /// The migration was asked for.
    pub started_us: u64,
    /// The source's vCPUs stood still; later slots happened later by the blackout.
    pub stopped_us: u64,
    /// The destination's vCPUs ran.
    pub resumed_us: u64,
    /// All memory had arrived.
    pub finished_us: u64,
    /// Pages touched in each slot.
    pub operations: Vec<u32>,
}

/// The guest from its switch until all memory had arrived.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct GuestFigures {
    /// The same guest, undisturbed, for comparison.
    pub baseline: Baseline,
    /// First touches after the switch that took long enough to be noted.
    pub fault_latency_us: Latency,
    /// All touches that took so long, for whatever reason.
    pub gap_us: Latency,
    /// From the start of the vCPUs to the end of the first touch that had to wait, by the
    /// guest's clock: its kernel's own pages had to come first.
    pub first_touch_us: u64,
    /// Pages touched from the switch until all memory had arrived.
    pub operations: u64,
    /// How long the guest, undisturbed, would work for what it did not do from the stop
    /// at the source until all memory had arrived; the blackout is part of it.
    pub work_lost_us: u64,
    /// By how much the guest's clock fell behind the host's.
    pub clock_behind_us: i64,
    /// Gaps that were not noted for want of room.
    pub gaps_lost: u64,
    /// The guest's work over time.
    pub work: Work,
}

/// What was seen of one round.
#[derive(Clone, Debug)]
pub(super) struct Observed {
    pub(super) marked: Marked,
    /// The guest's clock and the host's, once more, when all was over.
    pub(super) marked_again: Marked,
    pub(super) baseline: GuestReport,
    pub(super) after: GuestReport,
    pub(super) verified: Verified,
}

impl GuestFigures {
    pub(super) fn new(moved: &Moved, observed: &Observed) -> Self {
        let Observed { after, .. } = observed;
        let baseline = Baseline::new(&observed.baseline);
        let since_mark = |instant: Duration| micros(instant.saturating_sub(observed.marked.host));
        let work = Work {
            slot_us: after.slot_us,
            started_us: since_mark(moved.started),
            stopped_us: since_mark(moved.stopped),
            resumed_us: since_mark(moved.resumed),
            finished_us: since_mark(moved.finished),
            operations: after.slots.clone(),
        };
        let (begin, end) = work.by_guest_clock();
        let later: Vec<&Gap> =
            after.gaps.iter().filter(|gap| gap.end_us() >= begin && gap.at_us < end).collect();
        let is_first = |gap: &&Gap| gap.at_us.saturating_sub(gap.age_us) < begin;
        let operations = work.between(begin, end);
        let full_speed_us = operations * 1e6 / baseline.operations_per_s;
        let elapsed_us = (work.finished_us - work.stopped_us) as f64;
        Self {
            fault_latency_us: Latency::of(
                later.iter().copied().filter(is_first).map(|gap| gap.took_ns),
            ),
            gap_us: Latency::of(later.iter().map(|gap| gap.took_ns)),
            first_touch_us: later.first().map_or(0, |gap| gap.end_us() - begin),
            operations: operations as u64,
            work_lost_us: (elapsed_us - full_speed_us).max(0.0) as u64,
            clock_behind_us: observed.marked_again.behind_us(observed.marked),
            gaps_lost: after.gaps_lost,
            baseline,
            work,
        }
    }
}

impl Baseline {
    fn new(report: &GuestReport) -> Self {
        let seconds = report.elapsed_us.max(1) as f64 / 1e6;
        Self {
            operations_per_s: report.operations.max(1) as f64 / seconds,
            gaps_per_s: (report.gaps.len() as u64 + report.gaps_lost) as f64 / seconds,
            gap_us: Latency::of(report.gaps.iter().map(|gap| gap.took_ns)),
        }
    }
}

impl Work {
    /// The time after the switch, from where the guest was stopped until all memory had
    /// arrived. It did not see the time between.
    fn by_guest_clock(&self) -> (u64, u64) {
        (self.stopped_us, self.stopped_us + self.finished_us.saturating_sub(self.resumed_us))
    }

    /// Pages touched between two instants of the guest's; slots cut through count in part.
    fn between(&self, begin_us: u64, end_us: u64) -> f64 {
        let slots = self.operations.iter().enumerate().map(|(index, &count)| {
            let start = index as u64 * self.slot_us;
            let inside = end_us.min(start + self.slot_us).saturating_sub(begin_us.max(start));
            f64::from(count) * inside as f64 / self.slot_us.max(1) as f64
        });
        slots.sum()
    }
}

impl Latency {
    fn of(nanoseconds: impl Iterator<Item = u64>) -> Self {
        let mut all: Vec<u64> = nanoseconds.collect();
        let Some(last) = all.len().checked_sub(1) else { return Self::default() };
        all.sort_unstable();
        let at = |share: f64| {
            let rank = (all.len() as f64 * share).ceil() as usize;
            all[rank.saturating_sub(1).min(last)] as f64 / 1e3
        };
        let mut buckets = Vec::new();
        for took in &all {
            let index = (u64::BITS - (took / 1000).leading_zeros()) as usize;
            if buckets.len() <= index {
                buckets.resize(index + 1, 0);
            }
            buckets[index] += 1;
        }
        Self {
            count: all.len() as u64,
            mean: all.iter().sum::<u64>() as f64 / all.len() as f64 / 1e3,
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: at(1.0),
            buckets,
        }
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::method::{Own, QemuStatistics};

    #[test]
    fn percentiles_are_values_that_occurred() {
        let latency = Latency::of((1..=100).rev().map(|micros| micros * 1000));
        assert_eq!((latency.count, latency.mean), (100, 50.5));
        assert_eq!((latency.p50, latency.p99, latency.max), (50.0, 99.0, 100.0));
        assert_eq!(latency.buckets, [0, 1, 2, 4, 8, 16, 32, 37]);
        assert_eq!(Latency::of([].into_iter()), Latency::default());
    }

    #[test]
    fn slots_cut_through_count_in_part() {
        let work = Work {
            slot_us: 10,
            started_us: 0,
            stopped_us: 15,
            resumed_us: 115,
            finished_us: 130,
            operations: vec![100, 200, 300, 400],
        };
        assert_eq!(work.by_guest_clock(), (15, 30));
        assert!((work.between(15, 30) - 400.0).abs() < 1e-9);
    }

    #[test]
    fn a_fault_is_a_long_first_touch_after_the_switch() {
        let gap = |at_us, took_ns, age_us| Gap { at_us, took_ns, age_us };
        let report = |gaps| GuestReport {
            elapsed_us: 1000,
            operations: 1000,
            wrong: 0,
            slot_us: 10_000,
            slots: vec![1000],
            gaps_lost: 0,
            gaps,
        };
        let at = |us: u64| Duration::from_micros(1_000_000 + us);
        let observed = Observed {
            marked: Marked { host: at(0), guest_us: 7_000_000 },
            marked_again: Marked { host: at(1100), guest_us: 7_001_000 },
            baseline: report(vec![]),
            after: report(vec![
                gap(100, 50_000, 90),  // Before the switch.
                gap(480, 90_000, 300), // Stopped in the midst of it.
                gap(600, 30_000, 200), // Last touched at the source.
                gap(700, 70_000, 20),  // Touched before at the destination.
                gap(900, 40_000, 800), // When all had arrived.
            ]),
            verified: Verified { pages: 1, wrong: 0 },
        };
        let moved = Moved {
            started: at(450),
            stopped: at(500),
            resumed: at(600),
            finished: at(950),
            bytes: 0,
            postcopy_bytes: 0,
            own: Own::Qemu(QemuStatistics::default()),
        };
        let figures = GuestFigures::new(&moved, &observed);
        assert_eq!(figures.fault_latency_us.count, 2);
        assert!((figures.fault_latency_us.max - 90.0).abs() < 1e-9);
        assert_eq!(figures.gap_us.count, 3);
        assert_eq!(figures.first_touch_us, 70);
        assert_eq!(figures.clock_behind_us, 100);
    }
}
