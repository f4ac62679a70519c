//! What guest memory holds at the source.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) const PAGE: u64 = 4096;

/// What word `word` of page `page` holds.
const fn word_of(page: u64, word: u64) -> u64 {
    if page % 7 == 3 { 0 } else { (page << 16 | word).wrapping_mul(0x5851_f42d_4c95_7f2d) | 1 }
}

/// Writes so many pages of the guest, from `first`, to a file, from its page `at`.
pub(crate) fn write(path: &Path, at: u64, first: u64, pages: u64) {
    let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
    for page in 0..pages {
        let words = (0..PAGE / 8).flat_map(|word| word_of(first + page, word).to_le_bytes());
        let bytes: Vec<_> = words.collect();
        file.write_all_at(&bytes, (at + page) * PAGE).unwrap();
    }
}

/// Verifies every byte of page `page` of the guest, which lies at `start`.
pub(crate) fn check(start: *mut u8, page: u64) {
    for word in 0..PAGE / 8 {
        // SAFETY: a page of a mapping that is there as long as this runs, and that is reached by
        // atomics only.
        let found = unsafe { AtomicU64::from_ptr(start.add(word as usize * 8).cast()) };
        let found = u64::from_le(found.load(Ordering::Relaxed));
        assert_eq!(found, word_of(page, word), "page {page}, word {word}");
    }
}

/// The same of bytes that were read.
pub(crate) fn check_bytes(bytes: &[u8], page: u64) {
    for (word, bytes) in (0..).zip(bytes.as_chunks::<8>().0) {
        assert_eq!(u64::from_le_bytes(*bytes), word_of(page, word), "page {page}, word {word}");
    }
}
