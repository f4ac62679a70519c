//! Where content is, as far as a stream has looked.

use crate::source::memory::SourceMemory;
use crate::sys::holes::Extent;

/// What the last look found: pieces of one region, in order. Memory is final, so what was
/// found once stays true.
#[derive(Debug, Default)]
pub(super) struct Sight {
    region: usize,
    /// Where the look began.
    from: u64,
    extents: Vec<Extent>,
}

impl Sight {
    /// The first content that ends after `offset`, if it begins before `end`; it may have begun
    /// before `offset`. Of a file it is not known where it ends: until it is
    /// [forgotten](Self::forget), everything up to `end` is taken for content.
    pub(super) fn content_at(
        &mut self,
        memory: &SourceMemory,
        region: usize,
        offset: u64,
        end: u64,
    ) -> Option<Extent> {
        let last = self.extents.last().map_or(0, |extent| extent.end);
        if self.region != region || offset < self.from || last <= offset {
            memory.look(region, offset, end, &mut self.extents);
            (self.region, self.from) = (region, offset);
        }
        let next = self.extents.partition_point(|extent| extent.end <= offset);
        self.extents.get(next).copied()
    }

    /// The next question is a new look.
    pub(super) fn forget(&mut self) {
        self.extents.clear();
    }
}
