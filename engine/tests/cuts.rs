//! Connections that break in the middle: nothing is lost, nothing comes twice, and nobody has
//! to do anything about it.

mod common;

use afterimage_protocol::wire::Channel;
use common::counters::Counters;
use common::proxy::{Cut, Proxy};
use common::{Content, Kind, Listening, Random, Setup};
use std::cell::RefCell;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A guest counts while connections are cut by `wanted` at random moments; then everything
/// must be there.
fn count_through(
    setup: &Setup,
    random: &mut Random,
    cuts: u64,
    wanted: impl Fn(&mut Random, Channel) -> bool,
) -> afterimage::DestinationStats {
    let (pair, proxy) = Proxy::between(setup);
    let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
    // Before it begins: it may be over before this thread runs again.
    proxy.hold_at(1);
    pair.switch(&[]);
    let threads = counters.start(6, 400, random);
    let full = if setup.content == Content::Scattered { 4 } else { 1 };
    let total = pair.old.small_pages() * 4096 / full;
    for cut in 0..cuts {
        let goal = total / (cuts + 1) * cut + random.below(total / (cuts + 1));
        proxy.hold_at(goal);
        common::wait_until("bytes in the proxy", || pair.dump(), || proxy.bytes() >= goal);
        let how = Cut::any(random);
        let chosen = RefCell::new(random.fork());
        proxy.cut(how, |channel| wanted(&mut chosen.borrow_mut(), channel));
        common::wait_until("the cut", || pair.dump(), || proxy.is_settled());
    }
    proxy.hold_at(u64::MAX);
    for thread in threads {
        thread.finish("a guest thread that counts", || pair.dump());
    }
    pair.finish();
    counters.check(&pair.old);
    pair.check_counts()
}

#[test]
fn every_connection_cut_again_and_again_loses_nothing() {
    prologue!("every_connection_cut");
    let mut random = Random::seeded("every_connection_cut_again_and_again_loses_nothing");
    for (kind, listening) in [
        (Kind::Anonymous, Listening::Source),
        (Kind::Memfd, Listening::Source),
        (Kind::Memfd, Listening::Destination),
    ] {
        let setup =
            Setup { kinds: vec![(kind, 24 * MIB)], streams: 4, listening, ..Setup::default() };
        let stats = count_through(&setup, &mut random, 4, |_, _| true);
        assert!(stats.recoveries >= 1, "{stats:?}");
    }
}

#[test]
fn single_channels_cut_at_random_lose_nothing() {
    prologue!("single_channels_cut");
    let mut random = Random::seeded("single_channels_cut_at_random_lose_nothing");
    for (kind, listening) in
        [(Kind::Anonymous, Listening::Source), (Kind::Memfd, Listening::Destination)]
    {
        let setup =
            Setup { kinds: vec![(kind, 24 * MIB)], streams: 4, listening, ..Setup::default() };
        count_through(&setup, &mut random, 12, |random, channel| {
            channel != Channel::Control && random.below(5) == 0
        });
    }
}

#[test]
fn streams_cut_among_many_small_frames_lose_nothing() {
    prologue!("streams_cut_among_many_small_frames");
    let mut random = Random::seeded("streams_cut_among_many_small_frames_lose_nothing");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let setup = Setup {
            kinds: vec![(kind, 48 * MIB)],
            streams: 2,
            content: Content::Scattered,
            ..Setup::default()
        };
        count_through(&setup, &mut random, 8, |random, channel| {
            matches!(channel, Channel::Background(_)) && random.below(2) == 0
        });
    }
}

/// One channel alone is cut several times; the session goes on without a recovery.
fn cut_one(wanted: Channel, name: &str) {
    let mut random = Random::seeded(name);
    for listening in [Listening::Source, Listening::Destination] {
        for how in [Cut::Reset, Cut::HalfClose, Cut::BlackHole] {
            let setup = Setup {
                kinds: vec![(Kind::Anonymous, 12 * MIB), (Kind::Memfd, 12 * MIB)],
                streams: 2,
                listening,
                ..Setup::default()
            };
            let (pair, proxy) = Proxy::between(&setup);
            let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
            proxy.hold_at(1);
            pair.switch(&[]);
            let threads = counters.start(4, 200, &mut random);
            for cut in 1..=3 {
                let goal = 6 * MIB * cut;
                proxy.hold_at(goal);
                common::wait_until(
                    "bytes, and the channel to be there again",
                    || pair.dump(),
                    || proxy.bytes() >= goal && proxy.open(|channel| channel == wanted) > 0,
                );
                assert_eq!(proxy.cut(how, |channel| channel == wanted), 1);
            }
            proxy.hold_at(u64::MAX);
            for thread in threads {
                thread.finish("a guest thread that counts", || pair.dump());
            }
            pair.finish();
            counters.check(&pair.old);
            let stats = pair.check_counts();
            assert_eq!(stats.recoveries, 0, "the control channel was not cut: {stats:?}");
        }
    }
}

#[test]
fn the_request_channel_alone_is_replaced() {
    prologue!("the_request_channel_alone");
    cut_one(Channel::Request(0), "the_request_channel_alone_is_replaced");
}

#[test]
fn one_background_stream_alone_is_replaced() {
    prologue!("one_background_stream_alone");
    cut_one(Channel::Background(1), "one_background_stream_alone_is_replaced");
}

#[test]
fn the_control_channel_alone_is_recovered() {
    prologue!("the_control_channel_alone");
    let mut random = Random::seeded("the_control_channel_alone_is_recovered");
    for listening in [Listening::Source, Listening::Destination] {
        let setup = Setup {
            kinds: vec![(Kind::Anonymous, 24 * MIB)],
            streams: 2,
            listening,
            ..Setup::default()
        };
        let stats = count_through(&setup, &mut random, 3, |_, channel| channel == Channel::Control);
        assert!(stats.recoveries >= 1, "{stats:?}");
    }
}

#[test]
fn channels_that_break_before_the_switchover_are_made_again() {
    prologue!("channels_that_break_before");
    for listening in [Listening::Source, Listening::Destination] {
        let all = [Channel::Request(0), Channel::Background(0), Channel::Control];
        for wanted in all {
            let setup = Setup { listening, ..Setup::default() };
            let (pair, proxy) = Proxy::between(&setup);
            for _ in 0..3 {
                common::wait_until(
                    "all three channels",
                    || pair.dump(),
                    // One that is dying may be counted beside those that live.
                    || all.iter().all(|one| proxy.open(|channel| channel == *one) == 1),
                );
                assert_eq!(proxy.cut(Cut::Reset, |channel| channel == wanted), 1);
            }
            pair.switch(&[]);
            pair.finish();
            pair.check_counts();
            pair.check_content();
        }
    }
}
