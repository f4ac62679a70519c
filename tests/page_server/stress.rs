//! Guests that compute and give pages up while a page server sends them everything at once.
//!
//! The model of a page: the counter that it must have, and whether the rest is that of the
//! image or zero. Threads that add hold the page's gate for reading and a lock word in the
//! page itself; a thread that gives pages up holds their gates alone.

mod random;

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Instant;

use afterimage::{
    Address, Destination, DestinationEvent, DestinationMemory, DestinationOptions,
    DestinationRegion, DiscardNotice, Endpoint, Events, FaultScope, GuestAddress, PageSize,
};
use afterimage_tools::ram::{self, Backing, GuestRam, HugePages};
use afterimage_tools::require;
use nix::sys::signal::Signal;

use crate::support::{LIMIT, PAGE, Server, memfd, sha256};
use random::Random;

const PAGES: u64 = 12288;
const LENGTH: u64 = PAGES * PAGE;
const WORDS: u64 = PAGE / 8;
const LOCK: u64 = 0;
const COUNTER: u64 = 1;
/// Threads that add, and how often each of them does.
const ADDERS: u64 = 4;
const ADDITIONS: u64 = 1200;
const BALLOONS: u64 = 2;

/// What the page server is to send: runs of content, of zeros that were written, and holes.
/// Every lock word is free.
fn image(path: &Path, random: &mut Random) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(LENGTH).unwrap();
    let mut bytes = vec![0; LENGTH as usize];
    let mut page = 0;
    while page < PAGES {
        let kind = random.below(4);
        let end = (page + 1 + random.below(64)).min(PAGES);
        let run = &mut bytes[(page * PAGE) as usize..(end * PAGE) as usize];
        if kind < 2 {
            for (index, word) in run.chunks_exact_mut(8).enumerate() {
                if index as u64 % WORDS != LOCK {
                    // Never zero: what comes back late is seen.
                    word.copy_from_slice(&(random.next() | 1).to_le_bytes());
                }
            }
        }
        if kind < 3 {
            file.write_all_at(run, page * PAGE).unwrap();
        }
        page = end;
    }
    bytes
}

/// A thread that may wait for a page that never comes; it is left behind then.
struct Worker<T> {
    answer: Receiver<T>,
}

impl<T: Send + 'static> Worker<T> {
    fn start(work: impl FnOnce() -> T + Send + 'static) -> Self {
        let (sender, answer) = channel();
        thread::spawn(move || sender.send(work()));
        Self { answer }
    }

    fn finish(self, what: &str, dump: impl FnOnce() -> String) -> T {
        match self.answer.recv_timeout(LIMIT) {
            Ok(value) => value,
            Err(RecvTimeoutError::Timeout) => panic!("not in {LIMIT:?}: {what}\n{}", dump()),
            Err(RecvTimeoutError::Disconnected) => panic!("{what}: the thread panicked"),
        }
    }
}

/// Ends the process if a destructor hangs after all.
fn watchdog(test: &'static str) -> Sender<()> {
    let (alive, gone) = channel();
    thread::spawn(move || {
        if gone.recv_timeout(LIMIT * 3) == Err(RecvTimeoutError::Timeout) {
            let _ = writeln!(std::io::stderr(), "{test} has not ended in {:?}", LIMIT * 3);
            std::process::abort();
        }
    });
    alive
}

struct Page {
    /// Held alone by who gives the page up.
    gate: RwLock<()>,
    counter: AtomicU64,
    is_given_up: AtomicBool,
}

struct Guest {
    // Dropped in this order: the engine before the memory that it serves.
    destination: RwLock<Option<Destination>>,
    ram: GuestRam,
    _huge_pages: Option<HugePages>,
    pages: Vec<Page>,
    image: Arc<Vec<u8>>,
    discards: DiscardNotice,
    scope: FaultScope,
    /// Before, it is only read.
    may_run: AtomicBool,
}

impl Guest {
    /// `None`, said aloud, where the machine has no huge pages for it.
    fn start(
        backing: Backing,
        image: &Arc<Vec<u8>>,
        discards: DiscardNotice,
        address: &Address,
    ) -> Option<(Arc<Self>, Events<DestinationEvent>)> {
        let huge_pages = match backing {
            Backing::Hugetlb => Some(require::hugetlb(LENGTH / ram::HUGE_PAGE_BYTES)?),
            Backing::Anonymous | Backing::Memfd => None,
        };
        let ram = GuestRam::allocate(LENGTH, backing).unwrap();
        let scope = if nix::unistd::geteuid().is_root() {
            FaultScope::KernelAndUser
        } else {
            FaultScope::UserOnly
        };
        let memory = DestinationMemory::register(vec![described(&ram)], scope, discards).unwrap();
        let options = DestinationOptions::default();
        let endpoint = Endpoint::Connect(address.clone());
        let (destination, events) = Destination::start(memory, endpoint, options).unwrap();
        let pages = (0..PAGES).map(|page| Page {
            gate: RwLock::new(()),
            counter: AtomicU64::new(word_of(image, page, COUNTER)),
            is_given_up: AtomicBool::new(false),
        });
        let guest = Self {
            destination: RwLock::new(Some(destination)),
            ram,
            _huge_pages: huge_pages,
            pages: pages.collect(),
            image: Arc::clone(image),
            discards,
            scope,
            may_run: AtomicBool::new(false),
        };
        Some((Arc::new(guest), events))
    }

    fn word(&self, page: u64, word: u64) -> &AtomicU64 {
        self.ram.word(ram::GuestAddress(page * PAGE + word * 8))
    }

    /// What a word must be that no guest writes.
    fn expected(&self, page: u64, word: u64) -> u64 {
        let is_given_up = self.pages[page as usize].is_given_up.load(Ordering::Relaxed);
        if is_given_up { 0 } else { word_of(&self.image, page, word) }
    }

    fn add(&self, page: u64, word: u64) {
        let model = &self.pages[page as usize];
        let _here = model.gate.read().expect("no thread panicked");
        let lock = self.word(page, LOCK);
        while lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            thread::yield_now();
        }
        let counter = self.word(page, COUNTER);
        let found = counter.load(Ordering::Relaxed);
        let expected = model.counter.load(Ordering::Relaxed);
        assert_eq!(found, expected, "the counter of page {page}, {:?}", self.ram.backing());
        counter.store(found.wrapping_add(1), Ordering::Relaxed);
        model.counter.store(expected.wrapping_add(1), Ordering::Relaxed);
        let found = self.word(page, word).load(Ordering::Relaxed);
        assert_eq!(found, self.expected(page, word), "word {word} of page {page}");
        lock.store(0, Ordering::Release);
    }

    /// What a VMM does before its guest runs.
    fn look(&self, page: u64, word: u64) {
        let _here = self.pages[page as usize].gate.read().expect("no thread panicked");
        let found = self.word(page, word).load(Ordering::Relaxed);
        assert_eq!(found, self.expected(page, word), "word {word} of page {page}, before Run");
    }

    /// Lets the kernel be the one that needs the page.
    fn read_by_kernel(&self, page: u64, into: &File) {
        let _here = self.pages[page as usize].gate.read().expect("no thread panicked");
        let start = self.ram.host_address(ram::GuestAddress(page * PAGE)).unwrap();
        // SAFETY: the kernel reads a page of our mapping, whose words are read as they are.
        let written =
            unsafe { libc::pwrite(into.as_raw_fd(), start.as_ptr().cast(), PAGE as usize, 0) };
        assert_eq!(written, PAGE as isize, "{}", std::io::Error::last_os_error());
        let mut copy = vec![0; PAGE as usize];
        into.read_exact_at(&mut copy, 0).unwrap();
        for word in 2..WORDS {
            let found = word_of(&copy, 0, word);
            assert_eq!(found, self.expected(page, word), "word {word} of page {page}, by kernel");
        }
    }

    /// Gives up a run of pages, as a balloon would.
    fn give_up(&self, page: u64, count: u64) {
        let run = page..page + count;
        let gates = run.clone().map(|page| &self.pages[page as usize].gate);
        let gates: Vec<_> = gates.map(|gate| gate.write().expect("no thread panicked")).collect();
        if self.discards == DiscardNotice::Called
            && let Some(destination) = &*self.destination.read().expect("no thread panicked")
        {
            destination.discard(GuestAddress(page * PAGE), count * PAGE);
        }
        let advice = match self.ram.backing() {
            Backing::Anonymous => libc::MADV_DONTNEED,
            // On shared memory the other keeps what has arrived.
            Backing::Memfd | Backing::Hugetlb => libc::MADV_REMOVE,
        };
        let start = self.ram.host_address(ram::GuestAddress(page * PAGE)).unwrap();
        // SAFETY: pages of our mapping, of which nobody holds anything: the gates are ours.
        let result =
            unsafe { libc::madvise(start.as_ptr().cast(), (count * PAGE) as usize, advice) };
        assert_eq!(result, 0, "a balloon: {}", std::io::Error::last_os_error());
        for page in run {
            let model = &self.pages[page as usize];
            model.counter.store(0, Ordering::Relaxed);
            model.is_given_up.store(true, Ordering::Relaxed);
        }
        drop(gates);
    }

    /// Gives up some runs of host pages.
    fn inflate(&self, runs: u64, random: &mut Random) {
        let unit = self.ram.backing().page_bytes() / PAGE;
        let units = PAGES / unit;
        for _ in 0..runs.max(1) {
            let first = random.below(units);
            let count = if unit > 1 { 1 } else { (1 + random.below(8)).min(units - first) };
            self.give_up(first * unit, count * unit);
        }
    }

    fn given_up(&self) -> u64 {
        let given_up = self.pages.iter().filter(|page| page.is_given_up.load(Ordering::Relaxed));
        given_up.count() as u64
    }

    /// Everything: counters, zeros, and what nobody wrote.
    fn check(&self) {
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for (page, model) in self.pages.iter().enumerate() {
            let words = self.ram.read_page(ram::GuestAddress(page as u64 * PAGE));
            let counter = model.counter.load(Ordering::Relaxed);
            assert_eq!(words[COUNTER as usize], counter, "the counter of page {page}");
            let mut bytes = words.map(u64::to_le_bytes);
            bytes[COUNTER as usize] = [0; 8];
            if model.is_given_up.load(Ordering::Relaxed) {
                assert!(bytes.as_flattened().iter().all(|byte| *byte == 0), "page {page} is back");
                continue;
            }
            let start = page * PAGE as usize;
            found.extend(bytes.as_flattened());
            // The model has the image's counter where nobody has added.
            expected.extend(&self.image[start..start + PAGE as usize]);
            expected[found.len() - PAGE as usize..][8..16].fill(0);
        }
        let wrong = found.chunks(PAGE as usize).zip(expected.chunks(PAGE as usize));
        let wrong = wrong.filter(|(found, expected)| found != expected).count();
        assert_eq!(sha256(&found), sha256(&expected), "{wrong} pages are wrong");
    }

    fn dump(&self) -> String {
        let destination = self.destination.read();
        let stats = destination.ok().and_then(|it| it.as_ref().map(Destination::stats));
        format!("{:?} {:?}: {stats:?}", self.ram.backing(), self.discards)
    }

    fn check_counts(&self, early: u64) {
        let destination = self.destination.read().expect("no thread panicked");
        let stats = destination.as_ref().expect("not dropped").stats();
        assert_eq!(stats.pages_total, LENGTH / self.ram.backing().page_bytes());
        assert_eq!(stats.pages_complete, stats.pages_total, "{stats:?}");
        assert_eq!(stats.pages_unreadable, 0, "{stats:?}");
        assert!(stats.pages_discarded >= early, "{early} before there was a source: {stats:?}");
        let once = stats.pages_requested
            + stats.pages_background
            + stats.pages_zero
            + stats.pages_discarded;
        assert_eq!(once, stats.pages_total, "each page is counted once: {stats:?}");
    }
}

fn word_of(bytes: &[u8], page: u64, word: u64) -> u64 {
    let at = (page * PAGE + word * 8) as usize;
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn described(ram: &GuestRam) -> DestinationRegion {
    let region = &ram.regions()[0];
    let (guest, start) = (GuestAddress(region.guest_base().0), region.host_base());
    let file = || -> OwnedFd { region.file().unwrap().0.try_clone().unwrap().into() };
    match ram.backing() {
        // SAFETY: the mapping outlives the destination, which the guest keeps before it; it
        // is reached by atomics only.
        Backing::Anonymous => unsafe { DestinationRegion::anonymous(guest, start, LENGTH) },
        // SAFETY: as above.
        Backing::Memfd => unsafe { DestinationRegion::shared(guest, start, LENGTH, file(), 0) },
        // SAFETY: as above.
        Backing::Hugetlb => unsafe {
            DestinationRegion::hugetlb(guest, start, LENGTH, PageSize::MIB_2, file(), 0)
        },
    }
}

/// Waits for an event, answering those that a VMM answers.
fn until(guest: &Arc<Guest>, events: &Events<DestinationEvent>, wanted: &DestinationEvent) {
    let (end, mut seen) = (Instant::now() + LIMIT, Vec::new());
    while seen.last() != Some(wanted) {
        match events.next_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(event) => seen.push(event),
            Err(reason) => panic!("{wanted:?}: {reason}, only {seen:?}\n{}", guest.dump()),
        }
        // In a snapshot there is no state to wait for.
        if matches!(seen.last(), Some(DestinationEvent::State(_) | DestinationEvent::Attached(_))) {
            let called = Arc::clone(guest);
            let call = Worker::start(move || {
                let destination = called.destination.read().expect("no thread panicked");
                // Too early in a migration, until the state is there.
                let _ = destination.as_ref().expect("not dropped").ready();
            });
            call.finish("ready", || guest.dump());
        }
    }
}

/// Threads that need pages already while there is no source, and add as soon as they may.
fn adders(guest: &Arc<Guest>, random: &mut Random) -> Vec<Worker<()>> {
    let adder = |mut random: Random| {
        let guest = Arc::clone(guest);
        Worker::start(move || {
            while !guest.may_run.load(Ordering::Relaxed) {
                guest.look(random.below(PAGES), 2 + random.below(WORDS - 2));
            }
            let copy = memfd(PAGE);
            for _ in 0..ADDITIONS {
                let page = random.below(PAGES);
                if guest.scope == FaultScope::KernelAndUser && random.below(8) == 0 {
                    guest.read_by_kernel(page, &copy);
                }
                guest.add(page, 2 + random.below(WORDS - 2));
            }
        })
    };
    (0..ADDERS).map(|_| adder(random.fork())).collect()
}

/// One guest, from where it may run to the end of its session and beyond.
fn run(
    guest: &Arc<Guest>,
    events: &Events<DestinationEvent>,
    early: u64,
    adders: Vec<Worker<()>>,
    random: &mut Random,
) {
    until(guest, events, &DestinationEvent::Run);
    guest.may_run.store(true, Ordering::Relaxed);
    let balloon = |mut random: Random| {
        let guest = Arc::clone(guest);
        let runs = LENGTH / guest.ram.backing().page_bytes() / 64;
        Worker::start(move || guest.inflate(runs, &mut random))
    };
    let mut workers: Vec<_> = (0..BALLOONS).map(|_| balloon(random.fork())).collect();
    workers.extend(adders);
    for worker in workers {
        worker.finish("a thread of the guest", || guest.dump());
    }
    until(guest, events, &DestinationEvent::Finished);
    let checked = Arc::clone(guest);
    let check = Worker::start(move || {
        checked.check_counts(early);
        checked.check();
        // What nobody answers for any more is still right.
        drop(checked.destination.write().expect("no thread panicked").take());
        checked.check();
    });
    check.finish("the end of the destination, and its memory", || guest.dump());
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Snapshot,
    Migration,
}

fn stress(test: &'static str, mode: Mode, backings: &[Backing], discards: DiscardNotice) {
    if !require::userfaultfd() {
        return;
    }
    let _alive = watchdog(test);
    let mut random = Random::seeded(test);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let bytes = Arc::new(image(&path, &mut random));
    let socket = format!("unix:{}", directory.path().join("socket").display());
    let address: Address = socket.parse().unwrap();

    // Before there is a source nothing has arrived: what is given up now never may.
    let start = |backing: &Backing| {
        let (guest, events) = Guest::start(*backing, &bytes, discards, &address)?;
        let (early, mut forked) = (Arc::clone(&guest), random.fork());
        let runs = PAGES * PAGE / backing.page_bytes() / 256;
        let worker = Worker::start(move || early.inflate(runs, &mut forked));
        worker.finish("a balloon before there is a source", || guest.dump());
        let early = guest.given_up() * PAGE / backing.page_bytes();
        let adders = adders(&guest, &mut random);
        Some((guest, events, early, adders))
    };
    let guests: Vec<_> = backings.iter().filter_map(start).collect();

    let memory = path.to_str().unwrap();
    let mut arguments = vec!["--listen", &socket, "--memory", memory, "--silence", "5s"];
    match mode {
        Mode::Snapshot => arguments.push("--snapshot"),
        Mode::Migration => arguments.extend(["--streams", "4"]),
    }
    let mut server = Server::start(&arguments);
    thread::scope(|scope| {
        let run = |(guest, events, early, adders)| {
            let mut random = random.fork();
            scope.spawn(move || run(&guest, &events, early, adders, &mut random))
        };
        let sizes: Vec<_> = guests.iter().map(|(guest, ..)| guest.ram.backing()).collect();
        let threads: Vec<_> = guests.into_iter().map(run).collect();
        for (thread, backing) in threads.into_iter().zip(sizes) {
            assert!(thread.join().is_ok(), "the guest on {backing:?} failed");
            if mode == Mode::Snapshot {
                server.line("has every page");
            }
        }
    });
    if mode == Mode::Snapshot {
        server.signal(Signal::SIGTERM);
    }
    let end = Worker::start(move || server.end());
    let (status, report, lines) = end.finish("the end of the page server", String::new);
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")), "{report} {lines:#?}");
    assert_eq!(report["pages_missing"], 0, "{report}");
    assert_eq!(fs::read(&path).unwrap(), *bytes, "the image is only read");
}

const ALL: [Backing; 3] = [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb];

#[test]
fn guests_of_a_snapshot_compute_and_call_for_discards() {
    let test = "guests_of_a_snapshot_compute_and_call_for_discards";
    stress(test, Mode::Snapshot, &ALL, DiscardNotice::Called);
}

#[test]
fn guests_of_a_snapshot_compute_and_discard_by_events() {
    let test = "guests_of_a_snapshot_compute_and_discard_by_events";
    stress(test, Mode::Snapshot, &ALL, DiscardNotice::Events);
}

#[test]
fn a_migrated_guest_computes_and_calls_for_discards() {
    let test = "a_migrated_guest_computes_and_calls_for_discards";
    stress(test, Mode::Migration, &[Backing::Memfd], DiscardNotice::Called);
}

#[test]
fn a_migrated_guest_computes_and_discards_by_events() {
    let test = "a_migrated_guest_computes_and_discards_by_events";
    stress(test, Mode::Migration, &[Backing::Anonymous], DiscardNotice::Events);
}
