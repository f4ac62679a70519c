//! Frames and greetings that are out of place, refusals that end a session, and those that
//! must not.

use crate::harness::{
    MEMORY, OTHER_MEMORY, PAGES, Pair, SESSION, destination_config, layout_of, received_frame,
    section, state_end,
};
use afterimage_protocol::bitmap::Segment;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{DestinationEvent, DestinationSession, SourceEvent};
use afterimage_protocol::wire::{
    Attach, Capabilities, Channel, ControlFrame, Epoch, Generation, Hello, Kind, Offer, Phase,
    Refusal, RefuseCode, Role, SessionId, SessionKind,
};

fn offer(kind: SessionKind, pages: u64) -> ControlFrame {
    let layout = layout_of(pages);
    ControlFrame::Offer(Offer {
        kind,
        streams: 2,
        shards: 1,
        heartbeat_ms: 1000,
        silence_ms: 5000,
        layout,
    })
}

fn attach(phase: Phase) -> ControlFrame {
    ControlFrame::Attach(Attach { phase, layout: layout_of(PAGES) })
}

/// One of each.
fn all_frames() -> Vec<ControlFrame> {
    vec![
        offer(SessionKind::Migration, PAGES),
        attach(Phase::Fresh),
        received_frame(),
        ControlFrame::Begin,
        section("cpu", true),
        state_end(1),
        ControlFrame::Ready,
        ControlFrame::Go,
        ControlFrame::Running,
        ControlFrame::Ack(vec![PageRange::one(PageNumber(9))]),
        ControlFrame::Heartbeat { token: 1 },
        ControlFrame::HeartbeatReply { token: 1 },
        ControlFrame::Complete,
        ControlFrame::Bye,
        ControlFrame::TakeBack,
        ControlFrame::TakeBackAgreed,
        ControlFrame::TakeBackDenied,
        ControlFrame::Refuse(Refusal::new(RefuseCode::Failed, "a reason")),
        ControlFrame::Stale {
            range: PageRange::new(PageNumber(0), PAGES),
            segment: Segment::Runs(vec![0, 1]),
        },
        ControlFrame::Pass { number: 1, last: false },
        ControlFrame::PassTaken { number: 1, last: false },
        ControlFrame::Renew { channel: Channel::Background(0), generation: Generation(1) },
    ]
}

/// Heartbeats and refusals are never out of place.
const ALWAYS: [Kind; 3] = [Kind::Heartbeat, Kind::HeartbeatReply, Kind::Refuse];

/// Once data channels may be there, one of them may be given up.
fn renews(phase: &str, kind: Kind) -> bool {
    kind == Kind::Renew && !["offered", "receiving", "greeted", "attached"].contains(&phase)
}

fn greeted() -> Pair {
    let mut pair = Pair::migration();
    pair.connect().expect("let in");
    pair
}

fn attached() -> Pair {
    let mut pair = greeted();
    pair.deliver_to_destination();
    pair
}

fn receiving() -> Pair {
    let mut pair = attached();
    pair.deliver_to_source();
    pair
}

fn up() -> Pair {
    let mut pair = greeted();
    pair.pump();
    pair
}

fn ready() -> Pair {
    let mut pair = Pair::restored();
    pair.cut();
    pair.destination.ready().expect("state is there");
    pair.restart_source();
    pair.connect().expect("let in");
    pair.pump();
    pair
}

/// A phase of a pair, and what may arrive in it.
type Row = (&'static str, fn() -> Pair, &'static [Kind]);

#[test]
fn a_source_refuses_each_frame_out_of_place_and_loses_nothing() {
    let rows: [Row; 6] = [
        ("offered", greeted, &[Kind::Attach]),
        ("receiving", receiving, &[Kind::Received]),
        ("up", up, &[Kind::Ready, Kind::Ack, Kind::TakeBackAgreed]),
        ("restored", Pair::restored, &[Kind::Ready, Kind::Ack, Kind::TakeBackAgreed]),
        (
            "given",
            Pair::go_on_its_way,
            &[Kind::Ready, Kind::Running, Kind::Ack, Kind::TakeBackAgreed, Kind::TakeBackDenied],
        ),
        (
            "running",
            Pair::running,
            &[Kind::Running, Kind::Ack, Kind::Complete, Kind::TakeBackDenied],
        ),
    ];
    for (name, phase, fitting) in rows {
        for frame in all_frames() {
            let kind = frame.kind();
            let mut pair = phase();
            pair.forget();
            let before = pair.source_record;
            pair.source.frame(frame, pair.now);
            pair.drain();
            // An agreement is answered by the end of the session.
            let refused =
                pair.refusal_of_source().filter(|refusal| refusal.code != RefuseCode::Ended);
            if fitting.contains(&kind) || renews(name, kind) || ALWAYS.contains(&kind) {
                assert_eq!(refused, None, "{kind:?} while {name}");
                continue;
            }
            let refusal = refused.unwrap_or_else(|| panic!("{kind:?} while {name} is taken"));
            assert_eq!(refusal.code, RefuseCode::Protocol);
            assert!(refusal.reason.contains(&format!("{kind:?}")), "{}", refusal.reason);
            assert_eq!(pair.source_record, before);
            pair.cut();
            pair.connect().expect("another attempt fares better");
            pair.pump();
        }
    }
}

#[test]
fn a_destination_refuses_each_frame_out_of_place_and_loses_nothing() {
    let state = [Kind::Section, Kind::StateEnd];
    let rows: [Row; 6] = [
        ("greeted", greeted, &[Kind::Offer]),
        ("attached", attached, &[Kind::Begin]),
        ("up", up, &[Kind::Section, Kind::TakeBack]),
        ("restored", Pair::restored, &[Kind::TakeBack]),
        ("ready", ready, &[Kind::Go, Kind::TakeBack]),
        ("running", Pair::running, &[Kind::Go, Kind::TakeBack]),
    ];
    for (name, phase, fitting) in rows {
        for frame in all_frames() {
            let kind = frame.kind();
            let mut pair = phase();
            pair.forget();
            let before = pair.destination_record;
            pair.destination.frame(frame, pair.now);
            pair.drain();
            let refused = pair.refusal_of_destination();
            let has_state = matches!(name, "restored" | "ready" | "running");
            let repeats = has_state && state.contains(&kind);
            if fitting.contains(&kind) || repeats || renews(name, kind) || ALWAYS.contains(&kind) {
                assert_eq!(refused, None, "{kind:?} while {name}");
                continue;
            }
            let refusal = refused.unwrap_or_else(|| panic!("{kind:?} while {name} is taken"));
            assert_eq!(refusal.code, RefuseCode::Protocol);
            assert_eq!(pair.destination_record, before);
            pair.cut();
            pair.connect().expect("another attempt fares better");
            pair.pump();
        }
    }
}

#[test]
fn frames_on_no_connection_change_nothing() {
    for frame in all_frames() {
        let mut pair = Pair::go_on_its_way();
        pair.cut();
        pair.forget();
        pair.source.frame(frame.clone(), pair.now);
        pair.destination.frame(frame, pair.now);
        pair.drain();
        assert!(pair.source_actions.is_empty() && pair.destination_actions.is_empty());
    }
}

#[test]
fn pages_that_do_not_exist_are_refused() {
    let beyond = PageRange::new(PageNumber(PAGES - 1), 2);
    let mut pair = up();
    pair.source.frame(ControlFrame::Ack(vec![beyond]), pair.now);
    pair.drain();
    assert_eq!(pair.refusal_of_source().expect("refused").code, RefuseCode::Protocol);
}

#[test]
fn another_layout_is_refused_and_binds_the_destination_to_nothing() {
    let mut pair = greeted();
    pair.destination.frame(offer(SessionKind::Migration, PAGES + 1), pair.now);
    pair.drain();
    assert_eq!(pair.refusal_of_destination().expect("refused").code, RefuseCode::Layout);
    assert_eq!(pair.destination.record().session, SessionId::UNKNOWN);
    assert_eq!(pair.destination.record().epoch, Epoch(0));
}

#[test]
fn a_session_does_not_change_its_kind() {
    let mut pair = up();
    pair.cut();
    pair.connect().expect("let in");
    pair.destination.frame(offer(SessionKind::Snapshot, PAGES), pair.now);
    pair.drain();
    assert_eq!(pair.refusal_of_destination().expect("refused").code, RefuseCode::Protocol);
}

#[test]
fn a_destination_is_bound_to_its_session_before_it_has_any_page() {
    let mut pair = up();
    assert_eq!(pair.destination_record.session, SESSION);
    assert_eq!(pair.destination_record.epoch, Epoch(1));
    pair.restart_destination();
    let mut hello = source_hello(&pair);
    hello.session = SessionId([9; 16]);
    let refusal = pair.destination.admits(&hello).expect_err("another session's");
    assert_eq!(refusal.code, RefuseCode::UnknownSession);
    hello.session = SESSION;
    hello.stamp.epoch = Epoch(1);
    assert_eq!(pair.destination.admits(&hello).expect_err("passed").code, RefuseCode::Stale);
}

fn source_hello(pair: &Pair) -> Hello {
    Hello {
        role: Role::Source,
        channel: Channel::Control,
        stamp: afterimage_protocol::wire::Stamp {
            epoch: pair.source_record.epoch.next(),
            ..Default::default()
        },
        capabilities: Capabilities::default(),
        session: SESSION,
        incarnation: MEMORY,
    }
}

#[test]
fn greetings_that_do_not_fit_are_refused_by_name() {
    let mut pair = up();
    let theirs = source_hello(&pair);
    let ours = pair.destination.open();
    let code_of = |result: Result<(), Refusal>| result.expect_err("refused").code;
    assert_eq!(code_of(pair.source.admits(&theirs)), RefuseCode::Role);
    assert_eq!(code_of(pair.destination.admits(&ours)), RefuseCode::Role);
    let data = Channel::Background(0);
    let wrong = Hello { channel: data, ..theirs };
    assert_eq!(code_of(pair.destination.admits(&wrong)), RefuseCode::Protocol);
    let wrong = Hello { channel: data, ..ours };
    assert_eq!(code_of(pair.source.admits(&wrong)), RefuseCode::Protocol);
    let wrong = Hello { session: SessionId([9; 16]), ..ours };
    assert_eq!(code_of(pair.source.admits(&wrong)), RefuseCode::UnknownSession);
    assert!(pair.source.admits(&ours).is_ok() && pair.destination.admits(&theirs).is_ok());
}

#[test]
fn a_hello_that_no_greeting_awaits_is_refused() {
    let mut pair = up();
    let theirs = source_hello(&pair);
    let ours = pair.destination.open();
    pair.cut();
    assert!(pair.source.greeted(&ours, pair.now).is_err());
    assert!(pair.destination.greeted(&theirs, pair.now).is_err());
}

#[test]
fn an_older_hello_does_not_replace_the_greeting_of_a_newer_one() {
    let mut pair = up();
    let mut hello = source_hello(&pair);
    hello.stamp.epoch = Epoch(9);
    pair.destination.open();
    pair.destination.greeted(&hello, pair.now).expect("new");
    hello.stamp.epoch = Epoch(8);
    assert_eq!(pair.destination.admits(&hello).expect_err("older").code, RefuseCode::Stale);
}

const ENDING: [RefuseCode; 6] = [
    RefuseCode::Ended,
    RefuseCode::Incarnation,
    RefuseCode::Layout,
    RefuseCode::Version,
    RefuseCode::Role,
    RefuseCode::UnknownSession,
];

#[test]
fn a_destination_that_owns_the_guest_gives_up_for_no_refusal_but_a_fence() {
    for code in ENDING {
        let mut pair = Pair::running();
        pair.cut();
        pair.destination.open();
        let refusal = Refusal::new(code, "said by whoever listens there now");
        pair.destination.refused(refusal.clone());
        pair.drain();
        assert!(!pair.destination.is_over(), "{code:?}");
        assert_eq!(
            pair.destination_events.last(),
            Some(&DestinationEvent::TurnedAway(refusal)),
            "its VMM hears of it"
        );
        pair.connect().expect("the source is back");
        pair.destination.all_complete();
        pair.pump();
        assert!(pair.destination_events.contains(&DestinationEvent::Finished));
    }
}

#[test]
fn a_destination_that_knows_its_session_does_not_listen_to_strangers() {
    for (code, ends) in ENDING.into_iter().zip([true, true, true, false, false, false]) {
        let mut pair = up();
        pair.cut();
        pair.destination.open();
        pair.destination.refused(Refusal::new(code, "a reason"));
        pair.drain();
        assert_eq!(pair.destination.is_over(), ends, "{code:?}");
    }
}

#[test]
fn a_destination_of_no_session_ends_with_the_first_refusal_that_is_for_good() {
    for code in ENDING {
        let record = Pair::migration().destination_record;
        let mut destination = DestinationSession::new(destination_config(PAGES), record);
        destination.open();
        destination.refused(Refusal::new(code, "a reason"));
        assert!(destination.is_over());
    }
}

#[test]
fn a_refusal_of_the_moment_ends_nothing() {
    for code in [RefuseCode::Stale, RefuseCode::TooMany, RefuseCode::Protocol, RefuseCode::Failed] {
        let mut pair = up();
        pair.destination.frame(ControlFrame::Refuse(Refusal::new(code, "a reason")), pair.now);
        pair.drain();
        assert!(!pair.destination.is_over());
        pair.source.frame(ControlFrame::Refuse(Refusal::new(code, "a reason")), pair.now);
        pair.drain();
        assert!(!pair.source.is_over());
        assert_eq!(pair.source_events.last(), Some(&SourceEvent::Disconnected));
        pair.connect().expect("another attempt fares better");
    }
}

#[test]
fn a_destination_that_is_over_says_so() {
    let mut pair = Pair::running();
    pair.destination.all_complete();
    pair.pump();
    let mut hello = source_hello(&pair);
    hello.stamp.epoch = Epoch(99);
    assert_eq!(pair.destination.admits(&hello).expect_err("over").code, RefuseCode::Ended);
    assert!(pair.destination.ready().is_err());
    let before = pair.destination_events.len();
    pair.destination.refused(Refusal::new(RefuseCode::Fenced, "late"));
    pair.drain();
    assert_eq!(pair.destination_events.len(), before);
    let _ = OTHER_MEMORY;
}

#[test]
fn go_before_ready_is_refused() {
    let mut pair = Pair::restored();
    pair.destination.frame(ControlFrame::Go, pair.now);
    pair.drain();
    assert!(pair.refusal_of_destination().expect("refused").reason.contains("ready"));
    assert!(!pair.destination_runs());
}

#[test]
fn state_with_a_section_missing_is_refused() {
    let mut pair = up();
    pair.destination.frame(section("cpu", true), pair.now);
    pair.destination.frame(state_end(2), pair.now);
    pair.drain();
    assert!(pair.refusal_of_destination().expect("refused").reason.contains("2 were sent"));
}

#[test]
fn ready_needs_all_state() {
    let mut pair = up();
    assert!(pair.destination.ready().is_err());
    pair.destination.frame(section("cpu", true), pair.now);
    assert!(pair.destination.ready().is_err());
    pair.destination.frame(state_end(1), pair.now);
    assert!(pair.destination.ready().is_ok());
    assert!(pair.destination.ready().is_ok(), "said twice, sent once");
    pair.drain();
    assert_eq!(pair.to_source.iter().filter(|f| **f == ControlFrame::Ready).count(), 1);
}

#[test]
fn a_destination_that_runs_takes_no_device_state() {
    let mut pair = Pair::running();
    pair.restart_destination();
    pair.connect().expect("let in");
    pair.pump();
    pair.forget();
    pair.destination.frame(section("cpu", true), pair.now);
    pair.destination.frame(state_end(1), pair.now);
    pair.drain();
    assert!(pair.destination_actions.is_empty());
}
