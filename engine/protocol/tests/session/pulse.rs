//! Heartbeats and silence.

use crate::harness::Pair;
use afterimage_protocol::session::{DestinationEvent, SourceEvent};
use afterimage_protocol::wire::ControlFrame;
use std::time::Duration;

#[test]
fn a_side_with_nothing_to_say_says_so_and_is_answered() {
    let mut pair = Pair::running();
    pair.now = pair.source.next_tick().expect("connected");
    assert_eq!(pair.now, Duration::from_secs(1));
    pair.source.tick(pair.now);
    pair.drain();
    assert_eq!(pair.to_destination, [ControlFrame::Heartbeat { token: 1 }]);
    pair.deliver_to_destination();
    assert_eq!(pair.to_source, [ControlFrame::HeartbeatReply { token: 1 }]);
    pair.deliver_to_source();
    assert_eq!(pair.source.next_tick(), Some(Duration::from_secs(2)));
}

#[test]
fn a_destination_beats_as_the_offer_says() {
    let mut pair = Pair::running();
    pair.now = pair.destination.next_tick().expect("connected");
    assert_eq!(pair.now, Duration::from_secs(1));
    pair.destination.tick(pair.now);
    pair.drain();
    assert_eq!(pair.to_source, [ControlFrame::Heartbeat { token: 1 }]);
}

#[test]
fn silence_ends_the_connection_and_nothing_else() {
    let mut pair = Pair::running();
    pair.source.tick(Duration::from_millis(4999));
    pair.drain();
    assert!(!pair.source_events.contains(&SourceEvent::Disconnected));
    pair.source.tick(Duration::from_secs(5));
    pair.destination.tick(Duration::from_secs(5));
    pair.drain();
    assert_eq!(pair.source_events.last(), Some(&SourceEvent::Disconnected));
    assert_eq!(pair.destination_events.last(), Some(&DestinationEvent::Disconnected));
    assert!(pair.refusal_of_source().expect("said why").reason.contains("5s"));
    assert_eq!((pair.source.next_tick(), pair.destination.next_tick()), (None, None));
    pair.now = Duration::from_secs(6);
    pair.connect().expect("let in");
    pair.destination.all_complete();
    pair.pump();
    assert!(pair.destination.is_over());
}

#[test]
fn any_frame_breaks_the_silence() {
    let mut pair = Pair::running();
    let late = Duration::from_secs(4);
    pair.source.frame(ControlFrame::Ack(Vec::new()), late);
    pair.source.tick(Duration::from_secs(8));
    pair.drain();
    assert!(!pair.source_events.contains(&SourceEvent::Disconnected));
}
