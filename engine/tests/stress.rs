//! A guest that computes and gives pages up while everything comes at once.
//!
//! The model of a page: the counter that it must have, and whether the rest is that of the
//! source or zero. Threads that add hold the model for reading and a lock word in the page
//! itself; a thread that gives pages up holds it alone.

mod common;

use afterimage::{Checksums, Destination, DiscardNotice, ThreadHook, ThreadRole};
use common::{Content, Kind, Memory, Pair, Random, Setup, Toucher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const LOCK: u64 = 0;
const COUNTER: u64 = 1;

struct Page {
    /// Held alone by who gives the page up.
    gate: RwLock<()>,
    counter: AtomicU64,
    is_given_up: AtomicBool,
}

struct Guest {
    old: Arc<Memory>,
    new: Arc<Memory>,
    pages: Vec<Page>,
    discards: DiscardNotice,
}

impl Guest {
    fn new(pair: &Pair) -> Arc<Self> {
        let old = Arc::clone(&pair.old);
        let pages = (0..old.small_pages()).map(|page| {
            old.word(page, LOCK).store(0, Ordering::Relaxed);
            Page {
                gate: RwLock::new(()),
                counter: AtomicU64::new(old.word(page, COUNTER).load(Ordering::Relaxed)),
                is_given_up: AtomicBool::new(false),
            }
        });
        let pages = pages.collect();
        Arc::new(Self { pages, new: Arc::clone(&pair.new), old, discards: pair.setup.discards })
    }

    fn compute(&self, page: u64) {
        let model = &self.pages[page as usize];
        let _here = model.gate.read().expect("no thread panicked");
        let lock = self.new.word(page, LOCK);
        while lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
        let counter = self.new.word(page, COUNTER);
        let found = counter.load(Ordering::Relaxed);
        let expected = model.counter.load(Ordering::Relaxed);
        assert_eq!(found, expected, "the counter of page {page}");
        counter.store(found.wrapping_add(1), Ordering::Relaxed);
        model.counter.store(expected.wrapping_add(1), Ordering::Relaxed);
        lock.store(0, Ordering::Release);
    }

    /// Gives up a run of pages, as a balloon would.
    fn give_up(&self, destination: &Mutex<Option<Destination>>, page: u64, count: u64) {
        let run = page..page + count;
        let gates: Vec<_> = run
            .clone()
            .map(|page| self.pages[page as usize].gate.write().expect("no thread panicked"))
            .collect();
        if self.discards == DiscardNotice::Called
            && let Some(destination) = &*destination.lock().expect("no thread panicked")
        {
            destination.discard(self.new.guest_address(page), count * 4096);
        }
        let advice = match self.new.kind_of(page) {
            Kind::Anonymous => libc::MADV_DONTNEED,
            // On shared memory the other keeps what has arrived.
            _ => libc::MADV_REMOVE,
        };
        self.new.advise(page, count, advice).expect("a balloon can free memory");
        for page in run {
            let model = &self.pages[page as usize];
            model.counter.store(0, Ordering::Relaxed);
            model.is_given_up.store(true, Ordering::Relaxed);
        }
        drop(gates);
    }

    fn check(&self) {
        for (page, model) in self.pages.iter().enumerate() {
            let page = page as u64;
            let found = self.new.word(page, COUNTER).load(Ordering::Relaxed);
            assert_eq!(found, model.counter.load(Ordering::Relaxed), "the counter of page {page}");
            let is_given_up = model.is_given_up.load(Ordering::Relaxed);
            for word in (0..512).filter(|word| *word != COUNTER) {
                let at_source = self.old.word(page, word).load(Ordering::Relaxed);
                let expected = if is_given_up { 0 } else { at_source };
                let found = self.new.word(page, word).load(Ordering::Relaxed);
                assert_eq!(found, expected, "word {word} of page {page}, given up: {is_given_up}");
            }
        }
    }
}

fn stress(setup: &Setup, random: &mut Random) {
    let Some(pair) = Pair::start(setup) else { return };
    let guest = Guest::new(&pair);
    pair.switch(&[]);
    let Pair { source, destination, at_source, at_destination, .. } = pair;
    let destination = Arc::new(Mutex::new(Some(destination)));
    let dump = || {
        let destination = destination.lock().expect("no thread panicked");
        let stats = destination.as_ref().map(Destination::stats);
        format!("{:?}\n{stats:?}\n{:?}", source.stats(), at_destination.rest())
    };
    let pages = guest.pages.len() as u64;
    let mut threads: Vec<_> = (0..8)
        .map(|_| {
            let (guest, mut random) = (Arc::clone(&guest), random.fork());
            Toucher::start(move || {
                for _ in 0..1500 {
                    guest.compute(random.below(pages));
                }
            })
        })
        .collect();
    threads.extend((0..2).map(|_| {
        let (guest, mut random) = (Arc::clone(&guest), random.fork());
        let destination = Arc::clone(&destination);
        Toucher::start(move || {
            for _ in 0..150 {
                let page = random.below(pages);
                let count = (1 + random.below(8)).min(guest.new.left_in_region(page));
                guest.give_up(&destination, page, count);
            }
        })
    }));
    for thread in threads {
        thread.finish("a guest thread", dump);
    }
    let finished = |event: &_| *event == afterimage::DestinationEvent::Finished;
    at_destination.wait("the end at the destination", dump, finished);
    let finished = |event: &_| *event == afterimage::SourceEvent::Finished;
    at_source.wait("the end at the source", dump, finished);
    guest.check();
    let stats = destination.lock().expect("no thread panicked").as_ref().map(Destination::stats);
    let stats = stats.expect("not dropped");
    let once =
        stats.pages_requested + stats.pages_background + stats.pages_zero + stats.pages_discarded;
    assert_eq!(once, stats.pages_total, "{stats:?}");
    // What nobody has answered for any more is still right.
    drop(destination);
    guest.check();
}

fn stress_all(discards: DiscardNotice, random: &mut Random) {
    let kinds: [&[(Kind, u64)]; 3] = [
        &[(Kind::Anonymous, 24 * MIB)],
        &[(Kind::Memfd, 24 * MIB)],
        &[(Kind::Memfd, 8 * MIB), (Kind::Anonymous, 8 * MIB)],
    ];
    for (round, kinds) in kinds.into_iter().enumerate() {
        for content in [Content::Dense, Content::ZeroRuns] {
            let setup = Setup {
                kinds: kinds.to_vec(),
                content,
                seed: random.next(),
                streams: 4,
                checksums: if round == 2 { Checksums::On } else { Checksums::Off },
                discards,
                ..Setup::default()
            };
            stress(&setup, random);
        }
    }
}

#[test]
fn counters_and_discards_told_by_calls_come_out_right() {
    prologue!("counters_and_discards_told_by_calls");
    let mut random = Random::seeded("counters_and_discards_told_by_calls_come_out_right");
    stress_all(DiscardNotice::Called, &mut random);
}

#[test]
fn counters_and_discards_told_by_events_come_out_right() {
    prologue!("counters_and_discards_told_by_events");
    let mut random = Random::seeded("counters_and_discards_told_by_events_come_out_right");
    stress_all(DiscardNotice::Events, &mut random);
}

/// More than one read of events brings, and no fault among them: the thread that reads must
/// not go to sleep on the rest.
const CROWD: u64 = 100;

#[test]
fn what_a_whole_crowd_gives_up_at_once_is_all_read() {
    prologue!("what_a_whole_crowd_gives_up");
    let setup = Setup {
        kinds: vec![(Kind::Anonymous, 8 * MIB)],
        discards: DiscardNotice::Events,
        ..Setup::default()
    };
    let change = |_: &mut _, destination: &mut afterimage::DestinationOptions| {
        destination.polling = Duration::ZERO;
        // It comes last, when all the others wait.
        destination.threads = ThreadHook::new(|role, _| {
            if role == ThreadRole::Fault {
                let parameter = libc::sched_param { sched_priority: 0 };
                // SAFETY: changes this thread's scheduling only; the parameter is valid.
                unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameter) };
            }
        });
    };
    let pair = Pair::start_with(&setup, change, |address| address).expect("no huge pages");
    for round in 0..10 {
        let barrier = Arc::new(std::sync::Barrier::new(CROWD as usize));
        let threads: Vec<_> = (0..CROWD)
            .map(|index| {
                let (new, barrier) = (Arc::clone(&pair.new), Arc::clone(&barrier));
                Toucher::start(move || {
                    barrier.wait();
                    let page = round * CROWD + index;
                    new.advise(page, 1, libc::MADV_DONTNEED).expect("a balloon");
                })
            })
            .collect();
        busy_for(Duration::from_millis(20));
        for thread in threads {
            thread.finish("a balloon", || pair.dump());
        }
    }
    pair.switch(&[]);
    pair.finish();
    assert_eq!(pair.check_counts().pages_discarded, 10 * CROWD);
    for page in 0..10 * CROWD {
        assert_eq!(pair.new.word(page, 9).load(Ordering::Relaxed), 0, "page {page}");
    }
    pair.new.check_pages(setup.seed, setup.content, 10 * CROWD, pair.new.small_pages());
}

/// Keeps every core busy, so that what only runs on an idle core does not.
fn busy_for(time: Duration) {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                let end = Instant::now() + time;
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
            });
        }
    });
}

#[test]
fn dontneed_on_shared_memory_keeps_what_has_arrived_and_zeroes_the_rest() {
    prologue!("dontneed_on_shared_memory");
    let setup = Setup {
        kinds: vec![(Kind::Memfd, 16 * MIB)],
        discards: DiscardNotice::Events,
        streams: 4,
        ..Setup::default()
    };
    let pair = Pair::start(&setup).expect("no huge pages");
    // Not one has arrived.
    let new = Arc::clone(&pair.new);
    let early = Toucher::start(move || new.advise(0, 64, libc::MADV_DONTNEED));
    early.finish("a balloon", || pair.dump()).expect("a balloon");
    pair.switch(&[]);
    // Some have arrived.
    let new = Arc::clone(&pair.new);
    let later = Toucher::start(move || {
        for page in (64..new.small_pages()).step_by(16) {
            new.advise(page, 8, libc::MADV_DONTNEED).expect("a balloon");
        }
    });
    later.finish("a balloon", || pair.dump());
    pair.finish();
    pair.check_counts();
    for page in 0..pair.new.small_pages() {
        let is_zero = pair.new.word(page, 3).load(Ordering::Relaxed) == 0;
        let is_advised = page < 64 || page % 16 < 8;
        assert!(is_advised || !is_zero, "page {page} was not given up");
        assert!(page >= 64 || is_zero, "page {page} had not arrived");
        for word in 0..512 {
            let at_source = pair.old.word(page, word).load(Ordering::Relaxed);
            let expected = if is_zero { 0 } else { at_source };
            assert_eq!(pair.new.word(page, word).load(Ordering::Relaxed), expected, "page {page}");
        }
    }
}
