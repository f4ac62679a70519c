//! A release ledger in a file: a header of 4 KiB, then the words of its bitmap.
//!
//! The bits are kept in memory and written by calls, not through a mapping: where the disk is
//! full or the file was cut short, a call fails, and a mapping would end the process.
//!
//! A write may be torn by a power failure. Bits are only ever added, and pages are freed only
//! after the file was synced: whichever bits are there, no freed page lacks its own.

use super::ReleaseError;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::{Bitmap, words_for};
use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::SessionId;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const MAGIC: [u8; 8] = *b"AFTRELS\n";
const VERSION: u32 = 1;
/// Magic, version, 4 bytes reserved, session, pages.
const HEADER_BYTES: usize = 40;
/// Where the words begin.
const WORDS_AT: u64 = 4096;
/// Words read or written in one call, and the most that lie between two runs in one.
const WORDS_AT_ONCE: usize = 512;

#[derive(Debug)]
pub(super) struct LedgerFile {
    file: Arc<File>,
    was_empty: bool,
}

impl LedgerFile {
    /// Opens a ledger that is there, or makes one of an empty file, and reads its bits.
    pub(super) fn open(
        file: Arc<File>,
        session: SessionId,
        pages: u64,
    ) -> Result<(Self, LazyWords), ReleaseError> {
        let words = LazyWords::new(pages)?;
        let mut header = [0; HEADER_BYTES];
        let length = WORDS_AT + words_for(pages) as u64 * 8;
        let was_empty = file.metadata()?.len() < WORDS_AT || {
            file.read_exact_at(&mut header, 0)?;
            // A power failure while it was made.
            header == [0; HEADER_BYTES]
        };
        if was_empty {
            if file.metadata()?.len() > 0 && file.metadata()?.len() != length {
                return Err(ReleaseError::NotALedger);
            }
            file.set_len(length)?;
            file.write_all_at(&made(session, pages), 0)?;
            file.sync_all()?;
        } else {
            check(&header, session, pages)?;
            if file.metadata()?.len() < length {
                return Err(ReleaseError::NotALedger);
            }
            read(&file, &words, pages)?;
        }
        Ok((Self { file, was_empty }, words))
    }

    pub(super) const fn was_empty(&self) -> bool {
        self.was_empty
    }

    /// Writes the words that hold these runs, which are in order, and waits until they are
    /// durable.
    pub(super) fn write(&self, bitmap: &Bitmap<LazyWords>, runs: &[PageRange]) -> io::Result<()> {
        let mut spans: Vec<(usize, usize)> = Vec::new();
        for run in runs.iter().filter(|run| !run.is_empty()) {
            let first = (run.start.0 / 64) as usize;
            let end = ((run.start.0 + run.count - 1) / 64) as usize + 1;
            match spans.last_mut() {
                Some((from, to)) if first >= *from && first <= *to + WORDS_AT_ONCE => {
                    *to = end.max(*to);
                }
                _ => spans.push((first, end)),
            }
        }
        for (first, end) in spans {
            let bytes: Vec<u8> =
                (first..end).flat_map(|index| bitmap.word(index).to_le_bytes()).collect();
            self.file.write_all_at(&bytes, WORDS_AT + first as u64 * 8)?;
        }
        self.file.sync_data()
    }
}

fn made(session: SessionId, pages: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..32].copy_from_slice(&session.0);
    header[32..].copy_from_slice(&pages.to_le_bytes());
    header
}

fn check(header: &[u8; HEADER_BYTES], session: SessionId, pages: u64) -> Result<(), ReleaseError> {
    if header[..12] != made(session, pages)[..12] {
        return Err(ReleaseError::NotALedger);
    }
    let theirs = SessionId(header[16..32].try_into().expect("16 bytes"));
    if theirs != session {
        return Err(ReleaseError::OtherSession { theirs, ours: session });
    }
    let theirs = u64::from_le_bytes(header[32..].try_into().expect("8 bytes"));
    if theirs != pages {
        return Err(ReleaseError::OtherMemory { theirs, ours: pages });
    }
    Ok(())
}

fn read(file: &File, words: &LazyWords, pages: u64) -> io::Result<()> {
    let words = &words.as_ref()[..words_for(pages)];
    let mut buffer = [0; WORDS_AT_ONCE * 8];
    for (index, part) in words.chunks(WORDS_AT_ONCE).enumerate() {
        let bytes = &mut buffer[..part.len() * 8];
        file.read_exact_at(bytes, WORDS_AT + (index * WORDS_AT_ONCE * 8) as u64)?;
        for (word, bytes) in part.iter().zip(bytes.chunks_exact(8)) {
            let value = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
            // Words that are zero take no memory.
            if value != 0 {
                word.store(value, Ordering::Release);
            }
        }
    }
    if let (Some(last), 1..) = (words.last(), pages % 64) {
        last.fetch_and(u64::MAX >> (64 - pages % 64), Ordering::AcqRel);
    }
    Ok(())
}
