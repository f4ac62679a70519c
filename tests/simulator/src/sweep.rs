//! Many runs at once, on all cores. What comes out does not depend on how many.

use crate::{Coverage, Kill, Mutant, Outcome, Setup};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// How many runs a thread takes at once.
const CHUNK: u64 = 16;

/// What many runs brought.
#[derive(Debug, Default)]
pub struct Summary {
    /// How many runs.
    pub runs: u64,
    /// Their steps, all together.
    pub steps: u64,
    /// Those in which a rule did not hold, by the number of the run.
    pub violated: BTreeMap<u64, Outcome>,
    /// How they ended: the source's ownership, and how often.
    pub ended: BTreeMap<String, u64>,
    /// The transitions seen.
    pub coverage: Coverage,
}

impl Summary {
    fn add(&mut self, number: u64, outcome: Outcome) {
        self.runs += 1;
        self.steps += outcome.steps;
        self.coverage.merge(&outcome.coverage);
        *self.ended.entry(outcome.ended.clone()).or_default() += 1;
        if outcome.violation.is_some() {
            self.violated.insert(number, outcome);
        }
    }

    fn merge(&mut self, other: Self) {
        self.runs += other.runs;
        self.steps += other.steps;
        self.coverage.merge(&other.coverage);
        self.violated.extend(other.violated);
        for (ended, count) in other.ended {
            *self.ended.entry(ended).or_default() += count;
        }
    }
}

/// How many runs can go on at once on this machine.
#[must_use]
pub fn available_jobs() -> NonZeroUsize {
    thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Carries out the runs with these numbers, each as `setup` says, in `jobs` threads. Blocks
/// until all are done; `told` is called now and then with how many are, and how many of them
/// violated a rule, from any of the threads.
pub fn sweep(
    numbers: Range<u64>,
    jobs: NonZeroUsize,
    setup: impl Fn(u64) -> Setup + Sync,
    told: impl Fn(u64, u64) + Sync,
) -> Summary {
    let next = AtomicU64::new(numbers.start);
    let (done, found) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let mut summary = Summary::default();
        loop {
            let start = next.fetch_add(CHUNK, Ordering::Relaxed);
            if start >= numbers.end {
                return summary;
            }
            let chunk = start..numbers.end.min(start + CHUNK);
            let before = summary.violated.len();
            let count = chunk.end - chunk.start;
            for number in chunk {
                summary.add(number, setup(number).run());
            }
            let new = (summary.violated.len() - before) as u64;
            let found = found.fetch_add(new, Ordering::Relaxed) + new;
            told(done.fetch_add(count, Ordering::Relaxed) + count, found);
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.get()).map(|_| scope.spawn(work)).collect();
        let mut summary = Summary::default();
        for thread in threads {
            summary.merge(thread.join().expect("a run does not panic"));
        }
        summary
    })
}

/// Kills each party at every step of the quiet runs with these seeds, one kill a run, in
/// `jobs` threads. `told` is called with how many runs are done, of how many, and how many of
/// them violated a rule.
pub fn every_step(
    seeds: Range<u64>,
    jobs: NonZeroUsize,
    told: impl Fn(u64, u64, u64) + Sync,
) -> Summary {
    let mut kills = Vec::new();
    for seed in seeds {
        let setup = Setup::new(seed);
        let parties = setup.mortals();
        for step in 1..=setup.calm().run().steps {
            let of = |party| setup.with_kill(Kill { party, step });
            kills.extend(parties.iter().map(|party| of(*party)));
        }
    }
    let total = kills.len() as u64;
    let setup = |number: u64| kills[number as usize];
    sweep(0..total, jobs, setup, |done, found| told(done, total, found))
}

/// The first seed below `limit` at which a mutant is caught.
#[must_use]
pub fn caught_at(mutant: Mutant, limit: u64) -> Option<Outcome> {
    let mut runs = (0..limit).map(|seed| Setup::new(seed).with_mutant(mutant).run());
    runs.find(|run| run.violation.is_some())
}

/// The same for each mutant, in `jobs` threads.
#[must_use]
pub fn all_caught(limit: u64, jobs: NonZeroUsize) -> BTreeMap<&'static str, Option<Outcome>> {
    let next = AtomicU64::new(0);
    let work = || {
        let mut caught = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed) as usize;
            let Some(mutant) = Mutant::ALL.get(index) else { return caught };
            caught.push((mutant.name(), caught_at(*mutant, limit)));
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..jobs.get()).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
        joined.flat_map(|caught| caught.expect("a run does not panic")).collect()
    })
}
