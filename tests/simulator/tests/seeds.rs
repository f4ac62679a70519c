//! Thousands of seeds, each a session that something goes wrong with.

use afterimage_simulator::{Coverage, Mutant, caught_at, run};

const SEEDS: u64 = 2000;

#[test]
fn every_rule_holds_in_two_thousand_sessions() {
    let mut coverage = Coverage::default();
    let mut failures = Vec::new();
    for seed in 0..SEEDS {
        let outcome = run(seed, None, false);
        coverage.merge(&outcome.coverage);
        if let Some(violation) = &outcome.violation {
            failures.push(format!("seed {seed}: {violation}\n    {}", outcome.replay(None)));
        }
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    assert!(coverage.count() > 200, "only {} transitions were seen", coverage.count());
}

#[test]
fn a_seed_gives_the_same_run_every_time() {
    for seed in [0, 1, 77] {
        assert_eq!(run(seed, None, true).trace, run(seed, None, true).trace);
    }
}

macro_rules! caught {
    ($($test:ident: $mutant:ident within $seeds:literal;)*) => {$(
        #[test]
        fn $test() {
            let outcome = caught_at(Mutant::$mutant, $seeds);
            assert!(outcome.is_some(), "nobody noticed {} in {} seeds", Mutant::$mutant, $seeds);
        }
    )*};
}

caught! {
    an_ack_before_complete_is_caught: AckBeforeComplete within 100;
    a_claim_after_the_write_is_caught: ClaimAfterWrite within 100;
    a_missing_check_of_epochs_is_caught: NoEpochCheck within 100;
    a_release_before_the_ack_is_caught: ReleaseBeforeAck within 100;
    a_release_before_the_record_is_caught: ReleaseBeforeRecord within 200;
    a_release_that_is_not_noted_is_caught: ReleaseBeforeNoted within 200;
    a_forgotten_release_is_caught: ReleaseForgotten within 1500;
    ownership_without_a_record_is_caught: OwnershipWithoutRecord within 100;
    a_missing_wake_is_caught: NoWakeOnGiveBack within 100;
    half_a_page_left_behind_is_caught: ZeroWithoutEmptying within 200;
    a_forgotten_requeue_is_caught: RequeueForgotten within 100;
    a_discard_without_the_gate_is_caught: DiscardWithoutGate within 100;
    other_memory_after_given_is_caught: NewIncarnationAfterGiven within 1500;
    serving_a_guest_that_runs_is_caught: ServeBeforeFrozen within 100;
    forgotten_discards_are_caught: DiscardsForgotten within 1500;
    planes_that_are_not_sent_are_caught: PlanesNotSent within 100;
}
