//! Threads of the guest.

use super::*;

impl World {
    pub(super) fn mutate(&self, random: &mut Random, index: usize) {
        for _ in 0..self.page_count() * 3 {
            if self.is_stopping() {
                return;
            }
            // Half of the accesses go to few pages, so that threads meet.
            let bound = if random.one_in(2) { self.page_count() } else { 8 };
            let page = (random.below(bound) + self.seed) % self.page_count();
            self.at[index].store(page, Ordering::Relaxed);
            if random.one_in(4) {
                self.peek(page, random);
            } else {
                self.increment(page, random);
            }
            self.at[index].store(u64::MAX, Ordering::Relaxed);
            if random.one_in(8) {
                spin(Duration::from_micros(random.below(30)));
            }
        }
    }

    /// Counts the page's counter up by one, and knows what it was.
    fn increment(&self, page: u64, random: &mut Random) {
        let truth = self.truth_of(page);
        let base = self.base_of(page);
        let lock = self.word(page, LOCK);
        testing::await_that(&format!("page {page} is unlocked"), || {
            lock.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
        });
        let counter = self.word(page, COUNTER);
        let before = truth.increments.load(Ordering::Relaxed);
        let expected = self.expected(*base, page, COUNTER).wrapping_add(before);
        assert_eq!(counter.load(Ordering::Relaxed), expected, "counter of page {page} ({base:?})");
        for offset in self.samples(random) {
            let got = self.word(page, offset).load(Ordering::Relaxed);
            let expected = self.expected(*base, page, offset);
            assert_eq!(got, expected, "page {page} ({base:?}), offset {offset:#x}");
        }
        if random.one_in(16) {
            std::thread::yield_now();
        }
        counter.store(expected.wrapping_add(1), Ordering::Relaxed);
        truth.increments.store(before + 1, Ordering::Relaxed);
        truth.was_seen.store(true, Ordering::Relaxed);
        lock.store(0, Ordering::Release);
    }

    /// Looks at a page while it may be given up.
    fn peek(&self, page: u64, random: &mut Random) {
        let truth = self.truth_of(page);
        let is_gone = truth.is_gone.load(Ordering::Acquire);
        for offset in self.samples(random) {
            let got = self.word(page, offset).load(Ordering::Relaxed);
            let original = self.source_word(page, offset);
            assert!(got == 0 || got == original, "page {page} offset {offset:#x}: {got:#x}");
            if is_gone {
                assert_eq!(got, 0, "page {page} came back after its discard");
            } else if got != 0 {
                truth.was_seen.store(true, Ordering::Relaxed);
            }
        }
    }
}
