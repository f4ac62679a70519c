//! Guest memory as a source reads it: mapped by the VMM, or a file mapped here.
//!
//! Pages leave from where they lie. Holes are found without touching them, and memory that
//! could vanish under a mapping (a file cut short) is tested before a CPU reads it.

use crate::sys::holes::{self, Extent, Pagemap};
use crate::sys::mapping::{RawRun, is_readable};
use crate::sys::maps::{self, MappingError};
use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, LayoutError, LocalAddress, PageSize, Region,
};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

/// A piece of guest memory for a source.
#[derive(Debug)]
pub struct SourceRegion {
    region: Region,
    file: Option<FileRegion>,
}

#[derive(Debug)]
struct FileRegion {
    file: File,
    offset: u64,
    map: MmapRaw,
    /// The size of its huge pages, on hugetlbfs.
    huge_page: Option<u64>,
}

impl FileRegion {
    /// The next huge pages that hold anything but zeros. hugetlbfs does not tell its holes,
    /// and touching one through a mapping takes a huge page from the pool, or fails where
    /// there is none left. Reading it through the file does neither, and a page of zeros is
    /// as good as a hole.
    fn next_huge_data(&self, from: u64, end: u64) -> io::Result<Option<Extent>> {
        let page = self.huge_page.unwrap_or(4096);
        let mut start = from / page * page;
        while start < end {
            if self.holds_content(start, page.min(end - start))? {
                let stop = (start + page).min(end);
                return Ok(Some(Extent { start: start.max(from), end: stop }));
            }
            start += page;
        }
        Ok(None)
    }

    fn holds_content(&self, start: u64, length: u64) -> io::Result<bool> {
        // A page with content mostly shows some at its beginning.
        let mut buffer = vec![0; 64 << 10];
        let mut at = 0;
        while at < length {
            let step = if at == 0 { 4096 } else { buffer.len() as u64 }.min(length - at);
            let bytes = &mut buffer[..step as usize];
            match self.file.read_exact_at(bytes, self.offset + start + at) {
                Ok(()) if bytes.iter().all(|byte| *byte == 0) => at += step,
                Ok(()) => return Ok(true),
                // Cut off, or poisoned: whoever tests it finds that out.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(true),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }
}

/// hugetlbfs, as `statfs` names it.
const HUGETLBFS: i64 = 0x9584_58f6;

/// The size of a file's huge pages, if it has them.
fn huge_page_of(file: &File) -> io::Result<Option<u64>> {
    let system = nix::sys::statfs::fstatfs(file)?;
    let is_huge = system.filesystem_type().0 as i64 == HUGETLBFS;
    Ok(is_huge.then_some(system.block_size() as u64))
}

/// Why a file cannot be a source's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceMemoryError {
    /// The regions are no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The file is shorter than the region.
    #[error(
        "the memory file has {size} bytes, the region at guest address {guest_address} needs \
         {length} from offset {offset}: give the right file, offset or size"
    )]
    TooShort {
        /// Which region.
        guest_address: GuestAddress,
        /// Bytes in the file.
        size: u64,
        /// Where the region begins in it.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// A region is not what it was said to be.
    #[error("the region at guest address {guest_address} is not what it was said to be")]
    Mapping {
        /// Which region.
        guest_address: GuestAddress,
        /// What is wrong with it.
        source: MappingError,
    },
    /// The file cannot be mapped.
    #[error("could not {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl SourceRegion {
    /// Private anonymous memory that the VMM has mapped in this process. Memory that has a
    /// file is served from its file: [`file`](Self::file).
    ///
    /// # Safety
    /// `start` must be a mapping of `length` readable bytes that stays in place as long as the
    /// source lives. From the switchover on nobody may write it.
    #[must_use]
    pub unsafe fn anonymous(guest: GuestAddress, start: NonNull<u8>, length: u64) -> Self {
        let local = LocalAddress(start.as_ptr() as u64);
        let region =
            Region::new(guest, length, PageSize::KIB_4, Backing::Anonymous).local_at(local);
        Self { region, file: None }
    }

    /// A memfd, a file on tmpfs or hugetlbfs, or a snapshot file: `length` bytes from
    /// `offset`. It is mapped shared and only read. From the switchover on nobody may write
    /// it; if it is cut short, the pages that are gone are reported as unreadable.
    ///
    /// # Errors
    /// [`SourceMemoryError`] if it is too short or cannot be mapped.
    pub fn file(
        guest_address: GuestAddress,
        file: OwnedFd,
        offset: u64,
        length: u64,
    ) -> Result<Self, SourceMemoryError> {
        let wrap = |operation| move |source| SourceMemoryError::Io { operation, source };
        let file = File::from(file);
        let size = file.metadata().map_err(wrap("read the size of the memory file"))?.len();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(SourceMemoryError::TooShort { guest_address, size, offset, length });
        }
        let map = MmapOptions::new()
            .offset(offset)
            .len(length as usize)
            .map_raw_read_only(&file)
            .map_err(wrap("map the memory file"))?;
        map.advise(memmap2::Advice::DontFork).map_err(wrap("keep memory out of children"))?;
        let local = LocalAddress(map.as_ptr() as u64);
        let region =
            Region::new(guest_address, length, PageSize::KIB_4, Backing::Shared).local_at(local);
        let huge_page = huge_page_of(&file).map_err(wrap("ask for the memory file's kind"))?;
        Ok(Self { region, file: Some(FileRegion { file, offset, map, huge_page }) })
    }
}

/// The page map says where private memory has pages; of a file it would only say what has
/// been touched through this mapping, and the rest would become zeros.
fn check_private(region: &Region) -> Result<(), SourceMemoryError> {
    let start = region.local.unwrap_or_default().0;
    match maps::check_private(start, region.length) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => {
            Err(SourceMemoryError::Mapping { guest_address: region.guest_address, source })
        }
        Err(source) => {
            let operation = "read /proc/self/maps";
            Err(SourceMemoryError::Io { operation, source })
        }
    }
}

/// All memory of a source; several sessions may serve it at once.
#[derive(Debug)]
pub struct SourceMemory {
    layout: GuestLayout,
    files: Vec<Option<FileRegion>>,
    pagemap: Option<Pagemap>,
}

// SAFETY: the raw mappings are only read, through calls that are safe from any thread; who
// made a mapped region promised that it stays in place.
unsafe impl Send for SourceMemory {}
// SAFETY: as above.
unsafe impl Sync for SourceMemory {}

impl SourceMemory {
    /// Puts regions together.
    ///
    /// # Errors
    /// [`SourceMemoryError`] where they are no layout, or mapped memory is not private.
    pub fn new(mut regions: Vec<SourceRegion>) -> Result<Self, SourceMemoryError> {
        regions.sort_by_key(|region| region.region.guest_address);
        let layout = GuestLayout::new(regions.iter().map(|region| region.region).collect())?;
        for SourceRegion { region, file } in &regions {
            if file.is_none() {
                check_private(region)?;
            }
        }
        let files: Vec<_> = regions.into_iter().map(|region| region.file).collect();
        let pagemap = if files.iter().any(Option::is_none) {
            Pagemap::of_this_process()
                .inspect_err(|error| {
                    tracing::warn!(%error, "no page map: holes are sent as zeros one by one");
                })
                .ok()
        } else {
            None
        };
        Ok(Self { layout, files, pagemap })
    }

    /// The guest's memory as this side describes it.
    #[must_use]
    pub const fn layout(&self) -> &GuestLayout {
        &self.layout
    }

    /// Where bytes of a region lie.
    pub(crate) fn run(&self, region: usize, offset: u64, length: u64) -> RawRun {
        let found = &self.layout.regions()[region];
        assert!(offset.checked_add(length).is_some_and(|end| end <= found.length));
        let start = found.local.unwrap_or_default().0 + offset;
        RawRun { start: start as *mut u8, length: length as usize }
    }

    /// Whether bytes of a region can be read. Private memory always can; a file may have
    /// been cut short, and touching what is gone would be the end of the process.
    pub(crate) fn is_readable(&self, region: usize, offset: u64, length: u64) -> bool {
        match &self.files[region] {
            None => true,
            Some(_) if self.cut(region, offset + length).is_some() => false,
            Some(_) => is_readable(self.run(region, offset, length)),
        }
    }

    /// Where the file of a region ends now, in bytes of the region, if that is before `end`:
    /// what lies behind is lost, though it looks like a hole.
    fn cut(&self, region: usize, end: u64) -> Option<u64> {
        let file = self.files[region].as_ref()?;
        let size = file.file.metadata().ok()?.len();
        let here = size.saturating_sub(file.offset);
        (here < end).then_some(here)
    }

    /// The next bytes of a region at or after `from`, before `end`, that are no hole; all of
    /// them where holes cannot be told. What was cut off a file is no hole: it is tested, and
    /// found unreadable.
    pub(crate) fn next_data(&self, region: usize, from: u64, end: u64) -> Option<Extent> {
        let whole = Extent { start: from, end };
        let found = match (&self.files[region], &self.pagemap) {
            (Some(file), _) if file.huge_page.is_some() => file.next_huge_data(from, end),
            (Some(file), _) => {
                let base = file.offset;
                holes::next_data(&file.file, base + from, base + end).map(|extent| {
                    extent.map(|it| Extent { start: it.start - base, end: it.end - base })
                })
            }
            (None, Some(pagemap)) => {
                let base = self.layout.regions()[region].local.unwrap_or_default().0;
                pagemap.next_present(base + from, base + end).map(|extent| {
                    extent.map(|it| Extent { start: it.start - base, end: it.end - base })
                })
            }
            (None, None) => return Some(whole),
        };
        let found = found.unwrap_or_else(|error| {
            tracing::debug!(%error, "holes cannot be told");
            Some(whole)
        });
        match self.cut(region, end) {
            // A page that was cut in two is lost too.
            Some(cut) if found.is_none_or(|data| data.start >= cut) => {
                Some(Extent { start: from.max(cut / 4096 * 4096), end })
            }
            _ => found,
        }
    }

    /// Gives back the page tables of mapped files; what they hold stays.
    pub(crate) fn drop_page_tables(&self) {
        for file in self.files.iter().flatten() {
            crate::sys::mapping::drop_page_tables(&file.map);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{Area, Kind};

    #[test]
    fn holes_of_huge_pages_are_found_without_taking_pages_from_the_pool() {
        const HUGE: u64 = 2 << 20;
        let Some(area) = Area::new(Kind::Hugetlb, 4) else { return };
        area.word(HUGE + (1 << 20)).store(1, std::sync::atomic::Ordering::Relaxed);
        let file = area.file.as_ref().unwrap().try_clone().unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks();
        let same = file.try_clone().unwrap().into();
        let region = SourceRegion::file(GuestAddress(0), same, 0, 4 * HUGE).unwrap();
        let memory = SourceMemory::new(vec![region]).unwrap();
        let data = Extent { start: HUGE, end: 2 * HUGE };
        assert_eq!(memory.next_data(0, 0, 4 * HUGE), Some(data));
        assert_eq!(memory.next_data(0, HUGE + 4096, 4 * HUGE).unwrap().end, 2 * HUGE);
        assert_eq!(memory.next_data(0, 2 * HUGE, 4 * HUGE), None);
        assert_eq!(blocks(), before, "reading took pages from the pool");
    }

    #[test]
    fn what_is_cut_off_a_file_is_unreadable_and_no_hole() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let offset = 4096;
        file.set_len(offset + (1 << 20)).unwrap();
        file.write_all_at(&[1; 8192], offset).unwrap();
        let same = file.try_clone().unwrap().into();
        let region = SourceRegion::file(GuestAddress(0), same, offset, 1 << 20).unwrap();
        let memory = SourceMemory::new(vec![region]).unwrap();
        let end = 1 << 20;
        assert_eq!(memory.next_data(0, 0, end), Some(Extent { start: 0, end: 8192 }));
        assert_eq!(memory.next_data(0, 8192, end), None, "a hole, and within the file");
        assert!(memory.is_readable(0, 0, 8192));

        file.set_len(offset + (512 << 10) + 5).unwrap();
        assert_eq!(memory.next_data(0, 8192, 512 << 10), None, "still a hole");
        let lost = Extent { start: 512 << 10, end };
        assert_eq!(memory.next_data(0, 8192, end), Some(lost));
        assert_eq!(memory.next_data(0, 600 << 10, end), Some(Extent { start: 600 << 10, end }));
        assert!(memory.is_readable(0, 0, 8192));
        assert!(!memory.is_readable(0, 512 << 10, 4096), "half of it is gone");
        assert!(!memory.is_readable(0, 600 << 10, 4096));
    }
}
