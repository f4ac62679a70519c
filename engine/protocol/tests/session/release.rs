//! Pages freed at the source: when that may be, what is on record by then, and who is let in
//! afterwards.

use crate::harness::{Disk, MEMORY, OTHER_MEMORY, PAGES, Pair, layout_of};
use afterimage_protocol::layout::PageNumber;
use afterimage_protocol::session::{
    LostPages, Releasing, SourceAction, SourceEvent, SourceOwnership, SourcePages,
};
use afterimage_protocol::wire::{Attach, ControlFrame, Phase, RefuseCode, SessionKind};
use std::time::Duration;

fn may_release(pair: &Pair) -> bool {
    pair.source_actions.contains(&SourceAction::Release)
}

/// A pair whose source frees pages, the destination running.
fn released() -> Pair {
    let mut pair = Pair::releasing_at_go();
    pair.pump();
    assert!(may_release(&pair));
    assert_eq!(pair.source_record.pages, SourcePages::Released);
    pair
}

#[test]
fn nothing_is_released_before_the_destination_is_known_to_run() {
    let mut pair = Pair::releasing_at_go();
    pair.deliver_to_destination();
    assert!(pair.destination_runs(), "it runs, and has not been heard");
    assert!(!may_release(&pair));
    assert_eq!(pair.source_record.pages, SourcePages::Whole);
    pair.cut();
    pair.connect().expect("let in");
    assert!(!may_release(&pair));
    pair.pump();
    assert!(may_release(&pair), "it has attached as running");
}

#[test]
fn the_record_comes_before_the_release() {
    let pair = released();
    let position = |wanted: &dyn Fn(&SourceAction) -> bool| {
        pair.source_actions.iter().position(wanted).expect("it was asked for")
    };
    let recorded = position(
        &|action| matches!(action, SourceAction::Persist(record) if record.pages == SourcePages::Released),
    );
    let told = position(&|action| *action == SourceAction::Event(SourceEvent::Running));
    let let_go = position(&|action| *action == SourceAction::Release);
    assert!(told < recorded && recorded < let_go, "{:?}", pair.source_actions);
}

#[test]
fn a_release_that_cannot_be_recorded_frees_nothing_cuts_nothing_and_is_tried_again() {
    for failure in [Disk::Fails, Disk::FailsAfterWriting] {
        let mut pair = Pair::releasing_at_go();
        pair.source_disk = failure;
        pair.pump();
        assert!(!may_release(&pair));
        assert_eq!(pair.source_events.last(), Some(&SourceEvent::PersistFailed));
        assert_eq!(pair.source.link_name(), "up", "the guest goes on being served");
        // Not with each frame.
        pair.forget();
        pair.source.frame(ControlFrame::Ack(Vec::new()), pair.now);
        pair.drain();
        assert!(pair.source_events.is_empty());
        pair.source_disk = Disk::Works;
        pair.now += Duration::from_secs(6);
        pair.source.frame(ControlFrame::Ack(Vec::new()), pair.now);
        pair.drain();
        assert!(may_release(&pair), "{failure:?}");
        assert_eq!(pair.source_record.pages, SourcePages::Released);
    }
}

#[test]
fn a_source_that_is_to_keep_all_pages_and_one_of_a_snapshot_release_nothing() {
    let mut pair = Pair::running();
    pair.pump();
    assert!(!may_release(&pair));
    assert_eq!(pair.source_record.pages, SourcePages::Whole);

    let mut pair = Pair::new(SessionKind::Snapshot);
    pair.releasing = Releasing::AfterRunning;
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    let _ = pair.destination.ready();
    pair.pump();
    assert!(!may_release(&pair));
}

#[test]
fn a_fence_and_a_taking_back_are_refused_once_pages_may_be_freed() {
    for restarts in [false, true] {
        let mut pair = released();
        pair.cut();
        if restarts {
            pair.restart_source();
        }
        let error = pair.source.fence().expect_err("the guest is nowhere else");
        assert!(error.to_string().contains("at the destination alone"), "{error}");
        let error = pair.source.reclaim().expect_err("the guest is nowhere else");
        assert!(error.to_string().contains("at the destination alone"), "{error}");
        pair.drain();
        assert!(!pair.source.may_run());
        assert_eq!(pair.source_ownership(), SourceOwnership::Given);
    }
}

#[test]
fn a_fence_is_possible_as_long_as_nothing_was_freed() {
    let mut pair = Pair::releasing_at_go();
    pair.cut();
    pair.source.fence().expect("nothing was freed");
    pair.drain();
    assert!(pair.source.may_run());
    assert_eq!(pair.source_record.pages, SourcePages::Whole);
    let code = pair.connect().expect_err("fenced").code;
    assert_eq!(code, RefuseCode::Fenced);
}

#[test]
fn a_source_started_again_goes_on_releasing_once_the_destination_is_back() {
    let mut pair = released();
    pair.restart_source();
    assert!(!may_release(&pair));
    pair.connect().expect("let in");
    pair.pump();
    let position = |wanted: SourceAction| {
        pair.source_actions.iter().position(|action| *action == wanted).expect("it was asked for")
    };
    let compared = position(SourceAction::CompareReleased);
    assert!(compared < position(SourceAction::Send(ControlFrame::Begin)));
    assert!(compared < position(SourceAction::Release));
    assert!(pair.source_events.contains(&SourceEvent::Running));
    pair.destination.all_complete();
    pair.pump();
    assert_eq!(pair.source_ownership(), SourceOwnership::Finished);
    assert_eq!(pair.source_record.pages, SourcePages::Released);
}

#[test]
fn a_destination_that_lacks_a_freed_page_is_refused_each_time_and_told_of_once() {
    for restarts in [false, true] {
        let mut pair = released();
        pair.forget();
        pair.cut();
        if restarts {
            pair.restart_source();
        }
        pair.source_events.clear();
        let lost = LostPages { first: PageNumber(7), count: 3 };
        pair.lost = Some(lost);
        for round in 0..3 {
            pair.source_actions.clear();
            pair.connect().expect("a hello says nothing of pages");
            pair.pump();
            let refusal = pair.refusal_of_source().expect("refused");
            assert_eq!(refusal.code, RefuseCode::Released);
            assert!(refusal.reason.contains("3 pages from page 7"), "{refusal}");
            assert!(!pair.source_actions.contains(&SourceAction::Send(ControlFrame::Begin)));
            let opened = |it: &SourceAction| matches!(it, SourceAction::OpenData { .. });
            assert!(!pair.source_actions.iter().any(opened), "nothing is served to it");
            assert!(!may_release(&pair));
            let told = pair.source_events.iter().filter(|it| **it == SourceEvent::Lost(lost));
            assert_eq!(told.count(), 1, "round {round}");
            assert!(!pair.destination.is_over(), "it keeps its faults and tries again");
        }
        pair.lost = None;
        pair.connect().expect("let in");
        pair.pump();
        assert!(may_release(&pair), "the memory was brought back");
    }
}

#[test]
fn other_memory_before_it_ran_finds_nothing_freed_and_after_is_refused() {
    let mut pair = Pair::migration();
    pair.releasing = Releasing::AfterRunning;
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    pair.source.bring_state().expect("not yet frozen");
    pair.pump();
    pair.lose_destination(OTHER_MEMORY);
    pair.connect().expect("it has not been given away");
    pair.pump();
    assert!(!may_release(&pair));
    assert_eq!(pair.source_record.pages, SourcePages::Whole);
    pair.destination.ready().expect("all state is there");
    pair.pump();
    assert!(may_release(&pair));
    pair.lose_destination(MEMORY);
    let refusal = pair.connect().expect_err("the guest ran elsewhere");
    assert_eq!(refusal.code, RefuseCode::Incarnation);
}

/// A record of freed pages says that the destination ran: whoever says otherwise has lost its
/// own.
#[test]
fn a_destination_that_says_it_never_ran_is_not_believed_by_a_source_that_has_freed_pages() {
    for phase in [Phase::Fresh, Phase::Ready, Phase::Refused] {
        let mut pair = released();
        pair.restart_source();
        pair.connect().expect("let in");
        let layout = layout_of(PAGES);
        pair.source.frame(ControlFrame::Attach(Attach { phase, layout }), pair.now);
        pair.drain();
        let refusal = pair.refusal_of_source().expect("refused");
        assert_eq!(refusal.code, RefuseCode::Protocol, "{phase:?}");
        assert!(!pair.source.may_run());
    }
}
