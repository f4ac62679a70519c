//! Thousands of seeds, each a session that something goes wrong with.

use afterimage_simulator::{
    Mutant, Setup, Summary, Tracing, available_jobs, caught_at, every_step, sweep,
};
use std::num::NonZeroUsize;

const SEEDS: u64 = 10_000;
/// Runs in which each party is killed at every step.
const QUIET_RUNS: u64 = 2;

fn assert_nothing_violated(summary: &Summary) {
    let failures: Vec<String> = summary
        .violated
        .values()
        .filter_map(|run| Some(format!("{}\n    {}", run.violation.as_ref()?, run.replay())))
        .collect();
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
}

/// Situations that the simulator is there for: each has to come about.
const SITUATIONS: [&str; 34] = [
    "a VMM died whose guest ran",
    "a channel broke in the middle of a piece",
    "a channel was closed because the other side had given it up",
    "a connection attempt came twice",
    "a copy came whose page is being received",
    "a data channel got stuck",
    "a data connection that nobody greeted was given up",
    "a data hello that is out of date was turned away",
    "a fence was refused because pages were freed",
    "a fenced destination came back and stays stopped",
    "a guest was held that was ready to go",
    "a handler died between COPY and complete",
    "a handler died between complete and CONTINUE",
    "a handler died with a discard read and not entered",
    "a handler died with faults read and not answered",
    "a page was asked for before memory was final",
    "a record did not fit on the disk",
    "a side was paused by hand",
    "an answer came before memory was final",
    "an attempt without an answer was given up",
    "an early copy came after its pass had ended",
    "an early copy came after memory was final",
    "an early copy came while it was told what is stale",
    "an early copy came whose page is being received",
    "another pass began",
    "background alone brought what was missing",
    "one host did not hear the other",
    "pages that were given back had been dropped elsewhere",
    "pages were under way when memory became final",
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
    assert!(coverage.transitions() > 500, "only {} transitions were seen", coverage.transitions());
    for situation in SITUATIONS {
        assert!(coverage.situations().contains_key(situation), "it never was that {situation}");
    }
}

#[test]
fn every_rule_holds_whoever_dies_at_whichever_step() {
    let summary = every_step(0..QUIET_RUNS, available_jobs(), |_, _, _| ());
    assert_nothing_violated(&summary);
    let kills = |seed| {
        let setup = Setup::new(seed);
        setup.calm().run().steps * setup.mortals().len() as u64
    };
    assert_eq!(summary.runs, (0..QUIET_RUNS).map(kills).sum());
    let midway = "a handler died between complete and CONTINUE";
    assert!(summary.coverage.situations().contains_key(midway), "it never was that {midway}");
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
    a_claim_after_the_write_is_caught: ClaimAfterWrite by "i1_once_and_i8_gone" within 100;
    a_missing_check_of_epochs_is_caught: NoEpochCheck by "i5_fenced" within 300;
    a_release_before_the_ack_is_caught: ReleaseBeforeAck by "i2_kept" within 100;
    a_release_before_the_record_is_caught: ReleaseBeforeRecord by "i2_kept" within 200;
    a_release_that_is_not_noted_is_caught: ReleaseBeforeNoted by "i2_kept" within 200;
    a_forgotten_release_is_caught: ReleaseForgotten by "i2_kept" within 1500;
    ownership_without_a_record_is_caught: OwnershipWithoutRecord
        by "i3_given_to_whom" | "i3_one_owner" within 100;
    a_missing_wake_is_caught: NoWakeOnGiveBack by "i4_nobody_forgotten" within 500;
    half_a_page_left_behind_is_caught: ZeroWithoutEmptying by "i1_once_and_i8_gone" within 200;
    a_forgotten_requeue_is_caught: RequeueForgotten by "i4_in_flight_remembered" within 100;
    a_discard_without_the_gate_is_caught: DiscardWithoutGate
        by "i1_once_and_i8_gone" within 100;
    other_memory_after_given_is_caught: NewIncarnationAfterGiven
        by "i3_given_to_whom" | "i3_one_owner" | "i6_rebuilt" within 500;
    serving_a_guest_that_runs_is_caught: ServeBeforeFrozen by "i1_once_and_i8_gone" within 100;
    forgotten_discards_are_caught: DiscardsForgotten by "i1_once_and_i8_gone" within 1500;
    planes_that_are_not_sent_are_caught: PlanesNotSent by "i6_rebuilt" within 100;
    planes_that_are_not_heard_are_caught: ReceivedIgnored by "i6_rebuilt" within 100;
    a_discard_lost_with_its_reader_is_caught: EventBufferLost
        by "i1_once_and_i8_gone" within 500;
    half_a_page_left_by_the_dead_is_caught: TakeoverWithoutEmptying
        by "i1_once_and_i8_gone" within 1500;
    claims_of_the_dead_are_caught: ClaimsKeptAtTakeover
        by "i4_nobody_forgotten" | "i4_progress" | "i7_bounded" within 500;
    waiters_of_the_dead_are_caught: NoWakeAtTakeover by "i4_nobody_forgotten" within 300;
    pages_given_back_and_not_asked_for_are_caught: GivenBackNotAsked
        by "i4_given_back_is_asked_for" within 100;
    a_guest_that_starts_too_early_is_caught: RunBeforeRecorded
        by "i3_given_to_whom" | "i3_one_owner" within 100;
    a_guest_let_go_while_it_starts_is_caught: TakeBackWhileRecording
        by "i3_one_owner" | "i3_given_to_whom" within 1500;
    an_older_epoch_is_caught: OlderEpochAccepted by "i5_fenced" within 300;
    an_older_generation_is_caught: OlderGenerationAccepted by "i5_fenced" within 500;
    answers_to_the_fenced_are_caught: FencedAnswered
        by "i3_one_owner" | "i3_given_to_whom" | "i1_once_and_i8_gone" within 1500;
    silence_that_ends_nothing_is_caught: SilenceIgnored by "i4_progress" within 500;
    a_stall_that_nobody_notices_is_caught: StallIgnored by "i4_progress" within 1500;
    a_channel_given_up_in_silence_is_caught: RenewNotSaid by "i4_progress" within 1500;
    an_attempt_that_waits_for_ever_is_caught: AttemptWithoutEnd by "i4_progress" within 500;
    last_writes_that_are_not_told_are_caught: LastWritesNotTold
        by "i1_once_and_i8_gone" | "i1_early_copies" within 100;
    an_early_copy_of_final_memory_is_caught: EarlyAfterSettled
        by "i1_once_and_i8_gone" within 100;
    an_early_copy_between_stale_and_pass_is_caught: EarlyAfterStale
        by "i1_once_and_i8_gone" | "i1_early_copies" within 1500;
    an_early_copy_of_another_pass_is_caught: PassNumberIgnored
        by "i1_once_and_i8_gone" | "i1_early_copies" within 1500;
    a_pass_that_begins_too_soon_is_caught: PassBeforeAcknowledged
        by "i4_nothing_under_way" within 100;
    pages_that_overtake_their_pass_are_caught: PassNotWaitedFor
        by "i6_early_after_its_pass" | "i4_nothing_under_way" within 100;
    vouching_for_everything_is_caught: VouchForEverything
        by "i1_once_and_i8_gone" | "i1_early_copies" within 300;
    an_ack_of_a_stale_copy_is_caught: StaleAckHeeded
        by "i1_early_copies" | "i6_rebuilt" within 100;
    an_old_copy_under_a_zero_page_is_caught: ZeroOverOldCopy
        by "i1_once_and_i8_gone" | "i1_early_copies" within 100;
    old_copies_that_stay_mapped_are_caught: OldCopiesKept
        by "i1_once_and_i8_gone" | "i1_early_copies" within 500;
    an_answer_that_is_too_early_is_caught: AnsweredBeforeFrozen
        by "i1_once_and_i8_gone" | "i4_progress" within 1500;
    a_cancel_after_the_point_of_no_return_is_caught: DenialIgnored
        by "i3_one_owner" | "i3_given_to_whom" within 100;
    a_hold_that_nobody_hears_of_is_caught: HoldIgnored by "i3_held" within 300;
}
