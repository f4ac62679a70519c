//! What of a destination may outlive the process that serves it: the planes, what is known of
//! early copies, which discards wait for a writer, and what was last read from the userfaultfd.
//!
//! All of it lies in one mapping, of memory that ends with the process or of a file that
//! somebody else keeps (a memfd at a keeper). A process that is killed at any instant leaves
//! there what its successor needs; see [`Pages`](super::pages::Pages) for how it takes over.
//!
//! | at byte | words | |
//! | --- | --- | --- |
//! | 0 | 7 | magic, version, pages, checksum of the layout, whether memory was emptied; of early copies: what becomes of them, and whether something may lie in pages that are not complete |
//! | 4096 | 128 | messages |
//! | 8192 | 8192 | pages discarded while they were being written, each plus one; 0 is free |
//! | 73728 | a bit a page | claimed, up to a multiple of 4096 bytes |
//! | after it | a bit a page | complete |
//! | after it | a bit a page | early copies that count; of a file only while there may be some |

use crate::sys::messages::Messages;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::{Bitmap, Planes, words_for};
use afterimage_protocol::layout::GuestLayout;
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"AFTRPLN\n");
const VERSION: u64 = 2;
const BLOCK: usize = 4096;
const MESSAGES: usize = BLOCK;
const DISCARDS: usize = 2 * BLOCK;
/// Far more pages than all channels together can be writing at once.
const DISCARD_SLOTS: usize = 8192;
const CLAIMED: usize = DISCARDS + DISCARD_SLOTS * 8;

/// How many there are.
const FIELDS: usize = 7;

/// The words of the first block.
#[derive(Clone, Copy)]
enum Field {
    Magic,
    Version,
    Pages,
    Checksum,
    /// 1 once memory has been emptied for these planes: what is there from then on counts.
    Begun,
    /// As [`Early`](super::pages::Pages) numbers them; 0 if there are none.
    Stage,
    /// Not 0 once an early copy may lie in a page that is not complete.
    HasOld,
}

/// What is known of early copies.
#[derive(Debug)]
pub(crate) struct KeptEarly {
    head: LazyWords,
    /// Those that count.
    pub(crate) current: Bitmap<LazyWords>,
}

impl KeptEarly {
    pub(crate) fn stage(&self) -> &AtomicU64 {
        &self.head.as_ref()[Field::Stage as usize]
    }

    pub(crate) fn has_old(&self) -> &AtomicU64 {
        &self.head.as_ref()[Field::HasOld as usize]
    }
}

/// Memory for the planes of one destination.
#[derive(Debug)]
pub(crate) struct Kept {
    map: Arc<MmapRaw>,
    /// A word for each field.
    head: LazyWords,
    pages: u64,
    /// In which a successor finds it.
    file: Option<File>,
}

/// An empty file for planes: memory that exists as long as anybody holds the descriptor.
pub(crate) fn new_file() -> io::Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    Ok(memfd_create(c"afterimage-planes", flags)?)
}

impl Kept {
    /// In memory that ends with the process.
    pub(crate) fn for_now(layout: &GuestLayout) -> io::Result<Self> {
        let pages = layout.page_count();
        let map = MmapOptions::new().len(length_for(pages)).no_reserve_swap().map_anon()?;
        Ok(Self::over(MmapRaw::from(map), pages, None))
    }

    fn over(map: MmapRaw, pages: u64, file: Option<File>) -> Self {
        let map = Arc::new(map);
        Self { head: LazyWords::within(&map, 0, FIELDS), map, pages, file }
    }

    /// In a file: begun anew if it is empty, or taken over as it is.
    ///
    /// # Errors
    /// The file holds something else, or planes of other memory.
    pub(crate) fn in_file(file: OwnedFd, layout: &GuestLayout) -> io::Result<Self> {
        let pages = layout.page_count();
        let (file, wanted) = (File::from(file), length_for(pages));
        match file.metadata()?.len() {
            0 => {
                file.set_len(wanted as u64)?;
                // Allocated, because a full file system would be SIGBUS later.
                fallocate(&file, FallocateFlags::empty(), 0, early_at(pages) as i64)?;
            }
            found if found == wanted as u64 => {}
            found => {
                return Err(wrong(format!("it has {found} bytes, {pages} pages need {wanted}")));
            }
        }
        keep_size(&file)?;
        let map = MmapOptions::new().len(wanted).map_raw(file.as_raw_fd())?;
        let kept = Self::over(map, pages, Some(file));
        if kept.field(Field::Magic).load(Ordering::Acquire) == 0 {
            kept.describe(layout);
        } else {
            kept.check(layout)?;
        }
        Ok(kept)
    }

    fn describe(&self, layout: &GuestLayout) {
        self.field(Field::Version).store(VERSION, Ordering::Relaxed);
        self.field(Field::Pages).store(self.pages, Ordering::Relaxed);
        self.field(Field::Checksum).store(layout.checksum().into(), Ordering::Relaxed);
        // Last: without it, nothing has been described.
        self.field(Field::Magic).store(MAGIC, Ordering::Release);
    }

    fn check(&self, layout: &GuestLayout) -> io::Result<()> {
        let field = |field| self.field(field).load(Ordering::Acquire);
        if field(Field::Magic) != MAGIC {
            return Err(wrong("it does not hold planes".to_owned()));
        }
        if field(Field::Version) != VERSION {
            let theirs = field(Field::Version);
            return Err(wrong(format!("its planes are of version {theirs}, this is {VERSION}")));
        }
        if field(Field::Pages) != self.pages
            || field(Field::Checksum) != u64::from(layout.checksum())
        {
            return Err(wrong("its planes are of memory with another layout".to_owned()));
        }
        Ok(())
    }

    fn field(&self, field: Field) -> &AtomicU64 {
        &self.head.as_ref()[field as usize]
    }

    /// Whether a process before this one has served this memory.
    pub(crate) fn has_begun(&self) -> bool {
        self.field(Field::Begun).load(Ordering::Acquire) != 0
    }

    /// The memory is empty: from here the planes say what is in it.
    pub(crate) fn begin(&self) {
        self.field(Field::Begun).store(1, Ordering::Release);
    }

    pub(crate) fn planes(&self) -> Planes<LazyWords> {
        let count = words_for(self.pages).max(1);
        let words = |offset| LazyWords::within(&self.map, offset, count);
        Planes::over(words(CLAIMED), words(CLAIMED + plane_bytes(self.pages)), self.pages)
    }

    /// What is known of early copies. Where it is in a file, the bitmap may be written only
    /// between [`reserve_early`](Self::reserve_early) and [`release_early`](Self::release_early).
    pub(crate) fn early(&self) -> KeptEarly {
        let count = words_for(self.pages).max(1);
        let words = LazyWords::within(&self.map, early_at(self.pages), count);
        let head = LazyWords::within(&self.map, 0, FIELDS);
        KeptEarly { head, current: Bitmap::over(words, self.pages) }
    }

    /// Early copies may come: there is room to note them. Again and again without harm.
    pub(crate) fn reserve_early(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let (at, length) = (early_at(self.pages), plane_bytes(self.pages));
        Ok(fallocate(file, FallocateFlags::empty(), at as i64, length as i64)?)
    }

    /// None are left, and no bit is set. The room goes back.
    pub(crate) fn release_early(&self) {
        let Some(file) = &self.file else { return };
        let (at, length) = (early_at(self.pages), plane_bytes(self.pages));
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if let Err(error) = fallocate(file, flags, at as i64, length as i64) {
            tracing::debug!(%error, "the room for early copies is kept");
        }
    }

    pub(crate) fn messages(&self) -> Messages {
        Messages::over(LazyWords::within(&self.map, MESSAGES, Messages::WORDS))
    }

    /// Slots for the pages that were discarded while somebody was writing them.
    pub(crate) fn discards(&self) -> LazyWords {
        LazyWords::within(&self.map, DISCARDS, DISCARD_SLOTS)
    }
}

fn plane_bytes(pages: u64) -> usize {
    (words_for(pages).max(1) * 8).next_multiple_of(BLOCK)
}

/// Where the bitmap of early copies is.
fn early_at(pages: u64) -> usize {
    CLAIMED + 2 * plane_bytes(pages)
}

fn length_for(pages: u64) -> usize {
    early_at(pages) + plane_bytes(pages)
}

/// Whoever cut the file short would end the process that has mapped it. Files other than a
/// memfd cannot be sealed; who gives one keeps others from it.
fn keep_size(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    match fcntl(file, FcntlArg::F_ADD_SEALS(seals)) {
        Ok(_) | Err(nix::Error::EINVAL | nix::Error::EPERM) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
