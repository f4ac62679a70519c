//! Sides in processes of their own, sides that end, and many destinations of one image.

mod common;

use afterimage::{
    Destination, DestinationEvent, DiscardNotice, Endpoint, SnapshotServer, Source, SourceEvent,
    SourceLedger, SourceOwnership, SourceRecord, StateSection,
};
use common::children::{Role, argument, say};
use common::counters::Counters;
use common::{Content, EventLog, Kind, Listening, Memory, Pair, Random, Setup, Toucher, Transport};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;

fn shared_setup() -> Setup {
    Setup {
        kinds: vec![(Kind::Memfd, 8 * MIB), (Kind::Anonymous, 8 * MIB)],
        content: Content::ZeroRuns,
        seed: 4711,
        streams: 4,
        ..Setup::default()
    }
}

fn state() -> Vec<StateSection> {
    vec![StateSection { name: "cpu".into(), version: 2, bytes: vec![3; 2 << 20] }]
}

/// Plays the source in a child of its own.
#[test]
fn child_source() {
    let Some(address) = argument("child_source") else { return };
    let setup = shared_setup();
    let old = Memory::new(&setup.kinds);
    old.fill(setup.seed, setup.content);
    let endpoint = if address.is_empty() {
        let listener = common::session::listen();
        say(&listener.address().to_string());
        Endpoint::Listen(listener)
    } else {
        Endpoint::Connect(address.parse().expect("an address"))
    };
    let options = common::session::source_options(&setup);
    let (source, events) = Source::start(old.as_source(), endpoint, options).expect("a source");
    source.switch_over(state()).expect("may switch over");
    let events = EventLog::new(events);
    events.wait("the end", || format!("{:?}", source.stats()), |it| *it == SourceEvent::Finished);
    say("finished");
}

#[test]
fn memory_moves_between_two_processes() {
    prologue!("memory_moves_between_two_processes");
    for listening in [Listening::Source, Listening::Destination] {
        let setup = shared_setup();
        let new = Memory::new(&setup.kinds);
        let memory = new.register(DiscardNotice::Called).expect("registered memory");
        let (endpoint, role) = match listening {
            Listening::Source => {
                let role = Role::start("child_source", "");
                let address = role.hear("where the source listens");
                (Endpoint::Connect(address.parse().expect("an address")), role)
            }
            Listening::Destination => {
                let listener = common::session::listen();
                let address = listener.address().to_string();
                (Endpoint::Listen(listener), Role::start("child_source", &address))
            }
        };
        let options = common::session::destination_options(&setup);
        let (destination, events) =
            Destination::start(memory, endpoint, options).expect("a destination");
        let events = EventLog::new(events);
        let dump = || format!("{:?}", destination.stats());
        let wanted = DestinationEvent::State(state());
        events.wait("device state", dump, |event| *event == wanted);
        destination.ready().expect("may be ready");
        events.wait("run", dump, |event| *event == DestinationEvent::Run);
        let reading = Arc::clone(&new);
        let reader = Toucher::start(move || reading.check(4711, Content::ZeroRuns));
        reader.finish("the guest reads", dump);
        events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
        assert_eq!(role.hear("the source's end"), "finished");
        role.finish();
    }
}

/// Drops a destination of which nothing has arrived while a thread waits for a page.
#[test]
fn child_abandons() {
    let Some(kind) = argument("child_abandons") else { return };
    let kind = if kind == "memfd" { Kind::Memfd } else { Kind::Anonymous };
    let new = Memory::new(&[(kind, MIB)]);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let endpoint = Endpoint::Listen(common::session::listen());
    let options = common::session::destination_options(&Setup::default());
    let (destination, events) = Destination::start(memory, endpoint, options).expect("started");
    let touching = Arc::clone(&new);
    let early = std::thread::spawn(move || {
        // SAFETY: the call has no arguments.
        say(&unsafe { libc::gettid() }.to_string());
        say(&format!("read {}", touching.word(3, 3).load(Ordering::Relaxed)));
    });
    drop(destination);
    assert_eq!(EventLog::new(events).until_end(), [DestinationEvent::Abandoned]);
    say("abandoned");
    let late = std::thread::spawn(move || {
        // SAFETY: as above.
        say(&unsafe { libc::gettid() }.to_string());
        say(&format!("read {}", new.word(200, 3).load(Ordering::Relaxed)));
    });
    // Until the parent has seen enough.
    let _ = (early.join(), late.join());
    say("joined");
}

#[test]
fn whoever_touches_a_missing_page_of_an_abandoned_guest_waits() {
    prologue!("whoever_touches_a_missing_page");
    for kind in ["anonymous", "memfd"] {
        let role = Role::start("child_abandons", kind);
        let mut threads = Vec::new();
        while threads.len() < 2 {
            let line = role.hear("the threads of the child");
            assert!(!line.starts_with("read"), "a missing page was read: {line}");
            threads.extend(line.parse::<u32>().ok());
        }
        for thread in threads {
            let path = format!("/proc/{}/task/{thread}/wchan", role.id());
            let wchan = || std::fs::read_to_string(&path).unwrap_or_default();
            common::wait_until("a thread that waits in a fault", wchan, || {
                wchan().contains("userfault")
            });
        }
        while let Some(line) = role.heard() {
            assert_eq!(line, "abandoned");
        }
    }
}

#[test]
fn one_image_is_served_to_three_destinations() {
    prologue!("one_image_is_served");
    let setup = Setup { kinds: vec![(Kind::Memfd, 16 * MIB)], streams: 2, ..Setup::default() };
    let image = Memory::new(&setup.kinds);
    image.fill(setup.seed, setup.content);
    let listener = common::session::listen();
    let address = listener.address().clone();
    let options = common::session::source_options(&setup);
    let (server, events) =
        SnapshotServer::start(image.as_source(), listener, options, 3).expect("a server");
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
    let state = |event: &DestinationEvent| matches!(event, DestinationEvent::State(_));
    for (destination, events, _) in &guests {
        events.wait("the state of a snapshot", dump, state);
        destination.ready().expect("may be ready");
        events.wait("run", dump, |event| *event == DestinationEvent::Run);
    }
    for (destination, events, new) in &guests {
        let (reading, seed, content) = (Arc::clone(new), setup.seed, setup.content);
        Toucher::start(move || reading.check(seed, content)).finish("a reader", dump);
        events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
        // What one guest writes is nobody else's.
        new.word(7, 7).store(1, Ordering::Relaxed);
        let counted = destination.stats();
        let once = counted.pages_requested + counted.pages_background + counted.pages_zero;
        assert_eq!(once, counted.pages_total, "{counted:?}");
    }
    image.check(setup.seed, setup.content);
    let events = EventLog::new(events);
    for _ in 0..3 {
        events.wait("the end of three", dump, |(_, event)| *event == SourceEvent::Finished);
    }
    assert_eq!(server.unfinished(), 0);
    assert_eq!(server.stats().destinations.len(), 3);
}

#[test]
fn a_snapshot_server_has_room_again_when_a_destination_has_gone() {
    prologue!("a_snapshot_server_has_room");
    let setup = Setup { kinds: vec![(Kind::Memfd, 2 * MIB)], ..Setup::default() };
    let image = Memory::new(&setup.kinds);
    image.fill(setup.seed, setup.content);
    let listener = common::session::listen();
    let address = listener.address().clone();
    let options = common::session::source_options(&setup);
    let (server, _events) =
        SnapshotServer::start(image.as_source(), listener, options, 1).expect("a server");
    for round in 0..4 {
        let new = Memory::new(&setup.kinds);
        let memory = new.register(DiscardNotice::Called).expect("registered memory");
        let options = common::session::destination_options(&setup);
        let (destination, events) =
            Destination::start(memory, Endpoint::Connect(address.clone()), options)
                .expect("a destination");
        let events = EventLog::new(events);
        let dump = || format!("round {round}: {:?}", server.stats());
        let attached = |event: &DestinationEvent| matches!(event, DestinationEvent::Attached(_));
        events.wait("a place", dump, attached);
        if round % 2 == 0 {
            // It leaves in the middle.
            drop(destination);
            continue;
        }
        destination.ready().expect("may be ready");
        events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
        new.check(setup.seed, setup.content);
    }
}

#[test]
fn a_source_that_starts_again_from_its_record_goes_on_serving() {
    prologue!("a_source_that_starts_again");
    let mut random = Random::seeded("a_source_that_starts_again_from_its_record");
    // Not TCP: a free port may be somebody else's by the time that it is bound again.
    let transport = Transport::Unix;
    let setup = Setup { kinds: vec![(Kind::Memfd, 64 * MIB)], transport, ..Setup::default() };
    let record: Arc<Mutex<Option<SourceRecord>>> = Arc::default();
    let noted = Arc::clone(&record);
    let mut address = None;
    let pair = Pair::start_with(
        &setup,
        move |source, _| {
            source.ledger = SourceLedger::new(move |record| {
                *noted.lock().expect("not poisoned") = Some(*record);
                Ok(())
            });
        },
        |it| address.insert(it).clone(),
    );
    let (pair, address) = (pair.expect("no huge pages"), address.expect("an address"));
    let counters = Counters::prepare(&pair.old, Arc::clone(&pair.new));
    pair.switch(&[]);
    let Pair { source, destination, at_destination, old, .. } = pair;
    let dump = || format!("{:?} {:?}", destination.stats(), at_destination.rest());
    let threads = counters.start(4, 2000, &mut random);
    drop(source);
    let record = record.lock().expect("not poisoned").expect("a record");
    assert_eq!(record.ownership, SourceOwnership::Given);
    let mut options = common::session::source_options(&setup);
    options.record = record;
    let endpoint = Endpoint::Listen(common::session::listen_at(&address));
    let (source, events) = Source::start(old.as_source(), endpoint, options).expect("a source");
    for thread in threads {
        thread.finish("a guest thread that counts", dump);
    }
    at_destination.wait("the end", dump, |event| *event == DestinationEvent::Finished);
    EventLog::new(events).wait("the end", dump, |event| *event == SourceEvent::Finished);
    counters.check(&old);
    assert_eq!(destination.stats().recoveries, 1);
    drop(source);
}
