//! What a source frees while a migration runs, and how it remembers that it did.
//!
//! A [`ReleaseLedger`] has a bit for each page of 4 KiB of the guest, numbered as the source
//! sees it, so that it does not depend on which destination comes. Invariant (I2): a bit is set
//! only for a page that the destination has acknowledged, and is durable before the page is
//! freed; it is never cleared again. When pages are freed is left to [`releaser`], and whether
//! they may be at all to the session.

mod error;
mod file;
pub(super) mod releaser;

pub use error::ReleaseError;

use super::memory::SourceMemory;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::{Bitmap, words_for};
use afterimage_protocol::layout::{GuestLayout, PageNumber, PageRange};
use afterimage_protocol::session::{Book, LostPages, Releasing, SourcePages, SourceRecord};
use afterimage_protocol::wire::SessionId;
use file::LedgerFile;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a page in the source's own numbering.
pub(super) const PAGE_BYTES: u64 = 4096;

/// Whether a source frees pages that have arrived at the destination, while others are still
/// missing there.
#[derive(Debug, Default)]
#[non_exhaustive]
pub enum Release {
    /// All memory stays until the VMM gives it back itself. If the destination is lost after it
    /// ran the guest, the guest can go on here, from where it was at the switchover, after a
    /// [`fence`](super::Source::fence).
    #[default]
    Keep,
    /// Pages are freed once the destination has acknowledged them and is known to run the
    /// guest: `MADV_DONTNEED` for private memory, a hole in the file for all other, huge pages
    /// whole or not at all. **If the destination is lost after that, the guest is lost.** Taking
    /// it back and fencing are refused from then on. In a migration only.
    ///
    /// Nothing else may use the memory: another session that serves it, and a file that is to
    /// be kept, would see zeros.
    Free(ReleaseLedger),
}

impl Release {
    pub(super) const fn releasing(&self) -> Releasing {
        match self {
            Self::Keep => Releasing::Never,
            Self::Free(_) => Releasing::AfterRunning,
        }
    }

    /// The ledger, opened, where pages are to be freed.
    pub(super) fn open(
        &self,
        record: &SourceRecord,
        memory: &SourceMemory,
    ) -> Result<Option<Arc<Released>>, ReleaseError> {
        match self {
            Self::Keep if record.pages == SourcePages::Released => Err(ReleaseError::NoLedger),
            Self::Keep => Ok(None),
            Self::Free(ledger) => {
                memory.check_release()?;
                ledger.open(record, memory.layout().page_count()).map(Some)
            }
        }
    }
}

/// Which pages a source has freed. Clones are the same ledger; all may be used from any thread.
///
/// It belongs to one session, and goes with its [`SourceRecord`]: whoever starts the session
/// again gives both.
#[derive(Clone, Debug)]
pub struct ReleaseLedger {
    file: Option<Arc<File>>,
    opened: Arc<Mutex<Option<Arc<Released>>>>,
}

impl ReleaseLedger {
    /// In the memory of this process, a bit for each 4 KiB. For a source whose process takes
    /// the guest's memory with it when it dies. Keep a clone to start the same session again in
    /// this process.
    #[must_use]
    pub fn volatile() -> Self {
        Self { file: None, opened: Arc::default() }
    }

    /// In a file that is open for reading and writing: empty, or left by an earlier source of
    /// the same session. Written and synced (`fdatasync`) before each batch of pages is freed,
    /// on a thread that nobody waits for; while that fails nothing is freed. 1 bit for each
    /// 4 KiB, and 4 KiB. Make the directory that it is in durable first.
    #[must_use]
    pub fn file(file: OwnedFd) -> Self {
        Self { file: Some(Arc::new(File::from(file))), opened: Arc::default() }
    }

    /// The ledger's bits for a session, compared with what its record says.
    pub(super) fn open(
        &self,
        record: &SourceRecord,
        pages: u64,
    ) -> Result<Arc<Released>, ReleaseError> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = opened.is_none();
        let released = match &*opened {
            Some(released) => Arc::clone(released),
            None => Arc::new(match &self.file {
                None => Released::new(record.session, pages, LazyWords::new(pages)?, None),
                Some(file) => {
                    let (file, words) = LedgerFile::open(Arc::clone(file), record.session, pages)?;
                    Released::new(record.session, pages, words, Some(file))
                }
            }),
        };
        released.check(record, pages, is_new)?;
        *opened = Some(Arc::clone(&released));
        Ok(released)
    }
}

/// An opened ledger.
#[derive(Debug)]
pub(crate) struct Released {
    session: SessionId,
    bitmap: Bitmap<LazyWords>,
    file: Option<LedgerFile>,
    /// Pages that were freed; those noted by an earlier process, perhaps in vain, included.
    freed: AtomicU64,
    /// Whether an earlier process or connection may have noted pages and not freed them.
    is_in_doubt: AtomicBool,
    /// Whoever notes and frees pages holds it.
    turn: Mutex<()>,
    /// That pages could not be freed has been told.
    has_failed: AtomicBool,
}

impl Released {
    fn new(session: SessionId, pages: u64, words: LazyWords, file: Option<LedgerFile>) -> Self {
        let bitmap = Bitmap::over(words, pages);
        let noted = bitmap.count();
        let (freed, is_in_doubt) = (AtomicU64::new(noted), AtomicBool::new(noted > 0));
        let has_failed = AtomicBool::new(false);
        let turn = Mutex::default();
        Self { session, bitmap, file, freed, is_in_doubt, turn, has_failed }
    }

    /// Record and ledger must tell one story: pages that were freed and are not known would be
    /// sent as zeros.
    fn check(&self, record: &SourceRecord, pages: u64, is_new: bool) -> Result<(), ReleaseError> {
        if self.session != record.session {
            let (theirs, ours) = (self.session, record.session);
            return Err(ReleaseError::OtherSession { theirs, ours });
        }
        if self.bitmap.pages() != pages {
            let theirs = self.bitmap.pages();
            return Err(ReleaseError::OtherMemory { theirs, ours: pages });
        }
        let remembers = !is_new || self.file.as_ref().is_some_and(|file| !file.was_empty());
        match record.pages {
            SourcePages::Released if !remembers => Err(ReleaseError::Forgotten),
            SourcePages::Whole if self.noted() > 0 => {
                Err(ReleaseError::NoRecord { noted: self.noted() })
            }
            _ => Ok(()),
        }
    }

    fn noted(&self) -> u64 {
        self.bitmap.count()
    }

    /// How many pages of 4 KiB were freed.
    pub(crate) fn freed(&self) -> u64 {
        self.freed.load(Ordering::Relaxed)
    }

    /// Notes durably that these pages will be freed. If that fails they must not be.
    fn note(&self, runs: &[PageRange]) -> io::Result<u64> {
        let mut news = Vec::new();
        for run in runs {
            self.bitmap.set(*run, |new| news.push(new));
        }
        if let Some(file) = &self.file
            && let Err(error) = file.write(&self.bitmap, &news)
        {
            for run in news {
                self.bitmap.clear(run, |_| ());
            }
            return Err(error);
        }
        Ok(news.iter().map(|run| run.count).sum())
    }

    /// What a destination lacks of what was freed, when its planes are in the book.
    pub(super) fn lost(
        &self,
        own: &GuestLayout,
        served: &GuestLayout,
        book: &Book<LazyWords>,
    ) -> Option<LostPages> {
        if served.page_count() == own.page_count() {
            return self.lost_alike(book);
        }
        let mut lost: Option<LostPages> = None;
        // A large page of the destination may hold several runs: each is counted once.
        let mut counted = 0;
        for piece in self.bitmap.runs().flat_map(|run| own.split(run).collect::<Vec<_>>()) {
            let pages = overlapping(served, piece.region, piece.offset, piece.length);
            let end = pages.start.0 + pages.count;
            let mut from = pages.start.0.max(counted);
            while from < end {
                let rest = PageRange::new(PageNumber(from), end - from);
                let Some(missing) = book.first_missing_in(rest) else { break };
                lost.get_or_insert(LostPages { first: missing.start, count: 0 }).count +=
                    missing.count;
                from = missing.start.0 + missing.count;
            }
            counted = counted.max(end);
        }
        lost
    }

    /// The same where both sides number pages alike: word by word, because the session waits for
    /// it, and a large guest may have been freed in very many small runs.
    fn lost_alike(&self, book: &Book<LazyWords>) -> Option<LostPages> {
        let mut lost: Option<LostPages> = None;
        for index in 0..words_for(self.bitmap.pages()) {
            let missing = self.bitmap.word(index) & !book.acked_word(index);
            if missing != 0 {
                let first = PageNumber(index as u64 * 64 + u64::from(missing.trailing_zeros()));
                lost.get_or_insert(LostPages { first, count: 0 }).count +=
                    u64::from(missing.count_ones());
            }
        }
        lost
    }
}

/// The pages of a layout that bytes of a region lie in, also in part.
fn overlapping(layout: &GuestLayout, region: usize, offset: u64, length: u64) -> PageRange {
    let first = layout.pages_of(region).start.0;
    let shift = layout.regions()[region].page_size.shift();
    let (from, end) = (offset >> shift, (offset + length - 1) >> shift);
    PageRange::new(PageNumber(first + from), end - from + 1)
}

#[cfg(test)]
mod tests;
