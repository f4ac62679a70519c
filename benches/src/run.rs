//! A run: rounds of units, one after the other, so that what is compared is measured close
//! together and by turns.

use std::collections::BTreeMap;
use std::time::Duration;

use afterimage_tools::sampling::ArrivalSample;
use indicatif::{ProgressBar, ProgressStyle};

use crate::error::BenchError;
use crate::figures;
use crate::interrupt;
use crate::latency::Latencies;
use crate::machine;
use crate::outcome::ResidentSample;
use crate::pair::{Network, Pair};
use crate::suite::{Over, Round, Step};
use crate::unit::{MemoryPlan, Unit};

/// A link of 1 Gbit/s.
const GIGABIT: u64 = 1_000_000_000;
/// Memory that the machine keeps for itself beside a guest.
const SPARE: u64 = 3 << 30;

/// How a run is made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How often each step is measured.
    pub rounds: u32,
    /// How both processes are connected.
    pub network: Network,
    /// Whether the sources' memory is spoilt, to see that it is found.
    pub corrupt_one_byte: bool,
    /// Whether there is a bar on standard error.
    pub shows_progress: bool,
}

/// What all rounds came to.
#[derive(Clone, Debug, Default)]
pub struct Measurements {
    /// The figures, round by round.
    pub rounds: Vec<Round>,
    /// All latencies of a step together.
    pub latencies: BTreeMap<Step, Latencies>,
    /// What arrived when, in the last round that was watched.
    pub samples: BTreeMap<Step, Vec<ArrivalSample>>,
    /// What was left at the source when, in the last round.
    pub resident: BTreeMap<Step, Vec<ResidentSample>>,
    /// What the machine lacked.
    pub lacking: BTreeMap<Step, String>,
    /// What failed, once at least.
    pub failed: BTreeMap<Step, String>,
}

/// Measures `steps` in their order, each once in each round, and `once` in the first.
///
/// # Errors
/// [`BenchError::Wrong`] as soon as a page has another content than it must have, and
/// [`BenchError::Interrupted`]; nothing else ends a run.
pub fn run(steps: &[Step], once: &[Step], plan: Plan) -> Result<Measurements, BenchError> {
    let Plan { rounds, network, corrupt_one_byte, shows_progress } = plan;
    let bar = bar(steps.len() as u64 * u64::from(rounds) + once.len() as u64, shows_progress);
    let mut chosen = Pair::new(network, corrupt_one_byte);
    let mut gigabit = Pair::new(Network::Veth(Some(GIGABIT)), corrupt_one_byte);
    let mut measurements = Measurements::default();
    for number in 1..=rounds {
        let mut round = Round::new();
        let more = if number == 1 { once } else { &[] };
        for step in steps.iter().chain(more) {
            bar.set_message(format!("round {number} of {rounds}: {}", step.unit));
            let pair = match step.over {
                Over::Chosen => &mut chosen,
                Over::Gigabit => &mut gigabit,
            };
            if !measurements.lacking.contains_key(step) {
                measurements.measure(*step, pair, &mut round)?;
            }
            if interrupt::has_come() {
                return Err(BenchError::Interrupted);
            }
            bar.inc(1);
        }
        measurements.rounds.push(round);
    }
    bar.finish_and_clear();
    Ok(measurements)
}

impl Measurements {
    fn measure(
        &mut self,
        step: Step,
        pair: &mut Pair,
        round: &mut Round,
    ) -> Result<(), BenchError> {
        let measured = enough_memory(step.unit).and_then(|()| pair.measure(step.unit));
        match measured {
            Ok(measured) => {
                if let Some(latencies) = &measured.destination.latencies {
                    self.latencies.entry(step).or_default().add(latencies);
                }
                round.insert(step, figures::of(&measured));
                if !measured.destination.samples.is_empty() {
                    self.samples.insert(step, measured.destination.samples);
                }
                if !measured.source.resident.is_empty() {
                    self.resident.insert(step, measured.source.resident);
                }
            }
            Err(BenchError::Wrong(what)) => {
                return Err(BenchError::Wrong(format!("{}: {what}", step.unit)));
            }
            Err(BenchError::Lacking(what)) => drop(self.lacking.insert(step, what)),
            Err(BenchError::Interrupted) => return Err(BenchError::Interrupted),
            // Its processes hear the signal too.
            Err(_) if interrupt::has_come() => return Err(BenchError::Interrupted),
            Err(BenchError::Failed(what)) => {
                tracing::error!(unit = %step.unit, "{what}");
                self.failed.insert(step, what);
            }
        }
        Ok(())
    }
}

/// Whether there is room for a guest that is large and dense; smaller ones find it anyway.
fn enough_memory(unit: Unit) -> Result<(), BenchError> {
    let Unit::Switchover(memory) = unit else { return Ok(()) };
    let needed = needed_for(&memory, unit.is_given_up()) + SPARE;
    let available = machine::available_bytes();
    if available >= needed {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
    Err(BenchError::Lacking(format!(
        "{unit} needs {:.1} GiB of memory, {:.1} are free",
        gib(needed),
        gib(available)
    )))
}

fn needed_for(memory: &MemoryPlan, is_given_up: bool) -> u64 {
    let content = memory.content_pages() * crate::memory::PAGE;
    if is_given_up { content } else { 2 * content }
}

fn bar(units: u64, shows_progress: bool) -> ProgressBar {
    let bar = if shows_progress { ProgressBar::new(units) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{bar:20} {pos}/{len} {elapsed}, {eta} left  {msg}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// What is under way, and for how long, where nothing else can be told.
#[must_use]
pub fn spinner(shows_progress: bool, what: String) -> ProgressBar {
    let bar = if shows_progress { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{spinner} {elapsed}  {msg}");
    let bar = bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(200));
    bar.with_message(what)
}
