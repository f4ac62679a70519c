//! Pages for which their file has no room: a full tmpfs.
//!
//! Invariant: they wait until there is some, and nothing else waits for them.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DiscardNotice, Endpoint, Events, Source,
    SourceEvent, StateSection,
};
use common::small_disk::on_a_small_disk;
use common::{EventLog, Kind, Memory, Setup, Toucher};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

const MIB: u64 = 1 << 20;
/// Of the first region, in pages.
const SHORT: u64 = 4 * MIB / 4096;

fn open(directory: &Path, name: &str) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).open(directory.join(name)).expect("a file")
}

/// A guest that runs in memory of which the first region has too little room.
struct Moved {
    // Dropped in this order: the engine before the memory that it serves.
    source: Source,
    destination: Destination,
    at_destination: EventLog<DestinationEvent>,
    _at_source: Events<SourceEvent>,
    _old: Arc<Memory>,
    new: Arc<Memory>,
    setup: Setup,
}

impl Moved {
    fn start(file: File, background: Background) -> Self {
        let kinds = vec![(Kind::Memfd, SHORT * 4096), (Kind::Anonymous, 4 * MIB)];
        let setup = Setup { kinds, ..Setup::default() };
        let old = Memory::new(&setup.kinds);
        old.fill(setup.seed, setup.content);
        let new = Memory::on_file(file, SHORT * 4096, &setup.kinds[1..]);
        let listener = common::session::listen();
        let address = listener.address().clone();
        let mut options = common::session::source_options(&setup);
        options.background = background;
        let (source, at_source) =
            Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
        let memory = new.register(DiscardNotice::Called).expect("registered memory");
        let options = common::session::destination_options(&setup);
        let (destination, events) =
            Destination::start(memory, Endpoint::Connect(address), options).expect("started");
        let at_destination = EventLog::new(events);
        let moved = Self {
            source,
            destination,
            at_destination,
            _at_source: at_source,
            _old: old,
            new,
            setup,
        };
        moved.source.switch_over(Vec::<StateSection>::new()).expect("may switch over");
        moved.wait("state", |event| matches!(event, DestinationEvent::State(_)));
        moved.destination.ready().expect("may be ready");
        moved.wait("run", |event| *event == DestinationEvent::Run);
        moved
    }

    fn wait(&self, what: &str, is_wanted: impl Fn(&DestinationEvent) -> bool) {
        self.at_destination.wait(what, || self.dump(), is_wanted);
    }

    fn dump(&self) -> String {
        format!("{:?} {:?}", self.source.stats(), self.destination.stats())
    }

    fn reader(&self, from: u64, to: u64) -> Toucher<()> {
        let (new, seed, content) = (Arc::clone(&self.new), self.setup.seed, self.setup.content);
        Toucher::start(move || new.check_pages(seed, content, from, to))
    }
}

#[test]
fn who_needs_no_room_does_not_wait_for_who_has_none() {
    prologue!("who_needs_no_room");
    on_a_small_disk("2m", |directory| {
        let filler = open(directory, "filler");
        filler.write_all_at(&vec![1; MIB as usize], 0).expect("room");
        let moved = Moved::start(open(directory, "memory"), Background::OnRequest);
        // All of them read 400 pages, and there is room for 256.
        let short: Vec<_> = (0..4).map(|part| moved.reader(part * 100, (part + 1) * 100)).collect();
        moved.wait("no room", |event| matches!(event, DestinationEvent::Failed(_)));
        moved.reader(SHORT, 2 * SHORT).finish("who needs no room", || moved.dump());
        // The first region has not got what was read of it.
        assert!(moved.destination.stats().pages_complete < SHORT + 400, "{}", moved.dump());
        let has_tried = || moved.source.stats().pages_requested > SHORT + 256 + 16;
        common::wait_until("that it is tried", || moved.dump(), has_tried);
        // Told once, however often it is tried.
        let rest = moved.at_destination.rest();
        assert!(!rest.iter().any(|it| matches!(it, DestinationEvent::Failed(_))), "{rest:?}");
        filler.set_len(0).expect("there is room");
        for reader in short {
            reader.finish("who has room now", || moved.dump());
        }
        // There is none again, which is told again; this one waits to the end.
        let _more = moved.reader(400, 600);
        moved.wait("no room again", |event| matches!(event, DestinationEvent::Failed(_)));
        let stats = moved.destination.stats();
        assert_eq!(stats.recoveries, 0, "{}", moved.dump());
    });
}

/// Background streams come upon it too: they end, and are made again.
#[test]
fn all_of_it_comes_when_there_is_room() {
    prologue!("all_of_it_comes");
    on_a_small_disk("8m", |directory| {
        let filler = open(directory, "filler");
        filler.write_all_at(&vec![1; 7 * MIB as usize], 0).expect("room");
        let moved = Moved::start(open(directory, "memory"), Background::Unlimited);
        let short = moved.reader(0, SHORT);
        moved.wait("no room", |event| matches!(event, DestinationEvent::Failed(_)));
        moved.reader(SHORT, 2 * SHORT).finish("who needs no room", || moved.dump());
        filler.set_len(0).expect("there is room");
        short.finish("who has room now", || moved.dump());
        moved.wait("the end", |event| *event == DestinationEvent::Finished);
        moved.new.check(moved.setup.seed, moved.setup.content);
    });
}
