//! Whether a limit of background is kept, and whether faults wait for it.

use super::figure;
use crate::suite::{Better, Round, Row, Step, Units, Value, sweeps};
use crate::unit::{Load, Unit};

/// By how many percent a second may carry more or less than was set.
const OFF_PERCENT: f64 = 5.0;
/// As for the other percentiles: what the engine may add to what the machine does to the floor.
const P99_REACH: f64 = 1.5;

/// What a second carries beside what was set.
pub(super) fn bandwidth(units: &Units) -> Vec<Row> {
    let step: Step = units.bandwidth().into();
    let row = |name, what, figures: &'static [&'static str], reach| {
        let work_out = move |round: &Round| {
            let all: Option<Vec<f64>> =
                figures.iter().map(|name| figure(round, step, name)).collect();
            Some(Value { value: all?.into_iter().fold(0.0, f64::max), reach })
        };
        let better = Better::Lower;
        Row { name, what, better, steps: vec![step], work_out: Box::new(work_out) }
    };
    vec![
        row(
            "bandwidth_error",
            "by how much what crosses the wire in a second is off the limit of background, in \
             percent; the worst of the three that follow",
            &["off_before_percent", "off_after_percent", "off_changed_percent"],
            Some(OFF_PERCENT),
        ),
        row("bandwidth_error_before", "before the switchover", &["off_before_percent"], None),
        row("bandwidth_error_after", "after it", &["off_after_percent"], None),
        row(
            "bandwidth_error_changed",
            "from the instant at which another limit is set",
            &["off_changed_percent"],
            None,
        ),
    ]
}

/// Faults beside a limited background, to faults without any.
pub(super) fn faults(units: &Units) -> Vec<Row> {
    let plans = [units.limited(Load::Limited(sweeps::RATES[0])), units.limited(Load::Idle)];
    let engine = plans.map(|plan| Step::from(Unit::Faults(plan)));
    let floor = plans.map(|plan| Step::from(Unit::RemoteFault(plan)));
    let p99 = |round: &Round, [limited, alone]: [Step; 2]| {
        Some(figure(round, limited, "p99_us")? / figure(round, alone, "p99_us")?)
    };
    let of_engine = move |round: &Round| {
        let reach = P99_REACH * p99(round, floor)?;
        Some(Value { value: p99(round, engine)?, reach: Some(reach) })
    };
    let of_floor = move |round: &Round| Some(Value { value: p99(round, floor)?, reach: None });
    vec![
        Row {
            name: "fault_limited_p99",
            what: "p99 of faults while the background is limited to 64 MiB/s, to the same without \
                   any background",
            better: Better::Lower,
            steps: [engine, floor].concat(),
            work_out: Box::new(of_engine),
        },
        Row {
            name: "fault_limited_p99_floor",
            what: "the same of L, whose background shares the processors too",
            better: Better::Lower,
            steps: floor.to_vec(),
            work_out: Box::new(of_floor),
        },
    ]
}
