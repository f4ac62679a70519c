//! Where content is, as far as a stream has looked.
//!
//! Invariant: what was found is believed only while what may leave stays the same. A guest that
//! still runs touches pages that were holes; those of them that are sent after that are sent of a
//! later pass, or once memory is final, and by then somebody has looked again.

use crate::source::memory::SourceMemory;
use crate::source::serving::Mode;
use crate::sys::holes::Extent;

/// How far a look goes that does not continue the last one: who comes for a page that the guest
/// waits for, or has written last, goes elsewhere soon, and dense memory takes as long to look at
/// as it is long.
const SHORT_LOOK: u64 = 1 << 20;
/// How far any look goes: the first of a mode, and what a file says at once. Each that continues
/// the last goes twice as far as that.
const LONGEST_LOOK: u64 = 64 << 20;

/// What the last look found: pieces of one region, in order.
#[derive(Debug, Default)]
pub(super) struct Sight {
    /// In which mode it was.
    mode: Option<Mode>,
    /// There was none yet in this mode.
    is_first: bool,
    region: usize,
    /// Where the look began, and where it ended.
    from: u64,
    end: u64,
    extents: Vec<Extent>,
}

/// What lies at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// The first content that ends behind the place; it may have begun before it.
    pub(super) content: Option<Extent>,
    /// Up to there, there is no other.
    pub(super) end: u64,
}

impl Sight {
    /// Memory is to be sent in this mode from now on.
    pub(super) fn enter(&mut self, mode: Mode) {
        if self.mode != Some(mode) {
            (self.mode, self.is_first) = (Some(mode), true);
            self.forget();
        }
    }

    /// What lies at `offset` of a region of `length` bytes, of which a page of so many bytes begins
    /// there. Of a file it is not known where its content ends: until it is
    /// [forgotten](Self::forget), everything up to the end is taken for that.
    pub(super) fn at(
        &mut self,
        memory: &SourceMemory,
        (region, length): (usize, u64),
        offset: u64,
        page_bytes: u64,
    ) -> Seen {
        if let Some(seen) = self.known(region, offset, page_bytes) {
            return seen;
        }
        let before = self.end - self.from;
        // What lies between is looked at too, if there is not more of it than that.
        let continues = self.region == region && (self.from..=self.end + before).contains(&offset);
        let ahead = match continues {
            _ if self.is_first || memory.is_file(region) => LONGEST_LOOK,
            true => (2 * before).min(LONGEST_LOOK),
            false => 0,
        };
        let ahead = ahead.max(SHORT_LOOK).max(page_bytes);
        (self.region, self.from, self.is_first) = (region, offset, false);
        self.end = memory.look(region, offset, length.min(offset + ahead), &mut self.extents);
        Seen { content: self.extents.first().copied(), end: self.end }
    }

    /// The next question is a new look.
    pub(super) fn forget(&mut self) {
        self.extents.clear();
        self.from = self.end;
    }

    fn known(&self, region: usize, offset: u64, page_bytes: u64) -> Option<Seen> {
        if self.region != region || !(self.from..self.end).contains(&offset) {
            return None;
        }
        let next = self.extents.partition_point(|extent| extent.end <= offset);
        let content = self.extents.get(next).copied();
        // Of a page that lies there in part nobody knows whether it is a hole.
        (content.is_some() || offset + page_bytes <= self.end)
            .then_some(Seen { content, end: self.end })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::SourceRegion;
    use crate::sys::holes::EXTENTS_AT_ONCE;
    use crate::sys::testing::{Area, Kind};
    use afterimage_protocol::layout::GuestAddress;
    use std::ptr::NonNull;
    use std::sync::atomic::Ordering;

    const PAGE: u64 = 4096;
    const MIB: u64 = 1 << 20;

    /// Private memory of which no page was touched.
    fn untouched(length: u64) -> (Area, SourceMemory) {
        let area = Area::new(Kind::Anonymous, length / PAGE).expect("not huge");
        area.advise(0, length, libc::MADV_NOHUGEPAGE).unwrap();
        let start = NonNull::new(area.address() as *mut u8).unwrap();
        // SAFETY: a test holds the area as long as the memory.
        let region = unsafe { SourceRegion::anonymous(GuestAddress(0), start, length) };
        (area, SourceMemory::new(vec![region]).unwrap())
    }

    fn touch(area: &Area, offset: u64) {
        area.word(offset).store(1, Ordering::Relaxed);
    }

    fn start_of(seen: Seen) -> Option<u64> {
        seen.content.map(|extent| extent.start)
    }

    #[test]
    fn what_was_a_hole_is_looked_at_again_in_the_next_mode() {
        let (area, memory) = untouched(MIB);
        let (mut sight, whole) = (Sight::default(), (0, MIB));
        sight.enter(Mode::Early(1));
        assert_eq!(sight.at(&memory, whole, 0, PAGE), Seen { content: None, end: MIB });
        touch(&area, 8 * PAGE);
        sight.enter(Mode::Early(1));
        assert_eq!(start_of(sight.at(&memory, whole, PAGE, PAGE)), None, "looked at once");
        sight.enter(Mode::Early(2));
        assert_eq!(start_of(sight.at(&memory, whole, PAGE, PAGE)), Some(8 * PAGE));
        touch(&area, 4 * PAGE);
        sight.enter(Mode::Final);
        assert_eq!(start_of(sight.at(&memory, whole, PAGE, PAGE)), Some(4 * PAGE));
    }

    #[test]
    fn looks_go_farther_as_long_as_each_continues_the_last() {
        let length = 512 * MIB;
        let (_area, memory) = untouched(length);
        let (mut sight, whole) = (Sight::default(), (0, length));
        sight.enter(Mode::Final);
        let mut end = |offset| sight.at(&memory, whole, offset, PAGE).end;
        assert_eq!(end(100 * MIB), 100 * MIB + LONGEST_LOOK, "a stream begins");
        assert_eq!(end(0), SHORT_LOOK);
        assert_eq!(end(SHORT_LOOK - PAGE), SHORT_LOOK, "known");
        assert_eq!(end(SHORT_LOOK), 3 * SHORT_LOOK);
        // With a gap between.
        assert_eq!(end(4 * SHORT_LOOK), 8 * SHORT_LOOK);
        assert_eq!(end(300 * MIB), 300 * MIB + SHORT_LOOK, "somewhere else");
        assert_eq!(end(0), SHORT_LOOK, "behind it");
        let mut at = SHORT_LOOK;
        while at < length {
            let next = end(at);
            assert!(next <= at + LONGEST_LOOK);
            at = next;
        }
        assert_eq!(at, length);
    }

    #[test]
    fn of_a_page_that_was_looked_at_in_part_nobody_says_that_it_is_a_hole() {
        let (area, memory) = untouched(4 * MIB);
        let (mut sight, whole) = (Sight::default(), (0, 4 * MIB));
        touch(&area, 3 * MIB / 2);
        assert_eq!(sight.at(&memory, whole, PAGE, PAGE), Seen { content: None, end: MIB + PAGE });
        let large = sight.at(&memory, whole, MIB, MIB);
        assert_eq!(start_of(large), Some(3 * MIB / 2));
    }

    #[test]
    fn a_look_that_finds_many_pieces_ends_with_the_last_of_them() {
        let length = 2 * (EXTENTS_AT_ONCE as u64 + 1) * PAGE;
        let (area, memory) = untouched(length);
        (0..length).step_by(2 * PAGE as usize).for_each(|offset| touch(&area, offset));
        // So long a page that one look would reach to the end.
        let seen = Sight::default().at(&memory, (0, length), 0, length);
        assert_eq!(seen.end, length - 3 * PAGE);
        assert_eq!(start_of(seen), Some(0));
    }
}
