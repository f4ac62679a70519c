//! The rows, and what each is to reach.

mod limits;
mod precopy;
mod reliability;

use afterimage_tools::ram::Backing;

use super::{Better, DENSE_GIB, Over, Round, Row, SPARSE_TIB, Sizes, Step, Units, Value};
use crate::floors::anonymous;
use crate::unit::{
    BackgroundPlan, FaultPlan, Load, Mechanism, MemoryPlan, Shape, Think, Unit, Wait,
};

/// What a switchover may take beside one round trip.
const SWITCHOVER_US: f64 = 2000.0;
/// What each side may use beside guest RAM whatever its size: invariant I7, with one stream.
const FIXED_BYTES: f64 = ((16 + 2) << 20) as f64;
/// Memory for what the engine needs beside a dense guest; there is no room for more twice.
const FOOTPRINT: u64 = 1 << 30;
/// Bytes that a link of 1 Gbit/s carries in a second, frames and headers left out.
const GIGABIT_BYTES: f64 = 1e9 / 8.0 * 1448.0 / 1538.0;
/// Guest memory that moves over such a link in about two seconds.
const GIGABIT_GUEST: u64 = 256 << 20;

/// Every row of a run of this size.
#[must_use]
pub fn all(sizes: Sizes) -> Vec<Row> {
    let units = Units::new(sizes);
    let mut rows = idle(&units);
    rows.extend(loaded(&units));
    rows.extend(background(&units));
    rows.extend(sparse(&units));
    rows.extend(switchover());
    rows.extend(cost(&units));
    rows.push(working_set(&units));
    rows.extend(limits::bandwidth(&units));
    rows.extend(limits::faults(&units));
    rows.extend(precopy::moving(&units));
    rows.extend(precopy::stopped(&units));
    rows.extend(reliability::release(&units));
    rows.extend(reliability::resident_source(&units));
    rows.extend(reliability::recovery());
    rows.extend(gigabit());
    rows
}

fn figure(round: &Round, step: impl Into<Step>, name: &str) -> Option<f64> {
    round.get(&step.into())?.get(name).copied()
}

/// One figure of a unit divided by the same of another.
fn ratio(
    name: &'static str,
    what: &'static str,
    (of, to): (Step, Step),
    figure_name: &'static str,
    better: Better,
    reach: Option<f64>,
) -> Row {
    let work_out = move |round: &Round| {
        let value = figure(round, of, figure_name)? / figure(round, to, figure_name)?;
        Some(Value { value, reach })
    };
    Row { name, what, better, steps: vec![of, to], work_out: Box::new(work_out) }
}

fn faults(plan: FaultPlan) -> (Step, Step) {
    (Unit::Faults(plan).into(), Unit::RemoteFault(plan).into())
}

fn idle(units: &Units) -> Vec<Row> {
    let blocking = faults(units.idle(Wait::Blocking));
    let polling = faults(units.idle(Wait::Polling));
    let p50_polling = move |round: &Round| {
        let floor = figure(round, polling.1, "p50_us")?;
        let value = figure(round, polling.0, "p50_us")? / floor;
        // Never above the floor that blocks.
        let reach = (figure(round, blocking.1, "p50_us")? / floor).min(1.25);
        Some(Value { value, reach: Some(reach) })
    };
    let p99 = move |round: &Round| {
        let one = |(of, to)| Some(figure(round, of, "p99_us")? / figure(round, to, "p99_us")?);
        Some(Value { value: f64::max(one(blocking)?, one(polling)?), reach: Some(1.5) })
    };
    let both = vec![blocking.0, blocking.1, polling.0, polling.1];
    vec![
        ratio(
            "fault_idle_p50_blocking",
            "median fault without load, to L, both blocking",
            blocking,
            "p50_us",
            Better::Lower,
            Some(1.1),
        ),
        Row {
            name: "fault_idle_p50_polling",
            what: "the same polling; never above L blocking",
            better: Better::Lower,
            steps: vec![polling.0, polling.1, blocking.1],
            work_out: Box::new(p50_polling),
        },
        Row {
            name: "fault_idle_p99",
            what: "p99 without load, to L's; the worse of blocking and polling",
            better: Better::Lower,
            steps: both,
            work_out: Box::new(p99),
        },
    ]
}

fn loaded(units: &Units) -> Vec<Row> {
    let back_to_back = faults(units.loaded(Think::BackToBack));
    let computing = faults(units.loaded(Think::Computing));
    let row =
        |name, what, steps, figure| ratio(name, what, steps, figure, Better::Lower, Some(1.5));
    let p999 = move |round: &Round| {
        let value = figure(round, back_to_back.0, "p999_us")?;
        Some(Value { value, reach: Some(1000.0) })
    };
    let load = "median fault under saturating background, back to back, to L under the same";
    vec![
        row("fault_loaded_p50", load, back_to_back, "p50_us"),
        row("fault_loaded_p99", "its p99 to L's", back_to_back, "p99_us"),
        Row {
            name: "fault_loaded_p999_us",
            what: "its p99.9 in microseconds",
            better: Better::Lower,
            steps: vec![back_to_back.0],
            work_out: Box::new(p999),
        },
        row("fault_busy_p50", "the same with 500 faults a second", computing, "p50_us"),
        row("fault_busy_p99", "its p99 to L's", computing, "p99_us"),
    ]
}

fn background(units: &Units) -> Vec<Row> {
    let alone: Step = units.dense(Backing::Anonymous).into();
    let kept = |name, what, think, reach| {
        let loaded: Step = Unit::Faults(units.loaded(think)).into();
        ratio(name, what, (loaded, alone), "background_bytes_per_s", Better::Higher, reach)
    };
    let limit = |name, what, mechanism: Mechanism| {
        let steps = (units.dense(mechanism.backing()).into(), units.place(mechanism).into());
        ratio(name, what, steps, "bytes_per_s", Better::Higher, Some(0.95))
    };
    let faults = "background rate while a thread faults back to back, to the rate alone";
    vec![
        kept("background_kept", faults, Think::BackToBack, Some(0.8)),
        ratio(
            "background_kept_by_floor",
            "what L leaves of floor 6 in the same way: both share the processors",
            (
                Unit::RemoteFault(units.loaded(Think::BackToBack)).into(),
                units.place(Mechanism::Copy).into(),
            ),
            "background_bytes_per_s",
            Better::Higher,
            None,
        ),
        kept("background_kept_busy", "the same at 500 faults a second", Think::Computing, None),
        limit(
            "background_limit_anonymous",
            "background rate to receiving and COPY alone",
            Mechanism::Copy,
        ),
        limit(
            "background_limit_memfd",
            "background rate to receiving and CONTINUE alone",
            Mechanism::ContinueMemfd,
        ),
        limit("background_limit_hugetlb", "the same on huge pages", Mechanism::ContinueHugetlb),
    ]
}

fn sparse(units: &Units) -> Vec<Row> {
    let dense: Step = units.as_much_content().into();
    let one_piece: Step = units.background(Backing::Anonymous, Shape::OnePiece, 1).into();
    let scattered: Step = units.background(Backing::Anonymous, Shape::Scattered, 1).into();
    let time = |name, what, step| ratio(name, what, (step, dense), "seconds", Better::Lower, None);
    let worse = move |round: &Round| {
        let seconds = |step| figure(round, step, "seconds");
        let value = f64::max(seconds(one_piece)?, seconds(scattered)?) / seconds(dense)?;
        Some(Value { value, reach: Some(1.1) })
    };
    let wire: Step = Unit::Wire(SPARSE_TIB).into();
    let zero_bytes = move |round: &Round| {
        let overhead = figure(round, wire, "wire_overhead_bytes")?;
        Some(Value { value: overhead / figure(round, wire, "zero_pages")?, reach: Some(0.1) })
    };
    vec![
        Row {
            name: "sparse_time",
            what: "time of a guest with content in a quarter, to a dense one with as much content; \
                   the worse of the two that follow",
            better: Better::Lower,
            steps: vec![one_piece, scattered, dense],
            work_out: Box::new(worse),
        },
        time("sparse_time_one_piece", "the quarter in one piece", one_piece),
        time("sparse_time_scattered", "every fourth page", scattered),
        Row {
            name: "zero_bytes_per_page",
            what: "bytes on the wire beside content, for each zero page of a sparse TiB",
            better: Better::Lower,
            steps: vec![wire],
            work_out: Box::new(zero_bytes),
        },
    ]
}

fn switchover() -> Vec<Row> {
    let round_trip: Step = Unit::PingPong(Wait::Blocking).into();
    let dense: Step = Unit::Switchover(DENSE_GIB).into();
    let sparse: Step = Unit::Switchover(SPARSE_TIB).into();
    let row = |name, what, of: Vec<Step>| {
        let mut steps = of.clone();
        steps.push(round_trip);
        let work_out = move |round: &Round| {
            let times: Option<Vec<f64>> =
                of.iter().map(|step| figure(round, *step, "switchover_us")).collect();
            let value = times?.into_iter().fold(0.0, f64::max);
            let reach = figure(round, round_trip, "p50_us")? + SWITCHOVER_US;
            Some(Value { value, reach: Some(reach) })
        };
        Row { name, what, better: Better::Lower, steps, work_out: Box::new(work_out) }
    };
    vec![
        row(
            "switchover_us",
            "from the stop at the source until the guest may run, in microseconds; the worse of \
             the two that follow, to one round trip and 2 ms",
            vec![dense, sparse],
        ),
        row("switchover_us_1_gib", "with 1 GiB, dense", vec![dense]),
        row("switchover_us_1_tib_sparse", "with 1 TiB, sparse", vec![sparse]),
    ]
}

fn cost(units: &Units) -> Vec<Row> {
    let sparse: Step = Unit::Footprint(SPARSE_TIB).into();
    let footprint = |backing| {
        Step::from(Unit::Footprint(MemoryPlan { backing, bytes: FOOTPRINT, shape: Shape::Dense }))
    };
    let dense = [footprint(Backing::Anonymous), footprint(Backing::Memfd)];
    let memory = move |round: &Round| {
        let side = |step: Step, side: &str, fixed: f64| {
            let extra = (figure(round, step, side)? - fixed).max(0.0);
            Some(extra * 8.0 / figure(round, step, "pages")?)
        };
        let mut most: f64 = 0.0;
        for name in ["extra_source_bytes", "extra_destination_bytes"] {
            // What is allowed whatever the size is nothing beside a TiB, and is not left out.
            most = most.max(side(sparse, name, 0.0)?);
            for step in dense {
                most = most.max(side(step, name, FIXED_BYTES)?);
            }
        }
        Some(Value { value: most, reach: Some(4.0) })
    };
    let engine: Step = units.dense(Backing::Anonymous).into();
    let floor: Step = units.place(Mechanism::Copy).into();
    let cpu = |name, what, sides: &'static [&'static str], reach| {
        let work_out = move |round: &Round| {
            let ratios: Option<Vec<f64>> = sides
                .iter()
                .map(|side| Some(figure(round, engine, side)? / figure(round, floor, side)?))
                .collect();
            Some(Value { value: ratios?.into_iter().fold(0.0, f64::max), reach })
        };
        let steps = vec![engine, floor];
        Row { name, what, better: Better::Lower, steps, work_out: Box::new(work_out) }
    };
    vec![
        Row {
            name: "memory_bits_per_page",
            what: "memory beside guest RAM, page tables included, in bits a page; the worse side \
                   of a sparse TiB and of dense guests less 18 MiB",
            better: Better::Lower,
            steps: vec![sparse, dense[0], dense[1]],
            work_out: Box::new(memory),
        },
        cpu(
            "cpu_per_gib",
            "processor time per GiB, polling off, to receiving and COPY alone; the worse side",
            &["cpu_source_s_per_gib", "cpu_destination_s_per_gib"],
            Some(1.15),
        ),
        cpu("cpu_per_gib_source", "at the source", &["cpu_source_s_per_gib"], None),
        cpu("cpu_per_gib_destination", "at the destination", &["cpu_destination_s_per_gib"], None),
    ]
}

fn working_set(units: &Units) -> Row {
    let resident: Step = units.working_set(true).into();
    let postcopy: Step = units.working_set(false).into();
    let what = "time of work in 64 MiB that are still at the source, to the same when resident";
    ratio("working_set_time", what, (postcopy, resident), "seconds", Better::Lower, None)
}

fn gigabit() -> Vec<Row> {
    let step = |unit| Step { unit, over: Over::Gigabit };
    let plan = FaultPlan {
        wait: Wait::Polling,
        load: Load::Saturating,
        think: Think::BackToBack,
        bytes: GIGABIT_GUEST,
    };
    let faults = (step(Unit::Faults(plan)), step(Unit::RemoteFault(plan)));
    let memory = anonymous(GIGABIT_GUEST);
    let alone = step(Unit::Background(BackgroundPlan { memory, streams: 1 }));
    let share = move |round: &Round| {
        let value = figure(round, alone, "bytes_per_s")? / GIGABIT_BYTES;
        Some(Value { value, reach: None })
    };
    let row = |name, what, figure| ratio(name, what, faults, figure, Better::Lower, None);
    vec![
        Row {
            name: "gigabit_background",
            what: "background rate over a link of 1 Gbit/s, as part of what it carries",
            better: Better::Higher,
            steps: vec![alone],
            work_out: Box::new(share),
        },
        row("gigabit_fault_loaded_p50", "median fault while that link is full, to L", "p50_us"),
        row("gigabit_fault_loaded_p99", "its p99 to L's", "p99_us"),
    ]
}
