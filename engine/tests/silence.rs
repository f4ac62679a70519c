//! Data channels that fall silent while the rest of the session lives: missed, and replaced
//! alone. One that is only slow is left in peace.

mod common;

use afterimage::{Background, DestinationEvent, Endpoint, Incarnation, Source, SourceEvent};
use afterimage_protocol::wire::{Channel, ControlFrame, Generation};
use common::counters::Counters;
use common::peer::HandDestination;
use common::proxy::{Cut, Proxy};
use common::{Content, Kind, Listening, Memory, Pair, Random, Setup};
use std::io::Write;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Long enough for a machine that tests several things at once.
const SILENCE: Duration = Duration::from_secs(1);

fn start(setup: &Setup, background: Background) -> (Pair, Proxy) {
    let mut proxy = None;
    let pair = Pair::start_with(
        setup,
        |source, destination| {
            source.background = background;
            (source.silence, destination.silence) = (SILENCE, SILENCE);
        },
        |address| proxy.insert(Proxy::start(&address)).address(),
    );
    (pair.expect("no huge pages"), proxy.expect("a detour"))
}

fn assert_undisturbed(pair: &Pair) {
    assert_eq!(pair.check_counts().recoveries, 0, "{}", pair.dump());
    assert_eq!(pair.source.stats().recoveries, 0, "{}", pair.dump());
    assert!(!pair.at_source.rest().contains(&SourceEvent::Disconnected));
    assert!(!pair.at_destination.rest().contains(&DestinationEvent::Disconnected));
}

/// One channel swallows what is sent on it, twice, while a guest counts.
fn silence_one(wanted: Channel, streams: u16, name: &str) {
    let mut random = Random::seeded(name);
    for listening in [Listening::Source, Listening::Destination] {
        let setup = Setup {
            kinds: vec![(Kind::Anonymous, 12 * MIB), (Kind::Memfd, 12 * MIB)],
            streams,
            listening,
            ..Setup::default()
        };
        let (pair, proxy) = start(&setup, Background::Unlimited);
        let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
        let is_wanted = |channel| channel == wanted;
        proxy.hold_at(1);
        pair.switch(&[]);
        let threads = counters.start(4, 400, &mut random);
        for round in 1..=2 {
            let goal = 4 * MIB * round;
            proxy.hold_at(goal);
            common::wait_until(
                "bytes, and the channel",
                || pair.dump(),
                || proxy.bytes() >= goal && proxy.open(is_wanted) == 1,
            );
            let seen = proxy.seen(is_wanted);
            assert!(proxy.cut(Cut::Vanish, is_wanted) >= 1);
            proxy.hold_at(goal + 2 * MIB);
            common::wait_until("the next one", || pair.dump(), || proxy.seen(is_wanted) > seen);
        }
        proxy.hold_at(u64::MAX);
        for thread in threads {
            thread.finish("a guest thread that counts", || pair.dump());
        }
        pair.finish();
        counters.check(&pair.old);
        assert_undisturbed(&pair);
    }
}

#[test]
fn a_silent_background_stream_is_replaced_alone() {
    prologue!("a_silent_background_stream");
    silence_one(Channel::Background(1), 3, "a_silent_background_stream_is_replaced_alone");
}

#[test]
fn the_only_background_stream_is_replaced_when_it_falls_silent() {
    prologue!("the_only_background_stream");
    silence_one(Channel::Background(0), 1, "the_only_background_stream_is_replaced");
}

#[test]
fn a_silent_request_channel_is_replaced_alone() {
    prologue!("a_silent_request_channel");
    for listening in [Listening::Source, Listening::Destination] {
        let setup = Setup {
            kinds: vec![(Kind::Anonymous, 4 * MIB), (Kind::Memfd, 4 * MIB)],
            listening,
            ..Setup::default()
        };
        let (pair, proxy) = start(&setup, Background::OnRequest);
        let is_wanted = |channel| channel == Channel::Request(0);
        pair.switch(&[]);
        for round in 1..=2 {
            let open = || proxy.open(is_wanted) == 1;
            common::wait_until("the request channel", || pair.dump(), open);
            let seen = proxy.seen(is_wanted);
            assert_eq!(proxy.cut(Cut::Vanish, is_wanted), 1);
            let new = Arc::clone(&pair.new);
            let page = 300 * round;
            let waiting = common::Toucher::start(move || {
                new.word(page, 1).load(std::sync::atomic::Ordering::Relaxed)
            });
            let found = waiting.finish("a page", || pair.dump());
            let wanted = pair.old.word(page, 1).load(std::sync::atomic::Ordering::Relaxed);
            assert_eq!(found, wanted);
            assert!(proxy.seen(is_wanted) > seen, "it came on another connection");
        }
        pair.source.set_background(Background::Unlimited);
        pair.finish();
        assert_undisturbed(&pair);
        pair.check_content();
    }
}

#[test]
fn a_stream_that_is_only_slow_or_idle_is_not_replaced() {
    prologue!("a_stream_that_is_only_slow");
    let setup = Setup { streams: 2, ..Setup::default() };
    let rate = NonZeroU64::new(200_000).expect("not zero");
    let (pair, proxy) = start(&setup, Background::Limited { bytes_per_second: rate });
    pair.switch(&[]);
    let since = Instant::now();
    common::wait_until("a while", || pair.dump(), || since.elapsed() >= 4 * SILENCE);
    pair.source.set_background(Background::OnRequest);
    common::wait_until("a while", || pair.dump(), || since.elapsed() >= 7 * SILENCE);
    let dump = || pair.dump();
    assert!(pair.destination.stats().pages_complete > 0, "{}", dump());
    assert!(pair.destination.stats().pages_complete < pair.new.pages(), "{}", dump());
    assert_eq!(proxy.seen(|_| true), 4, "control, request, two streams\n{}", dump());
    pair.source.set_background(Background::Unlimited);
    pair.finish();
    assert_undisturbed(&pair);
    pair.check_content();
}

/// Says every now and then that the destination is there, until it is told to stop.
fn beat(hand: &HandDestination, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let mut socket = hand.control.socket.try_clone().expect("a socket");
    let frame = ControlFrame::Heartbeat { token: 1 }.encode(hand.hello.stamp, false);
    std::thread::spawn(move || {
        while !stop.load(Ordering::Acquire) && socket.write_all(&frame).is_ok() {
            std::thread::park_timeout(SILENCE / 10);
        }
    })
}

#[test]
fn a_stream_whose_next_piece_takes_longer_than_any_patience_is_left_alone_while_bytes_move() {
    let _watchdog = common::Watchdog::start("a_stream_whose_next_piece_takes_longer");
    let silence = 2 * SILENCE;
    let old = Memory::new(&[(Kind::Anonymous, 64 * MIB)]);
    old.fill(5, Content::Dense);
    let mut options = common::session::source_options(&Setup::default());
    options.silence = silence;
    let listener = common::session::listen();
    let address = listener.address().clone();
    let (source, _events) =
        Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
    let mut hand = HandDestination::attach(&address, Incarnation([3; 16]));
    let stop = Arc::new(AtomicBool::new(false));
    let beats = beat(&hand, Arc::clone(&stop));
    let (_requests, _) = hand.open(Channel::Request(0), 1);
    let (mut stream, _) = hand.open(Channel::Background(0), 1);
    source.switch_over(Vec::new()).expect("may switch over");
    let end = hand.control.hear_control().said("device state");
    assert_eq!(end, ControlFrame::StateEnd { sections: 0 });
    // Nothing is acknowledged, and a little is read.
    let dump = || format!("{:?}", source.stats());
    let since = Instant::now();
    while since.elapsed() < 4 * silence {
        stream.receive(128 << 10).said("a stream that is only slow");
        let read = Instant::now();
        common::wait_until("a while", dump, || read.elapsed() >= silence / 20);
    }
    // Nothing is read.
    let stopped = Instant::now();
    let said = hand.control.hear_control().said("the stream to be given up");
    let channel = Channel::Background(0);
    assert_eq!(said, ControlFrame::Renew { channel, generation: Generation(1) });
    assert!(stopped.elapsed() >= silence / 4, "it was given up while bytes moved");
    stop.store(true, Ordering::Release);
    beats.join().expect("no panic");
}
