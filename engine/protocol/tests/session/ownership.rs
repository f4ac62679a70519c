//! Who may run the guest: giving, taking back, fencing.

use crate::harness::{Disk, MEMORY, OTHER_MEMORY, Pair};
use afterimage_protocol::session::{
    AfterRefusal, DestinationEvent, DestinationOwnership, SourceAction, SourceEvent,
    SourceOwnership,
};
use afterimage_protocol::wire::{ControlFrame, RefuseCode, SessionKind};

#[test]
fn given_is_durable_before_go() {
    let pair = Pair::go_on_its_way();
    assert_eq!(pair.source_record.ownership, SourceOwnership::Given);
    assert_eq!(pair.source_record.incarnation, MEMORY);
    assert!(!pair.source.may_run() && !pair.destination_runs());
}

#[test]
fn running_is_durable_before_the_guest_is_run() {
    let mut pair = Pair::go_on_its_way();
    assert!(!pair.destination_events.contains(&DestinationEvent::Run));
    pair.deliver_to_destination();
    assert_eq!(pair.destination_record.ownership, DestinationOwnership::Running);
    assert!(pair.destination_events.contains(&DestinationEvent::Run));
}

#[test]
fn a_guest_that_was_not_given_is_taken_back_once_that_is_durable() {
    let mut pair = Pair::restored();
    pair.source.reclaim().expect("not given yet");
    assert!(!pair.source.may_run(), "it is not durable yet");
    pair.drain();
    assert!(pair.source.may_run() && pair.source.is_over());
    assert_eq!(pair.source_ownership(), SourceOwnership::Reclaimed);
    pair.pump();
    assert!(matches!(pair.destination_events.last(), Some(DestinationEvent::Ended(_))));
}

#[test]
fn a_cancelled_migration_stays_cancelled_when_the_source_is_restarted() {
    let mut pair = Pair::restored();
    pair.destination.ready().expect("state is there");
    pair.cut();
    pair.source.reclaim().expect("not given yet");
    pair.drain();
    assert!(pair.source.may_run());
    pair.restart_source();
    assert_eq!(pair.connect().expect_err("cancelled").code, RefuseCode::Ended);
    assert!(pair.destination.is_over() && !pair.destination_runs());
}

#[test]
fn a_guest_on_its_way_is_taken_back_by_agreement() {
    let mut pair = Pair::go_on_its_way();
    // The go is lost.
    pair.cut();
    pair.source.reclaim().expect("the destination is not known to run");
    assert!(!pair.source.may_run(), "nobody has agreed yet");
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Reclaimed);
    assert_eq!(pair.destination_record.ownership, DestinationOwnership::Refused);
    assert!(pair.source.may_run(), "the guest is the source's for good");
    assert!(pair.source_events.contains(&SourceEvent::Reclaimed));
    assert!(pair.destination_events.contains(&DestinationEvent::Refused));
    assert!(!pair.destination_events.contains(&DestinationEvent::Run));
    assert!(pair.destination.ready().is_err());
}

#[test]
fn a_go_that_was_first_wins_against_taking_back() {
    let mut pair = Pair::go_on_its_way();
    pair.source.reclaim().expect("the destination is not known to run");
    pair.drain();
    assert_eq!(pair.to_destination, [ControlFrame::Go, ControlFrame::TakeBack]);
    pair.pump();
    assert!(pair.destination_runs() && !pair.source.may_run());
    assert_eq!(pair.source_events.iter().filter(|e| **e == SourceEvent::ReclaimDenied).count(), 1);
    assert!(pair.source.reclaim().is_err());
}

#[test]
fn taking_back_that_crosses_running_is_denied() {
    let mut pair = Pair::go_on_its_way();
    pair.deliver_to_destination();
    assert_eq!(pair.to_source, [ControlFrame::Running]);
    pair.source.reclaim().expect("the destination is not known to run");
    pair.pump();
    assert!(pair.source_events.contains(&SourceEvent::ReclaimDenied));
    assert!(!pair.may_both_run() && pair.destination_runs());
}

#[test]
fn an_agreement_whose_answer_was_lost_is_found_again() {
    for source_restarts in [false, true] {
        let mut pair = Pair::go_on_its_way();
        pair.cut();
        pair.source.reclaim().expect("the destination is not known to run");
        pair.connect().expect("let in");
        pair.pump_until(|pair| pair.destination_record.ownership == DestinationOwnership::Refused);
        assert!(!pair.source.may_run());
        pair.cut();
        if source_restarts {
            pair.restart_source();
        }
        pair.connect().expect("let in");
        pair.pump();
        assert!(pair.source.may_run(), "restarts: {source_restarts}");
        assert!(!pair.destination_runs());
    }
}

#[test]
fn a_restarted_source_that_forgot_taking_back_gives_the_guest_again() {
    let mut pair = Pair::go_on_its_way();
    pair.cut();
    pair.source.reclaim().expect("the destination is not known to run");
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    assert!(pair.destination_runs() && !pair.source.may_run());
}

/// Pairs in each of which the destination can still refuse.
fn before_it_runs() -> [(&'static str, Pair); 5] {
    let mut attached = Pair::migration();
    attached.connect().expect("let in");
    attached.pump();
    let mut ready = Pair::restored();
    ready.destination.ready().expect("state is there");
    [
        ("attached", attached),
        ("in precopy", Pair::passing()),
        ("restored", Pair::restored()),
        ("ready", ready),
        ("go on its way", Pair::go_on_its_way()),
    ]
}

#[test]
fn a_destination_that_refuses_gives_the_guest_back_unasked() {
    for (when, mut pair) in before_it_runs() {
        pair.destination.refuse().expect("it does not run here");
        assert_eq!(pair.destination_record.ownership, DestinationOwnership::Waiting);
        assert!(pair.destination.ready().is_err(), "{when}");
        pair.pump();
        assert_eq!(pair.destination_record.ownership, DestinationOwnership::Refused, "{when}");
        assert_eq!(pair.source_ownership(), SourceOwnership::Reclaimed, "{when}");
        assert!(pair.source.may_run() && !pair.destination_runs(), "{when}");
        assert!(pair.source_events.contains(&SourceEvent::Refused), "{when}");
        assert_eq!(pair.source_events.last(), Some(&SourceEvent::Reclaimed), "{when}");
        assert!(pair.destination_events.contains(&DestinationEvent::Refused), "{when}");
        assert!(matches!(pair.destination_events.last(), Some(DestinationEvent::Ended(_))));
        assert!(!pair.destination_events.contains(&DestinationEvent::Run), "{when}");
    }
}

#[test]
fn a_guest_that_was_refused_may_be_had_by_other_memory_of_a_source_that_offers_it_again() {
    for is_given in [false, true] {
        let mut pair = Pair::restored();
        pair.after_refusal = AfterRefusal::OfferAgain;
        pair.restart_source();
        pair.source.bring_state().expect("the same state, after a restart");
        pair.connect().expect("let in");
        pair.pump();
        if is_given {
            pair.destination.ready().expect("all state is there");
            pair.drain();
            pair.deliver_to_source();
            assert_eq!(pair.source_ownership(), SourceOwnership::Given);
            pair.cut();
        }
        pair.destination.refuse().expect("it does not run here");
        pair.drain();
        if is_given {
            pair.connect().expect("let in");
        }
        pair.pump();
        assert_eq!(pair.source_ownership(), SourceOwnership::Owner, "given: {is_given}");
        assert_eq!(pair.source_events.last(), Some(&SourceEvent::Disconnected));
        assert!(pair.source_events.contains(&SourceEvent::Refused) && !pair.source.is_over());
        assert!(matches!(pair.destination_events.last(), Some(DestinationEvent::Ended(_))));
        assert!(!pair.source.may_run(), "it is frozen, for the next one");

        // The same memory is no next one.
        pair.restart_destination();
        pair.connect().expect("let in");
        pair.pump();
        assert!(pair.destination.is_over() && !pair.destination_runs());

        pair.lose_destination(OTHER_MEMORY);
        pair.connect().expect("let in");
        pair.pump();
        pair.destination.ready().expect("all state is there");
        pair.pump();
        assert!(pair.destination_runs() && !pair.may_both_run(), "given: {is_given}");
        assert_eq!(pair.source_record.incarnation, OTHER_MEMORY);
    }
}

#[test]
fn a_refusal_that_nobody_heard_is_found_at_the_next_connection() {
    for (restarts_source, restarts_destination) in
        [(false, false), (true, false), (false, true), (true, true)]
    {
        let mut pair = Pair::go_on_its_way();
        pair.cut();
        pair.destination.refuse().expect("it does not run here");
        pair.drain();
        assert!(!pair.source.may_run(), "it has not heard yet");
        if restarts_source {
            pair.restart_source();
        }
        if restarts_destination {
            pair.restart_destination();
        }
        pair.connect().expect("let in");
        pair.pump();
        assert!(pair.source.may_run() && !pair.destination_runs());
        assert!(matches!(pair.destination_events.last(), Some(DestinationEvent::Ended(_))));
    }
}

#[test]
fn a_refusal_between_attach_and_begin_is_heard() {
    for is_ready in [false, true] {
        let mut pair = Pair::restored();
        if is_ready {
            pair.destination.ready().expect("state is there");
        }
        pair.cut();
        pair.connect().expect("let in");
        pair.pump_until(|pair| pair.to_destination.front() == Some(&ControlFrame::Begin));
        pair.destination.refuse().expect("it does not run here");
        pair.pump();
        assert!(pair.source.may_run() && !pair.destination_runs(), "ready: {is_ready}");
    }
}

#[test]
fn a_refusal_that_could_not_be_recorded_is_recorded_with_the_next_connection() {
    let mut pair = Pair::go_on_its_way();
    pair.destination_disk = Disk::Fails;
    pair.destination.refuse().expect("it does not run here");
    pair.pump();
    assert_eq!(pair.destination_events.last(), Some(&DestinationEvent::Disconnected));
    assert!(pair.destination_events.contains(&DestinationEvent::PersistFailed));
    assert!(!pair.source.may_run(), "it may still run there, after a restart");
    pair.destination_disk = Disk::Works;
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.destination_record.ownership, DestinationOwnership::Refused);
    assert!(pair.source.may_run() && !pair.destination_runs());
}

#[test]
fn a_guest_that_runs_or_may_be_anybodys_is_not_refused() {
    let mut running = Pair::running();
    assert!(running.destination.refuse().is_err());
    let mut starting = Pair::go_on_its_way();
    starting.deliver_to_destination();
    assert!(starting.destination.refuse().is_err(), "it is on record");
    let mut unbound = Pair::migration();
    assert!(unbound.destination.refuse().is_err(), "by nobody's offer");
    let mut over = Pair::restored();
    over.source.reclaim().expect("not given yet");
    over.pump();
    assert!(over.destination.refuse().is_err());
    let mut snapshot = Pair::new(SessionKind::Snapshot);
    snapshot.connect().expect("let in");
    snapshot.pump();
    assert!(snapshot.destination.refuse().is_err());
}

#[test]
fn a_fenced_destination_is_refused_and_never_told_to_run() {
    // It has recorded that it runs and died before anybody knew.
    let mut pair = Pair::go_on_its_way();
    pair.deliver_to_destination();
    pair.cut();
    pair.restart_destination();
    let before = pair.source_record.epoch;
    pair.source.fence().expect("an operator says so");
    pair.drain();
    assert!(pair.source.may_run());
    assert_eq!(pair.source_ownership(), SourceOwnership::Fenced);
    assert!(pair.source_record.epoch > before);
    assert_eq!(pair.connect().expect_err("fenced").code, RefuseCode::Fenced);
    assert_eq!(pair.destination_events, [DestinationEvent::Fenced]);
    assert!(pair.destination.is_over());
    pair.restart_source();
    pair.restart_destination();
    assert_eq!(pair.connect().expect_err("still fenced").code, RefuseCode::Fenced);
    assert!(!pair.destination_events.contains(&DestinationEvent::Run));
}

#[test]
fn fencing_a_connected_destination_tells_it() {
    let mut pair = Pair::restored();
    pair.source.fence().expect("an operator says so");
    pair.pump();
    assert_eq!(pair.destination_events.last(), Some(&DestinationEvent::Fenced));
}

#[test]
fn a_restarted_destination_that_runs_is_told_so_only_after_begin() {
    let mut pair = Pair::running();
    pair.restart_destination();
    assert!(pair.destination_events.is_empty());
    pair.connect().expect("let in");
    pair.pump_until(|pair| pair.to_destination.front() == Some(&ControlFrame::Begin));
    assert!(!pair.destination_events.contains(&DestinationEvent::Run));
    pair.pump();
    assert!(pair.destination_events.contains(&DestinationEvent::Run));
}

#[test]
fn a_destination_that_ran_and_forgot_it_gives_nothing_back() {
    let mut pair = Pair::running();
    pair.destination_record.ownership = DestinationOwnership::Refused;
    pair.restart_destination();
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Given);
    assert_eq!(pair.refusal_of_source().expect("refused").code, RefuseCode::Protocol);
}

#[test]
fn nothing_is_given_again_once_all_has_arrived() {
    let mut pair = Pair::running();
    pair.destination.all_complete();
    pair.drain();
    pair.deliver_to_source();
    for forgotten in [DestinationOwnership::Waiting, DestinationOwnership::Refused] {
        pair.destination_record.ownership = forgotten;
        pair.restart_destination();
        pair.forget();
        pair.connect().expect("let in");
        pair.pump();
        assert_eq!(pair.source_ownership(), SourceOwnership::Finished);
        assert_eq!(pair.refusal_of_source().expect("refused").code, RefuseCode::Protocol);
    }
}

#[test]
fn what_a_destination_said_before_it_was_restarted_is_not_believed_after() {
    let mut pair = Pair::running();
    pair.destination.all_complete();
    pair.drain();
    pair.deliver_to_source();
    // The bye is lost, and the restarted destination has not looked at its planes yet.
    pair.restart_destination();
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.refusal_of_destination(), None, "no bye before it says complete");
    pair.destination.all_complete();
    pair.pump();
    assert!(pair.destination.is_over());
}

#[test]
fn a_source_that_was_given_away_lets_no_call_undo_it() {
    let mut pair = Pair::running();
    assert!(pair.source.bring_state().is_err());
    assert!(pair.source.reclaim().is_err());
    pair.destination.all_complete();
    pair.pump();
    assert!(pair.source.bring_state().is_err());
    assert!(pair.source.reclaim().is_err());
    assert!(pair.source.fence().is_err());
    pair.restart_source();
    assert!(!pair.source.may_run());
    assert!(pair.source.fence().is_err());
}

#[test]
fn other_memory_is_let_in_by_nobody_after_taking_back() {
    let mut pair = Pair::restored();
    pair.source.reclaim().expect("not given yet");
    pair.pump();
    pair.lose_destination(OTHER_MEMORY);
    assert_eq!(pair.connect().expect_err("over").code, RefuseCode::Ended);
}

#[test]
fn state_is_not_asked_of_the_vmm_again_by_a_source_that_has_it() {
    let mut pair = Pair::restored();
    assert!(pair.source.bring_state().is_err());
    assert!(pair.source_actions.contains(&SourceAction::SendState));
}
