//! Hostile and broken peers against a real source: each is sent away in bounded time and
//! memory, and afterwards a proper destination gets everything.

mod common;

use afterimage::{GuestAddress, Incarnation, SessionId, SourceEvent};
use afterimage_protocol::layout::{Backing, GuestLayout, PageSize, Region};
use afterimage_protocol::wire::{
    Attach, Channel, ControlFrame, Greeting, HEADER_BYTES, Header, Kind as FrameKind, Phase,
    RefuseCode, Role,
};
use common::peer::{self, HandDestination, Heard, Wire, hello_of, pages, request, stamp};
use common::victim::Victim;
use common::{Kind, Pair, Random, Setup};
use std::net::Shutdown;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const STRANGER: Incarnation = Incarnation([9; 16]);

/// A greeting of these fields.
fn prefix(magic: [u8; 8], version: u16, oldest: u16, kind: u16, length: u16) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    for field in [version, oldest, kind, length] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

#[test]
fn a_wrong_greeting_is_answered_with_what_is_wrong() {
    prologue!("a_wrong_greeting");
    let victim = Victim::start(|_| ());
    let magic = *b"AFTRIMG\n";
    let cases = [
        ("magic", prefix(*b"HTTP/1.1", 1, 1, 1, 56), RefuseCode::Protocol, vec!["48, 54, 54"]),
        ("too new", prefix(magic, 9, 7, 1, 56), RefuseCode::Version, vec!["7 to 9", "1 to 1"]),
        ("too old", prefix(magic, 0, 0, 1, 56), RefuseCode::Version, vec!["0 to 0", "1 to 1"]),
        ("kind", prefix(magic, 1, 1, 77, 56), RefuseCode::Protocol, vec!["77"]),
        ("length", prefix(magic, 1, 1, 1, 60_000), RefuseCode::Protocol, vec!["60000", "4096"]),
        ("short", prefix(magic, 1, 1, 1, 3), RefuseCode::Protocol, vec!["3", "56"]),
    ];
    for (name, mut bytes, code, said) in cases {
        bytes.resize(bytes.len() + 60, 0);
        let mut wire = Wire::connect(&victim.address);
        wire.send(&bytes);
        let refusal = wire.hear_refusal(name);
        assert_eq!(refusal.code, code, "{name}: {refusal:?}");
        for words in said {
            assert!(refusal.reason.contains(words), "{name}: {refusal:?} does not say {words:?}");
        }
        wire.drain();
    }
    // What no slot or role is.
    for at in [16, 17, 18] {
        let hello = hello_of(Role::Destination, Channel::Background(0));
        let mut bytes = Greeting::Hello(hello).encode();
        bytes[at] = 200;
        let mut wire = Wire::connect(&victim.address);
        wire.send(&bytes);
        let refusal = wire.hear_refusal("a field that cannot be");
        assert!(refusal.reason.contains("200"), "{refusal:?}");
    }
    // A greeting that stops, at every byte.
    let whole = Greeting::Hello(hello_of(Role::Destination, Channel::Control)).encode();
    for length in (0..whole.len()).step_by(7) {
        let mut wire = Wire::connect(&victim.address);
        wire.send(&whole[..length]);
        wire.socket.shutdown(Shutdown::Write).expect("a connected socket");
        assert_eq!(wire.hear_greeting(), Heard::Gone, "after {length} bytes");
    }
    victim.serves_properly();
}

#[test]
fn a_hello_for_something_else_is_refused_with_both_values() {
    prologue!("a_hello_for_something_else");
    let victim = Victim::start(|_| ());
    let ours = victim.source.session().to_string();
    let foreign = SessionId([3; 16]);
    let refused = |hello| {
        let mut wire = Wire::connect(&victim.address);
        wire.send_hello(hello);
        wire.hear_refusal("a hello that is wrong")
    };
    let refusal = refused(hello_of(Role::Source, Channel::Control));
    assert_eq!(refusal.code, RefuseCode::Role, "{refusal:?}");

    let mut hello = hello_of(Role::Destination, Channel::Control);
    hello.session = foreign;
    let refusal = refused(hello);
    assert_eq!(refusal.code, RefuseCode::UnknownSession);
    assert!(refusal.reason.contains(&foreign.to_string()), "{refusal:?}");
    assert!(refusal.reason.contains(&ours), "{refusal:?}");

    // Data channels: before there is a session, then with each thing wrong.
    for channel in [Channel::Request(0), Channel::Background(0)] {
        let refusal = refused(hello_of(Role::Destination, channel));
        assert_eq!(refusal.code, RefuseCode::UnknownSession, "{refusal:?}");
        assert!(refusal.reason.contains(&ours), "{refusal:?}");
    }
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    let good = hand.data_hello(Channel::Background(0), 2);
    let (_wire, _) = hand.open(Channel::Background(0), 2);
    let cases = [
        ("role", RefuseCode::Role, vec![]),
        ("session", RefuseCode::UnknownSession, vec![foreign.to_string(), ours.clone()]),
        ("incarnation", RefuseCode::Incarnation, vec!["0505".into(), "0909".into()]),
        ("epoch", RefuseCode::Stale, vec!["77".into(), good.stamp.epoch.0.to_string()]),
        ("generation", RefuseCode::Stale, vec!["1".into(), "2".into()]),
        ("channel", RefuseCode::TooMany, vec!["background 9".into()]),
    ];
    for (what, code, said) in cases {
        let mut hello = good;
        hello.stamp.generation.0 = 3;
        match what {
            "role" => hello.role = Role::Source,
            "session" => hello.session = foreign,
            "incarnation" => hello.incarnation = Incarnation([5; 16]),
            "epoch" => hello.stamp.epoch.0 = 77,
            "generation" => hello.stamp.generation.0 = 1,
            _ => hello.channel = Channel::Background(9),
        }
        let refusal = refused(hello);
        assert_eq!(refusal.code, code, "{what}: {refusal:?}");
        for words in said {
            assert!(refusal.reason.contains(&words), "{what}: {refusal:?} lacks {words:?}");
        }
    }
    // Another memory, while this one is connected.
    let mut other = hello_of(Role::Destination, Channel::Control);
    other.incarnation = Incarnation([5; 16]);
    let refusal = refused(other);
    assert_eq!(refusal.code, RefuseCode::TooMany, "{refusal:?}");
    assert!(refusal.reason.contains("0909"), "{refusal:?}");
    // The one that is connected has not suffered.
    hand.say(&ControlFrame::Heartbeat { token: 5 });
    hand.say(&ControlFrame::Refuse(afterimage_protocol::wire::Refusal::new(
        RefuseCode::Failed,
        "done",
    )));
    hand.control.drain();
    victim.serves_properly();
}

/// A header of a control frame with any fields.
fn control(kind: FrameKind, epoch: u32, page: u64, count: u32, length: u32) -> Vec<u8> {
    Header::new(kind, stamp(epoch, 1), page, count).with_length(length).bytes().to_vec()
}

/// What is sent in which epoch, and what the refusal says of it.
type Case = (&'static str, fn(u32) -> Vec<u8>, &'static str);

#[test]
fn wrong_frames_on_the_control_channel_end_the_connection_with_a_reason() {
    prologue!("wrong_frames_on_the_control");
    let victim = Victim::start(|_| ());
    let foreign = |length| {
        let region = Region::new(GuestAddress(0), length, PageSize::KIB_4, Backing::Anonymous);
        GuestLayout::new(vec![region]).expect("a layout")
    };
    // Before the attach.
    let mut hand = HandDestination::greet(&victim.address, STRANGER);
    hand.say(&ControlFrame::Attach(Attach { phase: Phase::Fresh, layout: foreign(8 * MIB) }));
    let said = format!("{:?}", hand.control.hear_end("another layout"));
    assert!(said.contains("Layout") && said.contains("0x400000") && said.contains("0x800000"));

    let mut hand = HandDestination::greet(&victim.address, STRANGER);
    hand.say(&ControlFrame::Attach(Attach { phase: Phase::Running, layout: foreign(4 * MIB) }));
    let said = format!("{:?}", hand.control.hear_end("running what was not given"));
    assert!(said.contains("not given"), "{said}");

    // After it; the epoch is put in once it is known.
    let cases: [Case; 11] = [
        (
            "unknown",
            |epoch| {
                let mut bytes = control(FrameKind::Ready, epoch, 0, 0, 0);
                bytes[0] = 99;
                bytes
            },
            "99",
        ),
        ("misplaced data", |epoch| control(FrameKind::PageContent, epoch, 0, 1, 4096), "2"),
        ("a source's frame", |epoch| ControlFrame::Begin.encode(stamp(epoch, 1), false), "Begin"),
        ("oversized", |epoch| control(FrameKind::Ack, epoch, 0, 1, 1 << 30), "1073741824"),
        (
            "a payload where none is",
            |epoch| {
                let mut bytes = control(FrameKind::Ready, epoch, 0, 0, 4);
                bytes.extend([0; 4]);
                bytes
            },
            "4",
        ),
        (
            "ack out of range",
            |epoch| ControlFrame::Ack(vec![pages(1000, 25)]).encode(stamp(epoch, 1), false),
            "1024",
        ),
        (
            "ack that overflows",
            |epoch| ControlFrame::Ack(vec![pages(u64::MAX - 3, 2)]).encode(stamp(epoch, 1), false),
            "1024",
        ),
        ("running", |epoch| ControlFrame::Running.encode(stamp(epoch, 1), false), "Running"),
        ("complete", |epoch| ControlFrame::Complete.encode(stamp(epoch, 1), false), "Complete"),
        ("the future", |epoch| ControlFrame::Ready.encode(stamp(epoch + 1, 1), false), "stamped"),
        (
            "denial of nothing",
            |epoch| ControlFrame::TakeBackDenied.encode(stamp(epoch, 1), false),
            "TakeBackDenied",
        ),
    ];
    for (name, bytes, says) in cases {
        let mut hand = HandDestination::attach(&victim.address, STRANGER);
        let bytes = bytes(hand.hello.stamp.epoch.0);
        hand.control.send(&bytes);
        let last = hand.control.hear_end(name).pop();
        let Some(ControlFrame::Refuse(refusal)) = last else { panic!("{name}: {last:?}") };
        assert_eq!(refusal.code, RefuseCode::Protocol, "{name}: {refusal:?}");
        assert!(refusal.reason.contains(says), "{name}: {refusal:?} lacks {says:?}");
    }
    // A frame of an older epoch changes nothing: the same Complete that was refused above.
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    let old = hand.hello.stamp.epoch.0 - 1;
    hand.control.send(&ControlFrame::Complete.encode(stamp(old, 1), false));
    hand.say(&ControlFrame::Heartbeat { token: 77 });
    loop {
        let header = hand.control.receive(HEADER_BYTES).said("a reply");
        let header = Header::from_bytes(header.try_into().expect("a header's length"));
        if header.kind() == Ok(FrameKind::HeartbeatReply) && header.page() == 77 {
            break;
        }
    }
    // A frame that stops in the middle.
    let bytes = control(FrameKind::Ack, old + 1, 0, 1, 16);
    hand.control.send(&bytes[..20]);
    hand.control.socket.shutdown(Shutdown::Write).expect("a connected socket");
    hand.control.drain();
    victim.serves_properly();
}

#[test]
fn wrong_frames_on_data_channels_end_that_channel_alone() {
    prologue!("wrong_frames_on_data");
    let victim = Victim::start(|_| ());
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    victim.source.switch_over(vec![]).expect("may switch over");
    let mut generation = 0;
    let wrong: [fn(u32, u32) -> Vec<u8>; 9] = [
        |epoch, generation| request(pages(1024, 1), stamp(epoch, generation)),
        |epoch, generation| request(pages(1000, 25), stamp(epoch, generation)),
        |epoch, generation| request(pages(u64::MAX, 1), stamp(epoch, generation)),
        |epoch, generation| request(pages(0, 0), stamp(epoch, generation)),
        |epoch, generation| request(pages(0, 65), stamp(epoch, generation)),
        |epoch, generation| peer::content(pages(0, 1), stamp(epoch, generation), 0),
        |epoch, generation| request(pages(0, 1), stamp(epoch, generation + 1)),
        |epoch, generation| request(pages(0, 1), stamp(epoch + 1, generation)),
        |epoch, generation| {
            Header::new(FrameKind::Ready, stamp(epoch, generation), 0, 0).bytes().to_vec()
        },
    ];
    for bytes in wrong {
        generation += 1;
        let (mut wire, at) = hand.open(Channel::Request(0), generation);
        wire.send(&bytes(at.epoch.0, generation));
        wire.drain();
    }
    // Older frames are dropped, and the next is answered.
    generation += 1;
    let (mut wire, at) = hand.open(Channel::Request(0), generation);
    wire.send(&request(pages(3, 1), stamp(at.epoch.0, generation - 1)));
    wire.send(&request(pages(5, 1), at));
    let header = wire.receive(HEADER_BYTES).said("an answer");
    let header = Header::from_bytes(header.try_into().expect("a header's length"));
    assert_eq!((header.kind(), header.page()), (Ok(FrameKind::PageContent), 5));
    assert_eq!(victim.source.stats().frames_stale, 1);
    // The control channel has seen nothing of all this.
    assert!(hand.say(&ControlFrame::Heartbeat { token: 1 }));
    let events = victim.at_source.rest();
    assert!(matches!(events[..], [SourceEvent::Attached(_), SourceEvent::Stopped]), "{events:?}");
    drop((wire, hand));
    victim.serves_properly();
}

#[test]
fn silent_peers_are_sent_away() {
    prologue!("silent_peers");
    let victim = Victim::start(|options| {
        options.heartbeat = Duration::from_millis(100);
        options.silence = Duration::from_millis(700);
    });
    let begin = Instant::now();
    let mut before_hello = Wire::connect(&victim.address);
    let mut half_hello = Wire::connect(&victim.address);
    half_hello.send(b"AFTRIMG\n\x01");
    // Says hello, and nothing more; then one that attaches and falls silent.
    let mut hand = HandDestination::greet(&victim.address, STRANGER);
    let said = format!("{:?}", hand.control.hear_end("silence after the offer"));
    assert!(said.contains("nothing was heard"), "{said}");
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    let (mut request, _) = hand.open(Channel::Request(0), 1);
    let (mut background, _) = hand.open(Channel::Background(0), 1);
    let said = format!("{:?}", hand.control.hear_end("silence after the attach"));
    assert!(said.contains("nothing was heard"), "{said}");
    request.drain();
    background.drain();
    before_hello.drain();
    half_hello.drain();
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    victim.serves_properly();
}

#[test]
fn a_slow_greeting_is_heard_to_its_end() {
    prologue!("a_slow_greeting");
    let victim = Victim::start(|_| ());
    let mut wire = Wire::connect(&victim.address);
    for byte in Greeting::Hello(hello_of(Role::Destination, Channel::Control)).encode() {
        wire.send(&[byte]);
        std::thread::sleep(Duration::from_millis(2));
    }
    wire.hear_hello("after the last byte");
    drop(wire);
    victim.serves_properly();
}

#[test]
fn a_peer_that_reads_no_answers_does_not_stop_the_background() {
    prologue!("a_peer_that_reads_no_answers");
    let victim = Victim::start(|_| ());
    let mut hand = HandDestination::attach(&victim.address, STRANGER);
    victim.source.switch_over(vec![]).expect("may switch over");
    let (mut requests, at) = hand.open(Channel::Request(0), 1);
    requests.socket.set_nonblocking(true).expect("a socket");
    let round: Vec<u8> = (0..512).flat_map(|page| request(pages(page, 1), at)).collect();
    // Until it does not read any more, because its answers are not read.
    let mut stuck_since = None;
    let mut at_byte = 0;
    while stuck_since.is_none_or(|since: Instant| since.elapsed() < Duration::from_millis(500)) {
        use std::io::Write;
        match requests.socket.write(&round[at_byte..]) {
            Ok(bytes) => (stuck_since, at_byte) = (None, (at_byte + bytes) % round.len()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                stuck_since.get_or_insert_with(Instant::now);
                hand.say(&ControlFrame::Heartbeat { token: 0 });
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => panic!("{error}"),
        }
    }
    let (mut background, _) = hand.open(Channel::Background(0), 1);
    background.socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a socket");
    background.receive(HEADER_BYTES).said("the background goes on");
    drop((requests, background, hand));
    victim.serves_properly();
}

#[test]
fn random_bytes_after_a_valid_beginning_end_the_connection() {
    prologue!("random_bytes");
    let mut random = Random::seeded("random_bytes_after_a_valid_beginning_end_the_connection");
    let victim = Victim::start(|_| ());
    for round in 0..60 {
        let mut hand = HandDestination::attach(&victim.address, STRANGER);
        let mut garbage = Vec::new();
        for _ in 0..=random.below(40) {
            garbage.extend(random.next().to_le_bytes());
        }
        // Half of them with headers that are nearly right.
        if round % 2 == 0 {
            let kind = 1 + random.below(34) as u16;
            garbage[..2].copy_from_slice(&kind.to_le_bytes());
            garbage.resize(garbage.len().max(HEADER_BYTES), 0);
            garbage[2..4].fill(0);
            garbage[4..8].copy_from_slice(&(random.below(64) as u32).to_le_bytes());
            garbage[8..12].copy_from_slice(&hand.hello.stamp.epoch.0.to_le_bytes());
            garbage[12..16].copy_from_slice(&1_u32.to_le_bytes());
        }
        let mut wires = Vec::new();
        for channel in [Channel::Request(0), Channel::Background(1)] {
            let (mut wire, _) = hand.open(channel, 1);
            wire.send(&garbage);
            wires.push(wire);
        }
        hand.control.send(&garbage);
        for wire in &mut wires {
            // It may have gone already.
            let _ = wire.socket.shutdown(Shutdown::Write);
            wire.drain();
        }
        // It may have gone already.
        let _ = hand.control.socket.shutdown(Shutdown::Write);
        hand.control.drain();
    }
    victim.serves_properly();
}

#[test]
fn a_stranger_does_not_disturb_a_migration_under_way() {
    prologue!("a_stranger");
    let setup = Setup { kinds: vec![(Kind::Memfd, 16 * MIB)], streams: 4, ..Setup::default() };
    let mut address = None;
    let pair = Pair::start_with(&setup, |_, _| (), |it| address.insert(it).clone());
    let pair = pair.expect("no huge pages asked for");
    let address = address.expect("an address");
    pair.source.switch_over(vec![]).expect("may switch over");
    pair.wait_state();
    for channel in [Channel::Control, Channel::Request(0), Channel::Background(2)] {
        for _ in 0..10 {
            let mut wire = Wire::connect(&address);
            wire.send_hello(hello_of(Role::Destination, channel));
            assert!(matches!(wire.hear_greeting(), Heard::Said(Greeting::Refuse(_))));
        }
    }
    pair.destination.ready().expect("may be ready");
    pair.finish();
    pair.check_counts();
    pair.check_content();
    assert_eq!(pair.destination.stats().recoveries, 0);
}
