//! A handler that serves the memory of another process, is killed, and is succeeded: the
//! guest never stops for good, and every page is what it must be.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DestinationLedger, DestinationMemory,
    DestinationOptions, DestinationOwnership, DestinationRecord, DestinationRegion, DiscardNotice,
    Endpoint, GuestAddress, Incarnation, PageSize, RegisteredAddress, SessionId, Source,
    SourceEvent, StateSection,
};
use afterimage_protocol::wire::Epoch;
use common::children::{Role, argument, say};
use common::{Content, EventLog, Kind, Memory, Random, Setup, wait_until};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::fs;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

const MIB: u64 = 1 << 20;
const SEED: u64 = 99;

/// What every handler of one guest is given, as text.
struct Handover {
    address: String,
    record: PathBuf,
    uffd: i32,
    planes: i32,
    /// Guest address, registered address, length, page bytes, file or -1.
    regions: Vec<[i64; 5]>,
}

impl Handover {
    fn to_text(&self) -> String {
        let regions = self.regions.iter().map(|region| region.map(|it| it.to_string()).join(","));
        let regions = regions.collect::<Vec<_>>().join(";");
        let Self { address, record, uffd, planes, .. } = self;
        format!("{address} {} {uffd} {planes} {regions}", record.display())
    }

    fn parse(text: &str) -> Self {
        let mut parts = text.split(' ');
        let mut next = || parts.next().expect("a part");
        let (address, record) = (next().to_owned(), next().into());
        let (uffd, planes) = (next().parse().expect("a number"), next().parse().expect("a number"));
        let region = |text: &str| {
            let mut numbers = text.split(',').map(|it| it.parse().expect("a number"));
            [(); 5].map(|()| numbers.next().expect("five numbers"))
        };
        let regions = next().split(';').map(region).collect();
        Self { address, record, uffd, planes, regions }
    }
}

fn owned(descriptor: i64) -> OwnedFd {
    // SAFETY: inherited for this process, and named once.
    unsafe { OwnedFd::from_raw_fd(descriptor as i32) }
}

fn read_record(path: &Path) -> Option<DestinationRecord> {
    let bytes = fs::read(path).ok()?;
    Some(DestinationRecord {
        session: SessionId(bytes[..16].try_into().expect("whole")),
        incarnation: Incarnation(bytes[16..32].try_into().expect("whole")),
        epoch: Epoch(u32::from_le_bytes(bytes[32..36].try_into().expect("whole"))),
        ownership: match bytes[36] {
            1 => DestinationOwnership::Waiting,
            2 => DestinationOwnership::Refused,
            _ => DestinationOwnership::Running,
        },
    })
}

fn write_record(path: &Path, record: &DestinationRecord) -> io::Result<()> {
    let mut bytes = [record.session.0, record.incarnation.0].concat();
    bytes.extend(record.epoch.0.to_le_bytes());
    bytes.push(record.ownership as u8);
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    fs::rename(new, path)
}

/// Serves the memory of its parent until it is killed, or done.
#[test]
fn child_handler() {
    let Some(text) = argument("child_handler") else { return };
    let given = Handover::parse(&text);
    let regions = given.regions.iter().map(|&[guest, registered, length, page, file]| {
        DestinationRegion::handed_over(
            GuestAddress(guest as u64),
            RegisteredAddress(registered as u64),
            length as u64,
            PageSize::from_bytes(page as u64).expect("a page size"),
            (file >= 0).then(|| (owned(file), 0)),
        )
    });
    let (uffd, planes) = (owned(given.uffd.into()), owned(given.planes.into()));
    let memory = DestinationMemory::attach_kept(uffd, regions.collect(), planes).expect("attached");
    let mut options = DestinationOptions::default();
    let record = read_record(&given.record);
    if let Some(record) = record {
        options.record = record;
    }
    let path = given.record;
    options.ledger = DestinationLedger::new(move |record| write_record(&path, record));
    let endpoint = Endpoint::Connect(given.address.parse().expect("an address"));
    let (destination, events) = Destination::start(memory, endpoint, options).expect("started");
    while let Some(event) = events.next() {
        match event {
            DestinationEvent::State(_) => destination.ready().expect("may be ready"),
            DestinationEvent::Run => say("run"),
            DestinationEvent::Finished => break,
            _ => {}
        }
    }
    say("finished");
}

/// A guest in this process, whose memory is served by others.
struct Guest {
    memory: Arc<Memory>,
    registered: DestinationMemory,
    handover: Handover,
    /// Kept open for those to come.
    _descriptors: Vec<OwnedFd>,
    _directory: tempfile::TempDir,
}

impl Guest {
    fn new(kinds: &[(Kind, u64)], address: &str) -> Option<Self> {
        let memory = Memory::try_new(kinds)?;
        let registered = memory.register(DiscardNotice::Events).expect("registered memory");
        let directory = tempfile::tempdir().expect("a directory");
        let mut descriptors = Vec::new();
        let mut inherited = |fd: OwnedFd| {
            fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty())).expect("a descriptor");
            descriptors.push(fd);
            descriptors.last().expect("pushed").as_raw_fd()
        };
        let regions = registered.layout().regions().iter().enumerate().map(|(index, region)| {
            let file = registered.file(index).expect("a descriptor");
            [
                region.guest_address.0 as i64,
                region.registered.expect("registered").0 as i64,
                region.length as i64,
                region.page_size.bytes() as i64,
                file.map_or(-1, |(file, _)| inherited(file).into()),
            ]
        });
        let regions = regions.collect();
        let handover = Handover {
            address: address.to_owned(),
            record: directory.path().join("record"),
            uffd: inherited(registered.userfaultfd().expect("a descriptor")),
            planes: inherited(DestinationMemory::planes_file().expect("a descriptor")),
            regions,
        };
        Some(Self {
            memory,
            registered,
            handover,
            _descriptors: descriptors,
            _directory: directory,
        })
    }

    fn handler(&self) -> Role {
        Role::start("child_handler", &self.handover.to_text())
    }
}

/// Threads that touch pages at random, give some up, and know what each must hold.
struct Vcpus {
    touches: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// Pages that the guest gives up when it first comes to them.
const fn is_given_up(page: u64) -> bool {
    page % 11 == 3
}

impl Vcpus {
    fn start(memory: &Arc<Memory>, count: u64) -> Self {
        let (touches, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let threads = (0..count).map(|vcpu| {
            let (memory, touches, stop) =
                (Arc::clone(memory), Arc::clone(&touches), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut random = Random::new(SEED + vcpu);
                // Each gives up pages of its own: the others leave them alone.
                while !stop.load(Ordering::Relaxed) {
                    let page = random.below(memory.small_pages() / count) * count + vcpu;
                    touch(&memory, page);
                    touches.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        Self { threads: threads.collect(), touches, stop }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("every page is what it must be");
        }
    }
}

fn touch(memory: &Memory, page: u64) {
    let can_be_given_up = memory.kind_of(page) != Kind::Huge;
    if is_given_up(page) && can_be_given_up {
        let advice = match memory.kind_of(page) {
            Kind::Anonymous => libc::MADV_DONTNEED,
            _ => libc::MADV_REMOVE,
        };
        memory.advise(page, 1, advice).expect("pages can be given up");
        for word in [0, 511] {
            let found = memory.word(page, word).load(Ordering::Relaxed);
            assert_eq!(found, 0, "page {page} was given up, and came back");
        }
    } else {
        memory.check_pages(SEED, Content::Dense, page, page + 1);
    }
}

fn dies_and_goes_on(kinds: &[(Kind, u64)], deaths: u64) {
    let old =
        Memory::new(&kinds.iter().map(|(_, length)| (Kind::Memfd, *length)).collect::<Vec<_>>());
    old.fill(SEED, Content::Dense);
    let listener = common::session::listen();
    let address = listener.address().to_string();
    let mut options = common::session::source_options(&Setup { streams: 2, ..Setup::default() });
    options.background =
        Background::Limited { bytes_per_second: NonZeroU64::new(4 * MIB).expect("not zero") };
    let (source, events) =
        Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
    let events = EventLog::new(events);
    let Some(guest) = Guest::new(kinds, &address) else { return };
    let dump = || format!("{:?}", source.stats());
    let state = vec![StateSection { name: "cpu".into(), version: 1, bytes: vec![7; 100_000] }];
    source.switch_over(state).expect("may switch over");

    let mut random = Random::new(deaths);
    let mut handler = guest.handler();
    assert_eq!(handler.hear("the guest may run"), "run");
    let vcpus = Vcpus::start(&guest.memory, 3);
    for death in 0..deaths {
        // Somewhere in the middle of the guest's work, or of the handler's own beginning.
        let until = vcpus.touches.load(Ordering::Relaxed) + random.below(400);
        wait_until("the guest goes on", dump, || {
            vcpus.touches.load(Ordering::Relaxed) >= until || death % 4 == 3
        });
        drop(handler);
        handler = guest.handler();
    }
    source.set_background(Background::Unlimited);
    let told = || handler.hear("the end");
    wait_until("the migration's end", dump, || told() == "finished");
    handler.finish();
    events.wait("the end", dump, |event| *event == SourceEvent::Finished);
    vcpus.stop();
    for page in 0..guest.memory.small_pages() {
        touch(&guest.memory, page);
    }
    guest.registered.all_arrived();
}

#[test]
fn a_guest_in_files_survives_the_deaths_of_its_handlers() {
    prologue!("a_guest_in_files_survives_the_deaths_of_its_handlers");
    dies_and_goes_on(&[(Kind::Memfd, 16 * MIB)], 16);
}

#[test]
fn a_guest_in_private_memory_survives_the_deaths_of_its_handlers() {
    prologue!("a_guest_in_private_memory_survives_the_deaths_of_its_handlers");
    dies_and_goes_on(&[(Kind::Anonymous, 16 * MIB)], 16);
}

#[test]
fn a_guest_in_huge_pages_survives_the_deaths_of_its_handlers() {
    prologue!("a_guest_in_huge_pages_survives_the_deaths_of_its_handlers");
    dies_and_goes_on(&[(Kind::Huge, 32 * MIB), (Kind::Memfd, 4 * MIB)], 8);
}
