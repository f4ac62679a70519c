//! What a link that is cut costs, and what a source that frees its memory.

use afterimage_tools::ram::Backing;

use super::{figure, ratio};
use crate::suite::{Better, Round, Row, SPARSE_64_GIB, SPARSE_GIB, Step, Units, Value};
use crate::unit::{MemoryPlan, Outage, RecoveryPlan, Unit};

pub(super) fn release(units: &Units) -> Vec<Row> {
    let row = |name, what, backing| {
        let steps = (units.release(backing).into(), units.dense(backing).into());
        ratio(name, what, steps, "seconds", Better::Lower, None)
    };
    vec![
        row(
            "release_cost",
            "time of a dense guest whose source frees what has arrived, to one whose does not",
            Backing::Anonymous,
        ),
        row("release_cost_memfd", "the same of a memfd", Backing::Memfd),
    ]
}

/// What is left at the source while the guest moves.
pub(super) fn resident_source(units: &Units) -> Vec<Row> {
    let row = |name, what, backing, figure_name| {
        let step: Step = units.resident_source(backing).into();
        one(name, what, step, move |round| figure(round, step, figure_name))
    };
    vec![
        row(
            "resident_source",
            "part of the guest still in the source's memory when half of the pages are \
             acknowledged, and the source frees",
            Backing::Anonymous,
            "resident_at_half",
        ),
        row("resident_source_end", "the same at the end", Backing::Anonymous, "resident_at_end"),
        row(
            "resident_source_memfd",
            "the first of a memfd, by its blocks",
            Backing::Memfd,
            "resident_at_half",
        ),
        row("resident_source_memfd_end", "the same at the end", Backing::Memfd, "resident_at_end"),
    ]
}

/// From the return of a link to the page that somebody has waited for since it was cut.
pub(super) fn recovery() -> Vec<Row> {
    let step = |memory: MemoryPlan, outage| -> Step {
        Unit::Recovery(RecoveryPlan { memory, outage }).into()
    };
    let short = step(SPARSE_GIB, Outage::Short);
    let large = step(SPARSE_64_GIB, Outage::Short);
    let long = step(SPARSE_GIB, Outage::Long);
    let time =
        move |name, what, step| one(name, what, step, move |round| figure(round, step, "p50_us"));
    let round_trips = move |name, what, step| {
        one(name, what, step, move |round| {
            Some(figure(round, step, "p50_us")? / figure(round, step, "round_trip_us")?)
        })
    };
    let work = move |name, what, step| {
        one(name, what, step, move |round| {
            let all = figure(round, step, "agreement_us")? + figure(round, step, "request_us")?;
            Some(all / figure(round, step, "round_trip_us")?)
        })
    };
    vec![
        time(
            "recovery_us",
            "from the return of a link that was away for 100 ms until the page is there that \
             somebody waits for, in microseconds; 1 GiB, sparse",
            short,
        ),
        round_trips("recovery", "the same to connecting, and 16 bytes there and back", short),
        work("recovery_connected", "without the pause until a connection is tried", short),
        work("recovery_connected_64_gib", "the same with 64 GiB, sparse", large),
        time("recovery_us_after_2_s", "as recovery_us, where the link was away for 2 s", long),
    ]
}

/// A row of one unit, of which nothing is asked.
fn one(
    name: &'static str,
    what: &'static str,
    step: Step,
    value: impl Fn(&Round) -> Option<f64> + 'static,
) -> Row {
    let work_out = move |round: &Round| Some(Value { value: value(round)?, reach: None });
    Row { name, what, better: Better::Lower, steps: vec![step], work_out: Box::new(work_out) }
}
