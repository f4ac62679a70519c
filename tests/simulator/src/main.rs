//! `simulate`: runs sessions from seeds, and says which rules did not hold.

use afterimage_simulator::{Coverage, Mutant, caught_at, run};
use clap::Parser;
use serde::Serialize;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

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
  simulate --seed 42                  one seed, with everything that happened in it
  simulate --seed 3 --mutant no-epoch-check
  simulate --seeds 100 --coverage     which transitions were seen

Exit status:
  0  every rule held (with --mutant: it was caught)
  1  a rule did not hold (with --mutant: it was not caught)
  2  the command line is wrong"
)]
struct Options {
    /// How many seeds to run.
    #[arg(long, default_value_t = 1000, conflicts_with = "seed")]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Runs this seed alone and says all that happened.
    #[arg(long)]
    seed: Option<u64>,
    /// Breaks a rule on purpose: `list` names them.
    #[arg(long)]
    mutant: Option<String>,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    /// Prints the transitions seen.
    #[arg(long, conflicts_with = "json")]
    coverage: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    schema_version: u32,
    seeds: u64,
    steps: u64,
    violations: Vec<Found>,
    ended: BTreeMap<String, u64>,
    mutants: BTreeMap<&'static str, Option<u64>>,
    mutants_caught: usize,
    transitions_covered: usize,
    seeds_per_s: f64,
}

#[derive(Debug, Serialize)]
struct Found {
    seed: u64,
    rule: &'static str,
    what: String,
    step: u64,
    replay: String,
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
        Some(seed) => replay(seed, mutant, options.json),
        None => sweep(&options, mutant),
    }
}

fn replay(seed: u64, mutant: Option<Mutant>, json: bool) -> ExitCode {
    let outcome = run(seed, mutant, !json);
    for line in &outcome.trace {
        println!("{line}");
    }
    let violated = outcome.violation.is_some();
    match (&outcome.violation, json) {
        (_, true) => {
            let violation = outcome.violation.as_ref().map(ToString::to_string);
            println!(
                "{}",
                serde_json::json!({
                    "schema_version": 1, "seed": seed, "steps": outcome.steps,
                    "violation": violation, "ended": outcome.ended,
                })
            );
        }
        (Some(violation), false) => println!("seed {seed}: {violation}"),
        (None, false) => println!("seed {seed}: {} steps, {}", outcome.steps, outcome.ended),
    }
    if violated == mutant.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn sweep(options: &Options, mutant: Option<Mutant>) -> ExitCode {
    let begun = Instant::now();
    let mut coverage = Coverage::default();
    let mut report = Report {
        schema_version: 1,
        seeds: options.seeds,
        steps: 0,
        violations: Vec::new(),
        ended: BTreeMap::new(),
        mutants: BTreeMap::new(),
        mutants_caught: 0,
        transitions_covered: 0,
        seeds_per_s: 0.0,
    };
    let mut told = begun;
    for seed in options.first..options.first + options.seeds {
        let outcome = run(seed, mutant, false);
        report.steps += outcome.steps;
        coverage.merge(&outcome.coverage);
        *report.ended.entry(outcome.ended.clone()).or_default() += 1;
        if let Some(violation) = &outcome.violation {
            let (rule, what, step) = (violation.rule, violation.what.clone(), violation.step);
            let replay = outcome.replay(mutant);
            report.violations.push(Found { seed, rule, what, step, replay });
        }
        if told.elapsed().as_secs() >= 2 {
            told = Instant::now();
            let found = report.violations.len();
            eprintln!("simulate: {} of {} seeds, {found} violations", seed + 1, options.seeds);
        }
    }
    report.seeds_per_s = options.seeds as f64 / begun.elapsed().as_secs_f64();
    report.transitions_covered = coverage.count();
    let mut is_right = report.violations.is_empty() != mutant.is_some();
    if mutant.is_none() {
        for mutant in Mutant::ALL {
            let caught = caught_at(*mutant, MUTANT_SEEDS).map(|outcome| outcome.seed);
            report.mutants.insert(mutant.name(), caught);
        }
        report.mutants_caught = report.mutants.values().flatten().count();
        is_right &= report.mutants_caught == Mutant::ALL.len();
    }
    print_report(&report, options, &coverage);
    if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn print_report(report: &Report, options: &Options, coverage: &Coverage) {
    if options.json {
        println!("{}", serde_json::json!(report));
        return;
    }
    for found in &report.violations {
        println!("seed {}: {} at step {}: {}", found.seed, found.rule, found.step, found.what);
        println!("    {}", found.replay);
    }
    println!(
        "{} seeds, {} steps, {} violations, {:.0} seeds/s, {} transitions seen, ended {:?}",
        report.seeds,
        report.steps,
        report.violations.len(),
        report.seeds_per_s,
        report.transitions_covered,
        report.ended,
    );
    for (mutant, seed) in &report.mutants {
        match seed {
            Some(seed) => println!("{mutant}: caught with seed {seed}"),
            None => println!("{mutant}: NOT caught with {MUTANT_SEEDS} seeds"),
        }
    }
    if options.coverage {
        for line in coverage.lines() {
            println!("{line}");
        }
    }
}
