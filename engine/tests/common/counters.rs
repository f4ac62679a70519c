//! A guest that counts: threads that add to counters in pages, each under a lock word of its
//! page. A lost page, or one that came twice, shows in a counter.

use super::{Memory, Random, Toucher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the lock lies in a page. 0 is free.
pub const LOCK: u64 = 0;
/// Where the counter lies.
pub const COUNTER: u64 = 1;

pub struct Counters {
    memory: Arc<Memory>,
    before: Vec<u64>,
    added: Vec<AtomicU64>,
}

impl Counters {
    /// Puts a free lock into every page of the source.
    pub fn prepare(old: &Memory, new: Arc<Memory>) -> Arc<Self> {
        let mut before = Vec::new();
        for page in 0..old.small_pages() {
            old.word(page, LOCK).store(0, Ordering::Relaxed);
            before.push(old.word(page, COUNTER).load(Ordering::Relaxed));
        }
        let added = before.iter().map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { memory: new, before, added })
    }

    pub fn add_one(&self, page: u64) {
        let lock = self.memory.word(page, LOCK);
        while lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::thread::yield_now();
        }
        let counter = self.memory.word(page, COUNTER);
        // Two steps on purpose: the lock makes them one.
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        lock.store(0, Ordering::Release);
        self.added[page as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Threads that add to random pages, `rounds` times each.
    pub fn start(
        self: &Arc<Self>,
        threads: u64,
        rounds: u64,
        random: &mut Random,
    ) -> Vec<Toucher<()>> {
        (0..threads)
            .map(|_| {
                let (counters, mut random) = (Arc::clone(self), random.fork());
                Toucher::start(move || {
                    for _ in 0..rounds {
                        counters.add_one(random.below(counters.before.len() as u64));
                    }
                })
            })
            .collect()
    }

    /// All counters are right, and all else is as it was at the source.
    pub fn check(&self, old: &Memory) {
        for page in 0..old.small_pages() {
            let added = self.added[page as usize].load(Ordering::Relaxed);
            let expected = self.before[page as usize].wrapping_add(added);
            let found = self.memory.word(page, COUNTER).load(Ordering::Relaxed);
            assert_eq!(found, expected, "the counter of page {page}, {added} times added to");
            for word in (0..512).filter(|word| *word != COUNTER) {
                let (there, here) = (old.word(page, word), self.memory.word(page, word));
                let (there, here) = (there.load(Ordering::Relaxed), here.load(Ordering::Relaxed));
                assert_eq!(here, there, "word {word} of page {page}");
            }
        }
    }
}
