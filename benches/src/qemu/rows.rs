//! QEMU's postcopy with preempt against the engine, in rows as the rest of the bench has them.
//!
//! Invariant: a ratio is of two migrations of the same round, theirs ÷ ours, so that more is
//! better for the engine.

use serde::Serialize;

use super::report::{ModeReport, QemuRound, Spread};
use crate::figures::Summary;

/// One row.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Ratio {
    /// Its name.
    pub name: &'static str,
    /// What it says.
    pub what: &'static str,
    /// The median of the rounds; `None` if it could not be measured.
    pub value: Option<f64>,
    /// What it is to reach.
    pub reach: f64,
    /// Always `higher`.
    pub better: &'static str,
    /// Whether it is reached.
    pub ok: Option<bool>,
    /// Round by round.
    pub rounds: Vec<f64>,
    /// The smallest and the largest.
    pub spread: Option<[f64; 2]>,
    /// QEMU's own figure, with preempt; in microseconds or bytes.
    pub theirs: Option<Spread>,
    /// The engine's.
    pub ours: Option<Spread>,
}

/// A figure of a round; `None` where there was nothing to measure.
type Figure = fn(&QemuRound) -> Option<f64>;

struct Row {
    name: &'static str,
    what: &'static str,
    reach: f64,
    figure: Figure,
}

const ROWS: [Row; 6] = [
    Row {
        name: "qemu_blackout_ratio",
        what: "no vCPU runs anywhere",
        reach: 1.0,
        figure: |round| Some(round.blackout_us as f64),
    },
    Row {
        name: "qemu_fault_mean_ratio",
        what: "mean wait of a guest for a page that has not come",
        reach: 10.0,
        figure: |round| fault(round, round.guest.fault_latency_us.mean),
    },
    Row {
        name: "qemu_fault_p99_ratio",
        what: "what 1 % of these waits exceed",
        reach: 10.0,
        figure: |round| fault(round, round.guest.fault_latency_us.p99),
    },
    Row {
        name: "qemu_total_ratio",
        what: "from the command until both sides say that all has arrived",
        reach: 2.0,
        figure: |round| Some(round.total_us as f64),
    },
    Row {
        name: "qemu_work_lost_ratio",
        what: "the guest's work that was not done from its stop until all had arrived",
        reach: 5.0,
        // A guest that lost nothing would make it infinite.
        figure: |round| Some(round.guest.work_lost_us.max(1) as f64),
    },
    Row {
        name: "qemu_bytes_ratio",
        what: "bytes that crossed the network, headers and both directions included",
        reach: 1.0,
        figure: |round| round.wire_bytes.map(|bytes| bytes as f64),
    },
];

fn fault(round: &QemuRound, value: f64) -> Option<f64> {
    (round.guest.fault_latency_us.count > 0).then_some(value)
}

/// All rows.
pub(super) fn compare(theirs: &ModeReport, ours: &ModeReport) -> Vec<Ratio> {
    let rounds: Vec<_> = theirs.rounds.iter().zip(&ours.rounds).collect();
    let pairs = |figure: Figure| {
        let both = |&(theirs, ours): &(_, _)| figure(theirs).zip(figure(ours));
        rounds.iter().filter_map(both).collect()
    };
    ROWS.iter().map(|row| row.of(pairs(row.figure))).collect()
}

impl Row {
    /// Of theirs and ours, round by round.
    fn of(&self, mut pairs: Vec<(f64, f64)>) -> Ratio {
        pairs.retain(|(_, ours)| *ours > 0.0);
        let summary = Summary::of(pairs.iter().map(|(theirs, ours)| theirs / ours).collect());
        let value = summary.as_ref().map(|it| it.median);
        let (theirs, ours): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
        let spread = |values: Vec<f64>| (!values.is_empty()).then(|| Spread::of(values));
        Ratio {
            name: self.name,
            what: self.what,
            value,
            reach: self.reach,
            better: "higher",
            ok: value.map(|value| value >= self.reach),
            spread: summary.as_ref().map(|it| it.spread),
            rounds: summary.map_or_else(Vec::new, |it| it.rounds),
            theirs: spread(theirs),
            ours: spread(ours),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_the_median_of_the_rounds_ratios_and_not_the_ratio_of_medians() {
        let row = Row { name: "row", what: "", reach: 4.0, figure: |_| None };
        let ratio = row.of(vec![(10.0, 1.0), (8.0, 4.0), (100.0, 25.0)]);
        assert_eq!(ratio.rounds, [10.0, 2.0, 4.0]);
        assert_eq!(
            (ratio.value, ratio.ok, ratio.spread),
            (Some(4.0), Some(true), Some([2.0, 10.0]))
        );
        assert_eq!(ratio.theirs.map(|it| it.median), Some(10.0));
        assert_eq!(ratio.ours.map(|it| it.median), Some(4.0));
        assert_eq!(row.of(vec![(3.0, 1.0)]).ok, Some(false));
    }

    #[test]
    fn what_was_not_measured_is_missing_and_not_good() {
        let row = Row { name: "row", what: "", reach: 1.0, figure: |_| None };
        let ratio = row.of(vec![(3.0, 0.0)]);
        assert_eq!((ratio.value, ratio.ok, ratio.theirs), (None, None, None));
    }
}
