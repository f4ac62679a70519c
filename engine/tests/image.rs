//! A snapshot's memory that lies on the destination's machine too.
//!
//! Invariant: a guest reads what its source has, whichever way a page came.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DestinationStats, DiscardNotice, Endpoint,
    SnapshotServer, SourceMemory, SourceStats, StartError,
};
use common::{Content, EventLog, Kind, Memory, Pair, Setup, Toucher};
use std::fs::OpenOptions;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
/// Vcpus, so to say.
const THREADS: u64 = 4;

/// Restores a guest with this image, which reads all of its memory while it comes, and says what
/// both sides have done.
fn restore(
    setup: &Setup,
    background: Background,
    image: impl FnOnce(&Memory) -> Arc<SourceMemory>,
) -> Option<(SourceStats, DestinationStats)> {
    let memory = Memory::try_new(&setup.kinds)?;
    let new = Memory::try_new(&setup.kinds)?;
    memory.fill(setup.seed, setup.content);
    let listener = common::session::listen();
    let address = listener.address().clone();
    let mut options = common::session::source_options(setup);
    options.background = background;
    let (server, _events) =
        SnapshotServer::start(memory.as_source(), listener, options, 1).expect("a server");
    let mut options = common::session::destination_options(setup);
    options.image = Some(image(&memory));
    let registered = new.register(setup.discards).expect("registered memory");
    let (destination, events) =
        Destination::start(registered, Endpoint::Connect(address), options).expect("started");
    let events = EventLog::new(events);
    let dump = || format!("{:?} {:?}", server.stats(), destination.stats());
    let state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
    events.wait("the state of a snapshot", dump, state);
    destination.ready().expect("may be ready");
    events.wait("run", dump, |event| *event == DestinationEvent::Run);
    let readers = (0..THREADS).map(|thread| {
        let (new, seed, content) = (Arc::clone(&new), setup.seed, setup.content);
        let at = |part: u64| new.small_pages() * part / THREADS;
        let (from, to) = (at(thread), at(thread + 1));
        Toucher::start(move || new.check_pages(seed, content, from, to))
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.finish("a reader", dump);
    }
    // What is a hole for the source and was not read comes in background, or not at all.
    events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
    new.check(setup.seed, setup.content);
    let (_, at_source) = server.stats().destinations.pop().expect("one");
    Some((at_source, destination.stats()))
}

#[test]
fn who_waits_for_a_page_gets_it_from_the_image() {
    prologue!("who_waits_for_a_page");
    for kinds in [
        vec![(Kind::Anonymous, 8 * MIB), (Kind::Memfd, 8 * MIB)],
        vec![(Kind::Huge, 16 * MIB), (Kind::Memfd, 2 * MIB)],
    ] {
        for content in [Content::Dense, Content::ZeroRuns] {
            let setup = Setup { kinds: kinds.clone(), content, ..Setup::default() };
            // Of the same memory in files of its own.
            let image = Memory::try_new(&as_files(&setup));
            let Some(image) = image else { continue };
            image.fill(setup.seed, setup.content);
            let restored = restore(&setup, Background::OnRequest, |_| image.as_source());
            let Some((at_source, here)) = restored else { continue };
            let counted = here.pages_requested + here.pages_zero;
            assert_eq!((counted, here.pages_background), (here.pages_total, 0), "{here:?}");
            // Nothing but what was touched before the session began.
            assert!(at_source.pages_requested < 8, "{at_source:?} {here:?}");
            assert_eq!(here.fault_latency.count, here.pages_total, "{here:?}");
        }
    }
}

/// The same memory, all of it in files.
fn as_files(setup: &Setup) -> Vec<(Kind, u64)> {
    setup.kinds.iter().map(|&(_, length)| (Kind::Memfd, length)).collect()
}

#[test]
fn pages_come_from_the_image_and_in_background_at_once() {
    prologue!("pages_come_from_the_image");
    for round in 0..10 {
        let kind = [Kind::Anonymous, Kind::Memfd][round % 2];
        let kinds = vec![(kind, 32 * MIB)];
        let setup = Setup { kinds, streams: 2, content: Content::ZeroRuns, ..Setup::default() };
        let image = Memory::new(&as_files(&setup));
        image.fill(setup.seed, setup.content);
        let restored = restore(&setup, Background::Unlimited, |_| image.as_source());
        let (at_source, here) = restored.expect("no huge pages");
        let once = here.pages_requested + here.pages_background + here.pages_zero;
        assert_eq!(once, here.pages_total, "{here:?}");
        assert_eq!(at_source.pages_acknowledged, here.pages_total, "{at_source:?}");
    }
}

/// An image that was cut short since: what it lacks is asked for.
#[test]
fn what_the_image_lacks_comes_from_the_source() {
    prologue!("what_the_image_lacks");
    let setup = Setup { kinds: vec![(Kind::Anonymous, 8 * MIB)], ..Setup::default() };
    let image = Memory::new(&as_files(&setup));
    image.fill(setup.seed, setup.content);
    let restored = restore(&setup, Background::OnRequest, |_| {
        let memory = image.as_source();
        let file = OpenOptions::new().write(true).open(image.path_of(0)).expect("its file");
        file.set_len(4 * MIB).expect("cut");
        memory
    });
    let (at_source, here) = restored.expect("no huge pages");
    assert_eq!(here.pages_requested, here.pages_total, "{here:?}");
    let lacking = here.pages_total / 2;
    assert!((lacking..lacking + 8).contains(&at_source.pages_requested), "{at_source:?}");
}

#[test]
fn the_image_of_a_guest_that_moves_is_not_looked_at() {
    prologue!("the_image_of_a_guest_that_moves");
    let setup = Setup { kinds: vec![(Kind::Memfd, 8 * MIB)], ..Setup::default() };
    let other = Memory::new(&setup.kinds);
    other.fill(setup.seed + 1, Content::Dense);
    let pair = Pair::start_with(
        &setup,
        |source, destination| {
            source.background = Background::OnRequest;
            destination.image = Some(other.as_source());
        },
        |address| address,
    );
    let pair = pair.expect("no huge pages");
    pair.switch(&[]);
    let (new, seed, content) = (Arc::clone(&pair.new), setup.seed, setup.content);
    Toucher::start(move || new.check(seed, content)).finish("a reader", || pair.dump());
    pair.finish();
    pair.check_counts();
}

#[test]
fn an_image_of_other_memory_is_refused() {
    prologue!("an_image_of_other_memory");
    let memory = Memory::new(&[(Kind::Memfd, MIB)]);
    let image = Memory::new(&[(Kind::Memfd, 2 * MIB)]);
    let mut options = common::session::destination_options(&Setup::default());
    options.image = Some(image.as_source());
    let registered = memory.register(DiscardNotice::Called).expect("registered memory");
    let endpoint = Endpoint::Listen(common::session::listen());
    let refused = Destination::start(registered, endpoint, options).map(drop);
    let Err(StartError::Image { reason }) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("0x200000 bytes"), "{reason}");
}
