//! Precopy passes, and what becomes of them when a connection or a process ends.

use crate::harness::{PAGES, Pair, destination_config, received_frame, section, state_end};
use afterimage_protocol::bitmap::Segment;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationAction, DestinationEvent, DestinationOwnership, DestinationSession, SourceAction,
    SourceEvent,
};
use afterimage_protocol::wire::{
    Attach, Capabilities, ControlFrame, MAX_PASS, Phase, RefuseCode, SessionKind,
};

/// Connected, and nothing said yet but what leads to `Begin`.
fn passing() -> Pair {
    let mut pair = Pair::precopy(SessionKind::Migration);
    pair.connect().expect("let in");
    pair
}

/// The first pass is open.
fn open() -> Pair {
    Pair::passing()
}

const fn pass(number: u16, last: bool) -> ControlFrame {
    ControlFrame::Pass { number, last }
}

const fn taken(number: u16, last: bool) -> ControlFrame {
    ControlFrame::PassTaken { number, last }
}

fn stale(first: u64, count: u64) -> ControlFrame {
    let range = PageRange::new(PageNumber(first), count);
    ControlFrame::Stale { range, segment: Segment::Runs(vec![0, 1]) }
}

/// What a source asked for that concerns passes, in order.
fn steps(pair: &Pair) -> Vec<SourceAction> {
    let is_one = |action: &&SourceAction| {
        matches!(
            action,
            SourceAction::TellStale
                | SourceAction::OpenPass { .. }
                | SourceAction::Settled
                | SourceAction::SendState
                | SourceAction::Send(ControlFrame::Pass { .. } | ControlFrame::Begin)
        )
    };
    pair.source_actions.iter().filter(is_one).cloned().collect()
}

fn announced(pair: &Pair) -> Option<Phase> {
    pair.destination_actions.iter().rev().find_map(|action| match action {
        DestinationAction::Send(ControlFrame::Attach(Attach { phase, .. })) => Some(*phase),
        _ => None,
    })
}

/// A frame comes that a source would not say here; the destination hangs up.
fn assert_destination_refuses(mut pair: Pair, frame: ControlFrame) {
    pair.destination.frame(frame, pair.now);
    pair.drain();
    let refusal = pair.refusal_of_destination().expect("refused");
    assert_eq!(refusal.code, RefuseCode::Protocol, "{refusal:?}");
    assert_eq!(pair.destination.link_name(), "down");
}

fn assert_source_refuses(mut pair: Pair, frame: ControlFrame) {
    pair.source.frame(frame, pair.now);
    pair.drain();
    let refusal = pair.refusal_of_source().expect("refused");
    assert_eq!(refusal.code, RefuseCode::Protocol, "{refusal:?}");
    assert_eq!(pair.source.link_name(), "down");
}

#[test]
fn a_pass_is_said_after_begin_and_opened_once_it_is_taken_in() {
    let pair = open();
    assert_eq!(announced(&pair), Some(Phase::Early));
    let wanted = [
        SourceAction::Send(ControlFrame::Begin),
        SourceAction::TellStale,
        SourceAction::Send(pass(1, false)),
        SourceAction::OpenPass { number: 1 },
    ];
    assert_eq!(steps(&pair), wanted);
    assert!(pair.destination_actions.contains(&DestinationAction::Pass { number: 1, last: false }));
    assert!(pair.source.is_unsettled() && !pair.destination.is_settled());
}

#[test]
fn another_pass_begins_only_while_one_is_open() {
    let mut pair = passing();
    assert!(pair.source.next_pass().is_err(), "the destination has not attached");
    pair.pump_until(|pair| steps(pair).contains(&SourceAction::Send(pass(1, false))));
    assert!(pair.source.next_pass().is_err(), "it has not been taken in");
    pair.pump();
    pair.source.next_pass().expect("one is open");
    assert!(pair.source.next_pass().is_err(), "this one was said only");
    pair.pump();
    assert_eq!(steps(&pair).last(), Some(&SourceAction::OpenPass { number: 2 }));
    pair.source.freeze().expect("not yet frozen");
    assert!(pair.source.next_pass().is_err(), "memory is final");
}

#[test]
fn passes_are_counted_on_each_connection_up_to_the_last_number() {
    let mut pair = open();
    for _ in 0..MAX_PASS - 2 {
        pair.source.next_pass().expect("there are numbers left");
        pair.pump();
    }
    assert!(pair.source.next_pass().is_err(), "the last number is for the last pass");
    pair.source.freeze().expect("not yet frozen");
    pair.pump();
    assert!(steps(&pair).contains(&SourceAction::Send(pass(MAX_PASS, true))));
    assert!(pair.destination.is_settled());
}

#[test]
fn memory_becomes_final_while_a_pass_is_open() {
    let mut pair = open();
    pair.forget();
    pair.source.freeze().expect("not yet frozen");
    pair.drain();
    assert_eq!(steps(&pair), [SourceAction::TellStale, SourceAction::Send(pass(2, true))]);
    assert!(pair.source.is_unsettled(), "the destination may still take early copies");
    pair.deliver_to_destination();
    assert!(pair.destination.is_settled());
    assert_eq!(pair.destination_events, [DestinationEvent::Stopped]);
    pair.pump();
    assert_eq!(steps(&pair).last(), Some(&SourceAction::Settled));
    assert!(!pair.source.is_unsettled());
}

#[test]
fn memory_becomes_final_before_a_pass_was_taken_in() {
    let mut pair = passing();
    pair.pump_until(|pair| steps(pair).contains(&SourceAction::Send(pass(1, false))));
    pair.source.freeze().expect("not yet frozen");
    pair.pump();
    let wanted = [
        SourceAction::Send(ControlFrame::Begin),
        SourceAction::TellStale,
        SourceAction::Send(pass(1, false)),
        SourceAction::TellStale,
        SourceAction::Send(pass(2, true)),
        SourceAction::Settled,
    ];
    assert_eq!(steps(&pair), wanted, "no pass is opened any more");
}

#[test]
fn memory_becomes_final_without_a_connection() {
    let mut pair = open();
    pair.cut();
    pair.forget();
    pair.source.freeze().expect("not yet frozen");
    pair.drain();
    assert_eq!(steps(&pair), []);
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(announced(&pair), Some(Phase::Early));
    let wanted = [
        SourceAction::Send(ControlFrame::Begin),
        SourceAction::TellStale,
        SourceAction::Send(pass(1, true)),
        SourceAction::Settled,
    ];
    assert_eq!(steps(&pair), wanted);
}

#[test]
fn device_state_follows_the_last_pass() {
    let mut pair = open();
    pair.forget();
    pair.source.bring_state().expect("not yet frozen");
    pair.drain();
    let wanted =
        [SourceAction::TellStale, SourceAction::Send(pass(2, true)), SourceAction::SendState];
    assert_eq!(steps(&pair), wanted);
    pair.pump();
    assert!(pair.destination_events.contains(&DestinationEvent::StateComplete));
}

#[test]
fn a_connection_is_lost_in_each_stage() {
    type Reach = fn(&mut Pair);
    let stages: [(&str, Reach, Phase); 5] = [
        ("said", |pair| pair.pump_until(|pair| pair.source.is_unsettled()), Phase::Early),
        ("open", Pair::pump, Phase::Early),
        (
            "ending, not heard of",
            |pair| {
                pair.pump();
                pair.source.freeze().expect("not yet frozen");
                pair.drain();
            },
            Phase::Early,
        ),
        (
            "ending, taken in",
            |pair| {
                pair.pump();
                pair.source.freeze().expect("not yet frozen");
                pair.drain();
                pair.deliver_to_destination();
            },
            Phase::Fresh,
        ),
        (
            "settled",
            |pair| {
                pair.pump();
                pair.source.freeze().expect("not yet frozen");
                pair.pump();
            },
            Phase::Fresh,
        ),
    ];
    for (stage, reach, phase) in stages {
        let mut pair = passing();
        reach(&mut pair);
        pair.cut();
        assert!(!pair.source.is_unsettled(), "{stage}: no connection, no pass");
        pair.forget();
        pair.connect().expect("let in");
        pair.pump();
        assert_eq!(announced(&pair), Some(phase), "{stage}");
        let tells = steps(&pair).contains(&SourceAction::TellStale);
        assert_eq!(tells, phase == Phase::Early, "{stage}: early copies are compared");
        if !pair.source.is_frozen() {
            pair.source.freeze().expect("not yet frozen");
            pair.pump();
        }
        assert!(pair.destination.is_settled() && !pair.source.is_unsettled(), "{stage}");
    }
}

#[test]
fn a_restarted_source_begins_passes_anew() {
    let mut pair = open();
    pair.source.next_pass().expect("one is open");
    pair.pump();
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    let opened = SourceAction::OpenPass { number: 1 };
    assert_eq!(steps(&pair).last(), Some(&opened), "numbers begin again");
    assert!(steps(&pair).contains(&SourceAction::TellStale));
}

#[test]
fn a_source_restarted_after_the_switchover_meets_a_settled_destination() {
    let mut pair = open();
    pair.source.bring_state().expect("not yet frozen");
    pair.pump();
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(announced(&pair), Some(Phase::Fresh));
    assert!(!steps(&pair).contains(&SourceAction::TellStale), "nothing is early any more");
    pair.source.bring_state().expect("this process has not got it");
    pair.pump();
    assert!(!pair.source.is_unsettled());
}

#[test]
fn a_restarted_destination_has_early_copies_to_settle_until_it_runs() {
    let mut pair = open();
    pair.source.bring_state().expect("not yet frozen");
    pair.pump();
    pair.restart_destination();
    assert!(!pair.destination.is_settled(), "nobody has recorded it");
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(announced(&pair), Some(Phase::Early));
    assert!(pair.destination.is_settled());
    assert!(pair.destination_events.contains(&DestinationEvent::StateComplete), "it came again");
    pair.destination.ready().expect("all state is there");
    pair.pump();
    assert!(pair.destination_runs());
    pair.restart_destination();
    assert!(pair.destination.is_settled(), "it runs, on record");
}

#[test]
fn without_the_capability_there_are_no_passes() {
    for (ours, theirs) in [(true, false), (false, true), (false, false)] {
        let of = |has| if has { Capabilities::PRECOPY } else { Capabilities::default() };
        let mut pair = Pair::with_capabilities(SessionKind::Migration, of(ours), of(theirs));
        pair.connect().expect("let in");
        pair.pump();
        assert_eq!(announced(&pair), Some(Phase::Fresh));
        assert!(pair.destination_actions.contains(&DestinationAction::ForgetEarly));
        assert!(!pair.source.can_precopy() && pair.source.next_pass().is_err());
        pair.source.bring_state().expect("not yet frozen");
        pair.pump();
        assert!(!pair.destination_events.contains(&DestinationEvent::Stopped));
        assert!(!steps(&pair).contains(&SourceAction::TellStale));
        assert!(pair.destination_events.contains(&DestinationEvent::StateComplete));
    }
}

#[test]
fn a_source_without_the_capability_makes_early_copies_forgotten() {
    let mut pair = open();
    pair.cut();
    pair.forget();
    pair.source_capabilities = Capabilities::default();
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    let mut actions = pair.destination_actions.iter();
    let forgets = actions.position(|action| *action == DestinationAction::ForgetEarly);
    let mut actions = pair.destination_actions.iter();
    let says = actions.position(|action| *action == DestinationAction::SendReceived);
    assert!(forgets.is_some() && forgets < says, "before it says what it has");
    assert_eq!(announced(&pair), Some(Phase::Fresh));
}

#[test]
fn a_snapshot_has_no_passes() {
    let mut pair = Pair::precopy(SessionKind::Snapshot);
    pair.connect().expect("let in");
    pair.pump();
    assert!(pair.destination.is_settled() && !pair.source.is_unsettled());
    assert!(!steps(&pair).contains(&SourceAction::TellStale));
}

#[test]
fn a_destination_refuses_what_is_out_of_place() {
    let settled = || {
        let mut pair = open();
        pair.source.freeze().expect("not yet frozen");
        pair.pump();
        pair
    };
    assert_destination_refuses(settled(), pass(3, false));
    assert_destination_refuses(settled(), pass(3, true));
    assert_destination_refuses(settled(), stale(0, 64));
    assert_destination_refuses(open(), stale(PAGES, 64));
    assert_destination_refuses(open(), stale(0, PAGES + 1));
    assert_destination_refuses(open(), section("cpu", true));
    assert_destination_refuses(open(), state_end(0));
    assert_destination_refuses(open(), ControlFrame::Go);
}

#[test]
fn a_source_refuses_a_pass_that_it_has_not_said() {
    assert_source_refuses(open(), taken(1, false));
    assert_source_refuses(open(), taken(2, false));
    assert_source_refuses(open(), taken(1, true));
    let said = || {
        let mut pair = open();
        pair.source.next_pass().expect("one is open");
        pair.drain();
        pair
    };
    assert_source_refuses(said(), taken(1, false));
    assert_source_refuses(said(), taken(3, false));
    assert_source_refuses(said(), taken(2, true));
    let ending = || {
        let mut pair = open();
        pair.source.freeze().expect("not yet frozen");
        pair.drain();
        pair
    };
    assert_source_refuses(ending(), taken(2, false));
    assert_source_refuses(ending(), taken(1, true));
    let mut settled = ending();
    settled.pump();
    assert_source_refuses(settled, taken(2, true));
}

#[test]
fn a_source_without_the_capability_refuses_early_copies() {
    let mut pair = Pair::migration();
    pair.connect().expect("let in");
    let layout = destination_config(PAGES).layout;
    pair.source.frame(ControlFrame::Attach(Attach { phase: Phase::Early, layout }), pair.now);
    pair.source.frame(received_frame(), pair.now);
    pair.drain();
    assert_eq!(pair.refusal_of_source().expect("refused").code, RefuseCode::Protocol);
}

#[test]
fn early_copies_are_not_believed_of_a_destination_that_ran() {
    let mut pair = open();
    pair.source.bring_state().expect("not yet frozen");
    pair.pump();
    pair.destination.ready().expect("all state is there");
    pair.pump();
    assert!(pair.source_events.contains(&SourceEvent::Running));
    // Its record is lost, and its memory is not.
    let mut record = pair.destination_record;
    record.ownership = DestinationOwnership::Waiting;
    pair.cut();
    pair.destination = DestinationSession::new(pair.destination_config(), record);
    pair.connect().expect("let in");
    pair.pump();
    assert_eq!(pair.refusal_of_source().expect("refused").code, RefuseCode::Protocol);
}

#[test]
fn a_guest_is_taken_back_in_the_middle_of_a_pass() {
    for taken_in in [false, true] {
        let mut pair = passing();
        pair.pump_until(|pair| pair.source.is_unsettled());
        if taken_in {
            pair.pump();
        }
        pair.source.reclaim().expect("it was not given");
        pair.pump();
        assert!(pair.source.may_run(), "taken in: {taken_in}");
        assert!(matches!(pair.destination_events.last(), Some(DestinationEvent::Ended(_))));
        assert_eq!(pair.connect().expect_err("cancelled").code, RefuseCode::Ended);
    }
}
