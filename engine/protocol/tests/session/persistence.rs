//! Disks that fail, with and without having written.

use crate::harness::{Disk, Pair};
use afterimage_protocol::session::{
    DestinationEvent, DestinationOwnership, SourceEvent, SourceOwnership,
};
use afterimage_protocol::wire::ControlFrame;

const FAILURES: [Disk; 2] = [Disk::Fails, Disk::FailsAfterWriting];

#[test]
fn an_epoch_that_cannot_be_recorded_opens_no_connection() {
    for failure in FAILURES {
        let mut pair = Pair::migration();
        pair.source_disk = failure;
        pair.connect().expect_err("no hello without a record");
        assert_eq!(pair.source_events, [SourceEvent::PersistFailed]);
        pair.source_disk = Disk::Works;
        pair.connect().expect("the disk works again");
        pair.pump();
    }
}

#[test]
fn a_binding_that_cannot_be_recorded_attaches_nothing() {
    for failure in FAILURES {
        let mut pair = Pair::migration();
        pair.destination_disk = failure;
        pair.connect().expect("let in");
        pair.pump();
        assert_eq!(pair.destination_events, [DestinationEvent::PersistFailed]);
        assert!(pair.source_events.is_empty());
        pair.destination_disk = Disk::Works;
        pair.connect().expect("the disk works again");
        pair.pump();
        assert!(pair.source_events.len() == 1);
    }
}

#[test]
fn given_that_cannot_be_recorded_sends_no_go() {
    for failure in FAILURES {
        for restarts in [false, true] {
            let mut pair = Pair::restored();
            pair.source_disk = failure;
            pair.destination.ready().expect("state is there");
            pair.pump();
            assert!(!pair.destination_runs() && !pair.source.may_run());
            assert!(pair.source_events.contains(&SourceEvent::PersistFailed));
            pair.source_disk = Disk::Works;
            if restarts {
                pair.restart_source();
                let _ = pair.source.bring_state();
            }
            pair.connect().expect("let in");
            pair.pump();
            assert!(pair.destination_runs(), "{failure:?}, restarts: {restarts}");
            assert!(!pair.source.may_run());
        }
    }
}

#[test]
fn a_guest_whose_giving_failed_is_taken_back_durably_or_not_at_all() {
    let mut pair = Pair::restored();
    pair.source_disk = Disk::FailsAfterWriting;
    pair.destination.ready().expect("state is there");
    pair.pump();
    pair.source.reclaim().expect("nothing was given");
    pair.drain();
    assert!(!pair.source.may_run(), "the disk may still say given");
    pair.source_disk = Disk::Works;
    pair.source.reclaim().expect("once more");
    pair.drain();
    assert!(pair.source.may_run());
    pair.restart_source();
    assert!(pair.source.may_run());
    pair.connect().expect_err("it is over");
}

#[test]
fn running_that_cannot_be_recorded_runs_nothing() {
    for failure in FAILURES {
        for restarts in [false, true] {
            let mut pair = Pair::go_on_its_way();
            pair.destination_disk = failure;
            pair.pump();
            assert!(!pair.destination_events.contains(&DestinationEvent::Run));
            assert!(pair.destination_events.contains(&DestinationEvent::PersistFailed));
            pair.destination_disk = Disk::Works;
            if restarts {
                pair.restart_destination();
            }
            pair.connect().expect("let in");
            pair.pump();
            let _ = pair.destination.ready();
            pair.pump();
            assert!(pair.destination_runs(), "{failure:?}, restarts: {restarts}");
            assert!(pair.destination_events.contains(&DestinationEvent::Run));
        }
    }
}

#[test]
fn a_refusal_that_cannot_be_recorded_gives_nothing_back() {
    for failure in FAILURES {
        let mut pair = Pair::go_on_its_way();
        pair.cut();
        pair.source.reclaim().expect("not known to run");
        pair.connect().expect("let in");
        pair.destination_disk = Disk::Works;
        pair.pump_until(|pair| pair.to_destination.back() == Some(&ControlFrame::TakeBack));
        pair.destination_disk = failure;
        pair.pump();
        assert!(!pair.source.may_run(), "{failure:?}");
        pair.destination_disk = Disk::Works;
        pair.connect().expect("let in");
        pair.pump();
        assert!(pair.source.may_run() && !pair.destination_runs());
    }
}

#[test]
fn taking_back_that_cannot_be_recorded_runs_nothing() {
    for failure in FAILURES {
        let mut pair = Pair::go_on_its_way();
        pair.cut();
        pair.source.reclaim().expect("not known to run");
        pair.connect().expect("let in");
        pair.pump_until(|pair| pair.destination_record.ownership == DestinationOwnership::Refused);
        pair.source_disk = failure;
        pair.pump();
        assert!(!pair.source.may_run());
        pair.source_disk = Disk::Works;
        pair.connect().expect("let in");
        pair.pump();
        assert_eq!(pair.source_ownership(), SourceOwnership::Reclaimed);
    }
}

#[test]
fn a_fence_that_cannot_be_recorded_is_none() {
    for failure in FAILURES {
        let mut pair = Pair::go_on_its_way();
        pair.cut();
        pair.source_disk = failure;
        pair.source.fence().expect("an operator says so");
        pair.drain();
        assert!(!pair.source.may_run());
        pair.source_disk = Disk::Works;
        pair.connect().expect("it is not fenced");
        pair.pump();
        assert!(pair.destination_runs());
        pair.restart_source();
        assert!(!pair.source.may_run(), "the record of the connection has replaced it");
    }
}

#[test]
fn completion_that_cannot_be_recorded_is_asked_for_again() {
    for failure in FAILURES {
        let mut pair = Pair::running();
        pair.source_disk = failure;
        pair.destination.all_complete();
        pair.pump();
        assert!(!pair.destination.is_over());
        pair.source_disk = Disk::Works;
        pair.connect().expect("let in");
        pair.pump();
        assert!(pair.destination.is_over());
        assert_eq!(pair.source_ownership(), SourceOwnership::Finished);
    }
}
