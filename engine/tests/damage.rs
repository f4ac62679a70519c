//! Networks that change what they carry: bytes that are turned round, left out, cut short or
//! held up. With checksums no damage gets through, and the session goes on by itself.

mod common;

use afterimage::{Background, Checksums, DestinationEvent, SourceEvent};
use afterimage_protocol::wire::Channel;
use common::counters::Counters;
use common::proxy::{Cut, Proxy, Way};
use common::{Kind, Listening, Pair, Random, Setup, Toucher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Long enough for a machine that tests several things at once.
const SILENCE: Duration = Duration::from_secs(1);
const DAMAGES: [Cut; 3] = [Cut::Corrupt, Cut::Omit, Cut::Truncate];

fn start(listening: Listening, background: Background) -> (Pair, Proxy) {
    let setup = Setup {
        kinds: vec![(Kind::Anonymous, 12 * MIB), (Kind::Memfd, 12 * MIB)],
        streams: 2,
        checksums: Checksums::On,
        listening,
        ..Setup::default()
    };
    let mut proxy = None;
    let pair = Pair::start_with(
        &setup,
        |source, destination| {
            source.background = background;
            (source.silence, destination.silence) = (SILENCE, SILENCE);
        },
        |address| proxy.insert(Proxy::start(&address)).address(),
    );
    (pair.expect("no huge pages"), proxy.expect("a detour"))
}

/// Lets background streams go on a little until something is so.
fn trickles(proxy: &Proxy, is_so: impl Fn(&Proxy) -> bool) -> bool {
    let is_so = is_so(proxy);
    if !is_so {
        proxy.hold_at(proxy.bytes() + (64 << 10));
    }
    is_so
}

/// Guest threads that count on some pages until they are told to stop.
struct Load {
    is_over: Arc<AtomicBool>,
    threads: Vec<Toucher<()>>,
}

impl Load {
    fn start(counters: &Arc<Counters>, pages: u64, random: &mut Random) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let threads = (0..3).map(|_| {
            let (counters, is_over) = (Arc::clone(counters), Arc::clone(&is_over));
            let mut random = random.fork();
            Toucher::start(move || {
                while !is_over.load(Ordering::Relaxed) {
                    counters.add_one(random.below(pages));
                }
            })
        });
        let threads = threads.collect();
        Self { is_over, threads }
    }

    fn stop(self, pair: &Pair) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.finish("a guest thread that counts", || pair.dump());
        }
    }
}

/// Damages a channel in each way, `page` and those after it being asked for meanwhile.
fn damage(pair: &Pair, proxy: &Proxy, counters: &Arc<Counters>, wanted: Channel, page: &mut u64) {
    let is_wanted = |channel| channel == wanted;
    for (how, way) in DAMAGES.into_iter().flat_map(|how| [(how, Way::Forth), (how, Way::Back)]) {
        common::wait_until("the channel", || pair.dump(), || proxy.open(is_wanted) == 1);
        let seen = proxy.seen(is_wanted);
        assert_eq!(proxy.damage(how, way, is_wanted), 1);
        let (counting, fresh) = (Arc::clone(counters), *page);
        *page += 1;
        let what = format!("{wanted:?} {how:?} {way:?}");
        Toucher::start(move || counting.add_one(fresh)).finish(&what, || pair.dump());
        let next = || proxy.is_settled() && proxy.seen(is_wanted) > seen;
        common::wait_until(&format!("the end of {what}"), || pair.dump(), next);
    }
}

#[test]
fn damage_to_what_is_asked_for_and_agreed_is_found() {
    prologue!("damage_to_what_is_asked_for");
    let mut random = Random::seeded("damage_to_what_is_asked_for_and_agreed_is_found");
    for listening in [Listening::Source, Listening::Destination] {
        let (pair, proxy) = start(listening, Background::OnRequest);
        let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
        pair.switch(&[]);
        let half = pair.old.small_pages() / 2;
        let load = Load::start(&counters, half, &mut random);
        let mut page = half;
        for wanted in [Channel::Request(0), Channel::Control] {
            damage(&pair, &proxy, &counters, wanted, &mut page);
        }
        load.stop(&pair);
        pair.source.set_background(Background::Unlimited);
        pair.finish();
        counters.check(&pair.old);
        assert!(pair.check_counts().recoveries >= 1, "{}", pair.dump());
    }
}

#[test]
fn damage_to_what_comes_in_background_is_found() {
    prologue!("damage_to_what_comes_in_background");
    let mut random = Random::seeded("damage_to_what_comes_in_background_is_found");
    for listening in [Listening::Source, Listening::Destination] {
        let (pair, proxy) = start(listening, Background::Unlimited);
        let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
        let is_wanted = |channel| matches!(channel, Channel::Background(_));
        let way = if listening == Listening::Source { Way::Back } else { Way::Forth };
        proxy.hold_at(1);
        pair.switch(&[]);
        let load = Load::start(&counters, pair.old.small_pages() / 4, &mut random);
        for (round, how) in (1..).zip(DAMAGES) {
            let goal = 3 * MIB * round;
            proxy.hold_at(goal);
            let is_time = || proxy.bytes() >= goal && proxy.open(is_wanted) == 2;
            common::wait_until("bytes, and both streams", || pair.dump(), is_time);
            assert_eq!(proxy.damage(how, way, is_wanted), 2);
            let what = format!("the end of both streams, {how:?}");
            common::wait_until(&what, || pair.dump(), || trickles(&proxy, Proxy::is_settled));
        }
        proxy.hold_at(u64::MAX);
        load.stop(&pair);
        pair.finish();
        counters.check(&pair.old);
        pair.check_counts();
    }
}

#[test]
fn what_was_held_up_and_comes_late_changes_nothing() {
    prologue!("what_was_held_up");
    let mut random = Random::seeded("what_was_held_up_and_comes_late_changes_nothing");
    for listening in [Listening::Source, Listening::Destination] {
        let (pair, proxy) = start(listening, Background::Unlimited);
        let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
        proxy.hold_at(1);
        pair.switch(&[]);
        let load = Load::start(&counters, pair.old.small_pages() / 4, &mut random);
        for round in 1..=2 {
            let goal = 4 * MIB * round;
            proxy.hold_at(goal);
            // A stream that is held for long is replaced, and open until it may go on.
            let are_there = |proxy: &Proxy| proxy.open(|_| true) == 4;
            let is_time = || proxy.bytes() >= goal && trickles(&proxy, are_there);
            common::wait_until("bytes, and all channels", || pair.dump(), is_time);
            assert!(proxy.cut(Cut::Stall, |_| true) >= 4);
            pair.wait_source(&SourceEvent::Disconnected);
            pair.wait_destination(&DestinationEvent::Disconnected);
            let are_new = || trickles(&proxy, are_there);
            common::wait_until("new channels", || pair.dump(), are_new);
            proxy.resume();
            // Whoever was hung up on is known by what cannot be carried any more.
            common::wait_until("the old ends", || pair.dump(), are_new);
        }
        proxy.hold_at(u64::MAX);
        load.stop(&pair);
        pair.finish();
        counters.check(&pair.old);
        assert!(pair.check_counts().recoveries >= 2, "{}", pair.dump());
    }
}
