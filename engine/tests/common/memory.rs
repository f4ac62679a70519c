//! Guests made of plain mappings, with content that can be computed again.

use super::random::mix;
use afterimage::{
    DestinationMemory, DestinationRegion, DiscardNotice, GuestAddress, MemoryError, PageSize,
    SourceMemory, SourceRegion,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub const PAGE: u64 = 4096;
const HUGE: u64 = 2 << 20;
/// Between the guest addresses of two regions.
const GAP: u64 = 1 << 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Anonymous,
    Memfd,
    /// Huge pages of 2 MiB.
    Huge,
}

/// What a page of 4 KiB holds at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Something in every page.
    Dense,
    /// Content in a few pages; holes of 4 KiB pages between, never touched.
    Sparse,
    /// Runs of zero pages that were written, between others.
    ZeroRuns,
    /// Content in every fourth page; the others were never touched.
    Scattered,
    /// Nothing but zeros that were written.
    Zeros,
    /// Nothing anywhere.
    Empty,
}

impl Content {
    fn of(self, page: u64) -> PageContent {
        match self {
            Self::Sparse if page % 61 < 5 => PageContent::Full,
            Self::Scattered if page.is_multiple_of(4) => PageContent::Full,
            Self::Sparse | Self::Scattered | Self::Empty => PageContent::Hole,
            Self::Zeros => PageContent::Zeros,
            Self::ZeroRuns if page % 97 < 40 || page.is_multiple_of(7) => PageContent::Zeros,
            Self::Dense | Self::ZeroRuns => PageContent::Full,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PageContent {
    Full,
    Zeros,
    Hole,
}

struct Area {
    kind: Kind,
    guest: GuestAddress,
    start: NonNull<u8>,
    length: u64,
    file: Option<OwnedFd>,
}

/// All memory of a guest.
pub struct Memory {
    areas: Vec<Area>,
}

// SAFETY: plain mappings, reached by volatile and atomic accesses only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `None`, after saying so, where the machine has no huge pages for it.
    pub fn try_new(kinds: &[(Kind, u64)]) -> Option<Arc<Self>> {
        match Self::map(kinds) {
            Ok(memory) => Some(Arc::new(memory)),
            Err(error) if kinds.iter().any(|(kind, _)| *kind == Kind::Huge) => {
                super::skip("hugetlb", &format!("no 2 MiB pages to be had: {error}"));
                None
            }
            Err(error) => panic!("no memory for a test: {error}"),
        }
    }

    /// Memory without huge pages.
    pub fn new(kinds: &[(Kind, u64)]) -> Arc<Self> {
        Self::try_new(kinds).expect("no huge pages asked for")
    }

    /// Memory in this file, and more behind it.
    pub fn on_file(file: File, length: u64, more: &[(Kind, u64)]) -> Arc<Self> {
        file.set_len(length).expect("a size");
        let area = Area::map_file(Kind::Memfd, GuestAddress(0), length, Some(file.into()));
        let more = more.iter().enumerate().map(|(index, (kind, length))| {
            Area::map(*kind, GuestAddress((index as u64 + 1) * GAP), *length)
        });
        let areas = std::iter::once(area).chain(more).collect::<Result<_, _>>();
        Arc::new(Self { areas: areas.expect("mappings") })
    }

    fn map(kinds: &[(Kind, u64)]) -> std::io::Result<Self> {
        let areas = kinds.iter().enumerate().map(|(index, (kind, length))| {
            Area::map(*kind, GuestAddress(index as u64 * GAP), *length)
        });
        Ok(Self { areas: areas.collect::<Result<_, _>>()? })
    }

    /// Writes what `seed` and `content` say; holes are left alone.
    pub fn fill(&self, seed: u64, content: Content) {
        let mut page = 0;
        for area in &self.areas {
            for offset in (0..area.length).step_by(PAGE as usize) {
                let at = area.at(offset);
                match content.of(page) {
                    PageContent::Hole => {}
                    PageContent::Zeros => write_page(at, |_| 0),
                    PageContent::Full => write_page(at, |word| word_of(seed, page, word)),
                }
                page += 1;
            }
        }
    }

    /// Reads every byte and panics at the first that is not what `fill` wrote.
    pub fn check(&self, seed: u64, content: Content) {
        self.check_pages(seed, content, 0, self.small_pages());
    }

    /// The same for some pages of 4 KiB.
    pub fn check_pages(&self, seed: u64, content: Content, from: u64, to: u64) {
        for page in from..to {
            let is_full = content.of(page) == PageContent::Full;
            for word in 0..PAGE / 8 {
                let expected = if is_full { word_of(seed, page, word) } else { 0 };
                let found = self.word(page, word).load(Ordering::Relaxed);
                assert_eq!(
                    found, expected,
                    "page {page} ({content:?}), word {word}: wrong content"
                );
            }
        }
    }

    /// Panics where two memories differ.
    pub fn check_same(&self, other: &Self) {
        (0..self.small_pages()).for_each(|page| self.check_page_same(other, page));
    }

    /// The same for one piece of 4 KiB.
    pub fn check_page_same(&self, other: &Self, page: u64) {
        for word in 0..PAGE / 8 {
            let (mine, theirs) = (self.word(page, word), other.word(page, word));
            let (mine, theirs) = (mine.load(Ordering::Relaxed), theirs.load(Ordering::Relaxed));
            assert_eq!(mine, theirs, "page {page}, word {word}: the sides differ");
        }
    }

    /// How many pieces of 4 KiB there are.
    pub fn small_pages(&self) -> u64 {
        self.areas.iter().map(|area| area.length / PAGE).sum()
    }

    /// How many pages there are at a destination.
    pub fn pages(&self) -> u64 {
        self.areas.iter().map(|area| area.length / area.page_bytes()).sum()
    }

    /// A word of a piece of 4 KiB.
    pub fn word(&self, mut page: u64, word: u64) -> &AtomicU64 {
        assert!(word < PAGE / 8);
        for area in &self.areas {
            if page < area.length / PAGE {
                // SAFETY: in the mapping, aligned, and only ever used as an atomic.
                return unsafe { AtomicU64::from_ptr(area.at(page * PAGE + word * 8).cast()) };
            }
            page -= area.length / PAGE;
        }
        panic!("no such page");
    }

    pub fn kind_of(&self, page: u64) -> Kind {
        self.place(page).0.kind
    }

    fn place(&self, mut page: u64) -> (&Area, u64) {
        for area in &self.areas {
            if page < area.length / PAGE {
                return (area, page * PAGE);
            }
            page -= area.length / PAGE;
        }
        panic!("no such page");
    }

    /// The guest address of a piece of 4 KiB.
    pub fn guest_address(&self, page: u64) -> GuestAddress {
        let (area, offset) = self.place(page);
        GuestAddress(area.guest.0 + offset)
    }

    /// How many pieces of 4 KiB follow in the same region, itself included.
    pub fn left_in_region(&self, page: u64) -> u64 {
        let (area, offset) = self.place(page);
        (area.length - offset) / PAGE
    }

    /// `madvise` on pieces of 4 KiB inside one region.
    pub fn advise(&self, page: u64, pages: u64, advice: i32) -> std::io::Result<()> {
        let (area, offset) = self.place(page);
        assert!(offset + pages * PAGE <= area.length, "inside one region");
        // SAFETY: advice on our own mapping, of which no reference is alive.
        let result =
            unsafe { libc::madvise(area.at(offset).cast(), (pages * PAGE) as usize, advice) };
        if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    /// A path at which another process opens the file of a region, as long as this one lives.
    pub fn path_of(&self, area: usize) -> String {
        let file = self.areas[area].file.as_ref().expect("a file");
        format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
    }

    /// Bytes of memory that it takes.
    pub fn resident_bytes(&self) -> u64 {
        self.areas.iter().map(Area::resident_bytes).sum()
    }

    /// As a source. Private memory is used where it is, files through a mapping of their own.
    pub fn as_source(&self) -> Arc<SourceMemory> {
        let regions = self.areas.iter().map(|area| match &area.file {
            // SAFETY: the mapping outlives the source: tests keep both until the end.
            None => unsafe { SourceRegion::anonymous(area.guest, area.start, area.length) },
            Some(file) => {
                let file = file.try_clone().expect("a descriptor");
                SourceRegion::file(area.guest, file, 0, area.length).expect("a memory file")
            }
        });
        Arc::new(SourceMemory::new(regions.collect()).expect("a layout"))
    }

    /// As a destination.
    pub fn register(&self, discards: DiscardNotice) -> Result<DestinationMemory, MemoryError> {
        let regions = self.areas.iter().map(|area| {
            let file = || area.file.as_ref().expect("a file").try_clone().expect("a descriptor");
            let (guest, start, length) = (area.guest, area.start, area.length);
            match area.kind {
                // SAFETY: a mapping of this kind and length that tests keep until the
                // destination is gone; only atomics reach it.
                Kind::Anonymous => unsafe { DestinationRegion::anonymous(guest, start, length) },
                // SAFETY: as above.
                Kind::Memfd => unsafe {
                    DestinationRegion::shared(guest, start, length, file(), 0)
                },
                // SAFETY: as above.
                Kind::Huge => unsafe {
                    DestinationRegion::hugetlb(guest, start, length, PageSize::MIB_2, file(), 0)
                },
            }
        });
        DestinationMemory::register(regions.collect(), super::scope(), discards)
    }
}

impl Area {
    fn map(kind: Kind, guest: GuestAddress, length: u64) -> std::io::Result<Self> {
        let file = match kind {
            Kind::Anonymous => None,
            Kind::Memfd => Some(memfd(MFdFlags::MFD_CLOEXEC, length)?),
            Kind::Huge => {
                let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
                Some(memfd(flags, length)?)
            }
        };
        Self::map_file(kind, guest, length, file)
    }

    fn map_file(
        kind: Kind,
        guest: GuestAddress,
        length: u64,
        file: Option<OwnedFd>,
    ) -> std::io::Result<Self> {
        let flags = match &file {
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            Some(_) => libc::MAP_SHARED,
        };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length as usize, access, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        if kind == Kind::Anonymous {
            // A huge page would make neighbours of a written page present.
            // SAFETY: advice on our own new mapping.
            unsafe { libc::madvise(start, length as usize, libc::MADV_NOHUGEPAGE) };
        }
        let start = NonNull::new(start.cast()).expect("a mapping is not at address 0");
        Ok(Self { kind, guest, start, length, file })
    }

    fn resident_bytes(&self) -> u64 {
        use std::os::unix::fs::FileExt;
        if let Some(file) = &self.file {
            let file = File::from(file.try_clone().expect("a descriptor"));
            return std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("a file")) * 512;
        }
        let pagemap = File::open("/proc/self/pagemap").expect("the page map");
        let mut entries = vec![0; (self.length / PAGE * 8) as usize];
        let at = self.start.as_ptr() as u64 / PAGE * 8;
        pagemap.read_exact_at(&mut entries, at).expect("the page map");
        // The top bits of an entry: present, swapped out.
        entries.chunks_exact(8).filter(|entry| entry[7] & 0xc0 != 0).count() as u64 * PAGE
    }

    fn page_bytes(&self) -> u64 {
        if self.kind == Kind::Huge { HUGE } else { PAGE }
    }

    fn at(&self, offset: u64) -> *mut u8 {
        assert!(offset < self.length);
        self.start.as_ptr().wrapping_add(offset as usize)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping; whoever used it has ended, or waits in it until the
        // process ends.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length as usize) };
    }
}

fn memfd(flags: MFdFlags, length: u64) -> std::io::Result<OwnedFd> {
    let file = File::from(memfd_create("guest", flags)?);
    file.set_len(length)?;
    Ok(file.into())
}

fn write_page(at: *mut u8, word_of: impl Fn(u64) -> u64) {
    for word in 0..PAGE / 8 {
        #[expect(clippy::cast_ptr_alignment, reason = "pages are aligned")]
        let at = at.cast::<u64>().wrapping_add(word as usize);
        // SAFETY: in a page of ours, aligned.
        unsafe { at.write_volatile(word_of(word)) };
    }
}

fn word_of(seed: u64, page: u64, word: u64) -> u64 {
    mix(seed ^ (page << 20) ^ word) | 1
}
