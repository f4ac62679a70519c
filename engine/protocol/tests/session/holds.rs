//! Guests that are held though the destination is ready, let go, or taken back.

use crate::harness::Pair;
use afterimage_protocol::session::{SourceEvent, SourceOwnership};

/// A destination that is ready, and a guest that is held.
fn held() -> Pair {
    let mut pair = Pair::passing();
    pair.source.hold();
    pair.source.bring_state().expect("not yet frozen");
    pair.pump();
    pair.destination.ready().expect("all state is there");
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Owner);
    pair
}

#[test]
fn a_held_guest_goes_when_it_is_let_go() {
    let mut pair = held();
    let count = |pair: &Pair| {
        pair.source_events.iter().filter(|event| **event == SourceEvent::Held).count()
    };
    assert_eq!(count(&pair), 1);
    pair.cut();
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Owner, "a reconnection frees nobody");
    assert_eq!(count(&pair), 1, "it is told once");
    pair.source.proceed().expect("it is held");
    pair.pump();
    assert!(pair.destination_runs());
    assert!(pair.source.proceed().is_err(), "nothing is held any more");
}

#[test]
fn a_guest_let_go_without_a_connection_goes_with_the_next() {
    let mut pair = held();
    pair.cut();
    pair.source.proceed().expect("it is held");
    pair.drain();
    assert_eq!(pair.source_ownership(), SourceOwnership::Owner, "nobody is there to have it");
    pair.connect().expect("let in");
    pair.pump();
    assert!(pair.destination_runs());
}

#[test]
fn a_guest_let_go_before_anybody_is_ready_goes_once_somebody_is() {
    let mut pair = Pair::passing();
    pair.source.hold();
    pair.source.proceed().expect("it is held");
    pair.source.bring_state().expect("not yet frozen");
    pair.pump();
    pair.destination.ready().expect("all state is there");
    pair.pump();
    assert!(!pair.source_events.contains(&SourceEvent::Held));
    assert!(pair.destination_runs());
}

#[test]
fn a_held_guest_is_taken_back_without_asking() {
    let mut pair = held();
    pair.source.reclaim().expect("it was not given");
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Reclaimed);
    assert!(pair.source.may_run() && !pair.destination_runs());
    assert!(pair.source.proceed().is_ok(), "which changes nothing");
    pair.pump();
    assert!(pair.source.may_run() && !pair.destination_runs());
}

#[test]
fn a_hold_does_not_outlive_its_process() {
    let mut pair = held();
    pair.restart_source();
    assert!(pair.source.proceed().is_err(), "whoever holds says so again");
    pair.connect().expect("let in");
    pair.source.bring_state().expect("this process has not got it");
    pair.pump();
    assert!(pair.destination_runs());
}
