//! Which pages the source frees: `source/release.rs` in the engine.

use crate::mutant::Mutant;
use crate::source::PIECE;
use crate::world::World;
use afterimage_protocol::layout::PageNumber;
use afterimage_protocol::session::LostPages;

impl World {
    /// The source notes durably that pages are freed, or frees those that it has noted.
    pub(crate) fn release(&mut self) {
        let source = &self.source;
        let is_hasty = self.breaks(Mutant::ReleaseBeforeRecord);
        let may = source.may_release || (is_hasty && self.plan.releases && source.destination_runs);
        if !source.is_alive || !may {
            return;
        }
        let frees_unnoted = self.breaks(Mutant::ReleaseBeforeNoted);
        if self.random.chance(500) {
            for page in self.all_pages() {
                if self.source.released[page.0 as usize]
                    || (frees_unnoted && self.source.book.is_acked(page))
                {
                    self.source.memory[page.0 as usize] = None;
                }
            }
            return;
        }
        let from = self.random.below(self.plan.pages);
        for page in self.all_pages().skip(from as usize).take(PIECE as usize) {
            let may_go = self.source.book.is_acked(page)
                || (self.breaks(Mutant::ReleaseBeforeAck) && self.source.is_in_flight(page));
            if may_go {
                self.note(|| format!("source notes page {page} as freed"));
                self.source.released[page.0 as usize] = true;
            }
        }
    }

    /// The destination has said what it has: is everything there that was freed?
    pub(crate) fn compare_released(&mut self) {
        let source = &self.source;
        let is_lost =
            |page: &PageNumber| source.released[page.0 as usize] && !source.book.is_acked(*page);
        let first = self.all_pages().find(is_lost);
        let count = self.all_pages().filter(is_lost).count() as u64;
        let lost = first.map(|first| LostPages { first, count });
        let now = self.now;
        self.source.session.compared(lost, now);
    }
}
