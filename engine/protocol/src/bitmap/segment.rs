//! The wire form of a bitmap: a segment of pages, by runs or as raw words, whichever is
//! smaller.
//!
//! By runs: the length of a run of clear bits, then that of a run of set bits, and so on,
//! each as a LEB128 number, until the segment is full; what follows the last is clear.
//! Raw: the words, little-endian; bits beyond the segment are zero.

use super::{Bitmap, Words, words_for};
use crate::layout::{PageNumber, PageRange};

/// The most pages one segment may cover: 512 KiB raw.
pub const MAX_SEGMENT_PAGES: u64 = 1 << 22;

/// A piece of a bitmap as it travels.
///
/// ```
/// use afterimage_protocol::bitmap::{Bitmap, Segment};
/// use afterimage_protocol::layout::{PageNumber, PageRange};
///
/// let bitmap = Bitmap::new(1000);
/// bitmap.set(PageRange::new(PageNumber(70), 3), |_| ());
/// let range = PageRange::new(PageNumber(64), 500);
/// let segment = Segment::encode(&bitmap, range);
/// assert_eq!(segment, Segment::Runs(vec![6, 3]));
///
/// let copy = Bitmap::new(1000);
/// segment.decode(range, |run| {
///     copy.set(run, |_| ());
/// })?;
/// assert_eq!(copy.count(), 3);
/// # Ok::<(), afterimage_protocol::bitmap::SegmentError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// Alternating lengths of clear and set runs.
    Runs(Vec<u8>),
    /// Words.
    Raw(Vec<u8>),
}

/// Why bytes are no segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SegmentError {
    /// It claims to cover more pages than a segment may.
    #[error("a bitmap segment of {pages} pages, more than {MAX_SEGMENT_PAGES}")]
    TooLong {
        /// How many.
        pages: u64,
    },
    /// A number that does not end or does not fit.
    #[error("a malformed run length at byte {offset} of a bitmap segment")]
    BadNumber {
        /// Where.
        offset: usize,
    },
    /// Runs that go on beyond the segment's end.
    #[error("runs of a bitmap segment reach {reached} pages where it covers {pages}")]
    Beyond {
        /// How far they reach.
        reached: u64,
        /// How many pages the segment covers.
        pages: u64,
    },
    /// Raw words of the wrong length, or bits beyond the end.
    #[error("{bytes} raw bytes do not make a bitmap segment of {pages} pages")]
    BadRaw {
        /// How many bytes came.
        bytes: usize,
        /// How many pages the segment covers.
        pages: u64,
    },
}

impl Segment {
    /// The smaller form of the bits of `range`, whose start must be a multiple of 64.
    ///
    /// # Panics
    /// If the start is no multiple of 64 or the range is longer than
    /// [`MAX_SEGMENT_PAGES`].
    #[must_use]
    pub fn encode<W: Words>(bitmap: &Bitmap<W>, range: PageRange) -> Self {
        assert!(range.start.0.is_multiple_of(64) && range.count <= MAX_SEGMENT_PAGES);
        let words: Vec<u64> = (0..words_for(range.count))
            .map(|index| {
                let left = range.count - index as u64 * 64;
                let mask = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
                bitmap.word((range.start.0 / 64) as usize + index) & mask
            })
            .collect();
        encode_runs(&words, range.count).map_or_else(
            || Self::Raw(words.iter().flat_map(|word| word.to_le_bytes()).collect()),
            Self::Runs,
        )
    }

    /// Calls `set` with each run of set bits, numbered from `range.start`.
    ///
    /// # Errors
    /// [`SegmentError`] if the bytes are no segment of exactly this range; runs before the
    /// fault have been reported by then, so callers decode into a scratch copy or close
    /// the connection.
    pub fn decode(
        &self,
        range: PageRange,
        mut set: impl FnMut(PageRange),
    ) -> Result<(), SegmentError> {
        if range.count > MAX_SEGMENT_PAGES {
            return Err(SegmentError::TooLong { pages: range.count });
        }
        match self {
            Self::Runs(bytes) => decode_runs(bytes, range, &mut set),
            Self::Raw(bytes) => decode_raw(bytes, range, &mut set),
        }
    }
}

/// `None` where the raw words are smaller.
fn encode_runs(words: &[u64], pages: u64) -> Option<Vec<u8>> {
    let limit = words.len() * 8;
    let mut bytes = Vec::new();
    let (mut current, mut length) = (false, 0_u64);
    let mut left = pages;
    for &word in words {
        let mut used = 0;
        let bits = left.min(64);
        while used < bits {
            let shifted = if current { !word } else { word } >> used;
            let same = u64::from(shifted.trailing_zeros()).min(bits - used);
            length += same;
            used += same;
            if used < bits {
                put_number(&mut bytes, length);
                (current, length) = (!current, 0);
            }
        }
        left -= bits;
        if bytes.len() >= limit {
            return None;
        }
    }
    if current {
        put_number(&mut bytes, length);
    }
    (bytes.len() < limit).then_some(bytes)
}

fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn decode_runs(
    bytes: &[u8],
    range: PageRange,
    set: &mut impl FnMut(PageRange),
) -> Result<(), SegmentError> {
    let (mut offset, mut reached, mut is_set) = (0, 0_u64, false);
    while offset < bytes.len() {
        let start = offset;
        let mut length = 0_u64;
        let mut shift = 0;
        loop {
            let byte = *bytes.get(offset).ok_or(SegmentError::BadNumber { offset: start })?;
            offset += 1;
            length |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
            if shift > 28 {
                return Err(SegmentError::BadNumber { offset: start });
            }
        }
        if length > range.count - reached {
            let reached = reached + length;
            return Err(SegmentError::Beyond { reached, pages: range.count });
        }
        if is_set && length > 0 {
            set(PageRange::new(PageNumber(range.start.0 + reached), length));
        }
        reached += length;
        is_set = !is_set;
    }
    Ok(())
}

fn decode_raw(
    bytes: &[u8],
    range: PageRange,
    set: &mut impl FnMut(PageRange),
) -> Result<(), SegmentError> {
    let bad = SegmentError::BadRaw { bytes: bytes.len(), pages: range.count };
    if bytes.len() != words_for(range.count) * 8 {
        return Err(bad);
    }
    let mut runs = super::RunCollector::new(set);
    for (index, chunk) in bytes.chunks_exact(8).enumerate() {
        let word = u64::from_le_bytes(chunk.try_into().map_err(|_| bad)?);
        let left = range.count - index as u64 * 64;
        if left < 64 && word >> left != 0 {
            return Err(bad);
        }
        runs.push((range.start.0 / 64) as usize + index, word);
    }
    runs.finish();
    Ok(())
}
