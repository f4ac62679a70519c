//! A snapshot's memory that lies on the destination's machine too.
//!
//! Invariant: a guest reads what its source has, whichever way a page came.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DestinationStats, DiscardNotice, Endpoint, Events,
    Incarnation, SnapshotServer, SourceEvent, SourceMemory, SourceRegion, SourceStats, StartError,
};
use common::small_disk::on_a_small_disk;
use common::{Content, EventLog, Kind, Memory, Pair, Setup, Toucher};
use nix::sys::resource::{UsageWho, getrusage};
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
/// Vcpus, so to say.
const THREADS: u64 = 4;

/// A guest that runs while its memory comes.
struct Restored {
    destination: Destination,
    events: EventLog<DestinationEvent>,
    server: SnapshotServer,
    _at_server: Events<(Incarnation, SourceEvent)>,
    _memory: Arc<Memory>,
}

impl Restored {
    /// In `new`, of a server's memory like that, with this image.
    fn start(
        setup: &Setup,
        background: Background,
        image: Arc<SourceMemory>,
        new: &Memory,
    ) -> Option<Self> {
        let memory = Memory::try_new(&setup.kinds)?;
        memory.fill(setup.seed, setup.content);
        let listener = common::session::listen();
        let address = listener.address().clone();
        let mut options = common::session::source_options(setup);
        options.background = background;
        let (server, at_server) =
            SnapshotServer::start(memory.as_source(), listener, options, 1).expect("a server");
        let mut options = common::session::destination_options(setup);
        options.image = Some(image);
        let registered = new.register(setup.discards).expect("registered memory");
        let (destination, events) =
            Destination::start(registered, Endpoint::Connect(address), options).expect("started");
        let events = EventLog::new(events);
        let restored = Self { destination, events, server, _at_server: at_server, _memory: memory };
        restored.wait("the state of a snapshot", |it| matches!(it, DestinationEvent::State(_)));
        restored.destination.ready().expect("may be ready");
        restored.wait("run", |event| *event == DestinationEvent::Run);
        Some(restored)
    }

    fn wait(&self, what: &str, is_wanted: impl Fn(&DestinationEvent) -> bool) {
        self.events.wait(what, || self.dump(), is_wanted);
    }

    fn dump(&self) -> String {
        format!("{:?} {:?}", self.server.stats(), self.destination.stats())
    }

    /// What the server has done, and this side.
    fn stats(&self) -> (SourceStats, DestinationStats) {
        let (_, at_source) = self.server.stats().destinations.pop().expect("one");
        (at_source, self.destination.stats())
    }
}

/// Restores a guest with this image, which reads all of its memory while it comes, and says what
/// both sides have done.
fn restore(
    setup: &Setup,
    background: Background,
    image: Arc<SourceMemory>,
) -> Option<(SourceStats, DestinationStats)> {
    let new = Memory::try_new(&setup.kinds)?;
    let restored = Restored::start(setup, background, image, &new)?;
    let readers = (0..THREADS).map(|thread| {
        let (new, seed, content) = (Arc::clone(&new), setup.seed, setup.content);
        let at = |part: u64| new.small_pages() * part / THREADS;
        let (from, to) = (at(thread), at(thread + 1));
        Toucher::start(move || new.check_pages(seed, content, from, to))
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.finish("a reader", || restored.dump());
    }
    restored.wait("the end", |event| *event == DestinationEvent::Finished);
    new.check(setup.seed, setup.content);
    Some(restored.stats())
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
            let restored = restore(&setup, Background::OnRequest, image.as_source());
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
        let restored = restore(&setup, Background::Unlimited, image.as_source());
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
    let source = image.as_source();
    let file = OpenOptions::new().write(true).open(image.path_of(0)).expect("its file");
    file.set_len(4 * MIB).expect("cut");
    let restored = restore(&setup, Background::OnRequest, source);
    let (at_source, here) = restored.expect("no huge pages");
    assert_eq!(here.pages_requested, here.pages_total, "{here:?}");
    let lacking = here.pages_total / 2;
    assert!((lacking..lacking + 8).contains(&at_source.pages_requested), "{at_source:?}");
}

/// A snapshot's file as it is on a disk: regions lie in it one behind the other.
#[test]
fn an_image_on_a_disk_is_right_whatever_is_cached() {
    prologue!("an_image_on_a_disk");
    let kinds = vec![(Kind::Anonymous, 2 * MIB), (Kind::Memfd, 4 * MIB)];
    let setup = Setup { kinds, content: Content::ZeroRuns, ..Setup::default() };
    let image = Memory::new(&as_files(&setup));
    image.fill(setup.seed, setup.content);
    let file = tempfile::tempfile().expect("a file");
    let (mut offset, mut regions) = (MIB, Vec::new());
    for (area, (_, length)) in setup.kinds.iter().enumerate() {
        let content = std::fs::read(image.path_of(area)).expect("its content");
        file.write_all_at(&content, offset).expect("written");
        let address = image.guest_address(offset.saturating_sub(MIB) / 4096);
        let same = file.try_clone().expect("a descriptor").into();
        regions.push(SourceRegion::file(address, same, offset, *length).expect("a region"));
        offset += length;
    }
    let source = Arc::new(SourceMemory::new(regions).expect("a layout"));
    let (_, here) = restore(&setup, Background::OnRequest, source).expect("no huge pages");
    assert_eq!(here.pages_requested + here.pages_zero, here.pages_total, "{here:?}");
}

/// A page that cannot be put in place wakes whoever waits for it, who faults again.
#[test]
fn a_page_for_which_there_is_no_room_is_not_tried_without_end() {
    prologue!("a_page_for_which_there_is_no_room");
    on_a_small_disk("2m", |directory| {
        let setup = Setup { kinds: vec![(Kind::Memfd, 4 * MIB)], ..Setup::default() };
        let open = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).open(directory.join(name)).unwrap()
        };
        // There is room for some pages, and for no more.
        let filler = open("filler");
        filler.write_all_at(&vec![1; MIB as usize], 0).unwrap();
        let new = Memory::on_file(open("memory"), 4 * MIB, &[]);
        let image = Memory::new(&as_files(&setup));
        image.fill(setup.seed, setup.content);
        let restored = Restored::start(&setup, Background::OnRequest, image.as_source(), &new);
        let restored = restored.expect("no huge pages");
        let reader = {
            let new = Arc::clone(&new);
            Toucher::start(move || {
                new.check_pages(setup.seed, setup.content, 0, 400);
                getrusage(UsageWho::RUSAGE_THREAD).expect("what it has used")
            })
        };
        restored.wait("no room", |event| matches!(event, DestinationEvent::Failed(_)));
        // Taken once, and then asked for.
        let has_tried = || restored.stats().0.pages_requested >= 2;
        common::wait_until("that it is asked for", || restored.dump(), has_tried);
        filler.set_len(0).unwrap();
        let usage = reader.finish("a reader that has room", || restored.dump());
        // Each time that it was woken it had to wait again.
        let waits = usage.voluntary_context_switches();
        assert!(waits < 2000, "waited {waits} times: {}", restored.dump());
    });
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
fn an_image_that_cannot_be_used_is_refused() {
    prologue!("an_image_that_cannot_be_used");
    let refused = |kind: Kind, length: u64| {
        let image = Memory::new(&[(kind, length)]);
        let mut options = common::session::destination_options(&Setup::default());
        options.image = Some(image.as_source());
        let memory = Memory::new(&[(Kind::Memfd, MIB)]);
        let registered = memory.register(DiscardNotice::Called).expect("registered memory");
        let endpoint = Endpoint::Listen(common::session::listen());
        match Destination::start(registered, endpoint, options).map(drop) {
            Err(StartError::Image { reason }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let other = refused(Kind::Memfd, 2 * MIB);
    assert!(other.contains("0x200000 bytes"), "{other}");
    let private = refused(Kind::Anonymous, MIB);
    assert!(private.contains("no file"), "{private}");
}
