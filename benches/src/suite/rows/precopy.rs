//! What precopy spares a guest, and how soon a source says that it has stopped.

use afterimage_tools::ram::Backing;

use super::figure;
use crate::suite::{Better, Round, Row, Step, Units, Value};
use crate::unit::Precopied;

/// Remote faults that may be left after one pass.
const FAULTS_LEFT: f64 = 0.2;
/// How many times shorter the guest is to stand still after one pass.
const STALL_SPARED: f64 = 5.0;
/// How soon whoever waits for events is to hear that memory is final.
const STOPPED_US: f64 = 1000.0;

/// A guest that is moved by postcopy alone, and after one pass.
pub(super) fn moving(units: &Units) -> Vec<Row> {
    let both = |backing| {
        let step = |precopy| Step::from(units.moving(backing, precopy));
        (step(Precopied::OnePass), step(Precopied::Nothing))
    };
    let (anonymous, memfd) = (both(Backing::Anonymous), both(Backing::Memfd));
    let faults = |name, what, (with, without): (Step, Step)| {
        let work_out = move |round: &Round| {
            let faults = |step| figure(round, step, "remote_faults");
            Some(Value { value: faults(with)? / faults(without)?, reach: Some(FAULTS_LEFT) })
        };
        let (better, steps) = (Better::Lower, vec![with, without]);
        Row { name, what, better, steps, work_out: Box::new(work_out) }
    };
    let stall = |name, what, (with, without): (Step, Step)| {
        let work_out = move |round: &Round| {
            // Nobody may have waited at all.
            let with = figure(round, with, "stall_us")?.max(1.0);
            let value = figure(round, without, "stall_us")? / with;
            Some(Value { value, reach: Some(STALL_SPARED) })
        };
        let (better, steps) = (Better::Higher, vec![with, without]);
        Row { name, what, better, steps, work_out: Box::new(work_out) }
    };
    vec![
        faults(
            "precopy_fault_ratio",
            "remote faults of a guest that works in a tenth of its memory and reads the rest, \
             after one precopy pass, to those by postcopy alone",
            anonymous,
        ),
        stall(
            "precopy_stall_ratio",
            "how long its vCPUs wait for memory by postcopy alone, to the same after one pass",
            anonymous,
        ),
        faults("precopy_fault_ratio_memfd", "the first of a memfd", memfd),
        stall("precopy_stall_ratio_memfd", "the second of a memfd", memfd),
    ]
}

/// From the call that says that the guest has stopped to its event.
pub(super) fn stopped(units: &Units) -> Vec<Row> {
    let step = |precopy| Step::from(units.moving(Backing::Anonymous, precopy));
    let steps = [step(Precopied::OnePass), step(Precopied::HalfAPass)];
    let worse = move |round: &Round, of: fn(&Round, Step) -> Option<f64>| {
        Some(f64::max(of(round, steps[0])?, of(round, steps[1])?))
    };
    let time = move |round: &Round| {
        let value = worse(round, |round, step| figure(round, step, "stopped_us"))?;
        Some(Value { value, reach: Some(STOPPED_US) })
    };
    let wakes = move |round: &Round| {
        let value = worse(round, |round, step| {
            Some(figure(round, step, "stopped_us")? / figure(round, step, "wake_us")?)
        })?;
        Some(Value { value, reach: None })
    };
    vec![
        Row {
            name: "stopped_event_us",
            what: "from Source::stopped until a thread that polls the events' descriptor has \
                   Stopped, in microseconds; the worse of after a pass and in mid-pass",
            better: Better::Lower,
            steps: steps.to_vec(),
            work_out: Box::new(time),
        },
        Row {
            name: "stopped_event",
            what: "the same to the bare wake of a thread that polls an eventfd",
            better: Better::Lower,
            steps: steps.to_vec(),
            work_out: Box::new(wakes),
        },
    ]
}
