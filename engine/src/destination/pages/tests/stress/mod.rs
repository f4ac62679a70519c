//! Everything at once: threads that fault at random, a fault thread, copiers that give up
//! half-way, and a balloon, all on the same pages.
//!
//! Each page holds a lock and a counter besides its content; the same numbers are kept
//! outside. A page that is lost, seen too early, placed twice or brought back after a
//! discard has the wrong count or the wrong words at the next access, or at the end.

mod balloon;
mod copier;
mod handler;
mod mutator;
mod races;

use super::*;
use crate::sys::testing::{DEADLINE, Random, mix};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::Sender;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// The first word is the lock, the second the counter; from the third on nobody writes.
const LOCK: u64 = 0;
const COUNTER: u64 = 8;
const CONTENT: u64 = 16;

#[test]
fn private_memory_survives_everything_at_once() {
    rounds(Kind::Anonymous, 384, 20);
}

#[test]
fn shared_memory_survives_everything_at_once() {
    rounds(Kind::Memfd, 384, 20);
}

#[test]
fn shared_memory_with_huge_pages_survives_everything_at_once() {
    rounds(Kind::TmpfsHuge, 1024, 12);
}

#[test]
fn huge_pages_survive_everything_at_once() {
    rounds(Kind::Hugetlb, 12, 10);
}

fn rounds(kind: Kind, pages: u64, count: u64) {
    let seed = testing::seed();
    println!("AFTERIMAGE_SEED={seed}");
    let mut seeds = Random(seed);
    let mut in_flight = 0;
    for round in 0..count {
        let notice = [DiscardNotice::Events, DiscardNotice::Called][round as usize % 2];
        let Some(guest) = Guest::new(kind, pages, notice) else { return };
        let world = World::new(guest, notice, seeds.next());
        world.run(&format!("round {round} of AFTERIMAGE_SEED={seed}, {kind:?}, {notice:?}"));
        in_flight += world.discarded_in_flight.load(Ordering::Relaxed);
    }
    println!("{kind:?}: {in_flight} pages discarded in flight");
}

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Source,
    Zero,
}

/// What is known of a page outside of it.
#[derive(Debug)]
struct Truth {
    /// Held shared by who writes the page, exclusively by who gives it up.
    base: RwLock<Base>,
    /// Since it has had this base; changed under the page's own lock.
    increments: AtomicU64,
    /// Set when a discard has returned after which it must be zero.
    is_gone: AtomicBool,
    /// Set when its content has been seen.
    was_seen: AtomicBool,
    /// How often the engine said that it placed the page.
    placed: AtomicU64,
}

struct World {
    guest: Guest,
    notice: DiscardNotice,
    seed: u64,
    truth: Vec<Truth>,
    /// Where each thread of the guest is.
    at: Vec<AtomicU64>,
    stop: AtomicBool,
    /// Pages asked for lately, for the balloon to aim at.
    asked: AtomicU64,
    discarded_in_flight: AtomicU64,
}

const MUTATORS: u64 = 3;
const COPIERS: u64 = 2;

impl World {
    fn new(guest: Guest, notice: DiscardNotice, seed: u64) -> Arc<Self> {
        let truth = || Truth {
            base: RwLock::new(Base::Source),
            increments: AtomicU64::new(0),
            is_gone: AtomicBool::new(false),
            was_seen: AtomicBool::new(false),
            placed: AtomicU64::new(0),
        };
        let pages = guest.pages.layout().page_count();
        Arc::new(Self {
            truth: (0..pages).map(|_| truth()).collect(),
            at: (0..=MUTATORS).map(|_| AtomicU64::new(u64::MAX)).collect(),
            stop: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            discarded_in_flight: AtomicU64::new(0),
            guest,
            notice,
            seed,
        })
    }

    fn page_count(&self) -> u64 {
        self.truth.len() as u64
    }

    /// A word of the source's page.
    fn source_word(&self, page: u64, offset: u64) -> u64 {
        if offset == LOCK || self.is_zero_at_source(page) {
            return 0;
        }
        mix(self.seed ^ (page << 32) ^ offset) | 1
    }

    fn is_zero_at_source(&self, page: u64) -> bool {
        mix(self.seed ^ (page / 5)).is_multiple_of(4)
    }

    fn source_page(&self, page: u64) -> Vec<u8> {
        let offsets = (0..self.guest.page_bytes()).step_by(8);
        offsets.flat_map(|offset| self.source_word(page, offset).to_le_bytes()).collect()
    }

    /// What a word must be in a page with this base.
    fn expected(&self, base: Base, page: u64, offset: u64) -> u64 {
        match base {
            Base::Source => self.source_word(page, offset),
            Base::Zero => 0,
        }
    }

    /// A word of the guest's page; waits for it.
    fn word(&self, page: u64, offset: u64) -> &AtomicU64 {
        self.guest.area.word(page * self.guest.page_bytes() + offset)
    }

    /// Some places to look at: the first, the last, one between.
    fn samples(&self, random: &mut Random) -> [u64; 3] {
        let last = self.guest.page_bytes() - 8;
        [CONTENT, CONTENT + random.below((last - CONTENT) / 8) * 8, last]
    }

    fn truth_of(&self, page: u64) -> &Truth {
        &self.truth[page as usize]
    }

    fn base_of(&self, page: u64) -> RwLockReadGuard<'_, Base> {
        self.truth_of(page).base.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_placed(&self, page: u64) {
        let before = self.truth_of(page).placed.fetch_add(1, Ordering::Relaxed);
        assert_eq!(before, 0, "page {page} was placed twice");
    }

    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn run(self: &Arc<Self>, what: &str) {
        let mut random = Random(self.seed);
        let (sender, ended) = channel();
        let mut threads = 0;
        let mut start = |role: Role| {
            threads += 1;
            self.start(role, Random(random.next()), &sender)
        };
        let handler = start(Role::Handler);
        let mut others = vec![start(Role::Balloon)];
        others.extend((0..MUTATORS).map(|index| start(Role::Mutator(index as usize))));
        others.extend((0..COPIERS).map(|_| start(Role::Copier)));
        for left in (2..=threads).rev() {
            self.await_end(&ended, what, left);
        }
        for other in others {
            other.join().unwrap();
        }
        self.start(Role::Reader, Random(self.seed), &sender);
        self.await_end(&ended, what, 2);
        self.stop.store(true, Ordering::Release);
        self.await_end(&ended, what, 1);
        handler.join().unwrap();
        assert_eq!(self.guest.pages.remaining(), 0, "{what}");
        self.guest.assert_books_balance();
    }

    fn start(
        self: &Arc<Self>,
        role: Role,
        mut random: Random,
        ended: &Sender<Result<Role, Role>>,
    ) -> std::thread::JoinHandle<()> {
        let (world, ended) = (Arc::clone(self), ended.clone());
        std::thread::spawn(move || {
            let done = catch_unwind(AssertUnwindSafe(|| match role {
                Role::Handler => world.serve(&mut random),
                Role::Copier => world.copy(&mut random),
                Role::Balloon => world.inflate(&mut random),
                Role::Mutator(index) => world.mutate(&mut random, index),
                Role::Reader => world.read_all(),
            }));
            drop(world);
            let _ = ended.send(done.map(|()| role).map_err(|_| role));
        })
    }

    fn await_end(&self, ended: &Receiver<Result<Role, Role>>, what: &str, left: u64) {
        match ended.recv_timeout(DEADLINE) {
            Ok(Ok(_)) => {}
            Ok(Err(role)) => {
                self.stop.store(true, Ordering::Release);
                panic!("{role:?} failed in {what}");
            }
            Err(_) => {
                let pages = &self.guest.pages;
                let places: Vec<_> = self.at.iter().map(|at| at.load(Ordering::Relaxed)).collect();
                let known = places.iter().filter(|&&page| page < self.page_count());
                let states: Vec<_> =
                    known.map(|&page| (page, pages.planes().state(PageNumber(page)))).collect();
                let remaining = pages.remaining();
                pages.memory().wake_all();
                let helped = ended.recv_timeout(Duration::from_secs(2)).is_ok();
                self.stop.store(true, Ordering::Release);
                panic!(
                    "hang in {what}: {left} threads left, waiting at {states:?}, {remaining} \
                     pages remaining; waking everybody helped: {helped}"
                );
            }
        }
    }

    /// Looks at every word of every page.
    fn read_all(&self) {
        for page in 0..self.page_count() {
            self.at[MUTATORS as usize].store(page, Ordering::Relaxed);
            let base = *self.base_of(page);
            let increments = self.truth_of(page).increments.load(Ordering::Acquire);
            for offset in (0..self.guest.page_bytes()).step_by(8) {
                let mut expected = self.expected(base, page, offset);
                if offset == COUNTER {
                    expected = expected.wrapping_add(increments);
                }
                let got = self.word(page, offset).load(Ordering::Acquire);
                assert_eq!(got, expected, "page {page}, base {base:?}, offset {offset:#x}");
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Role {
    Handler,
    Copier,
    Balloon,
    Mutator(usize),
    Reader,
}

/// Holds this thread back at random wherever it passes by.
fn dawdle(random: &mut Random) {
    let mut random = Random(random.next());
    held::hold(move |_| match random.below(32) {
        0 => spin(Duration::from_micros(random.below(50))),
        1..8 => std::thread::yield_now(),
        _ => {}
    });
}

/// Lets time pass, as a network does.
fn spin(duration: Duration) {
    let start = Instant::now();
    while start.elapsed() < duration {
        std::thread::yield_now();
    }
}
