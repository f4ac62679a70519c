//! A source that frees what has arrived: memory really goes, and no cut, no restart and nobody
//! who lost something ever makes a freed page be read as zeros.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DestinationLedger, DestinationOptions,
    DestinationRecord, DiscardNotice, Endpoint, Incarnation, Release, ReleaseError, ReleaseLedger,
    SessionId, SnapshotServer, Source, SourceEvent, SourceLedger, SourceMemory, SourceOptions,
    SourceOwnership, SourcePages, SourceRecord, SourceRegion, StartError,
};
use afterimage_protocol::wire::Epoch;
use common::children::{Role, argument, say};
use common::counters::{Counters, LOCK};
use common::proxy::{Cut, Proxy};
use common::{Content, EventLog, Kind, Listening, Memory, Pair, Random, Setup, Toucher};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn frees(options: &mut SourceOptions) {
    options.release = Release::Free(ReleaseLedger::volatile());
}

/// A pair whose source frees pages; `None` without huge pages.
fn releasing(setup: &Setup, background: Background) -> Option<Pair> {
    Pair::start_with(
        setup,
        |source, _| {
            frees(source);
            source.background = background;
        },
        |address| address,
    )
}

/// The guest reads some pages of 4 KiB at the destination.
fn touch(pair: &Pair, from: u64, to: u64) {
    let (new, Setup { seed, content, .. }) = (Arc::clone(&pair.new), pair.setup.clone());
    Toucher::start(move || new.check_pages(seed, content, from, to))
        .finish("the guest reads", || pair.dump());
}

fn wait_released(pair: &Pair, pages: u64) {
    common::wait_until(
        "pages to be freed",
        || pair.dump(),
        || pair.source.stats().pages_released >= pages,
    );
}

#[test]
fn memory_that_has_arrived_goes_while_the_guest_runs() {
    prologue!("memory_that_has_arrived_goes");
    for kind in [Kind::Anonymous, Kind::Memfd, Kind::Huge] {
        let setup = Setup { kinds: vec![(kind, 16 * MIB)], ..Setup::default() };
        let Some(pair) = releasing(&setup, Background::OnRequest) else { continue };
        pair.switch(&[]);
        pair.wait_source(&SourceEvent::Running);
        assert_eq!(pair.old.resident_bytes(), 16 * MIB, "{kind:?}");
        touch(&pair, 0, 2048);
        wait_released(&pair, 2048);
        assert_eq!(pair.source.stats().pages_released, 2048, "no more than was touched");
        assert_eq!(pair.old.resident_bytes(), 8 * MIB, "{kind:?}");
        for refused in [pair.source.fence(), pair.source.reclaim()] {
            let error = refused.expect_err("the guest is nowhere else").to_string();
            assert!(error.contains("at the destination alone"), "{error}");
        }
        pair.source.set_background(Background::Unlimited);
        pair.finish();
        pair.check_counts();
        pair.check_content();
        assert_eq!(pair.source.stats().pages_unreadable, 0);
    }
}

#[test]
fn nothing_is_freed_before_the_guest_runs_elsewhere_and_new_memory_finds_everything() {
    prologue!("nothing_is_freed_before_the_guest_runs");
    let setup = Setup { kinds: vec![(Kind::Anonymous, 8 * MIB)], ..Setup::default() };
    let mut address = None;
    let pair = Pair::start_with(&setup, |source, _| frees(source), |it| address.insert(it).clone());
    let (pair, address) = (pair.expect("no huge pages"), address.expect("an address"));
    pair.source.switch_over(Vec::new()).expect("may switch over");
    pair.wait_state();
    common::wait_until(
        "all pages to be acknowledged",
        || pair.dump(),
        || pair.source.stats().pages_acknowledged == 2048,
    );
    let Pair { source, destination, at_source, old, .. } = pair;
    drop(destination);
    let new = Memory::new(&setup.kinds);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let options = common::session::destination_options(&setup);
    let (destination, events) =
        Destination::start(memory, Endpoint::Connect(address), options).expect("a destination");
    let events = EventLog::new(events);
    let dump = || format!("{:?} {:?}", source.stats(), destination.stats());
    events.wait("state", dump, |it| matches!(it, DestinationEvent::State(_)));
    assert_eq!(source.stats().pages_released, 0);
    assert_eq!(old.resident_bytes(), 8 * MIB);
    destination.ready().expect("may be ready");
    events.wait("the end", dump, |it| *it == DestinationEvent::Finished);
    at_source.wait("the end", dump, |it| *it == SourceEvent::Finished);
    new.check(setup.seed, setup.content);
}

/// A guest counts while everything is cut again and again, and what has arrived is freed.
#[test]
fn cuts_lose_nothing_while_pages_are_freed() {
    prologue!("cuts_lose_nothing_while_pages_are_freed");
    let mut random = Random::seeded("cuts_lose_nothing_while_pages_are_freed");
    for (kind, listening, content) in [
        (Kind::Anonymous, Listening::Source, Content::Dense),
        (Kind::Memfd, Listening::Destination, Content::Dense),
        (Kind::Anonymous, Listening::Destination, Content::Scattered),
    ] {
        let setup = Setup {
            kinds: vec![(kind, 24 * MIB)],
            streams: 2,
            listening,
            content,
            ..Setup::default()
        };
        // What the source had: its own memory goes.
        let twin = Memory::new(&setup.kinds);
        twin.fill(setup.seed, setup.content);
        let mut proxy = None;
        let detour = |address| proxy.insert(Proxy::start(&address)).address();
        let pair = Pair::start_with(&setup, |source, _| frees(source), detour);
        let (pair, proxy) = (pair.expect("no huge pages"), proxy.expect("a detour"));
        free_locks(&pair.old);
        let counters = Counters::prepare(&twin, Arc::clone(&pair.new));
        proxy.hold_at(1);
        pair.switch(&[]);
        let threads = counters.start(4, 1000, &mut random);
        let full = if content == Content::Scattered { 4 } else { 1 };
        let (cuts, total) = (6, 24 * MIB / full);
        for cut in 1..=cuts {
            let goal = total / (cuts + 1) * cut;
            proxy.hold_at(goal);
            common::wait_until(
                "bytes in the proxy, and pages freed",
                || pair.dump(),
                || {
                    let stats = pair.source.stats();
                    proxy.bytes() >= goal
                        && stats.pages_released > 0
                        && stats.pages_released >= stats.pages_acknowledged / 2
                },
            );
            let mut chosen = random.fork();
            let is_whole = cut % 2 == 0;
            let of_these = std::cell::RefCell::new(&mut chosen);
            proxy.cut(Cut::any(&mut random), |_| is_whole || of_these.borrow_mut().below(3) == 0);
            common::wait_until("the cut", || pair.dump(), || proxy.is_settled());
        }
        proxy.hold_at(u64::MAX);
        for thread in threads {
            thread.finish("a guest thread that counts", || pair.dump());
        }
        pair.finish();
        counters.check(&twin);
        pair.check_counts();
        assert!(pair.destination.stats().recoveries >= 1);
        assert!(pair.old.resident_bytes() < twin.resident_bytes());
    }
}

/// Threads that add to every page of a range, in an order of their own.
fn count_in(
    counters: &Arc<Counters>,
    pages: std::ops::Range<u64>,
    random: &mut Random,
) -> Vec<Toucher<()>> {
    let thread = |_| {
        let (counters, pages, start) = (Arc::clone(counters), pages.clone(), random.below(1 << 20));
        Toucher::start(move || {
            let count = pages.end - pages.start;
            for step in 0..count {
                counters.add_one(pages.start + (start + step * 7) % count);
            }
        })
    };
    (0..3).map(thread).collect()
}

/// The locks of [`Counters`] are free in the memory that is served.
fn free_locks(memory: &Memory) {
    for page in 0..memory.small_pages() {
        memory.word(page, LOCK).store(0, Ordering::Relaxed);
    }
}

/// Keeps a record in a file, as a page server does.
fn write_record(path: &Path, record: &SourceRecord) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    bytes.extend(record.session.0);
    bytes.extend(record.incarnation.0);
    bytes.extend(record.epoch.0.to_le_bytes());
    bytes.extend([record.ownership as u8, record.pages as u8]);
    let new = path.with_extension("new");
    std::fs::write(&new, &bytes)?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, path)
}

fn read_record(path: &Path) -> Option<SourceRecord> {
    let bytes = std::fs::read(path).ok()?;
    let mut record = SourceRecord::new(SessionId(bytes[..16].try_into().expect("16 bytes")));
    record.incarnation = Incarnation(bytes[16..32].try_into().expect("16 bytes"));
    record.epoch = Epoch(u32::from_le_bytes(bytes[32..36].try_into().expect("4 bytes")));
    record.ownership = match bytes[36] {
        1 => SourceOwnership::Owner,
        2 => SourceOwnership::Given,
        5 => SourceOwnership::Finished,
        other => panic!("ownership {other}"),
    };
    record.pages = if bytes[37] == 2 { SourcePages::Released } else { SourcePages::Whole };
    Some(record)
}

/// Serves a memfd of the parent's in a child of its own, from the record and the ledger beside
/// it.
#[test]
fn child_frees() {
    let Some(given) = argument("child_frees") else { return };
    let (directory, memory) = given.split_once(' ').expect("a directory and memory");
    let directory = PathBuf::from(directory);
    let open = |path: &Path| {
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    };
    let file = open(Path::new(memory));
    let length = file.metadata().unwrap().len();
    let region = SourceRegion::file(afterimage::GuestAddress(0), file.into(), 0, length).unwrap();
    let memory = Arc::new(SourceMemory::new(vec![region]).unwrap());
    let record_path = directory.join("record");
    let mut options = common::session::source_options(&Setup::default());
    let record = read_record(&record_path);
    if let Some(record) = record {
        options.record = record;
    }
    let ledger = open(&directory.join("ledger"));
    options.release = Release::Free(ReleaseLedger::file(ledger.into()));
    options.ledger = SourceLedger::new(move |record| write_record(&record_path, record));
    options.background = Background::OnRequest;
    let address = afterimage::Address::Unix(directory.join("socket"));
    let endpoint = Endpoint::Listen(common::session::listen_at(&address));
    let (source, events) = Source::start(memory, endpoint, options).expect("a source");
    say("listening");
    if record.is_none() {
        source.switch_over(Vec::new()).expect("may switch over");
    }
    let events = EventLog::new(events);
    let dump = || format!("{:?}", source.stats());
    events.wait("the guest to run", dump, |it| *it == SourceEvent::Running);
    let before = source.stats().pages_released;
    common::wait_until("pages to be freed", dump, || source.stats().pages_released >= before + 300);
    say(&format!("released {}", source.stats().pages_released));
    // The first ones are killed here: only what the guest touches leaves until then.
    source.set_background(if before < 600 { Background::OnRequest } else { Background::Unlimited });
    events.wait("the end", dump, |it| *it == SourceEvent::Finished);
    say(&format!("finished {:?}", source.stats()));
}

#[test]
fn a_source_that_is_killed_and_started_again_goes_on_and_remembers_what_it_freed() {
    prologue!("a_source_that_is_killed_and_started_again");
    let mut random = Random::seeded("a_source_that_is_killed_and_started_again");
    let kinds = [(Kind::Memfd, 32 * MIB)];
    let (old, new, twin) = (Memory::new(&kinds), Memory::new(&kinds), Memory::new(&kinds));
    for memory in [&old, &twin] {
        memory.fill(7, Content::Dense);
    }
    free_locks(&old);
    let counters = Counters::prepare(&twin, Arc::clone(&new));
    let directory = tempfile::tempdir().expect("a directory");
    let given = format!("{} {}", directory.path().display(), old.path_of(0));
    let mut child = Role::start("child_frees", &given);
    assert_eq!(child.hear("where it listens"), "listening");
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let address = afterimage::Address::Unix(directory.path().join("socket"));
    let options = common::session::destination_options(&Setup::default());
    let (destination, events) =
        Destination::start(memory, Endpoint::Connect(address), options).expect("a destination");
    let events = EventLog::new(events);
    let dump = || format!("{:?} {:?}", destination.stats(), events.rest());
    events.wait("state", dump, |it| matches!(it, DestinationEvent::State(_)));
    destination.ready().expect("may be ready");
    events.wait("run", dump, |it| *it == DestinationEvent::Run);
    let mut threads = count_in(&counters, 0..2000, &mut random);
    for round in 1..=2 {
        let line = child.hear("pages that were freed");
        let released = line.strip_prefix("released ").expect("a number of pages");
        let released: u64 = released.parse().expect("a number of pages");
        assert!(released >= 300 * round, "{line}");
        assert!(old.resident_bytes() <= 32 * MIB - released * PAGE);
        // SIGKILL.
        drop(child);
        let record = read_record(&directory.path().join("record")).expect("a record");
        assert_eq!(record.pages, SourcePages::Released);
        std::fs::remove_file(directory.path().join("socket")).expect("a socket left behind");
        // They wait until a source is there again.
        threads.extend(count_in(&counters, 2000 * round..2000 * (round + 1), &mut random));
        child = Role::start("child_frees", &given);
        assert_eq!(child.hear("where it listens again"), "listening");
    }
    for thread in threads {
        thread.finish("a guest thread that counts", dump);
    }
    let line = child.hear("pages that were freed");
    assert!(line.starts_with("released "), "{line}");
    events.wait("the end", dump, |it| *it == DestinationEvent::Finished);
    let line = child.hear("its end");
    assert!(line.starts_with("finished ") && line.contains("pages_unreadable: 0"), "{line}");
    child.finish();
    assert_eq!(destination.stats().recoveries, 2);
    counters.check(&twin);
    drop(destination);
}

#[test]
fn a_destination_that_lost_a_freed_page_is_refused_and_never_sent_zeros() {
    prologue!("a_destination_that_lost_a_freed_page");
    let setup = Setup { kinds: vec![(Kind::Memfd, 8 * MIB)], ..Setup::default() };
    let record: Arc<Mutex<Option<DestinationRecord>>> = Arc::default();
    let noted = Arc::clone(&record);
    let mut address = None;
    let change = move |source: &mut SourceOptions, destination: &mut DestinationOptions| {
        frees(source);
        source.background = Background::OnRequest;
        destination.ledger = DestinationLedger::new(move |record| {
            *noted.lock().expect("not poisoned") = Some(*record);
            Ok(())
        });
    };
    let pair = Pair::start_with(&setup, change, |it| address.insert(it).clone());
    let (pair, address) = (pair.expect("no huge pages"), address.expect("an address"));
    pair.switch(&[]);
    touch(&pair, 100, 200);
    wait_released(&pair, 100);
    let Pair { source, destination, at_source, .. } = pair;
    drop(destination);
    // Its record came back, its memory did not.
    let new = Memory::new(&setup.kinds);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let mut options = common::session::destination_options(&setup);
    options.record = record.lock().expect("not poisoned").expect("a record");
    let (destination, _events) =
        Destination::start(memory, Endpoint::Connect(address), options).expect("a destination");
    let dump = || format!("{:?} {:?}", source.stats(), destination.stats());
    let told =
        |it: &SourceEvent| matches!(it, SourceEvent::Lost { first, count: 100 } if first.0 == 100);
    at_source.wait("the loss to be told", dump, told);
    let stats = destination.stats();
    assert_eq!((stats.pages_complete, stats.bytes_received), (0, 0), "{stats:?}");
    assert!(source.fence().is_err(), "there is nothing to go on with here");
}

#[test]
fn what_cannot_free_pages_or_does_not_know_which_were_freed_is_refused() {
    let memory = Memory::new(&[(Kind::Memfd, MIB)]);
    let listen = || common::session::listen();
    let mut options = SourceOptions::default();
    frees(&mut options);
    let refused = SnapshotServer::start(memory.as_source(), listen(), options, 3);
    let error = refused.expect_err("a snapshot frees nothing");
    assert!(matches!(error, StartError::Release(ReleaseError::Snapshot)), "{error}");

    for (release, is_known) in
        [(Release::Keep, false), (Release::Free(ReleaseLedger::volatile()), true)]
    {
        let mut options = SourceOptions::default();
        options.record.ownership = SourceOwnership::Given;
        options.record.pages = SourcePages::Released;
        options.release = release;
        let refused = Source::start(memory.as_source(), Endpoint::Listen(listen()), options);
        let error = refused.expect_err("nobody knows which pages were freed");
        let expected = match error {
            StartError::Release(ReleaseError::Forgotten) => is_known,
            StartError::Release(ReleaseError::NoLedger) => !is_known,
            _ => false,
        };
        assert!(expected && error.to_string().contains("give the ledger"), "{error}");
    }
}

#[test]
fn a_source_that_is_started_again_in_its_process_takes_its_ledger_along() {
    prologue!("a_source_that_is_started_again_in_its_process");
    let transport = common::Transport::Unix;
    let setup = Setup { kinds: vec![(Kind::Anonymous, 16 * MIB)], transport, ..Setup::default() };
    let record: Arc<Mutex<Option<SourceRecord>>> = Arc::default();
    let (noted, ledger) = (Arc::clone(&record), ReleaseLedger::volatile());
    let given = ledger.clone();
    let mut address = None;
    let change = move |source: &mut SourceOptions, _: &mut DestinationOptions| {
        source.release = Release::Free(given);
        source.background = Background::OnRequest;
        source.ledger = SourceLedger::new(move |record| {
            *noted.lock().expect("not poisoned") = Some(*record);
            Ok(())
        });
    };
    let pair = Pair::start_with(&setup, change, |it| address.insert(it).clone());
    let (pair, address) = (pair.expect("no huge pages"), address.expect("an address"));
    pair.switch(&[]);
    touch(&pair, 0, 500);
    wait_released(&pair, 500);
    let Pair { source, destination, at_destination, old, new, .. } = pair;
    let dump = || format!("{:?} {:?}", destination.stats(), at_destination.rest());
    drop(source);
    let mut options = common::session::source_options(&setup);
    options.record = record.lock().expect("not poisoned").expect("a record");
    options.release = Release::Free(ledger);
    let endpoint = Endpoint::Listen(common::session::listen_at(&address));
    let (source, events) = Source::start(old.as_source(), endpoint, options).expect("a source");
    assert_eq!(source.stats().pages_released, 500);
    at_destination.wait("the end", dump, |it| *it == DestinationEvent::Finished);
    EventLog::new(events).wait("the end", dump, |it| *it == SourceEvent::Finished);
    new.check(setup.seed, setup.content);
}

/// The ledger's file cannot be written: nothing is freed, and the migration goes on.
#[test]
fn a_ledger_that_cannot_be_written_frees_nothing_and_holds_nobody_up() {
    prologue!("a_ledger_that_cannot_be_written");
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ledger");
    let setup = Setup { kinds: vec![(Kind::Memfd, 8 * MIB)], ..Setup::default() };
    let mut options = SourceOptions::default();
    let writable = File::create_new(&path).expect("a file");
    // A ledger of this session and this memory, made by hand: a header as it is in the file.
    let mut header = b"AFTRELS\n\x01\0\0\0\0\0\0\0".to_vec();
    header.extend(options.record.session.0);
    header.extend((8 * MIB / PAGE).to_le_bytes());
    writable.write_all_at(&header, 0).expect("a header");
    writable.set_len(4096 + 8 * MIB / PAGE / 8).expect("room for the bits");
    let read_only = File::open(&path).expect("the file");
    options.release = Release::Free(ReleaseLedger::file(read_only.into()));
    let pair = Pair::start_with(
        &setup,
        |source, _| (source.record, source.release) = (options.record, options.release),
        |address| address,
    );
    let pair = pair.expect("no huge pages");
    pair.switch(&[]);
    pair.finish();
    pair.check_content();
    assert_eq!(pair.source.stats().pages_released, 0);
    assert_eq!(pair.old.resident_bytes(), 8 * MIB);
}
