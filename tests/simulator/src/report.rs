//! What `simulate` prints of many runs, as text and as JSON.

use afterimage_simulator::{Outcome, Summary};
use serde::Serialize;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Duration;

/// Many runs. Its fields are those of the JSON object.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    schema_version: u32,
    /// How many runs: one a seed, or one a kill.
    seeds: u64,
    steps: u64,
    violations: Vec<Found>,
    ended: BTreeMap<String, u64>,
    /// At which seed each was caught first.
    mutants: BTreeMap<&'static str, Option<u64>>,
    pub(crate) mutants_caught: usize,
    states_covered: usize,
    transitions_covered: usize,
    situations: BTreeMap<&'static str, u64>,
    jobs: usize,
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

impl Report {
    pub(crate) fn new(summary: &Summary, jobs: NonZeroUsize, took: Duration) -> Self {
        let violations = summary.violated.values().filter_map(|outcome| {
            let violation = outcome.violation.as_ref()?;
            Some(Found {
                seed: outcome.seed(),
                rule: violation.rule,
                what: violation.what.clone(),
                step: violation.step,
                replay: outcome.replay(),
            })
        });
        Self {
            schema_version: 1,
            seeds: summary.runs,
            steps: summary.steps,
            violations: violations.collect(),
            ended: summary.ended.clone(),
            mutants: BTreeMap::new(),
            mutants_caught: 0,
            states_covered: summary.coverage.states(),
            transitions_covered: summary.coverage.transitions(),
            situations: summary.coverage.situations().clone(),
            jobs: jobs.get(),
            seeds_per_s: summary.runs as f64 / took.as_secs_f64(),
        }
    }

    pub(crate) fn add_mutants(&mut self, caught: &BTreeMap<&'static str, Option<Outcome>>) {
        let seeds = caught.iter().map(|(name, outcome)| (*name, outcome.as_ref()));
        self.mutants = seeds.map(|(name, outcome)| (name, outcome.map(Outcome::seed))).collect();
        self.mutants_caught = self.mutants.values().flatten().count();
    }

    pub(crate) fn print(&self) {
        for found in &self.violations {
            println!("seed {}: {} at step {}: {}", found.seed, found.rule, found.step, found.what);
            println!("    {}", found.replay);
        }
        println!(
            "{} runs, {} steps, {} violations, {:.0} runs/s with {} at once, ended {:?}",
            self.seeds,
            self.steps,
            self.violations.len(),
            self.seeds_per_s,
            self.jobs,
            self.ended,
        );
        println!(
            "{} states and {} transitions seen",
            self.states_covered, self.transitions_covered
        );
        for (situation, count) in &self.situations {
            println!("{situation}: {count}");
        }
        for (mutant, seed) in &self.mutants {
            match seed {
                Some(seed) => println!("{mutant}: caught with seed {seed}"),
                None => println!("{mutant}: NOT caught"),
            }
        }
    }
}
