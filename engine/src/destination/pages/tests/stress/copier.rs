//! Background channels, some of which break.

use super::*;

impl World {
    pub(super) fn copy(&self, random: &mut Random) {
        dawdle(random);
        let longest = if self.guest.page_bytes() > 4096 { 2 } else { 12 };
        while self.guest.pages.remaining() > 0 && !self.is_stopping() {
            let first = self.somewhere(random);
            let count = (1 + random.below(longest)).min(self.page_count() - first);
            let mut next = first;
            while next < first + count {
                let zero = self.is_zero_at_source(next);
                let alike = |&page: &u64| self.is_zero_at_source(page) == zero;
                let length = (next..first + count).take_while(alike).count() as u64;
                if zero {
                    self.guest.pages.zero(range(next, length));
                } else {
                    self.bring_piece(range(next, length), random);
                }
                next += length;
            }
            spin(Duration::from_micros(random.below(120)));
        }
    }

    /// A page; more often than not one that has not arrived.
    fn somewhere(&self, random: &mut Random) -> u64 {
        let first = random.below(self.page_count());
        if random.one_in(3) {
            return first;
        }
        let mut pages = (first..self.page_count()).chain(0..first);
        let planes = self.guest.pages.planes();
        pages.find(|&page| !planes.is_complete(PageNumber(page))).unwrap_or(first)
    }

    fn bring_piece(&self, piece: PageRange, random: &mut Random) {
        let claim = self.guest.pages.claim(piece);
        let content: Vec<u8> = piece.iter().flat_map(|page| self.source_page(page.0)).collect();
        // Where the channel breaks, if it does.
        let end = if random.one_in(6) { random.below(content.len() as u64) } else { u64::MAX };
        let mut at = 0;
        for target in claim.targets().unwrap().unwrap_or_default() {
            let from = at as usize;
            match target {
                Target::Memory(run) => {
                    let arrived = (end.saturating_sub(at) as usize).min(run.length);
                    // SAFETY: claimed, mapped, and written by this thread alone.
                    unsafe { run.write(&content[from..from + arrived / 2]) };
                    std::thread::yield_now();
                    // SAFETY: as above.
                    unsafe { run.write(&content[from..from + arrived]) };
                    at += run.length as u64;
                }
                Target::Nowhere(bytes) => at += bytes,
            }
        }
        if end < u64::MAX {
            return drop(claim);
        }
        let placed = |run: PageRange| run.iter().for_each(|page| self.note_placed(page.0));
        claim.finish(&content, placed).unwrap();
    }
}
