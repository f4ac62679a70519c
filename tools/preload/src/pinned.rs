//! Addresses that stay where they are: known without a lock, because an allocator that is called
//! while one is held may move memory of its own.

use crate::table::{MAX_REGIONS, Table};
use std::sync::atomic::{AtomicU64, Ordering};

static PINNED: [Range; MAX_REGIONS] = [const { Range::none() }; MAX_REGIONS];

/// All regions of a table, and no others.
pub(crate) fn set(table: &Table) {
    let mut ranges = PINNED.iter();
    for (region, range) in table.regions().zip(&mut ranges) {
        range.set(region.address, region.address + region.length);
    }
    ranges.for_each(|range| range.set(0, 0));
}

/// None any more.
pub(crate) fn clear() {
    for range in &PINNED {
        range.set(0, 0);
    }
}

/// The beginning of one that has a byte of this range.
pub(crate) fn overlap(start: u64, end: u64) -> Option<u64> {
    PINNED.iter().find_map(|range| range.overlap(start, end))
}

/// Empty if it ends before it begins.
struct Range {
    start: AtomicU64,
    end: AtomicU64,
}

impl Range {
    const fn none() -> Self {
        Self { start: AtomicU64::new(0), end: AtomicU64::new(0) }
    }

    fn set(&self, start: u64, end: u64) {
        // Empty in between, for who looks at the same time.
        self.end.store(0, Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
        self.end.store(end, Ordering::SeqCst);
    }

    fn overlap(&self, start: u64, end: u64) -> Option<u64> {
        let (from, to) = (self.start.load(Ordering::SeqCst), self.end.load(Ordering::SeqCst));
        (from < end && start < to).then_some(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_overlaps_what_it_shares_a_byte_with() {
        let range = Range::none();
        assert_eq!(range.overlap(0, u64::MAX), None);
        range.set(4096, 8192);
        assert_eq!(range.overlap(8191, 8192), Some(4096));
        assert_eq!(range.overlap(0, 4097), Some(4096));
        assert_eq!(range.overlap(8192, 9000), None);
        assert_eq!(range.overlap(0, 4096), None);
    }
}
