//! The guest's balloon: gives pages up, preferably those under way.

use super::*;
use afterimage_protocol::bitmap::PageState;
use std::sync::RwLockWriteGuard;

#[derive(Clone, Copy, Debug)]
enum Means {
    /// `Pages::discard`, then the pages are freed.
    Call,
    /// Advice that frees the pages whatever they are.
    Advice,
    /// `MADV_DONTNEED` on shared memory: gone if they have not arrived, else kept.
    AdviceThatKeeps,
}

impl World {
    pub(super) fn inflate(&self, random: &mut Random) {
        for _ in 0..self.page_count() / 2 {
            if self.is_stopping() {
                return;
            }
            let first = self.victim(random);
            let longest = if self.guest.page_bytes() > 4096 { 1 } else { 3 };
            let count = (1 + random.below(longest)).min(self.page_count() - first);
            // A page that the guest is using waits for another time.
            let locks: Vec<_> = (first..first + count)
                .map_while(|page| self.truth_of(page).base.try_write().ok())
                .collect();
            if locks.len() as u64 == count {
                self.give_up_locked(first, locks, random);
            }
            spin(Duration::from_micros(random.below(100)));
        }
    }

    fn victim(&self, random: &mut Random) -> u64 {
        let first = random.below(self.page_count());
        let planes = self.guest.pages.planes();
        match random.below(4) {
            0 => first,
            1 => self.asked.load(Ordering::Relaxed),
            _ => {
                let mut pages = (first..self.page_count()).chain(0..first);
                let is_claimed = |&page: &u64| planes.state(PageNumber(page)) == PageState::Claimed;
                pages.find(is_claimed).unwrap_or(first)
            }
        }
    }

    fn give_up_locked(
        &self,
        first: u64,
        mut locks: Vec<RwLockWriteGuard<'_, Base>>,
        random: &mut Random,
    ) {
        let count = locks.len() as u64;
        let planes = self.guest.pages.planes();
        let in_flight = range(first, count)
            .iter()
            .filter(|&page| planes.state(page) == PageState::Claimed)
            .count() as u64;
        self.discarded_in_flight.fetch_add(in_flight, Ordering::Relaxed);
        let seen: Vec<bool> = (first..first + count)
            .map(|page| self.truth_of(page).was_seen.load(Ordering::Relaxed))
            .collect();
        let means = self.choose(random);
        self.free(means, first, count);
        for (index, base) in locks.iter_mut().enumerate() {
            let page = first + index as u64;
            match means {
                Means::Call | Means::Advice => {
                    let truth = self.truth_of(page);
                    truth.increments.store(0, Ordering::Relaxed);
                    truth.is_gone.store(true, Ordering::Release);
                    **base = Base::Zero;
                    if random.one_in(2) {
                        self.see(page, Base::Zero, random);
                    }
                }
                Means::AdviceThatKeeps => {
                    let is_zero = self.word(page, CONTENT).load(Ordering::Relaxed) == 0;
                    if is_zero && **base == Base::Source && !self.is_zero_at_source(page) {
                        assert!(!seen[index], "page {page} had arrived and is lost");
                        **base = Base::Zero;
                        self.truth_of(page).is_gone.store(true, Ordering::Release);
                    }
                    self.see(page, **base, random);
                }
            }
        }
    }

    fn choose(&self, random: &mut Random) -> Means {
        match (self.notice, self.guest.has_file(), random.below(4)) {
            (DiscardNotice::Called, _, _) | (_, _, 0) => Means::Call,
            (_, true, 1) => Means::AdviceThatKeeps,
            _ => Means::Advice,
        }
    }

    fn free(&self, means: Means, first: u64, count: u64) {
        let page = self.guest.page_bytes();
        let (start, length) = (first * page, count * page);
        let area = &self.guest.area;
        if matches!(means, Means::Call) {
            self.guest.pages.discard(range(first, count));
        }
        match (means, &area.file) {
            (Means::Call, Some(file)) => {
                crate::sys::mapping::punch_hole(file, start, length).unwrap();
            }
            (Means::Advice, Some(_)) => area.advise(start, length, libc::MADV_REMOVE).unwrap(),
            _ => area.advise(start, length, libc::MADV_DONTNEED).unwrap(),
        }
    }

    fn see(&self, page: u64, base: Base, random: &mut Random) {
        for offset in self.samples(random) {
            let got = self.word(page, offset).load(Ordering::Relaxed);
            let expected = self.expected(base, page, offset);
            assert_eq!(got, expected, "page {page} ({base:?}) when given up, offset {offset:#x}");
        }
    }
}
