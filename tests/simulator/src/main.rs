//! `simulate`: runs sessions from seeds, and says which rules did not hold.

mod report;

use afterimage_simulator::{
    Kill, Mutant, Setup, Summary, Tracing, all_caught, available_jobs, every_step, sweep,
};
use clap::Parser;
use report::Report;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How many seeds a mutant may need.
const MUTANT_SEEDS: u64 = 1500;

/// Runs both sides of sessions against a made-up network, memory and disk, from seeds, and
/// checks the invariants after every step.
#[derive(Debug, Parser)]
#[command(
    name = "simulate",
    version,
    after_help = "\
Examples:
  simulate --seeds 10000              ten thousand seeds, from 0
  simulate --seeds 10000 --json       the same, with the mutants, as one JSON object
  simulate --every-step 8             kills each party at every step of 8 quiet runs
  simulate --seed 42                  one seed, with everything that happened in it
  simulate --seed 3 --mutant no-epoch-check
  simulate --seed 3 --kill handler@120
  simulate --seeds 100 --coverage     which states and transitions were seen

Exit status:
  0  every rule held (with --mutant: it was caught)
  1  a rule did not hold (with --mutant: it was not caught)
  2  the command line is wrong"
)]
struct Options {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000, conflicts_with_all = ["seed", "every_step"])]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Runs this seed alone and says all that happened.
    #[arg(long, conflicts_with = "every_step")]
    seed: Option<u64>,
    /// Kills each party once at every step of so many runs in which nothing else goes wrong.
    #[arg(long, value_name = "RUNS", conflicts_with = "mutant")]
    every_step: Option<u64>,
    /// Kills a party at a step of the run: source, handler, handler-midway or vmm.
    #[arg(long, value_name = "PARTY@STEP", requires = "seed")]
    kill: Option<Kill>,
    /// Breaks a rule on purpose: `list` names them.
    #[arg(long)]
    mutant: Option<String>,
    /// How many runs go on at once; what comes out is the same. As many as there are cores,
    /// unless given.
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// Prints the states and transitions seen.
    #[arg(long, conflicts_with = "json")]
    coverage: bool,
}

impl Options {
    fn jobs(&self) -> NonZeroUsize {
        self.jobs.unwrap_or_else(available_jobs)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let mutant = match options.mutant.as_deref() {
        Some("list") => {
            for mutant in Mutant::ALL {
                println!("{mutant}");
            }
            return ExitCode::SUCCESS;
        }
        Some(name) => match name.parse() {
            Ok(mutant) => Some(mutant),
            Err(error) => {
                eprintln!("simulate: {error}");
                return ExitCode::from(2);
            }
        },
        None => None,
    };
    match options.seed {
        Some(seed) => replay(seed, mutant, &options),
        None => run_many(&options, mutant),
    }
}

fn with(setup: Setup, mutant: Option<Mutant>) -> Setup {
    match mutant {
        Some(mutant) => setup.with_mutant(mutant),
        None => setup,
    }
}

fn replay(seed: u64, mutant: Option<Mutant>, options: &Options) -> ExitCode {
    let tracing = if options.json { Tracing::Off } else { Tracing::On };
    let mut setup = with(Setup::new(seed), mutant).traced(tracing);
    if let Some(kill) = options.kill {
        setup = setup.with_kill(kill);
    }
    let outcome = setup.run();
    for line in &outcome.trace {
        println!("{line}");
    }
    let violated = outcome.violation.is_some();
    match (&outcome.violation, options.json) {
        (violation, true) => println!(
            "{}",
            serde_json::json!({
                "schema_version": 1, "seed": seed, "steps": outcome.steps,
                "violation": violation.as_ref().map(ToString::to_string), "ended": outcome.ended,
            })
        ),
        (Some(violation), false) => println!("seed {seed}: {violation}"),
        (None, false) => println!("seed {seed}: {} steps, {}", outcome.steps, outcome.ended),
    }
    if violated == mutant.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run_many(options: &Options, mutant: Option<Mutant>) -> ExitCode {
    let begun = Instant::now();
    let last = Mutex::new(begun);
    let told = |done: u64, total: u64, found: u64| {
        // Whoever finds another at it leaves it to him.
        let Ok(mut last) = last.try_lock() else { return };
        if last.elapsed() >= Duration::from_secs(2) {
            *last = Instant::now();
            eprintln!("simulate: {done} of {total} runs, {found} violations");
        }
    };
    let summary: Summary = if let Some(runs) = options.every_step {
        every_step(options.first..options.first + runs, options.jobs(), told)
    } else {
        let numbers = options.first..options.first + options.seeds;
        let setup = |seed| with(Setup::new(seed), mutant);
        sweep(numbers, options.jobs(), setup, |done, found| told(done, options.seeds, found))
    };
    let mut report = Report::new(&summary, options.jobs(), begun.elapsed());
    let mut is_right = summary.violated.is_empty() != mutant.is_some();
    if mutant.is_none() && options.every_step.is_none() {
        report.add_mutants(&all_caught(MUTANT_SEEDS, options.jobs()));
        is_right &= report.mutants_caught == Mutant::ALL.len();
    }
    if options.json {
        println!("{}", serde_json::json!(report));
    } else {
        report.print();
    }
    if options.coverage {
        for line in summary.coverage.lines() {
            println!("{line}");
        }
    }
    if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
