//! Snapshots: many may have them, and nobody gives anything up.

use crate::harness::{OTHER_MEMORY, Pair};
use afterimage_protocol::session::{
    DestinationEvent, DestinationOwnership, SourceEvent, SourceOwnership,
};
use afterimage_protocol::wire::{ControlFrame, Refusal, RefuseCode, SessionKind};

fn attached() -> Pair {
    let mut pair = Pair::new(SessionKind::Snapshot);
    pair.connect().expect("let in");
    pair.pump();
    pair
}

fn running() -> Pair {
    let mut pair = attached();
    pair.destination.ready().expect("a snapshot needs no state");
    pair.pump();
    pair
}

#[test]
fn a_snapshot_runs_without_a_record_and_ends_with_bye() {
    let mut pair = running();
    assert!(pair.destination_events.contains(&DestinationEvent::Run));
    assert!(!pair.source.is_over());
    pair.destination.all_complete();
    pair.pump();
    assert_eq!(pair.destination_events.last(), Some(&DestinationEvent::Finished));
    assert_eq!(pair.source_events.last(), Some(&SourceEvent::Finished));
    assert_eq!(pair.source_ownership(), SourceOwnership::Owner);
    assert_eq!(pair.destination_record.ownership, DestinationOwnership::Waiting);
    assert!(pair.source.is_over(), "there is nothing left to do");
}

#[test]
fn the_memory_of_a_snapshot_is_final_from_the_start() {
    let pair = attached();
    assert!(pair.source.is_frozen() && !pair.source.may_run());
}

#[test]
fn a_snapshot_gives_nothing_away() {
    let mut pair = running();
    assert!(pair.source.reclaim().is_err());
    assert!(pair.source.fence().is_err());
    assert!(pair.source.bring_state().is_err());
    for frame in [ControlFrame::Go, ControlFrame::TakeBack] {
        let mut pair = running();
        pair.destination.frame(frame, pair.now);
        pair.drain();
        assert_eq!(pair.refusal_of_destination().expect("refused").code, RefuseCode::Protocol);
        assert_eq!(pair.destination_record.ownership, DestinationOwnership::Waiting);
    }
}

#[test]
fn a_snapshot_whose_bye_is_lost_asks_again() {
    let mut pair = running();
    pair.destination.all_complete();
    pair.drain();
    pair.deliver_to_source();
    pair.cut();
    assert!(!pair.destination.is_over());
    pair.connect().expect("let in");
    pair.pump();
    assert!(pair.destination.is_over());
    assert_eq!(pair.source_events.iter().filter(|e| **e == SourceEvent::Finished).count(), 1);
}

#[test]
fn a_snapshot_survives_the_restart_of_either_side() {
    let mut pair = running();
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    pair.restart_destination();
    pair.connect().expect("let in");
    pair.pump();
    pair.destination.ready().expect("it says so again");
    pair.pump();
    assert!(pair.destination_events.contains(&DestinationEvent::Run));
    pair.destination.all_complete();
    pair.pump();
    assert!(pair.destination.is_over());
}

#[test]
fn what_one_memory_had_is_not_believed_of_another() {
    let mut pair = running();
    pair.destination.all_complete();
    pair.pump();
    pair.lose_destination(OTHER_MEMORY);
    pair.connect().expect("a snapshot is for everybody");
    pair.pump();
    assert!(!pair.source.is_over() && !pair.destination.is_over());
    assert_eq!(pair.refusal_of_destination(), None);
    pair.destination.all_complete();
    pair.pump();
    assert_eq!(pair.source_events.iter().filter(|e| **e == SourceEvent::Finished).count(), 2);
}

#[test]
fn a_snapshot_that_runs_waits_for_its_source_whatever_strangers_say() {
    let mut pair = running();
    pair.cut();
    pair.destination.open();
    pair.destination.refused(Refusal::new(RefuseCode::Ended, "another server"));
    pair.drain();
    assert!(!pair.destination.is_over());
    pair.connect().expect("let in");
}

#[test]
fn a_claim_to_own_the_guest_of_a_snapshot_is_refused() {
    for ownership in [DestinationOwnership::Running, DestinationOwnership::Refused] {
        let mut pair = attached();
        pair.destination_record.ownership = ownership;
        pair.restart_destination();
        pair.connect().expect("let in");
        pair.pump();
        assert!(pair.refusal_of_source().is_some());
        assert_eq!(pair.source_ownership(), SourceOwnership::Owner);
    }
}

#[test]
fn a_destination_that_leaves_a_snapshot_is_not_waited_for() {
    let mut pair = Pair::new(SessionKind::Snapshot);
    pair.connect().expect("let in");
    pair.pump();
    pair.destination.leave().expect("it is a snapshot");
    pair.pump();
    assert_eq!(pair.source_events.last(), Some(&SourceEvent::Left));
    assert!(pair.destination.is_over() && pair.destination.leave().is_err());
    // Another one, or the same memory again, is served as before.
    pair.lose_destination(OTHER_MEMORY);
    pair.connect().expect("let in");
    pair.pump();
    assert!(matches!(pair.source_events.last(), Some(SourceEvent::Attached(_))));
}

#[test]
fn nobody_leaves_a_migration() {
    let mut pair = Pair::restored();
    assert!(pair.destination.leave().is_err());
    pair.source
        .frame(ControlFrame::Refuse(Refusal::new(RefuseCode::Ended, "out of place")), pair.now);
    pair.drain();
    assert!(!pair.source_events.contains(&SourceEvent::Left));
}
