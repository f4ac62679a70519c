//! Guest memory as a source reads it: mapped by the VMM, or a file.
//!
//! Pages of private memory leave from where they lie; what the page map does not show has
//! never been touched, and is not touched here. Pages of a file are read into staging, never
//! through a mapping: that would allocate its holes, cost page tables, and end the process
//! where the file has been cut short.

use super::release::ReleaseError;
use crate::sys::cached::AtOnce;
use crate::sys::holes::{self, Extent, Pagemap, Presence};
use crate::sys::mapping::{self, RawRun};
use crate::sys::maps::{self, MappingError};
use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, LayoutError, LocalAddress, PageSize, Region,
};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
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
    /// Its pages are huge, and so large.
    huge: Option<u64>,
    at_once: AtOnce,
    lifetime: MemoryLifetime,
}

/// What is left of a guest's memory when the process that serves it dies, as far as can be seen
/// from here. The least comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum MemoryLifetime {
    /// Some of it is private to this process and goes with it: a guest that the destination
    /// has not got all of is lost, wherever it runs.
    Process,
    /// Some of it is in files without a name, such as memfds: it lasts as long as any process
    /// has a descriptor of them, for instance afterimage-keeper.
    Descriptors,
    /// It is in files that have names, and lasts as long as these.
    Files,
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
    /// The system refuses something.
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
    /// file is served from its file: [`file`](Self::file). If this process dies while the
    /// destination lacks pages, the guest is lost ([`MemoryLifetime::Process`]).
    ///
    /// # Safety
    /// `start` must be a mapping of `length` readable bytes that stays in place as long as the
    /// source lives. From the switchover on nobody may write it. Where the source is to free
    /// pages ([`Release::Free`](crate::Release::Free)) nobody else may need their content.
    #[must_use]
    pub unsafe fn anonymous(guest: GuestAddress, start: NonNull<u8>, length: u64) -> Self {
        let local = LocalAddress(start.as_ptr() as u64);
        let region =
            Region::new(guest, length, PageSize::KIB_4, Backing::Anonymous).local_at(local);
        Self { region, file: None }
    }

    /// A memfd, a file on tmpfs or hugetlbfs, or a snapshot file: `length` bytes from
    /// `offset`. It is only read, unless pages are freed ([`Release`](crate::Release)), for
    /// which it must be open for writing. From the switchover on nobody may write it; if it is cut
    /// short, the pages that are gone are reported as unreadable.
    ///
    /// # Errors
    /// [`SourceMemoryError`] if it is too short.
    pub fn file(
        guest_address: GuestAddress,
        file: OwnedFd,
        offset: u64,
        length: u64,
    ) -> Result<Self, SourceMemoryError> {
        let wrap = |operation| move |source| SourceMemoryError::Io { operation, source };
        let file = File::from(file);
        let found = file.metadata().map_err(wrap("read the size of the memory file"))?;
        let size = found.len();
        if offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(SourceMemoryError::TooShort { guest_address, size, offset, length });
        }
        let region = Region::new(guest_address, length, PageSize::KIB_4, Backing::Shared);
        let huge = mapping::huge_page_bytes(&file)
            .map_err(wrap("see on which file system the memory file is"))?;
        let at_once =
            AtOnce::of(&file).map_err(wrap("see on which file system the memory file is"))?;
        let lifetime = match found.nlink() {
            0 => MemoryLifetime::Descriptors,
            _ => MemoryLifetime::Files,
        };
        Ok(Self { region, file: Some(FileRegion { file, offset, huge, at_once, lifetime }) })
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

    /// What is left of the guest's memory when this process dies: that of the region of which
    /// the least is left. Whether a file has a name was looked at when its region was described.
    #[must_use]
    pub fn lifetime(&self) -> MemoryLifetime {
        let each = self.files.iter().map(|file| match file {
            None => MemoryLifetime::Process,
            Some(file) => file.lifetime,
        });
        each.min().unwrap_or(MemoryLifetime::Files)
    }

    pub(super) fn warn_if_it_goes_with_the_process(&self) {
        if self.lifetime() == MemoryLifetime::Process {
            tracing::warn!(
                "guest memory is private to this process: if it dies before the destination has \
                 every page, the guest is lost; serve memfds that a keeper holds to survive that"
            );
        }
    }

    /// Whether pages of all regions can be freed, each by itself.
    pub(super) fn check_release(&self) -> Result<(), ReleaseError> {
        let mut places = Vec::new();
        for (region, file) in self.layout.regions().iter().zip(&self.files) {
            let guest_address = region.guest_address;
            let failed = |source| ReleaseError::Memory { guest_address, source };
            let (place, start) = match file {
                None => (None, region.local.unwrap_or_default().0),
                Some(FileRegion { file, offset, .. }) => {
                    let found = file.metadata().map_err(failed)?;
                    // Behind its end there is nothing to lose.
                    let end = found.len().next_multiple_of(1 << 30);
                    mapping::punch_hole(file, end, 1 << 30).map_err(failed)?;
                    (Some((found.dev(), found.ino())), *offset)
                }
            };
            places.push((place, start, start + region.length, guest_address));
        }
        places.sort_unstable();
        for pair in places.windows(2) {
            let ((place, _, end, first), (next, start, _, second)) = (pair[0], pair[1]);
            if place == next && start < end {
                return Err(ReleaseError::Shared { first, second });
            }
        }
        Ok(())
    }

    /// In what pieces pages of a region can be freed.
    pub(super) fn grain(&self, region: usize) -> Grain {
        match &self.files[region] {
            Some(FileRegion { huge: Some(bytes), offset, .. }) => {
                Grain { bytes: *bytes, base: offset % bytes }
            }
            _ => Grain { bytes: 4096, base: 0 },
        }
    }

    /// Frees bytes of a region, whole pieces of its [`grain`](Self::grain): they read as zeros
    /// afterwards.
    pub(super) fn free(&self, region: usize, offset: u64, length: u64) -> io::Result<()> {
        if let Some(FileRegion { file, offset: base, .. }) = &self.files[region] {
            return mapping::punch_hole(file, base + offset, length);
        }
        let found = &self.layout.regions()[region];
        assert!(offset.checked_add(length).is_some_and(|end| end <= found.length));
        // SAFETY: private memory of this region, as was checked when it was made. Whoever made
        // it promised that nobody else needs it if it is to be freed.
        unsafe { mapping::empty_private(found.local.unwrap_or_default().0 + offset, length) }
    }

    /// Whether a region's content must be read into staging.
    pub(crate) fn is_file(&self, region: usize) -> bool {
        self.files[region].is_some()
    }

    /// `length` bytes of a region from `offset`, where they lie, or read into `staging`, which
    /// for a file must be as long. The run may be shorter: the byte behind its end cannot be
    /// read. `presence` is what was found of these bytes.
    pub(crate) fn bring(
        &self,
        region: usize,
        offset: u64,
        length: u64,
        presence: Presence,
        staging: &mut [u8],
    ) -> Brought {
        let Some(FileRegion { file, offset: base, .. }) = &self.files[region] else {
            let found = &self.layout.regions()[region];
            assert!(offset.checked_add(length).is_some_and(|end| end <= found.length));
            let start = found.local.unwrap_or_default().0 + offset;
            let length = match presence {
                Presence::Present => length,
                Presence::Unknown => mapping::readable(start, length),
            };
            let run = RawRun { start: start as *mut u8, length: length as usize };
            return Brought { run, is_cut: false };
        };
        let into = &mut staging[..length as usize];
        let (mut got, mut is_cut) = (0, false);
        while got < into.len() {
            match file.read_at(&mut into[got..], base + offset + got as u64) {
                Ok(0) => {
                    is_cut = true;
                    break;
                }
                Ok(bytes) => got += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::error!(%error, region, offset = offset + got as u64, "unreadable");
                    break;
                }
            }
        }
        Brought { run: RawRun { start: into.as_mut_ptr(), length: got }, is_cut }
    }

    /// Whether all of it is in files; why not.
    pub(crate) fn check_files(&self) -> Result<(), String> {
        let mut each = self.layout.regions().iter().zip(&self.files);
        match each.find(|(_, file)| file.is_none()) {
            None => Ok(()),
            Some((region, _)) => {
                Err(format!("its region at guest address {} is no file", region.guest_address))
            }
        }
    }

    /// Reads bytes of a region without waiting for a disk; `false` if that cannot be, or the region
    /// has no file.
    pub(crate) fn bring_at_once(&self, region: usize, offset: u64, into: &mut [u8]) -> bool {
        let Some(FileRegion { file, offset: base, at_once, .. }) = &self.files[region] else {
            return false;
        };
        at_once.read(file, into, base + offset)
    }

    /// The next bytes of a region at or after `from`, before `end`, that are no hole. Of a file
    /// only the beginning is known, because to ask for the end costs as much as the file is
    /// large: `end` is given back. What was cut off a file is no hole: it is read, and found
    /// missing.
    pub(crate) fn next_data(&self, region: usize, from: u64, end: u64) -> Option<Extent> {
        let whole = Extent { start: from, end, presence: Presence::Unknown };
        let found = match (&self.files[region], &self.pagemap) {
            (Some(file), _) => file.next_data(from, end),
            (None, Some(pagemap)) => {
                let base = self.layout.regions()[region].local.unwrap_or_default().0;
                pagemap.next_present(base + from, base + end).map(|extent| {
                    extent.map(|it| Extent { start: it.start - base, end: it.end - base, ..it })
                })
            }
            (None, None) => return Some(whole),
        };
        found.unwrap_or_else(|error| {
            tracing::debug!(%error, "holes cannot be told");
            Some(whole)
        })
    }

    /// The same for as many of them as one look finds, in order. Replaces what `found` holds.
    /// Returns how far it has looked: to `end`, or to the end of the last of
    /// [`EXTENTS_AT_ONCE`](holes::EXTENTS_AT_ONCE).
    pub(crate) fn look(&self, region: usize, from: u64, end: u64, found: &mut Vec<Extent>) -> u64 {
        found.clear();
        let (None, Some(pagemap)) = (&self.files[region], &self.pagemap) else {
            found.extend(self.next_data(region, from, end));
            return end;
        };
        let base = self.layout.regions()[region].local.unwrap_or_default().0;
        let looked = pagemap.each_present(base + from, base + end, |it| {
            found.push(Extent { start: it.start - base, end: it.end - base, ..it });
        });
        if let Err(error) = looked {
            tracing::debug!(%error, "holes cannot be told");
            found.clear();
            found.push(Extent { start: from, end, presence: Presence::Unknown });
        }
        match found.last() {
            Some(last) if found.len() >= holes::EXTENTS_AT_ONCE => last.end,
            _ => end,
        }
    }
}

/// In what pieces pages can be freed: of hugetlbfs only whole huge pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grain {
    /// A power of two.
    pub(super) bytes: u64,
    /// How far behind the beginning of a piece the region begins.
    base: u64,
}

impl Grain {
    /// The end of the last whole piece at or before an offset in the region; 0 if there is
    /// none.
    pub(super) fn before(self, offset: u64) -> u64 {
        ((offset + self.base) / self.bytes * self.bytes).saturating_sub(self.base)
    }

    /// The start of the first whole piece at or after an offset in the region.
    pub(super) fn after(self, offset: u64) -> u64 {
        (offset + self.base).next_multiple_of(self.bytes) - self.base
    }

    /// The whole pieces that bytes lie in, also in part; of the first and the last those that
    /// lie in the region.
    pub(super) fn around(self, from: u64, to: u64) -> (u64, u64) {
        let start = (from + self.base) / self.bytes * self.bytes;
        let start = start.checked_sub(self.base).unwrap_or_else(|| self.after(0));
        (start, self.after(to))
    }
}

/// Content that is ready to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Brought {
    /// What could be read.
    pub(crate) run: RawRun,
    /// The file ends there: nothing behind it can be read either.
    pub(crate) is_cut: bool,
}

impl FileRegion {
    fn next_data(&self, from: u64, end: u64) -> io::Result<Option<Extent>> {
        let start = holes::next_data(&self.file, self.offset + from, self.offset + end)?;
        if let Some(start) = start {
            return Ok(Some(Extent {
                start: start - self.offset,
                end,
                presence: Presence::Unknown,
            }));
        }
        // Nothing more: is it a hole, or the end? A page that was cut in two is lost too.
        let size = self.file.metadata()?.len().saturating_sub(self.offset);
        let cut = from.max(size / 4096 * 4096);
        Ok((size < end).then_some(Extent { start: cut, end, presence: Presence::Unknown }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{Area, Kind};

    /// Whether bytes can be read, and are all zero.
    fn look(memory: &SourceMemory, offset: u64, length: u64) -> (bool, bool) {
        let mut staging = vec![1; length as usize];
        let brought = memory.bring(0, offset, length, Presence::Unknown, &mut staging);
        let is_whole = brought.run.length as u64 == length;
        (is_whole, is_whole && staging.iter().all(|byte| *byte == 0))
    }

    #[test]
    fn holes_of_huge_pages_are_read_without_taking_pages_from_the_pool() {
        const HUGE: u64 = 2 << 20;
        let Some(area) = Area::new(Kind::Hugetlb, 4) else { return };
        area.word(HUGE + (1 << 20)).store(1, std::sync::atomic::Ordering::Relaxed);
        let file = area.file.as_ref().unwrap().try_clone().unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let before = blocks();
        let same = file.try_clone().unwrap().into();
        let region = SourceRegion::file(GuestAddress(0), same, 0, 4 * HUGE).unwrap();
        let memory = SourceMemory::new(vec![region]).unwrap();
        // hugetlbfs does not tell its holes; they are read as zeros.
        assert_eq!(look(&memory, 0, HUGE), (true, true));
        assert_eq!(look(&memory, HUGE, HUGE), (true, false));
        assert_eq!(look(&memory, 2 * HUGE, HUGE), (true, true));
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
        assert_eq!(memory.next_data(0, 0, end).unwrap().start, 0);
        assert_eq!(memory.next_data(0, 8192, end), None, "a hole, and within the file");
        assert_eq!(look(&memory, 0, 8192), (true, false));
        assert_eq!(look(&memory, 8192, 8192), (true, true));

        file.set_len(offset + (512 << 10) + 5).unwrap();
        assert_eq!(memory.next_data(0, 8192, 512 << 10), None, "still a hole");
        let lost = |start| Some(Extent { start, end, presence: Presence::Unknown });
        assert_eq!(memory.next_data(0, 8192, end), lost(512 << 10));
        assert_eq!(memory.next_data(0, 600 << 10, end), lost(600 << 10));
        assert_eq!(look(&memory, 0, 8192), (true, false));
        assert_eq!(look(&memory, 512 << 10, 4096), (false, false), "half of it is gone");
        let brought = memory.bring(0, 600 << 10, 4096, Presence::Unknown, &mut [0; 4096]);
        assert!(brought.is_cut && brought.run.length == 0);
    }
}
