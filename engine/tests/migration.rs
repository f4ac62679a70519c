//! Whole migrations over real sockets: every page arrives once, with its content.

mod common;

use afterimage::{
    CallError, Checksums, DestinationEvent, DiscardNotice, SourceEvent, StateSection, ThreadHook,
    ThreadRole,
};
use common::counters::Counters;
use common::proxy::Proxy;
use common::{Content, Kind, Listening, Pair, Random, Setup, Toucher, Transport};
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn section(name: &str, length: usize) -> StateSection {
    let bytes = (0..length).map(|at| (at * 7 + length) as u8).collect();
    StateSection { name: name.into(), version: 3, bytes }
}

/// A migration of a guest that reads all of its memory while it comes.
fn migrate(setup: &Setup, state: &[StateSection]) {
    let Some(pair) = Pair::start(setup) else { return };
    pair.switch(state);
    let new = Arc::clone(&pair.new);
    let (seed, content) = (setup.seed, setup.content);
    let reader = Toucher::start(move || {
        // From the end: against the direction of the background.
        for page in (0..new.small_pages()).rev() {
            new.check_pages(seed, content, page, page + 1);
        }
    });
    reader.finish("the guest reads its memory", || pair.dump());
    pair.finish();
    pair.check_counts();
    pair.check_content();
}

#[test]
fn every_transport_direction_and_number_of_streams_moves_memory() {
    prologue!("every_transport");
    let mut seed = 100;
    for transport in [Transport::Tcp, Transport::Unix] {
        for listening in [Listening::Source, Listening::Destination] {
            for streams in [1, 4, 16] {
                seed += 1;
                let setup = Setup {
                    kinds: vec![(Kind::Anonymous, 4 * MIB), (Kind::Memfd, 2 * MIB)],
                    seed,
                    streams,
                    transport,
                    listening,
                    checksums: if seed % 2 == 0 { Checksums::On } else { Checksums::Off },
                    ..Setup::default()
                };
                migrate(&setup, &[section("cpu", 100)]);
            }
        }
    }
}

#[test]
fn every_kind_of_memory_moves_with_and_without_checksums() {
    prologue!("every_kind");
    let kinds: [&[(Kind, u64)]; 5] = [
        &[(Kind::Anonymous, 6 * MIB)],
        &[(Kind::Memfd, 6 * MIB)],
        &[(Kind::Huge, 8 * MIB)],
        &[(Kind::Memfd, 2 * MIB), (Kind::Huge, 4 * MIB), (Kind::Anonymous, 2 * MIB)],
        &[(Kind::Anonymous, 4096), (Kind::Memfd, 4096), (Kind::Anonymous, 12288)],
    ];
    for kinds in kinds {
        for content in [Content::Dense, Content::Sparse, Content::ZeroRuns] {
            for checksums in [Checksums::Off, Checksums::On] {
                let setup = Setup {
                    kinds: kinds.to_vec(),
                    content,
                    checksums,
                    streams: 2,
                    ..Setup::default()
                };
                migrate(&setup, &[]);
            }
        }
    }
}

#[test]
fn a_sparse_guest_arrives_by_zero_runs() {
    prologue!("a_sparse_guest");
    let setup = Setup {
        kinds: vec![(Kind::Anonymous, 512 * MIB), (Kind::Memfd, 512 * MIB)],
        content: Content::Empty,
        ..Setup::default()
    };
    let pair = Pair::start(&setup).expect("no huge pages");
    pair.switch(&[]);
    pair.finish();
    let stats = pair.check_counts();
    assert_eq!(stats.pages_zero, stats.pages_total);
    assert_eq!(stats.bytes_received, 0);
    // A look at some of them, through the kernel: zero.
    for page in (0..pair.new.small_pages()).step_by(997) {
        assert_eq!(pair.new.word(page, 5).load(Ordering::Relaxed), 0);
    }
}

#[test]
fn many_threads_fault_while_the_background_runs() {
    prologue!("many_threads_fault");
    let mut random = Random::seeded("many_threads_fault_while_the_background_runs");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let setup = Setup { kinds: vec![(kind, 32 * MIB)], streams: 4, ..Setup::default() };
        let (pair, proxy) = Proxy::between(&setup);
        let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
        // The background begins when somebody has waited for a page: it may be over before a
        // thread has touched anything.
        proxy.hold_at(1);
        pair.switch(&[section("cpu", 3000)]);
        let threads = counters.start(16, 600, &mut random);
        let requested = || pair.destination.stats().pages_requested;
        common::wait_until("a page asked for", || pair.dump(), || requested() > 0);
        proxy.hold_at(u64::MAX);
        for thread in threads {
            thread.finish("a guest thread that counts", || pair.dump());
        }
        pair.finish();
        counters.check(&pair.old);
        let stats = pair.check_counts();
        assert!(stats.pages_requested > 0, "{stats:?}");
        assert!(stats.fault_latency.count > 0 && stats.first_page.is_some(), "{stats:?}");
    }
}

#[test]
fn device_state_of_any_shape_arrives_whole() {
    prologue!("device_state");
    let states: [Vec<StateSection>; 4] = [
        vec![],
        vec![section("only", 0)],
        vec![section("cpu0", 4096), section("cpu1", 4096), section("disk", 3 * MIB as usize + 5)],
        vec![section("same", 10), section("same", 10)],
    ];
    for state in states {
        migrate(&Setup { kinds: vec![(Kind::Anonymous, MIB)], ..Setup::default() }, &state);
    }
}

#[test]
fn ready_comes_after_the_state_and_may_be_said_twice() {
    prologue!("ready_comes_after");
    let (pair, proxy) = Proxy::between(&Setup::default());
    // Not all may have arrived when it is said again: then the session is over.
    proxy.hold_at(1);
    assert!(matches!(pair.destination.ready(), Err(CallError::NotNow(_))));
    pair.switch(&[]);
    let again = pair.destination.ready();
    let stats = pair.destination.stats();
    // Memory is small: the session may be over by now, the one reason to refuse.
    assert!(again.is_ok() || stats.pages_complete == stats.pages_total, "{again:?}");
    assert!(matches!(pair.source.switch_over(vec![]), Err(CallError::NotNow(_))));
    proxy.hold_at(u64::MAX);
    pair.finish();
    pair.check_content();
}

/// The source has its guest, and nothing runs at the destination.
fn stays_at_the_source(pair: &Pair) {
    pair.wait_source(&SourceEvent::Reclaimed);
    let ended = |event: &DestinationEvent| matches!(event, DestinationEvent::Ended(_));
    pair.at_destination.wait("the end at the destination", || pair.dump(), ended);
    assert!(matches!(pair.destination.ready(), Err(CallError::NotNow(_))));
    assert!(!pair.at_destination.rest().contains(&DestinationEvent::Run));
    pair.old.check(pair.setup.seed, pair.setup.content);
}

#[test]
fn a_guest_taken_back_before_ready_stays_at_the_source() {
    prologue!("a_guest_taken_back");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    pair.source.switch_over(vec![section("cpu", 10)]).expect("may switch over");
    pair.wait_state();
    pair.source.reclaim().expect("nothing was given yet");
    stays_at_the_source(&pair);
}

#[test]
fn a_guest_that_runs_is_not_taken_back() {
    prologue!("a_guest_that_runs");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    pair.switch(&[]);
    // Either the source knows already that the guest runs, or the destination says so.
    match pair.source.reclaim() {
        Err(CallError::NotNow(_)) => {}
        Ok(()) => pair.wait_source(&SourceEvent::ReclaimDenied),
        Err(other) => panic!("{other}"),
    }
    pair.finish();
    assert!(!pair.at_source.rest().contains(&SourceEvent::Reclaimed));
    pair.check_content();
}

#[test]
fn a_destination_that_refuses_gives_the_guest_back() {
    prologue!("a_destination_that_refuses");
    for is_ready in [false, true] {
        let pair = Pair::start(&Setup::default()).expect("no huge pages");
        pair.source.hold().expect("not over");
        pair.source.switch_over(vec![section("cpu", 10)]).expect("may switch over");
        pair.wait_state();
        if is_ready {
            pair.destination.ready().expect("all state is there");
            pair.wait_source(&SourceEvent::Held);
        }
        pair.destination.refuse().expect("it does not run here");
        pair.wait_destination(&DestinationEvent::Refused);
        pair.wait_source(&SourceEvent::Refused);
        stays_at_the_source(&pair);
    }
}

#[test]
fn a_guest_that_runs_is_not_refused() {
    prologue!("a_guest_that_runs_is_not_refused");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    pair.switch(&[]);
    let refused = pair.destination.refuse().expect_err("it runs here").to_string();
    assert!(refused.contains("on record that it runs"), "{refused}");
    pair.finish();
    pair.check_content();
}

#[test]
fn a_fenced_destination_is_told_and_stays_out() {
    prologue!("a_fenced_destination");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    pair.source.switch_over(vec![]).expect("may switch over");
    pair.wait_state();
    pair.source.fence().expect("the session is not over");
    pair.wait_source(&SourceEvent::Reclaimed);
    pair.wait_destination(&DestinationEvent::Fenced);
    assert!(matches!(pair.destination.ready(), Err(CallError::NotNow(_))));
    assert!(matches!(pair.source.fence(), Err(CallError::NotNow(_))));
}

#[test]
fn two_migrations_in_one_process_do_not_meet() {
    prologue!("two_migrations");
    let one = Setup { seed: 1, kinds: vec![(Kind::Memfd, 16 * MIB)], ..Setup::default() };
    let two = Setup { seed: 2, streams: 4, ..one.clone() };
    let (one, two) = (Pair::start(&one), Pair::start(&two));
    let pairs = [one.expect("no huge pages"), two.expect("no huge pages")];
    for pair in &pairs {
        pair.switch(&[section("cpu", pair.setup.seed as usize)]);
    }
    for pair in &pairs {
        pair.finish();
        pair.check_counts();
        pair.check_content();
    }
}

/// The roles that the hook was called with, and whether signals were blocked there.
type Calls = Arc<Mutex<HashMap<(ThreadRole, usize), bool>>>;

fn noting_hook() -> (ThreadHook, Calls) {
    let calls = Calls::default();
    let noted = Arc::clone(&calls);
    let hook = ThreadHook::new(move |role, number| {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("/proc");
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
        let blocked = u64::from_str_radix(blocked.expect("a mask").trim(), 16).expect("a mask");
        // All but SIGKILL, SIGSTOP and the two that the C library keeps for itself.
        let wanted = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGALRM, libc::SIGCHLD];
        let all = wanted.iter().all(|signal| blocked & (1 << (signal - 1)) != 0);
        noted.lock().expect("not poisoned").insert((role, number), all);
    });
    (hook, calls)
}

#[test]
fn the_hook_sees_every_thread_and_none_takes_signals() {
    prologue!("the_hook_sees");
    let setup = Setup { streams: 4, ..Setup::default() };
    let (for_source, at_source) = noting_hook();
    let (for_destination, at_destination) = noting_hook();
    let pair = Pair::start_with(
        &setup,
        |source, destination| {
            (source.threads, destination.threads) = (for_source, for_destination);
        },
        |address| address,
    )
    .expect("no huge pages");
    // All channels are opened before the switchover, but a migration this small may be over
    // before the last thread has begun.
    let check = |calls: &Calls, roles: &[(ThreadRole, usize)]| {
        let called = || calls.lock().expect("not poisoned").clone();
        common::wait_until(
            "every thread's hook",
            || format!("{roles:?} in {:?}", called()),
            || roles.iter().all(|role| called().contains_key(role)),
        );
        assert!(called().values().all(|blocked| *blocked), "{:?}", called());
    };
    let background = (0..4).map(|slot| (ThreadRole::Background, slot));
    let mut roles: Vec<_> = background.collect();
    roles.extend([(ThreadRole::Control, 0)]);
    roles.push((ThreadRole::Fault, 0));
    check(&at_destination, &roles);
    roles.pop();
    roles.extend([(ThreadRole::Acceptor, 0), (ThreadRole::Request, 0)]);
    check(&at_source, &roles);
    pair.switch(&[]);
    pair.finish();
}

#[test]
fn events_wake_an_event_loop() {
    use mio::unix::SourceFd;
    use std::os::fd::{AsFd, AsRawFd};
    prologue!("events_wake");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    let mut poll = mio::Poll::new().expect("epoll");
    let fds = [
        pair.at_source.events().as_fd().as_raw_fd(),
        pair.at_destination.events().as_fd().as_raw_fd(),
    ];
    for (token, fd) in fds.iter().enumerate() {
        let interest = mio::Interest::READABLE;
        poll.registry().register(&mut SourceFd(fd), mio::Token(token), interest).expect("epoll");
    }
    pair.source.switch_over(vec![]).expect("may switch over");
    let mut ready = mio::Events::with_capacity(4);
    let (mut source_done, mut destination_done) = (false, false);
    while !(source_done && destination_done) {
        poll.poll(&mut ready, Some(common::PATIENCE)).expect("epoll");
        assert!(!ready.is_empty(), "no event came\n{}", pair.dump());
        while let Some(event) = pair.at_source.events().try_next() {
            source_done |= event == SourceEvent::Finished;
        }
        while let Some(event) = pair.at_destination.events().try_next() {
            match event {
                DestinationEvent::State(_) => pair.destination.ready().expect("may be ready"),
                DestinationEvent::Finished => destination_done = true,
                _ => {}
            }
        }
    }
    pair.check_content();
}

#[test]
fn a_fault_before_the_switchover_waits_for_it() {
    prologue!("a_fault_before");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    let new = Arc::clone(&pair.new);
    let early = Toucher::start(move || new.word(1234, 7).load(Ordering::Relaxed));
    let attached = |event: &SourceEvent| matches!(event, SourceEvent::Attached(_));
    pair.at_source.wait("a destination", || pair.dump(), attached);
    assert_eq!(pair.destination.stats().pages_complete, 0);
    pair.switch(&[]);
    let found = early.finish("the early fault", || pair.dump());
    assert_eq!(found, pair.old.word(1234, 7).load(Ordering::Relaxed));
    pair.finish();
    pair.check_content();
}

#[test]
fn discards_count_once_and_read_as_zero() {
    prologue!("discards_count");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let setup = Setup {
            kinds: vec![(kind, 16 * MIB)],
            discards: DiscardNotice::Called,
            ..Setup::default()
        };
        let pair = Pair::start(&setup).expect("no huge pages");
        // Before anything is sent: every discarded page is one that has not arrived.
        pair.destination.discard(pair.new.guest_address(100), 50 * 4096);
        pair.destination.discard(pair.new.guest_address(140), 20 * 4096);
        pair.switch(&[]);
        pair.finish();
        let stats = pair.check_counts();
        assert_eq!(stats.pages_discarded, 60);
        pair.new.check_pages(setup.seed, setup.content, 0, 100);
        pair.new.check_pages(setup.seed, setup.content, 160, pair.new.small_pages());
        for page in 100..160 {
            assert!((0..512).all(|word| pair.new.word(page, word).load(Ordering::Relaxed) == 0));
        }
    }
}

#[test]
fn device_state_goes_before_the_background_but_does_not_keep_it_away() {
    prologue!("device_state_goes_first");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    let attached = |event: &SourceEvent| matches!(event, SourceEvent::Attached(_));
    pair.at_source.wait("a destination", || pair.dump(), attached);
    let stopped = Instant::now();
    let state = vec![section("cpu", 100_000)];
    pair.source.switch_over(state.clone()).expect("may switch over");
    assert_eq!(pair.wait_state(), state);
    // Nobody says that it is restored.
    common::wait_until("pages", || pair.dump(), || pair.destination.stats().pages_complete > 0);
    assert!(stopped.elapsed() >= Duration::from_millis(100), "{:?}", stopped.elapsed());
    pair.destination.ready().expect("may run");
    pair.finish();
    pair.check_content();
}
