//! Words for bitmaps and planes in memory that costs nothing until it is used.

use afterimage_protocol::bitmap::words_for;
use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::sync::atomic::AtomicU64;

/// Zeroed words for a bit a page, in a mapping of their own: a bitmap of a sparse terabyte
/// is made in microseconds and takes memory only where bits are set.
#[derive(Debug)]
pub(crate) struct LazyWords {
    map: MmapRaw,
    count: usize,
}

impl LazyWords {
    /// Words for `pages` pages.
    pub(crate) fn new(pages: u64) -> io::Result<Self> {
        let count = words_for(pages).max(1);
        let map = MmapRaw::from(MmapOptions::new().len(count * 8).map_anon()?);
        Ok(Self { map, count })
    }
}

impl AsRef<[AtomicU64]> for LazyWords {
    fn as_ref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, readable, writable and `count` words long; it
        // lives as long as `self`; nobody reaches it but through these atomics.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), self.count) }
    }
}
