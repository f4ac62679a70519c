//! Hostile and broken peers against a real destination: it survives each in bounded time,
//! shows the guest nothing wrong, and afterwards a proper source completes the migration.

mod common;

use afterimage::{Address, Destination, DestinationEvent, DiscardNotice, Endpoint, SessionId};
use afterimage_protocol::wire::{
    Channel, ControlFrame, DataFrame, HEADER_BYTES, Header, Hello, Kind as FrameKind, RefuseCode,
    Role,
};
use common::attacked::{Attacked, SESSION, layout_of};
use common::peer::{
    HandSource, Heard, Wire, content, hello_of, offer_of, pages, source_hello, stamp,
};
use common::{EventLog, Kind, Memory, Random, Setup, Toucher};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Says something wrong, and hears the refusal.
fn refused(mut hand: HandSource, bytes: &[u8], what: &str) -> (RefuseCode, String) {
    hand.control.send(bytes);
    match hand.control.hear_end(what).pop() {
        Some(ControlFrame::Refuse(refusal)) => (refusal.code, refusal.reason),
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn a_destination_keeps_out_whoever_is_not_its_source() {
    prologue!("a_destination_keeps_out");
    let mut victim = Attacked::start(Kind::Anonymous);
    // Before it knows its session: other layouts and strangers do not bind it.
    let hand = HandSource::greet(&victim.address, SessionId([1; 16]), 900);
    let offer = ControlFrame::Offer(offer_of(&layout_of(8 * MIB)));
    let (code, reason) = refused(hand, &offer.encode(stamp(900, 1), false), "another layout");
    assert_eq!(code, RefuseCode::Layout);
    assert!(reason.contains("0x400000") && reason.contains("0x800000"), "{reason}");
    drop(HandSource::greet(&victim.address, SessionId([2; 16]), 7000));

    let hand = victim.attach();
    let refusal = |hello| {
        let mut wire = Wire::connect(&victim.address);
        wire.send_hello(hello);
        wire.hear_refusal("a hello that is wrong")
    };
    assert_eq!(refusal(hello_of(Role::Destination, Channel::Control)).code, RefuseCode::Role);
    let stranger = refusal(source_hello(SessionId([1; 16]), 999));
    assert_eq!(stranger.code, RefuseCode::UnknownSession);
    for id in [SESSION, SessionId([1; 16])] {
        assert!(stranger.reason.contains(&id.to_string()), "{stranger:?}");
    }
    let old = refusal(source_hello(SESSION, victim.epoch));
    assert_eq!(old.code, RefuseCode::Stale, "{old:?}");
    let mut data = source_hello(SESSION, victim.epoch);
    data.channel = Channel::Background(0);
    data.incarnation = hand.theirs.incarnation;
    for (what, code) in [
        ("session", RefuseCode::UnknownSession),
        ("epoch", RefuseCode::Stale),
        ("generation", RefuseCode::Stale),
        ("slot", RefuseCode::TooMany),
    ] {
        let mut hello = data;
        match what {
            "session" => hello.session = SessionId([1; 16]),
            "epoch" => hello.stamp.epoch.0 += 5,
            "generation" => hello.stamp.generation.0 = 0,
            _ => hello.channel = Channel::Request(3),
        }
        assert_eq!(refusal(hello).code, code, "{what}");
    }
    drop(hand);
    victim.gets_served_properly();
}

/// What the refusal says, and what is sent in which epoch.
type Case = (&'static str, fn(u32) -> Vec<u8>);

#[test]
fn wrong_control_frames_end_the_connection_with_a_reason() {
    prologue!("wrong_control_frames");
    let mut victim = Attacked::start(Kind::Memfd);
    let cases: [Case; 8] = [
        ("Go", |epoch| ControlFrame::Go.encode(stamp(epoch, 1), false)),
        ("Bye", |epoch| ControlFrame::Bye.encode(stamp(epoch, 1), false)),
        ("Begin", |epoch| ControlFrame::Begin.encode(stamp(epoch, 1), false)),
        ("Running", |epoch| ControlFrame::Running.encode(stamp(epoch, 1), false)),
        ("3 were sent", |epoch| {
            ControlFrame::StateEnd { sections: 3 }.encode(stamp(epoch, 1), false)
        }),
        ("stamped", |epoch| ControlFrame::Go.encode(stamp(epoch + 1, 1), false)),
        ("99", |epoch| {
            let mut bytes = Header::new(FrameKind::Go, stamp(epoch, 1), 0, 0).bytes().to_vec();
            bytes[0] = 99;
            bytes
        }),
        ("4294967295", |epoch| {
            let header = Header::new(FrameKind::Section, stamp(epoch, 1), 0, 0);
            header.with_length(u32::MAX).bytes().to_vec()
        }),
    ];
    for (says, bytes) in cases {
        let hand = victim.attach();
        let (code, reason) = refused(hand, &bytes(victim.epoch), says);
        assert_eq!(code, RefuseCode::Protocol, "{says}: {reason}");
        assert!(reason.to_lowercase().contains(&says.to_lowercase()), "{says}: {reason}");
    }
    victim.gets_served_properly();
}

#[test]
fn wrong_data_frames_end_the_channel_and_show_the_guest_nothing() {
    prologue!("wrong_data_frames");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let mut victim = Attacked::start(kind);
        let hand = victim.attach();
        let mut generation = 0;
        for channel in [Channel::Request(0), Channel::Background(0)] {
            generation = 0;
            let wrong: [fn(_) -> Vec<u8>; 8] = [
                |at| content(pages(1024, 1), at, 1),
                |at| content(pages(1023, 2), at, 1),
                |at| content(pages(u64::MAX, 1), at, 1),
                |at| Header::new(FrameKind::PageContent, at, 0, 1).with_length(17).bytes().into(),
                |at| {
                    Header::new(FrameKind::PageContent, at, 0, 1)
                        .with_length(1 << 31)
                        .bytes()
                        .into()
                },
                |at| DataFrame::Request(pages(0, 1)).header(at).bytes().into(),
                |at| DataFrame::Zero(pages(1000, 25)).header(at).bytes().into(),
                |at| Header::new(FrameKind::Go, at, 0, 0).bytes().into(),
            ];
            for bytes in wrong {
                generation += 1;
                let (mut wire, at) = hand.open(&victim.address, channel, generation);
                wire.send(&bytes(at));
                wire.drain();
            }
        }
        // A page that breaks off in the middle, and one of an older generation.
        generation += 1;
        let (mut wire, at) = hand.open(&victim.address, Channel::Background(0), generation);
        let older = stamp(at.epoch.0, generation - 1);
        wire.send(&content(pages(20, 1), older, 0xee));
        let broken = content(pages(30, 8), at, 0xee);
        wire.send(&broken[..HEADER_BYTES + 5000]);
        wire.socket.shutdown(Shutdown::Write).expect("a connected socket");
        wire.drain();
        assert_eq!(victim.destination.stats().frames_stale, 1);
        assert_eq!(victim.destination.stats().pages_complete, 0);
        drop(hand);
        victim.gets_served_properly();
    }
}

#[test]
fn a_page_that_is_complete_is_never_replaced() {
    prologue!("a_page_that_is_complete");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let mut victim = Attacked::start(kind);
        let mut hand = victim.attach();
        let (mut background, at) = hand.open(&victim.address, Channel::Background(0), 1);
        let (mut request, answer) = hand.open(&victim.address, Channel::Request(0), 1);
        let destination = &victim.destination;
        let dump = || format!("{:?}", destination.stats());
        background.send(&content(pages(0, 4), at, 1));
        let stats = || destination.stats();
        common::wait_until("four pages", dump, || stats().pages_complete == 4);
        for _ in 0..3 {
            background.send(&content(pages(0, 8), at, 2));
            background.send(DataFrame::Zero(pages(0, 8)).header(at).bytes());
            request.send(&content(pages(1, 1), answer, 3));
            request.send(DataFrame::Zero(pages(2, 1)).header(answer).bytes());
        }
        common::wait_until("the duplicates", dump, || stats().pages_duplicate >= 3 * 14 - 4);
        for page in 0..8 {
            let expected = if page < 4 { 0x0101_0101_0101_0101 } else { 0x0202_0202_0202_0202 };
            let new = Arc::clone(&victim.new);
            let read = Toucher::start(move || new.word(page, 9).load(Ordering::Relaxed));
            assert_eq!(read.finish("a complete page", dump), expected, "page {page}");
        }
        hand.say(&ControlFrame::Heartbeat { token: 1 });
    }
}

#[test]
fn silent_sources_are_given_up() {
    prologue!("silent_sources");
    let mut victim = Attacked::start(Kind::Anonymous);
    let mut offer = offer_of(&victim.layout);
    offer.silence_ms = 600;
    offer.heartbeat_ms = 100;
    victim.epoch += 1;
    let mut hand = HandSource::greet(&victim.address, SESSION, victim.epoch);
    hand.say(&ControlFrame::Offer(offer));
    let said = format!("{:?}", hand.control.hear_end("silence after the offer"));
    assert!(said.contains("nothing was heard"), "{said}");
    let mut silent = Wire::connect(&victim.address);
    let begin = Instant::now();
    silent.drain();
    assert!(begin.elapsed() < Duration::from_secs(15));
    victim.gets_served_properly();
}

#[test]
fn random_bytes_from_a_source_end_the_connection() {
    prologue!("random_bytes_from_a_source");
    let mut random = Random::seeded("random_bytes_from_a_source_end_the_connection");
    let mut victim = Attacked::start(Kind::Memfd);
    for _ in 0..40 {
        let mut hand = victim.attach();
        let mut garbage = Vec::new();
        for _ in 0..=random.below(40) {
            garbage.extend(random.next().to_le_bytes());
        }
        for channel in [Channel::Request(0), Channel::Background(0)] {
            let (mut wire, _) = hand.open(&victim.address, channel, 1);
            wire.send(&garbage);
            // It may have gone already.
            let _ = wire.socket.shutdown(Shutdown::Write);
            wire.drain();
        }
        hand.control.send(&garbage);
        let _ = hand.control.socket.shutdown(Shutdown::Write);
        hand.control.drain();
    }
    assert_eq!(victim.destination.stats().pages_complete, 0);
    victim.gets_served_properly();
}

/// Sends `bytes` again and again on a connection, until it is told to stop.
struct Flood {
    socket: std::net::TcpStream,
    thread: std::thread::JoinHandle<u64>,
}

impl Flood {
    fn start(mut wire: Wire, bytes: Vec<u8>) -> Self {
        let socket = wire.socket.try_clone().expect("a socket");
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while wire.socket.write_all(&bytes).is_ok() {
                sent += bytes.len() as u64;
            }
            sent
        });
        Self { socket, thread }
    }

    fn stop(self) -> u64 {
        // TCP may let a sender wait a minute for room at a peer that has gone.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.thread.join().expect("a flood")
    }
}

#[test]
fn a_destination_can_be_dropped_under_a_flood() {
    prologue!("a_destination_can_be_dropped");
    let mut victim = Attacked::start(Kind::Anonymous);
    let hand = victim.attach();
    let (request, at) = hand.open(&victim.address, Channel::Request(0), 1);
    let (background, same) = hand.open(&victim.address, Channel::Background(0), 1);
    let zeros = |at| DataFrame::Zero(pages(0, 1)).header(at).bytes().repeat(2000);
    let beats = ControlFrame::Heartbeat { token: 1 }.encode(hand.hello.stamp, false).repeat(2000);
    let mut unread = Wire::over(hand.control.socket.try_clone().expect("a socket"));
    let reader = std::thread::spawn(move || unread.drain());
    let floods = [(request, zeros(at)), (background, zeros(same)), (hand.control, beats)]
        .map(|(wire, bytes)| Flood::start(wire, bytes));
    common::wait_until(
        "the flood",
        || format!("{:?}", victim.destination.stats()),
        || victim.destination.stats().pages_duplicate > 20_000,
    );
    let begin = Instant::now();
    drop(victim.destination);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    for flood in floods {
        assert!(flood.stop() > 0);
    }
    reader.join().expect("a reader");
    assert!(victim.events.until_end().contains(&DestinationEvent::Abandoned));
}

#[test]
fn a_discard_goes_on_under_a_flood_of_answers() {
    prologue!("a_discard_goes_on");
    let mut victim = Attacked::start_with(Kind::Anonymous, DiscardNotice::Events);
    let hand = victim.attach();
    let (request, at) = hand.open(&victim.address, Channel::Request(0), 1);
    let zeros = DataFrame::Zero(pages(0, 1)).header(at).bytes().repeat(2000);
    let flood = Flood::start(request, zeros);
    let dump = || format!("{:?}", victim.destination.stats());
    common::wait_until("the flood", dump, || victim.destination.stats().pages_duplicate > 20_000);
    // Whoever discards waits until the event has been read.
    let new = Arc::clone(&victim.new);
    let discard = std::thread::spawn(move || new.advise(9, 3, libc::MADV_DONTNEED));
    common::wait_until("the discard", dump, || discard.is_finished());
    discard.join().expect("a discard").expect("an advice");
    // It goes on when the event is read, and that is before the event is dealt with.
    common::wait_until("its pages", dump, || victim.destination.stats().pages_discarded == 3);
    assert!(flood.stop() > 0);
}

#[test]
fn pages_called_unreadable_again_and_again_are_told_once() {
    prologue!("pages_called_unreadable");
    let mut victim = Attacked::start(Kind::Anonymous);
    let mut hand = victim.attach();
    let (mut background, at) = hand.open(&victim.address, Channel::Background(0), 1);
    let frames = DataFrame::Unreadable(pages(5, 3)).header(at).bytes().repeat(5000);
    background.send(&frames);
    background.send(DataFrame::Unreadable(pages(4, 5)).header(at).bytes());
    background.send(&content(pages(0, 1), at, 1));
    let stats = || victim.destination.stats();
    common::wait_until(
        "what was sent last",
        || format!("{:?}", stats()),
        || stats().pages_complete == 1,
    );
    assert_eq!(stats().pages_unreadable, 5);
    // A round trip, so that what the session thread was told is told on.
    hand.say(&ControlFrame::Heartbeat { token: 8 });
    let told = |event: &DestinationEvent| {
        *event == DestinationEvent::Unreadable { first_page: 8, pages: 1 }
    };
    victim.events.wait("the last of them", || format!("{:?}", stats()), told);
    let rest = victim.events.rest();
    let unreadable =
        |event: &&DestinationEvent| matches!(event, DestinationEvent::Unreadable { .. });
    assert_eq!(rest.iter().filter(unreadable).count(), 2, "{rest:?}");
}

#[test]
fn a_bye_is_heard_even_if_nothing_can_be_said_any_more() {
    prologue!("a_bye_is_heard");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let setup = Setup { kinds: vec![(Kind::Anonymous, 64 << 10)], ..Setup::default() };
    let new = Memory::new(&setup.kinds);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let address = Address::Unix(path.clone());
    let listener = common::session::listen_at(&address);
    let options = common::session::destination_options(&setup);
    let (destination, events) =
        Destination::start(memory, Endpoint::Listen(listener), options).expect("started");
    let events = EventLog::new(events);
    let dump = || format!("{:?}", destination.stats());
    let connect = |hello| {
        let socket = UnixStream::connect(&path).expect("somebody listens");
        let mut wire = Wire::over_unix(socket);
        wire.send_hello(hello);
        let theirs = wire.hear_hello("a destination greets");
        (wire, theirs)
    };
    let hello = source_hello(SESSION, 1);
    let (control, theirs) = connect(hello);
    let mut hand = HandSource { control, hello, theirs };
    hand.begin(&layout_of(64 << 10));
    hand.say(&ControlFrame::StateEnd { sections: 0 });
    let state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
    events.wait("device state", dump, state);
    destination.ready().expect("may be ready");
    let mut hello = hello;
    (hello.channel, hello.incarnation) = (Channel::Background(0), theirs.incarnation);
    let (mut background, _) = connect(hello);
    background.send(DataFrame::Zero(pages(0, 16)).header(hello.stamp).bytes());
    hand.say(&ControlFrame::Go);
    while let Heard::Said(frame) = hand.control.hear_control() {
        if frame == ControlFrame::Complete {
            break;
        }
    }
    // It does not read any more: the reply to the heartbeat cannot be sent. But it has said
    // that all is done.
    hand.control.socket.shutdown(Shutdown::Read).expect("a connected socket");
    let mut last = ControlFrame::Heartbeat { token: 1 }.encode(hand.hello.stamp, false);
    last.extend(ControlFrame::Bye.encode(hand.hello.stamp, false));
    hand.control.send(&last);
    events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
}

#[test]
fn a_session_that_nobody_answers_for_ends_soon_when_dropped() {
    prologue!("a_session_that_nobody_answers");
    // It accepts, and greets only on the control connection: all other attempts wait.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = Address::Tcp(listener.local_addr().expect("bound").to_string());
    let new = Memory::new(&[(Kind::Anonymous, MIB)]);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let options = common::session::destination_options(&Setup::default());
    let (destination, _events) =
        Destination::start(memory, Endpoint::Connect(address), options).expect("started");
    let mut control = Wire::over(listener.accept().expect("the destination connects").0);
    let theirs = control.hear_hello("a destination greets");
    let hello = source_hello(SESSION, 1);
    control.send_hello(hello);
    let mut hand = HandSource { control, hello, theirs };
    let mut offer = offer_of(&layout_of(MIB));
    offer.streams = 16;
    hand.begin_with(offer);
    // The first data channel is asked for; the other sixteen wait behind it.
    let _first = listener.accept().expect("a data channel");
    let begin = Instant::now();
    drop(destination);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(12), "{took:?} for one attempt under way");
}

#[test]
fn channels_that_break_at_once_are_made_again_with_pauses() {
    prologue!("channels_that_break_at_once");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = Address::Tcp(listener.local_addr().expect("bound").to_string());
    let new = Memory::new(&[(Kind::Anonymous, MIB)]);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let options = common::session::destination_options(&Setup::default());
    let (_destination, _events) =
        Destination::start(memory, Endpoint::Connect(address), options).expect("started");
    let mut control = Wire::over(listener.accept().expect("the destination connects").0);
    let theirs = control.hear_hello("a destination greets");
    let hello = source_hello(SESSION, 1);
    control.send_hello(hello);
    let mut hand = HandSource { control, hello, theirs };
    hand.begin(&layout_of(MIB));
    listener.set_nonblocking(true).expect("a socket");
    let end = Instant::now() + Duration::from_secs(1);
    let mut times = 0;
    while Instant::now() < end {
        let Ok((socket, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        socket.set_nonblocking(false).expect("a socket");
        let mut wire = Wire::over(socket);
        let asked = wire.hear_hello("a destination greets");
        wire.send_hello(Hello { channel: asked.channel, stamp: asked.stamp, ..hello });
        times += 1;
    }
    // Two channels, each at once, after 20 ms, 40, 80 and so on.
    assert!((4..30).contains(&times), "{times} connections in a second");
}
