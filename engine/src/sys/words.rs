//! Words for bitmaps and planes in memory that costs nothing until it is used.

use afterimage_protocol::bitmap::words_for;
use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Words in a mapping, zero until they are written: a bitmap of a sparse terabyte is made in
/// microseconds and takes memory only where bits are set.
#[derive(Debug)]
pub(crate) struct LazyWords {
    map: Arc<MmapRaw>,
    /// In bytes, a multiple of 8.
    offset: usize,
    count: usize,
}

impl LazyWords {
    /// Words for `pages` pages, in a mapping of their own.
    pub(crate) fn new(pages: u64) -> io::Result<Self> {
        let count = words_for(pages).max(1);
        let map = MmapRaw::from(MmapOptions::new().len(count * 8).map_anon()?);
        Ok(Self { map: Arc::new(map), offset: 0, count })
    }

    /// `count` words of a shared mapping from its byte `offset`, with what they hold.
    ///
    /// # Panics
    /// If they do not lie in the mapping, or not on a word.
    pub(crate) fn within(map: &Arc<MmapRaw>, offset: usize, count: usize) -> Self {
        let end = count.checked_mul(8).and_then(|bytes| bytes.checked_add(offset));
        assert!(offset.is_multiple_of(8) && end.is_some_and(|end| end <= map.len()));
        Self { map: Arc::clone(map), offset, count }
    }
}

impl AsRef<[AtomicU64]> for LazyWords {
    fn as_ref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, readable and writable, and these words lie in
        // it (asserted where they were chosen); it lives as long as `self`; nobody reaches
        // them but through these atomics, or in the kernel.
        unsafe {
            let start = self.map.as_mut_ptr().add(self.offset);
            std::slice::from_raw_parts(start.cast(), self.count)
        }
    }
}
