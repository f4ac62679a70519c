//! Links that are lost and made again: by themselves, by hand, elsewhere, and with failures in
//! the middle of it. Nothing is lost, and nothing acknowledged is sent again.

mod common;

use afterimage::{
    Address, Background, CallError, DestinationEvent, Endpoint, FirstConnection, Incarnation,
    Listener, Plaintext, Reconnect, SourceEvent,
};
use afterimage_protocol::wire::{Channel, RefuseCode, Role};
use common::counters::Counters;
use common::peer::{Wire, hello_of};
use common::proxy::{Cut, GREETING_BYTES, Proxy, Way};
use common::{Kind, Listening, Pair, Random, Setup, Toucher};
use std::os::fd::IntoRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Long enough for a machine that tests several things at once.
const SILENCE: Duration = Duration::from_secs(1);

/// A migration in which only what is asked for moves, until it is told otherwise.
fn on_request(listening: Listening, reconnect: Reconnect) -> (Setup, Pair, Proxy) {
    let setup = Setup {
        kinds: vec![(Kind::Anonymous, 4 * MIB), (Kind::Memfd, 4 * MIB)],
        streams: 3,
        listening,
        ..Setup::default()
    };
    let mut proxy = None;
    let pair = Pair::start_with(
        &setup,
        |source, destination| {
            source.background = Background::OnRequest;
            (source.silence, destination.silence) = (SILENCE, SILENCE);
            (source.reconnect, destination.reconnect) = (reconnect, reconnect);
        },
        |address| proxy.insert(Proxy::start(&address)).address(),
    );
    (setup, pair.expect("no huge pages"), proxy.expect("a detour"))
}

fn touch(pair: &Pair, page: u64) -> Toucher<u64> {
    let new = Arc::clone(&pair.new);
    Toucher::start(move || new.word(page, 1).load(Ordering::Relaxed))
}

fn check_touch(pair: &Pair, page: u64) {
    let found = touch(pair, page).finish("a page", || pair.dump());
    assert_eq!(found, pair.old.word(page, 1).load(Ordering::Relaxed), "page {page}");
}

/// The rest of the migration, with everything verified.
fn finish(pair: &Pair, recoveries: u64) {
    pair.source.set_background(Background::Unlimited);
    pair.finish();
    assert_eq!(pair.check_counts().recoveries, recoveries, "{}", pair.dump());
    assert_eq!(pair.source.stats().recoveries, recoveries, "{}", pair.dump());
    pair.check_content();
}

fn wait_attached(pair: &Pair) {
    let at_source = |event: &SourceEvent| matches!(event, SourceEvent::Attached(_));
    pair.at_source.wait("a destination", || pair.dump(), at_source);
    let at_destination = |event: &DestinationEvent| matches!(event, DestinationEvent::Attached(_));
    pair.at_destination.wait("a source", || pair.dump(), at_destination);
}

/// Until all five channels are there, so that a cut is one of them all.
fn wait_open(pair: &Pair, proxy: &Proxy) {
    common::wait_until("all channels", || pair.dump(), || proxy.open(|_| true) == 5);
}

/// The listening side begins to listen at `listener`, the other connects there.
fn recover_at(pair: &Pair, listener: Listener, address: &Address) {
    let (listen, connect) = (Endpoint::Listen(listener), Endpoint::Connect(address.clone()));
    let (at_source, at_destination) = match pair.setup.listening {
        Listening::Source => (listen, connect),
        Listening::Destination => (connect, listen),
    };
    pair.source.recover(Some(at_source)).expect("may recover");
    pair.destination.recover(Some(at_destination)).expect("may recover");
}

fn bind(address: &Address) -> Listener {
    Listener::bind(address, Plaintext::LoopbackOnly).expect("a free address")
}

/// A listener on another port, on a path, and on a descriptor that this process inherited,
/// each with the address where it is found.
fn elsewhere(directory: &std::path::Path) -> Vec<(Listener, Address)> {
    let tcp = common::session::listen();
    let found = tcp.address().clone();
    let path = Address::Unix(directory.join("socket"));
    let inherited = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let at_descriptor = Address::Tcp(inherited.local_addr().expect("bound").to_string());
    let descriptor = bind(&Address::Descriptor(inherited.into_raw_fd()));
    vec![(tcp, found), (bind(&path), path), (descriptor, at_descriptor)]
}

#[test]
fn a_paused_migration_is_recovered_on_another_port_path_and_descriptor() {
    prologue!("a_paused_migration_is_recovered");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, _proxy) = on_request(listening, Reconnect::Automatic);
        wait_attached(&pair);
        pair.switch(&[]);
        check_touch(&pair, 0);
        let directory = tempfile::tempdir().expect("a directory");
        let mut before: Option<Address> = None;
        let listeners = elsewhere(directory.path());
        let rounds = listeners.len() as u64;
        for (round, (listener, address)) in (1..).zip(listeners) {
            pair.source.pause().expect("may pause");
            pair.destination.pause().expect("may pause");
            pair.source.pause().expect("may pause twice");
            pair.wait_source(&SourceEvent::Paused);
            pair.wait_destination(&DestinationEvent::Paused);
            let waiting = touch(&pair, 100 * round);
            // Who needs no missing page goes on.
            check_touch(&pair, 0);
            assert!(waiting.is_waiting(), "nobody can have brought it");
            recover_at(&pair, listener, &address);
            let found = waiting.finish("a page after the pause", || pair.dump());
            assert_eq!(found, pair.old.word(100 * round, 1).load(Ordering::Relaxed));
            wait_attached(&pair);
            if let Some(Address::Tcp(before)) = before.replace(address) {
                let error = std::net::TcpStream::connect(&before).expect_err("replaced");
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
            }
            if let Some(Address::Unix(_)) = &before {
                assert!(directory.path().join("socket").exists());
            }
        }
        assert!(!directory.path().join("socket").exists(), "a listener takes its file along");
        assert!(!pair.at_source.rest().contains(&SourceEvent::Paused), "told once a pause");
        finish(&pair, rounds);
    }
}

#[test]
fn a_pause_is_over_at_the_same_address_when_nothing_else_is_said() {
    prologue!("a_pause_is_over");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, proxy) = on_request(listening, Reconnect::Automatic);
        pair.switch(&[]);
        pair.destination.pause().expect("may pause");
        pair.wait_source(&SourceEvent::Disconnected);
        let waiting = touch(&pair, 900);
        pair.destination.recover(None).expect("was paused");
        waiting.finish("a page after the pause", || pair.dump());
        pair.source.pause().expect("may pause");
        pair.wait_destination(&DestinationEvent::Disconnected);
        pair.source.recover(None).expect("was paused");
        check_touch(&pair, 1200);
        assert!(proxy.seen(|channel| channel == Channel::Control) >= 3);
        finish(&pair, 2);
    }
}

#[test]
fn a_session_that_is_connected_or_over_is_not_recovered() {
    prologue!("a_session_that_is_connected");
    let (_, pair, _proxy) = on_request(Listening::Source, Reconnect::Automatic);
    wait_attached(&pair);
    let endpoint = || Some(Endpoint::Listen(common::session::listen()));
    let refused = |result: Result<(), CallError>, reason: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    };
    let reason = "nothing is paused: the session is connected";
    refused(pair.source.recover(None), reason);
    refused(pair.source.recover(endpoint()), reason);
    refused(pair.destination.recover(None), reason);
    refused(pair.destination.recover(endpoint()), reason);
    pair.switch(&[]);
    finish(&pair, 0);
    refused(pair.source.recover(None), "the session is over");
    refused(pair.destination.recover(endpoint()), "the session is over");
    refused(pair.source.pause(), "the session is over");
    refused(pair.destination.pause(), "the session is over");
    let paused = |event: &SourceEvent| *event == SourceEvent::Paused;
    assert!(!pair.at_source.rest().iter().any(paused));
}

#[test]
fn a_link_lost_by_hand_stays_lost_until_it_is_recovered() {
    prologue!("a_link_lost_by_hand");
    for listening in [Listening::Source, Listening::Destination] {
        for how in [Cut::Reset, Cut::Vanish] {
            let (_, pair, proxy) = on_request(listening, Reconnect::ByHand);
            wait_attached(&pair);
            pair.switch(&[]);
            wait_open(&pair, &proxy);
            let is_control = |channel| channel == Channel::Control;
            let seen = proxy.seen(is_control);
            proxy.cut(how, |_| true);
            pair.wait_source(&SourceEvent::Disconnected);
            pair.wait_source(&SourceEvent::Paused);
            pair.wait_destination(&DestinationEvent::Disconnected);
            pair.wait_destination(&DestinationEvent::Paused);
            let waiting = touch(&pair, 300);
            assert_eq!(proxy.seen(is_control), seen, "nobody has tried");
            let listener = common::session::listen();
            let address = listener.address().clone();
            recover_at(&pair, listener, &address);
            waiting.finish("a page after the recovery", || pair.dump());
            finish(&pair, 1);
        }
    }
}

#[test]
fn a_destination_connects_to_nobody_before_it_is_told_to() {
    prologue!("a_destination_connects_to_nobody");
    for listening in [Listening::Source, Listening::Destination] {
        let setup = Setup { listening, ..Setup::default() };
        let mut proxy = None;
        let pair = Pair::start_with(
            &setup,
            |_, destination| destination.first_connection = FirstConnection::OnRecover,
            |address| proxy.insert(Proxy::start(&address)).address(),
        );
        let (pair, proxy) = (pair.expect("no huge pages"), proxy.expect("a detour"));
        let tried = || proxy.seen(|channel| channel == Channel::Control);
        if listening == Listening::Destination {
            common::wait_until("two refusals", || pair.dump(), || tried() > 2);
        }
        let listener = common::session::listen();
        let address = listener.address().clone();
        recover_at(&pair, listener, &address);
        pair.switch(&[]);
        finish(&pair, 0);
        if listening == Listening::Source {
            assert_eq!(tried(), 0, "it connects to where it is told to, and not before");
        }
    }
}

#[test]
fn a_recovery_that_finds_nobody_waits_for_somebody() {
    prologue!("a_recovery_that_finds_nobody");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, _proxy) = on_request(listening, Reconnect::ByHand);
        pair.switch(&[]);
        pair.source.pause().expect("may pause");
        pair.wait_destination(&DestinationEvent::Paused);
        let directory = tempfile::tempdir().expect("a directory");
        let address = Address::Unix(directory.path().join("later"));
        let connect = || Some(Endpoint::Connect(address.clone()));
        let waiting = touch(&pair, 300);
        // Nobody is there yet, at neither attempt.
        for _ in 0..2 {
            match listening {
                Listening::Source => pair.destination.recover(connect()),
                Listening::Destination => pair.source.recover(connect()),
            }
            .expect("may recover");
        }
        let listen = Some(Endpoint::Listen(bind(&address)));
        match listening {
            Listening::Source => pair.source.recover(listen),
            Listening::Destination => pair.destination.recover(listen),
        }
        .expect("may recover");
        waiting.finish("a page after the recovery", || pair.dump());
        finish(&pair, 1);
    }
}

#[test]
fn a_lost_link_is_recovered_elsewhere_while_it_is_tried_again() {
    prologue!("a_lost_link_is_recovered_elsewhere");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, proxy) = on_request(listening, Reconnect::Automatic);
        pair.switch(&[]);
        // From here nobody is found at the old address.
        drop(proxy);
        pair.wait_source(&SourceEvent::Disconnected);
        pair.wait_destination(&DestinationEvent::Disconnected);
        let listener = common::session::listen();
        let address = listener.address().clone();
        recover_at(&pair, listener, &address);
        check_touch(&pair, 300);
        finish(&pair, 1);
    }
}

#[test]
fn whoever_connects_to_a_paused_side_is_told_to_try_later() {
    prologue!("whoever_connects_to_a_paused_side");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, proxy) = on_request(listening, Reconnect::Automatic);
        wait_attached(&pair);
        let role = match listening {
            Listening::Source => pair.source.pause().map(|()| Role::Destination),
            Listening::Destination => pair.destination.pause().map(|()| Role::Source),
        }
        .expect("may pause");
        let mut wire = Wire::connect(&proxy.address());
        let mut hello = hello_of(role, Channel::Control);
        hello.incarnation = Incarnation([8; 16]);
        assert!(wire.send_hello(hello));
        let refusal = wire.hear_refusal("somebody connects to a paused side");
        assert_eq!(refusal.code, RefuseCode::Failed);
        assert!(refusal.reason.contains("paused"), "{refusal:?}");
        match listening {
            Listening::Source => pair.source.recover(None),
            Listening::Destination => pair.destination.recover(None),
        }
        .expect("was paused");
        pair.switch(&[]);
        finish(&pair, 1);
    }
}

/// Bytes of the control connection that say how far it is: its hello, and the frames of the
/// handshake up to the end of the first `Received`, or of `Begin`.
fn places() -> Vec<(Way, u64)> {
    let (offer, attach, received, begin) = (32 + 16 + 2 * 24, 32 + 8 + 2 * 24, 32 + 1, 32);
    let mut places = Vec::new();
    for (way, frames) in [(Way::Forth, [attach, received]), (Way::Back, [offer, begin])] {
        let mut at = GREETING_BYTES;
        places.push((way, at));
        for length in frames {
            places.extend([(way, at + 1), (way, at + length - 1), (way, at + length)]);
            at += length;
        }
    }
    places
}

#[test]
fn a_recovery_whose_own_handshake_is_cut_anywhere_is_tried_again() {
    prologue!("a_recovery_whose_own_handshake");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, proxy) = on_request(listening, Reconnect::Automatic);
        wait_attached(&pair);
        pair.switch(&[]);
        let mut recoveries = 0;
        for (page, (way, bytes)) in (0..).zip(places()) {
            // Where the destination listens, the frames go the other way.
            let way = match (listening, way) {
                (Listening::Source, way) => way,
                (Listening::Destination, Way::Forth) => Way::Back,
                (Listening::Destination, Way::Back) => Way::Forth,
            };
            wait_open(&pair, &proxy);
            let resets = proxy.resets();
            proxy.reset_next(way, bytes);
            proxy.cut(Cut::Reset, |_| true);
            common::wait_until("the first cut", || pair.dump(), || proxy.is_settled());
            let waiting = touch(&pair, page * 10);
            common::wait_until("the cut handshake", || pair.dump(), || proxy.resets() > resets);
            let found = waiting.finish("a page after two cuts", || pair.dump());
            assert_eq!(found, pair.old.word(page * 10, 1).load(Ordering::Relaxed));
            // One that was cut behind its begin had been made already.
            let now = pair.destination.stats().recoveries;
            assert!((1..=2).contains(&(now - recoveries)), "{now} after {recoveries}");
            recoveries = now;
        }
        common::wait_until(
            "both to agree",
            || pair.dump(),
            || pair.source.stats().recoveries >= recoveries,
        );
        pair.source.set_background(Background::Unlimited);
        pair.finish();
        pair.check_counts();
        pair.check_content();
    }
}

#[test]
fn a_hundred_cuts_one_after_each_percent_lose_nothing() {
    prologue!("a_hundred_cuts");
    let mut random = Random::seeded("a_hundred_cuts_one_after_each_percent_lose_nothing");
    let setup = Setup {
        kinds: vec![(Kind::Anonymous, 12 * MIB), (Kind::Memfd, 12 * MIB)],
        streams: 4,
        ..Setup::default()
    };
    let (pair, proxy) = Proxy::between(&setup);
    let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
    proxy.hold_at(1);
    pair.switch(&[]);
    let threads = counters.start(2, 200, &mut random);
    let total = pair.new.pages();
    let step = pair.old.small_pages() * 4096 / 200;
    for percent in 1..=100 {
        // What is left at the last cut is more than comes by request meanwhile.
        let wanted = total * percent / 110;
        common::wait_until(
            "one percent more",
            || pair.dump(),
            || {
                let has_come = pair.destination.stats().pages_complete >= wanted;
                if !has_come {
                    proxy.hold_at(proxy.bytes() + step);
                }
                has_come
            },
        );
        let how = if random.below(2) == 0 { Cut::Reset } else { Cut::HalfClose };
        proxy.hold_at(0);
        let before = pair.destination.stats().recoveries;
        let is_control = |channel| channel == Channel::Control;
        common::wait_until("a link to cut", || pair.dump(), || proxy.open(is_control) == 1);
        proxy.cut(how, |_| true);
        common::wait_until("the cut", || pair.dump(), || proxy.is_settled());
        common::wait_until(
            "the next connection",
            || pair.dump(),
            || pair.destination.stats().recoveries > before,
        );
    }
    proxy.hold_at(u64::MAX);
    for thread in threads {
        thread.finish("a guest thread that counts", || pair.dump());
    }
    pair.finish();
    counters.check(&pair.old);
    let stats = pair.check_counts();
    assert!(stats.recoveries >= 100, "{}", pair.dump());
    // What comes twice was asked for while it was under way in background; what has been
    // acknowledged is asked for and sent no more.
    let asked = pair.source.stats().pages_requested;
    assert!(stats.pages_duplicate <= asked, "{}", pair.dump());
}

#[test]
fn peers_that_vanish_without_a_word_are_missed_and_replaced() {
    prologue!("peers_that_vanish");
    for listening in [Listening::Source, Listening::Destination] {
        let (_, pair, proxy) = on_request(listening, Reconnect::Automatic);
        wait_attached(&pair);
        pair.switch(&[]);
        for round in 1..=2 {
            wait_open(&pair, &proxy);
            proxy.cut(Cut::Vanish, |_| true);
            check_touch(&pair, 50 * round);
        }
        finish(&pair, 2);
    }
}
