//! Migrations that go well, and those that lose their connection on the way.

use crate::harness::{MEMORY, OTHER_MEMORY, Pair};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationAction, DestinationEvent, DestinationOwnership, SourceAction, SourceEvent,
    SourceOwnership,
};
use afterimage_protocol::wire::{ControlFrame, Epoch, RefuseCode};

#[test]
fn a_migration_goes_from_hello_to_bye() {
    let mut pair = Pair::running();
    assert!(pair.destination_runs() && !pair.source.may_run());
    pair.destination.all_complete();
    pair.pump();
    assert_eq!(
        pair.source_events,
        [
            SourceEvent::Attached(MEMORY),
            SourceEvent::Stopped,
            SourceEvent::Ready,
            SourceEvent::Given,
            SourceEvent::Running,
            SourceEvent::Finished
        ]
    );
    assert_eq!(
        pair.destination_events,
        [
            DestinationEvent::Attached(crate::harness::SESSION),
            DestinationEvent::StateComplete,
            DestinationEvent::Run,
            DestinationEvent::Finished
        ]
    );
    assert_eq!(pair.source_ownership(), SourceOwnership::Finished);
    assert!(pair.source.is_over() && pair.destination.is_over());
}

#[test]
fn the_source_learns_what_the_destination_has_before_it_serves() {
    let mut pair = Pair::migration();
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.received, [PageRange::new(PageNumber(3), 2)]);
    let at = |wanted: fn(&SourceAction) -> bool| {
        pair.source_actions.iter().position(wanted).expect("it is asked for")
    };
    let reset = at(|action| matches!(action, SourceAction::ResetBook));
    let received = at(|action| matches!(action, SourceAction::Received { .. }));
    let open = at(|action| matches!(action, SourceAction::OpenData { .. }));
    assert!(reset < received && received < open);
}

#[test]
fn device_state_is_dropped_only_when_the_destination_runs() {
    let mut pair = Pair::go_on_its_way();
    assert!(!pair.source_actions.contains(&SourceAction::DropState));
    pair.deliver_to_destination();
    assert!(!pair.source_actions.contains(&SourceAction::DropState));
    pair.deliver_to_source();
    assert!(pair.source_actions.contains(&SourceAction::DropState));
}

#[test]
fn a_migration_survives_a_cut_after_any_number_of_frames() {
    for delivered in 0..16 {
        let mut pair = Pair::migration();
        pair.connect().expect("let in");
        pair.source.bring_state().expect("not yet frozen");
        let mut left = delivered;
        let mut has_said_ready = false;
        while left > 0 {
            left -= 1;
            pair.drain();
            if !has_said_ready && pair.destination.ready().is_ok() {
                has_said_ready = true;
                pair.drain();
            }
            if pair.to_source.is_empty() {
                pair.deliver_to_destination();
            } else {
                pair.deliver_to_source();
            }
            assert!(!pair.may_both_run(), "after {delivered} frames");
        }
        pair.cut();
        pair.connect().unwrap_or_else(|refusal| panic!("after {delivered} frames: {refusal:?}"));
        pair.pump();
        pair.destination.ready().expect("all state is there");
        pair.pump();
        assert!(pair.destination_runs(), "after {delivered} frames");
        pair.destination.all_complete();
        pair.pump();
        assert_eq!(pair.source_ownership(), SourceOwnership::Finished, "after {delivered}");
        let runs =
            pair.destination_events.iter().filter(|event| **event == DestinationEvent::Run).count();
        assert_eq!(runs, 1, "after {delivered} frames");
    }
}

#[test]
fn each_connection_has_an_epoch_of_its_own_durable_before_the_hello() {
    let mut pair = Pair::migration();
    for epoch in 1..5 {
        pair.connect().expect("let in");
        pair.pump();
        assert_eq!(pair.source_record.epoch, Epoch(epoch));
        assert_eq!(pair.destination.stamp().epoch, Epoch(epoch));
        let persist = pair
            .source_actions
            .iter()
            .position(|action| matches!(action, SourceAction::Persist(r) if r.epoch.0 == epoch));
        let greet = pair.source_actions.iter().position(
            |action| matches!(action, SourceAction::Greet(h) if h.stamp.epoch.0 == epoch),
        );
        assert!(persist < greet && persist.is_some());
    }
}

#[test]
fn an_epoch_that_has_passed_is_refused_by_the_destination() {
    let mut pair = Pair::migration();
    pair.connect().expect("let in");
    pair.pump();
    pair.source_record.epoch = Epoch(0);
    pair.restart_source();
    assert_eq!(pair.connect().expect_err("stale").code, RefuseCode::Stale);
    assert!(!pair.destination.is_over());
    pair.connect().expect("epoch 2 is new");
}

#[test]
fn a_destination_that_reconnects_before_the_source_noticed_is_let_in() {
    let mut pair = Pair::running();
    pair.destination.disconnected();
    pair.connect().expect("the old connection is given up");
    pair.pump();
    pair.destination.all_complete();
    pair.pump();
    assert!(pair.destination.is_over());
}

#[test]
fn other_memory_before_go_starts_again() {
    let mut pair = Pair::restored();
    pair.lose_destination(OTHER_MEMORY);
    pair.forget();
    pair.connect().expect("nothing was given yet");
    pair.pump();
    assert!(pair.source_actions.contains(&SourceAction::ResetBook));
    assert!(pair.destination_events.contains(&DestinationEvent::StateComplete));
    pair.destination.ready().expect("state is there");
    pair.pump();
    assert!(pair.destination_runs());
    assert_eq!(pair.source_record.incarnation, OTHER_MEMORY);
}

#[test]
fn other_memory_is_turned_away_while_the_first_is_connected() {
    let mut pair = Pair::restored();
    let mut hello = pair.destination.open();
    hello.incarnation = OTHER_MEMORY;
    assert_eq!(pair.source.admits(&hello).expect_err("busy").code, RefuseCode::TooMany);
}

#[test]
fn other_memory_after_given_is_refused_for_good() {
    let mut pair = Pair::go_on_its_way();
    pair.lose_destination(OTHER_MEMORY);
    assert_eq!(pair.connect().expect_err("given").code, RefuseCode::Incarnation);
    assert!(pair.destination.is_over());
    assert_eq!(pair.source_ownership(), SourceOwnership::Given);
    pair.restart_source();
    pair.lose_destination(OTHER_MEMORY);
    assert_eq!(pair.connect().expect_err("still given").code, RefuseCode::Incarnation);
}

#[test]
fn a_lost_bye_is_said_again() {
    let mut pair = Pair::running();
    pair.destination.all_complete();
    pair.drain();
    pair.deliver_to_source();
    assert_eq!(pair.to_destination, [ControlFrame::Bye]);
    pair.cut();
    assert!(pair.source.is_over() && !pair.destination.is_over());
    pair.connect().expect("a destination without its bye is let in");
    pair.pump();
    assert!(pair.destination.is_over());
    assert_eq!(pair.source_events.iter().filter(|e| **e == SourceEvent::Finished).count(), 1);
}

#[test]
fn a_restarted_source_that_had_finished_says_bye_again() {
    let mut pair = Pair::running();
    pair.destination.all_complete();
    pair.drain();
    pair.deliver_to_source();
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    assert!(pair.destination.is_over());
    assert!(!pair.source.may_run());
}

#[test]
fn a_finished_source_lets_no_other_memory_in() {
    let mut pair = Pair::running();
    pair.destination.all_complete();
    pair.pump();
    pair.lose_destination(OTHER_MEMORY);
    assert_eq!(pair.connect().expect_err("over").code, RefuseCode::Ended);
}

#[test]
fn complete_before_running_is_said_once_it_runs() {
    let mut pair = Pair::go_on_its_way();
    pair.destination.all_complete();
    pair.drain();
    assert!(!pair.to_source.contains(&ControlFrame::Complete));
    pair.pump();
    assert!(pair.source.is_over() && pair.destination.is_over());
}

#[test]
fn device_state_begins_anew_on_each_connection() {
    let mut pair = Pair::migration();
    pair.connect().expect("let in");
    pair.pump();
    pair.source.bring_state().expect("not yet frozen");
    pair.drain();
    pair.deliver_to_destination();
    pair.cut();
    pair.forget();
    pair.connect().expect("let in");
    pair.pump();
    let reset = pair
        .destination_actions
        .iter()
        .position(|action| *action == DestinationAction::ResetState)
        .expect("what came is forgotten");
    let section = pair
        .destination_actions
        .iter()
        .position(|action| matches!(action, DestinationAction::Section { .. }))
        .expect("it comes again");
    assert!(reset < section);
    assert!(pair.destination_events.contains(&DestinationEvent::StateComplete));
}

#[test]
fn a_connection_that_breaks_is_an_event_only_once_it_was_attached() {
    let mut pair = Pair::migration();
    pair.connect().expect("let in");
    pair.cut();
    assert!(pair.source_events.is_empty() && pair.destination_events.is_empty());
    pair.connect().expect("let in");
    pair.pump();
    pair.cut();
    assert_eq!(pair.source_events.last(), Some(&SourceEvent::Disconnected));
    assert_eq!(pair.destination_events.last(), Some(&DestinationEvent::Disconnected));
}

#[test]
fn ready_said_while_the_connection_is_being_made_is_not_lost() {
    let mut pair = Pair::restored();
    pair.cut();
    pair.connect().expect("let in");
    pair.deliver_to_destination();
    // The attach has said that it is not ready; begin is awaited.
    pair.destination.ready().expect("state is there");
    pair.pump();
    assert!(pair.destination_runs());
}

#[test]
fn a_source_restarted_before_given_goes_on_with_a_destination_that_is_ready() {
    let mut pair = Pair::restored();
    pair.cut();
    pair.destination.ready().expect("state is there");
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Owner);
    pair.source.bring_state().expect("it has not been said to this process");
    pair.pump();
    assert!(pair.destination_runs());
}

#[test]
fn a_destination_may_become_ready_before_a_restarted_source_has_its_state_again() {
    let mut pair = Pair::restored();
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    pair.destination.ready().expect("state is there");
    pair.pump();
    assert_eq!(pair.refusal_of_source(), None);
    assert_eq!(pair.destination.record().ownership, DestinationOwnership::Waiting);
    pair.source.bring_state().expect("it has not been said to this process");
    pair.pump();
    assert!(pair.destination_runs());
}
