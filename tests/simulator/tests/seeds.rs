//! Thousands of seeds, each a session that something goes wrong with.

use afterimage_simulator::{
    Mutant, Party, Setup, Summary, Tracing, available_jobs, caught_at, every_step, sweep,
};
use std::num::NonZeroUsize;

const SEEDS: u64 = 10_000;
/// Runs in which each party is killed at every step.
const QUIET_RUNS: u64 = 4;

fn assert_nothing_violated(summary: &Summary) {
    let failures: Vec<String> = summary
        .violated
        .values()
        .filter_map(|run| Some(format!("{}\n    {}", run.violation.as_ref()?, run.replay())))
        .collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Situations that the simulator is there for: each has to come about.
const SITUATIONS: [&str; 20] = [
    "a VMM died whose guest ran",
    "a channel broke in the middle of a piece",
    "a connection attempt came twice",
    "a data channel got stuck",
    "a data hello that is out of date was turned away",
    "a fenced destination came back and stays stopped",
    "a handler died between COPY and complete",
    "a handler died between complete and CONTINUE",
    "a handler died with a discard read and not entered",
    "a handler died with faults read and not answered",
    "a record did not fit on the disk",
    "a side was paused by hand",
    "an attempt without an answer was given up",
    "background alone brought what was missing",
    "one host did not hear the other",
    "silence ended a half-open link",
    "silence ended a link",
    "the destination gave up a channel over which nothing moved",
    "the hosts were parted",
    "the source gave up a channel over which nothing moved",
];

#[test]
fn every_rule_holds_in_ten_thousand_sessions() {
    let summary = sweep(0..SEEDS, available_jobs(), Setup::new, |_, _| ());
    assert_nothing_violated(&summary);
    let coverage = &summary.coverage;
    assert!(coverage.transitions() > 300, "only {} transitions were seen", coverage.transitions());
    for situation in SITUATIONS {
        assert!(coverage.situations().contains_key(situation), "it never was that {situation}");
    }
}

#[test]
fn every_rule_holds_whoever_dies_at_whichever_step() {
    let summary = every_step(0..QUIET_RUNS, available_jobs(), |_, _, _| ());
    assert_nothing_violated(&summary);
    let steps: u64 = (0..QUIET_RUNS).map(|seed| Setup::new(seed).calm().run().steps).sum();
    assert_eq!(summary.runs, steps * Party::ALL.len() as u64);
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in [0, 1, 77] {
        let trace = || Setup::new(seed).traced(Tracing::On).run().trace;
        assert_eq!(trace(), trace());
    }
}

#[test]
fn what_comes_out_does_not_depend_on_the_number_of_threads() {
    let in_threads = |jobs| {
        let jobs = NonZeroUsize::new(jobs).expect("not zero");
        let summary = sweep(0..100, jobs, Setup::new, |_, _| ());
        let lines: Vec<_> = summary.coverage.lines().collect();
        (summary.runs, summary.steps, summary.ended, lines)
    };
    assert_eq!(in_threads(1), in_threads(3));
}

macro_rules! caught {
    ($($test:ident: $mutant:ident by $($rule:literal)|+ within $seeds:literal;)*) => {$(
        #[test]
        fn $test() {
            let caught = caught_at(Mutant::$mutant, $seeds).and_then(|run| run.violation);
            let Some(violation) = caught else {
                panic!("nobody noticed {} in {} seeds", Mutant::$mutant, $seeds);
            };
            assert!([$($rule),+].contains(&violation.rule), "{violation}");
        }
    )*};
}

caught! {
    an_ack_before_complete_is_caught: AckBeforeComplete by "i6_rebuilt" within 100;
}
