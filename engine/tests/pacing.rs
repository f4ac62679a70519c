//! How fast a source sends what nobody has asked for, and that it never holds up what somebody
//! has.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DiscardNotice, Endpoint, Incarnation,
    SnapshotServer, Source, SourceOptions,
};
use afterimage_protocol::wire::Channel;
use common::peer::HandDestination;
use common::proxy::{Cut, Proxy};
use common::{Content, EventLog, Kind, Memory, Pair, Setup, Toucher};
use std::io::Read;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn limited(bytes_per_second: u64) -> Background {
    let bytes_per_second = NonZeroU64::new(bytes_per_second).expect("not zero");
    Background::Limited { bytes_per_second }
}

fn start(setup: &Setup, background: Background) -> Pair {
    let change = |source: &mut SourceOptions| source.background = background;
    Pair::start_with(setup, |source, _| change(source), |address| address).expect("no huge pages")
}

/// Pages that lie apart, as the guest touches them.
fn touch(new: &Arc<Memory>, setup: &Setup, first: u64) -> u64 {
    let (new, seed, content) = (Arc::clone(new), setup.seed, setup.content);
    let pages = new.small_pages();
    let chosen = (first..pages).step_by(97);
    let count = chosen.clone().count() as u64;
    let toucher = Toucher::start(move || {
        for page in chosen {
            new.check_pages(seed, content, page, page + 1);
        }
    });
    toucher.finish("faults are answered", || format!("{count} pages from {first}"));
    count
}

/// Of what has left in background, in bytes of content.
fn background_bytes(pair: &Pair) -> u64 {
    pair.source.stats().pages_background * 4096
}

/// What a rate may let through in some time: that, the credit of 25 ms, and a piece of each
/// stream that a change of the rate found under way.
fn allowed(rate: u64, time: Duration, under_way: u64) -> u64 {
    let worth = u128::from(rate) * (time + Duration::from_millis(25)).as_nanos() / 1_000_000_000;
    worth as u64 + under_way * (256 << 10) + (256 << 10)
}

#[test]
fn on_request_only_what_is_asked_for_leaves_until_it_is_lifted() {
    prologue!("on_request");
    for (kind, streams) in [(Kind::Anonymous, 1), (Kind::Memfd, 4)] {
        for content in [Content::Dense, Content::ZeroRuns] {
            let kinds = vec![(kind, 16 * MIB)];
            let setup = Setup { kinds, content, streams, ..Setup::default() };
            let pair = start(&setup, Background::OnRequest);
            pair.switch(&[]);
            let touched = touch(&pair.new, &setup, 5);
            // Counting comes after the waking.
            let counted = || pair.destination.stats().pages_complete == touched;
            common::wait_until("the count of pages asked for", || pair.dump(), counted);
            let (at_source, stats) = (pair.source.stats(), pair.destination.stats());
            assert!(at_source.pages_requested >= touched, "{}", pair.dump());
            assert_eq!(at_source.pages_background + at_source.pages_zero, 0, "{}", pair.dump());
            assert_eq!(stats.pages_background, 0, "{}", pair.dump());
            assert_eq!(stats.pages_complete, touched, "{}", pair.dump());
            pair.source.set_background(Background::Unlimited);
            pair.finish();
            pair.check_counts();
            pair.check_content();
        }
    }
}

#[test]
fn a_guest_that_touches_everything_needs_no_background() {
    prologue!("a_guest_that_touches");
    let setup = Setup { kinds: vec![(Kind::Memfd, 4 * MIB)], ..Setup::default() };
    let pair = start(&setup, Background::OnRequest);
    pair.switch(&[]);
    let (new, seed, content) = (Arc::clone(&pair.new), setup.seed, setup.content);
    Toucher::start(move || new.check(seed, content)).finish("all of it", || pair.dump());
    pair.finish();
    let stats = pair.check_counts();
    assert_eq!(stats.pages_background, 0, "{stats:?}");
    assert_eq!(pair.source.stats().pages_background, 0);
}

#[test]
fn a_limited_background_is_not_faster_and_arrives() {
    prologue!("a_limited_background");
    let rate = 64 * MIB;
    for (kind, streams) in [(Kind::Anonymous, 1), (Kind::Memfd, 4)] {
        let setup = Setup { kinds: vec![(kind, 32 * MIB)], streams, ..Setup::default() };
        let pair = start(&setup, limited(rate));
        let since = Instant::now();
        pair.switch(&[]);
        pair.finish();
        let took = since.elapsed();
        let sent = background_bytes(&pair);
        assert_eq!(sent, 32 * MIB, "nobody asked for anything");
        assert!(sent <= allowed(rate, took, 0), "{sent} bytes in {took:?}");
        pair.check_counts();
        pair.check_content();
    }
}

#[test]
fn a_limit_holds_up_no_request() {
    prologue!("a_limit_holds_up");
    let rate = 4096;
    let setup = Setup { kinds: vec![(Kind::Anonymous, 16 * MIB)], streams: 4, ..Setup::default() };
    let pair = start(&setup, limited(rate));
    let since = Instant::now();
    pair.switch(&[]);
    // At the limit this would take longer than any test may.
    for first in 0..40 {
        touch(&pair.new, &setup, first);
    }
    let (sent, took) = (background_bytes(&pair), since.elapsed());
    assert!(sent <= allowed(rate, took, 0), "{sent} bytes in {took:?}");
    pair.source.set_background(Background::Unlimited);
    pair.finish();
    pair.check_content();
}

#[test]
fn zero_runs_cost_only_their_headers() {
    prologue!("zero_runs");
    // Content would take most of a day.
    let setup = Setup {
        kinds: vec![(Kind::Memfd, 64 * MIB), (Kind::Anonymous, 64 * MIB)],
        content: Content::Empty,
        streams: 4,
        ..Setup::default()
    };
    let pair = start(&setup, limited(2000));
    pair.switch(&[]);
    pair.finish();
    let stats = pair.check_counts();
    assert_eq!(stats.pages_zero, stats.pages_total);
}

#[test]
fn written_zeros_cost_only_their_headers() {
    prologue!("written_zeros");
    let setup = Setup {
        kinds: vec![(Kind::Anonymous, 32 * MIB)],
        content: Content::Empty,
        streams: 4,
        ..Setup::default()
    };
    // Content would take two minutes, the headers of single pages take a second.
    let pair = start(&setup, limited(MIB / 4));
    // Present, so that they have to be looked at.
    for page in 0..pair.old.small_pages() {
        pair.old.word(page, 3).store(0, Ordering::Relaxed);
    }
    pair.switch(&[]);
    pair.finish();
    let stats = pair.check_counts();
    assert_eq!(stats.pages_zero, stats.pages_total);
}

#[test]
fn a_rate_is_changed_live() {
    prologue!("a_rate_is_changed");
    for streams in [1, 4] {
        let kinds = vec![(Kind::Anonymous, 64 * MIB)];
        let setup = Setup { kinds, streams, ..Setup::default() };
        // A page in four seconds: whoever went on by this rate would not be done in time.
        let slow = 1024;
        let pair = start(&setup, limited(slow));
        pair.switch(&[]);
        let beyond = |bytes| move |pair: &Pair| background_bytes(pair) > bytes;
        let wait = |what, is_so: &dyn Fn(&Pair) -> bool| {
            common::wait_until(what, || pair.dump(), || is_so(&pair));
        };
        wait("a first page", &beyond(0));
        let fast = 64 * MIB;
        let before = background_bytes(&pair);
        let since = Instant::now();
        pair.source.set_background(limited(fast));
        wait("more at a faster rate", &beyond(before + 4 * MIB));
        let (sent, took) = (background_bytes(&pair) - before, since.elapsed());
        assert!(sent <= allowed(fast, took, u64::from(streams)), "{sent} bytes in {took:?}");
        pair.source.set_background(Background::OnRequest);
        // What a stream had taken still leaves; faults go round the streams meanwhile.
        let held = background_bytes(&pair);
        touch(&pair.new, &setup, 11);
        let more = background_bytes(&pair) - held;
        assert!(more <= u64::from(streams) * (256 << 10), "{more} bytes after the change");
        pair.source.set_background(limited(slow));
        let (held, since) = (background_bytes(&pair), Instant::now());
        touch(&pair.new, &setup, 13);
        let (more, took) = (background_bytes(&pair) - held, since.elapsed());
        assert!(more <= allowed(slow, took, u64::from(streams)), "{more} bytes in {took:?}");
        pair.source.set_background(Background::Unlimited);
        pair.finish();
        pair.check_counts();
        pair.check_content();
    }
}

#[test]
fn a_source_that_holds_or_waits_ends_at_once() {
    prologue!("a_source_that_holds");
    for background in [Background::OnRequest, limited(1)] {
        for streams in [1, 4] {
            let kinds = vec![(Kind::Anonymous, 8 * MIB)];
            let setup = Setup { kinds, streams, ..Setup::default() };
            let pair = start(&setup, background);
            pair.switch(&[]);
            touch(&pair.new, &setup, 0);
            let Pair { source, .. } = pair;
            // Nobody would wake them for more than an hour.
            let dropper = Toucher::start(move || drop(source));
            dropper.finish("the drop of a source", || format!("{background:?} {streams}"));
        }
    }
}

#[test]
fn streams_that_hold_are_made_again_with_their_connections() {
    prologue!("streams_that_hold");
    for background in [Background::OnRequest, limited(1)] {
        let kinds = vec![(Kind::Memfd, 8 * MIB)];
        let setup = Setup { kinds, streams: 4, ..Setup::default() };
        let mut proxy = None;
        let pair = Pair::start_with(
            &setup,
            |source, _| source.background = background,
            |address| proxy.insert(Proxy::start(&address)).address(),
        );
        let (pair, proxy) = (pair.expect("no huge pages"), proxy.expect("a detour"));
        let open = || proxy.open(|channel| matches!(channel, Channel::Background(_)));
        pair.switch(&[]);
        common::wait_until("all streams", || pair.dump(), || open() == 4);
        touch(&pair.new, &setup, 0);
        // First all streams, which nobody uses, then everything.
        let is_stream = |channel: Channel| matches!(channel, Channel::Background(_));
        assert_eq!(proxy.cut(Cut::Reset, is_stream), 4);
        let is_again = || proxy.is_settled() && open() == 4;
        common::wait_until("all streams again", || pair.dump(), is_again);
        proxy.cut(Cut::Reset, |_| true);
        touch(&pair.new, &setup, 7);
        // A page may be due, and be lost with its stream.
        assert!(background_bytes(&pair) <= 2 * 4096, "{}", pair.dump());
        pair.source.set_background(Background::Unlimited);
        pair.finish();
        pair.check_content();
    }
}

#[test]
fn a_snapshot_is_paced_for_each_destination() {
    prologue!("a_snapshot_is_paced");
    let setup = Setup { kinds: vec![(Kind::Memfd, 8 * MIB)], streams: 4, ..Setup::default() };
    let image = Memory::new(&setup.kinds);
    image.fill(setup.seed, setup.content);
    let listener = common::session::listen();
    let address = listener.address().clone();
    let mut options = common::session::source_options(&setup);
    options.background = limited(1);
    let (server, _events) =
        SnapshotServer::start(image.as_source(), listener, options, 3).expect("a server");
    // Also for those that come later.
    server.set_background(Background::OnRequest);
    let guests: Vec<_> = (0..3)
        .map(|_| {
            let new = Memory::new(&setup.kinds);
            let memory = new.register(DiscardNotice::Called).expect("registered memory");
            let options = common::session::destination_options(&setup);
            let endpoint = Endpoint::Connect(address.clone());
            let (destination, events) =
                Destination::start(memory, endpoint, options).expect("a destination");
            (destination, EventLog::new(events), new)
        })
        .collect();
    let dump = || format!("{:?}", server.stats());
    for (destination, events, new) in &guests {
        let state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
        events.wait("the state of a snapshot", dump, state);
        destination.ready().expect("may be ready");
        events.wait("run", dump, |event| *event == DestinationEvent::Run);
        touch(new, &setup, 3);
    }
    for (name, stats) in server.stats().destinations {
        assert_eq!(stats.pages_background, 0, "{name:?}: {}", dump());
        assert!(stats.pages_requested > 0, "{name:?}: {}", dump());
    }
    server.set_background(Background::Unlimited);
    for (_, events, new) in &guests {
        events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
        new.check(setup.seed, setup.content);
    }
}

/// Somebody who takes all that the streams of a source send, and drops it.
struct Sink {
    source: Source,
    _hand: HandDestination,
    _old: Arc<Memory>,
    received: Arc<AtomicU64>,
}

impl Sink {
    fn start(streams: u16, bytes: u64) -> Self {
        let old = Memory::new(&[(Kind::Memfd, bytes)]);
        old.fill(1, Content::Dense);
        let listener = common::session::listen();
        let address = listener.address().clone();
        let mut options = SourceOptions::default();
        (options.streams, options.silence) = (streams, common::PATIENCE);
        options.background = Background::OnRequest;
        let endpoint = Endpoint::Listen(listener);
        let (source, _events) =
            Source::start(old.as_source(), endpoint, options).expect("a source");
        let hand = HandDestination::attach(&address, Incarnation([9; 16]));
        let received = Arc::new(AtomicU64::new(0));
        for slot in 0..streams {
            let (mut wire, _) = hand.open(Channel::Background(slot), 1);
            let received = Arc::clone(&received);
            std::thread::spawn(move || {
                let mut bin = vec![0; 1 << 20];
                while let Ok(bytes @ 1..) = wire.socket.read(&mut bin) {
                    received.fetch_add(bytes as u64, Ordering::Relaxed);
                }
            });
        }
        source.switch_over(vec![]).expect("may switch over");
        Self { source, _hand: hand, _old: old, received }
    }

    /// Bytes a second, over a second from now.
    fn rate(&self) -> f64 {
        let (before, since) = (self.received.load(Ordering::Relaxed), Instant::now());
        std::thread::sleep(Duration::from_secs(1));
        let (after, took) = (self.received.load(Ordering::Relaxed), since.elapsed());
        (after - before) as f64 / took.as_secs_f64()
    }
}

/// `cargo test --release -p afterimage --test pacing -- --ignored --nocapture`
#[test]
#[ignore = "measures: needs 3 GB of memory and a machine with nothing else to do"]
fn a_rate_is_kept_within_five_percent_over_a_second() {
    prologue!("a_rate_is_kept");
    let mut worst: f64 = 0.0;
    for streams in [1, 8] {
        let unlimited = Sink::start(streams, 2500 * MIB);
        unlimited.source.set_background(Background::Unlimited);
        println!("{streams} streams, unlimited: {:.0} MB/s", unlimited.rate() / 1e6);
        drop(unlimited);
        let sink = Sink::start(streams, 2500 * MIB);
        for rate in [10, 1000, 30, 300, 100, 700] {
            sink.source.set_background(limited(rate * 1_000_000));
            let found = sink.rate() / 1e6;
            let off = (found / rate as f64 - 1.0) * 100.0;
            println!("{streams} streams, {rate:4} MB/s: {found:8.2} MB/s, {off:+.2} %");
            worst = worst.max(off.abs());
        }
    }
    assert!(worst <= 5.0, "{worst:.2} % off at worst");
}
