//! Which memory a destination fills: its layout, its userfaultfd, and the files behind it.
//!
//! Invariant: from the moment a [`DestinationMemory`] exists, every page of it that the
//! planes do not call complete is missing for the guest and will be asked of the userfaultfd;
//! nothing of what was there before can be read. The descriptor is never closed while a page has not arrived, because a closed
//! userfaultfd turns missing pages into zeros: see [`keep_forever`].

mod handed_over;

use super::kept::Kept;
use crate::sys::fill::{self, Fill, Stopped};
use crate::sys::mapping::{self, Alias};
use crate::sys::maps::{self, MappingError};
use crate::sys::presence::Presence;
use crate::sys::uffd::{self, FaultScope, Features, UffdError};
use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, LayoutError, LocalAddress, PageSize, Region,
    RegisteredAddress,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use userfaultfd::{RegisterMode, Uffd};

/// A piece of guest memory for a destination.
///
/// Made by [`anonymous`](Self::anonymous), [`shared`](Self::shared) and
/// [`hugetlb`](Self::hugetlb) for memory that this process has mapped itself, or by
/// [`handed_over`](Self::handed_over) for memory of another process.
#[derive(Debug)]
pub struct DestinationRegion {
    region: Region,
    file: Option<(OwnedFd, u64)>,
}

impl DestinationRegion {
    /// Private anonymous memory of this process, pages of 4 KiB. Its content is dropped.
    ///
    /// # Safety
    /// `start` must be a private anonymous mapping of `length` bytes that stays in place as
    /// long as the destination lives, and of which no Rust reference is alive.
    #[must_use]
    pub unsafe fn anonymous(guest: GuestAddress, start: NonNull<u8>, length: u64) -> Self {
        let region = Region::new(guest, length, PageSize::KIB_4, Backing::Anonymous);
        Self { region: at(region, start), file: None }
    }

    /// A shared mapping of a memfd or a file on tmpfs in this process. What the file holds
    /// in this range is dropped.
    ///
    /// # Safety
    /// `start` must be a shared mapping of `length` bytes of `file` from `offset` that stays
    /// in place as long as the destination lives, and of which no Rust reference is alive.
    #[must_use]
    pub unsafe fn shared(
        guest: GuestAddress,
        start: NonNull<u8>,
        length: u64,
        file: OwnedFd,
        offset: u64,
    ) -> Self {
        let region = Region::new(guest, length, PageSize::KIB_4, Backing::Shared);
        Self { region: at(region, start), file: Some((file, offset)) }
    }

    /// A shared mapping of hugetlbfs or of a memfd with huge pages. What it holds in this
    /// range is dropped.
    ///
    /// # Safety
    /// As for [`shared`](Self::shared).
    #[must_use]
    pub unsafe fn hugetlb(
        guest: GuestAddress,
        start: NonNull<u8>,
        length: u64,
        page_size: PageSize,
        file: OwnedFd,
        offset: u64,
    ) -> Self {
        let region = Region::new(guest, length, page_size, Backing::Hugetlb);
        Self { region: at(region, start), file: Some((file, offset)) }
    }

    /// Memory that another process has mapped and registered, whose userfaultfd it handed
    /// over. With `file`, pages go through its page cache; without, they are copied.
    #[must_use]
    pub fn handed_over(
        guest: GuestAddress,
        registered: RegisteredAddress,
        length: u64,
        page_size: PageSize,
        file: Option<(OwnedFd, u64)>,
    ) -> Self {
        let backing = match file {
            None => Backing::Opaque,
            Some(_) if page_size == PageSize::KIB_4 => Backing::Shared,
            Some(_) => Backing::Hugetlb,
        };
        let region = Region::new(guest, length, page_size, backing).registered_at(registered);
        Self { region, file }
    }
}

impl DestinationRegion {
    /// Checks that memory of this process is what it was said to be, before it is emptied.
    fn check_mapping(&self) -> Result<(), MemoryError> {
        let Region { guest_address, length, local, .. } = self.region;
        let Some(start) = local else { return Ok(()) };
        let checked = match &self.file {
            None => maps::check_private(start.0, length),
            Some((file, offset)) => maps::check_shared(start.0, length, file, *offset),
        };
        checked
            .map_err(|error| UffdError::system("read /proc/self/maps", error))?
            .map_err(|source| MemoryError::Mapping { guest_address, source })
    }
}

fn at(region: Region, start: NonNull<u8>) -> Region {
    let address = start.as_ptr() as u64;
    region.registered_at(RegisteredAddress(address)).local_at(LocalAddress(address))
}

/// How the engine learns of memory that the guest gives up (balloon, free page reporting)
/// while pages are still to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscardNotice {
    /// The VMM calls [`Destination::discard`](crate::Destination::discard). Without that
    /// call, a page that arrives later brings the old content back.
    #[default]
    Called,
    /// The kernel raises an event for `MADV_DONTNEED` and `MADV_REMOVE`, which then wait
    /// until the engine has read it. A hole punched through the file raises none.
    Events,
}

/// Why memory could not be prepared for a destination.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The regions are no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// No userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// A region is not what it was said to be.
    #[error("the region at guest address {guest_address} is not what it was said to be")]
    Mapping {
        /// Which region.
        guest_address: GuestAddress,
        /// What is wrong with it.
        source: MappingError,
    },
    /// The kernel refuses to register a region.
    #[error(
        "could not register the region at guest address {guest_address} ({length:#x} bytes) with \
         userfaultfd: is it mapped as described, and not registered already?"
    )]
    Register {
        /// Which region.
        guest_address: GuestAddress,
        /// Its length in bytes.
        length: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file behind a region cannot be mapped or emptied.
    #[error("could not {operation} the file behind the region at guest address {guest_address}")]
    File {
        /// What was being done.
        operation: &'static str,
        /// Which region.
        guest_address: GuestAddress,
        /// What the kernel said.
        source: io::Error,
    },
    /// No memory for the planes, or a file of planes that is of other memory.
    #[error(
        "the planes of this memory cannot be used: give an empty file to begin with, or after a \
         restart the file that was used before, and the same regions"
    )]
    Planes(#[source] io::Error),
}

/// What the engine can do to a region besides filling missing pages.
#[derive(Debug)]
pub(crate) struct RegionFile {
    pub(crate) file: OwnedFd,
    pub(crate) offset: u64,
    pub(crate) alias: Alias,
}

/// Guest memory that is registered with userfaultfd and of which every page is missing, or as
/// a process before this one has left it.
#[derive(Debug)]
pub struct DestinationMemory {
    pub(crate) layout: GuestLayout,
    /// In the order of the layout's regions.
    pub(crate) files: Vec<Option<RegionFile>>,
    uffd: Uffd,
    pub(crate) has_events: bool,
    pub(crate) kept: Kept,
    /// What is there in the process that has this memory, where the kernel does not say.
    presence: Option<Presence>,
    is_taken_over: bool,
    is_unregistered: AtomicBool,
}

impl DestinationMemory {
    /// Empties memory of this process and registers it.
    ///
    /// Blocks for as long as the kernel takes to free what the memory held.
    ///
    /// # Errors
    /// [`MemoryError`]; the memory may have been emptied by then.
    pub fn register(
        regions: Vec<DestinationRegion>,
        scope: FaultScope,
        discards: DiscardNotice,
    ) -> Result<Self, MemoryError> {
        let has_events = discards == DiscardNotice::Events;
        let features = needed_features(&regions, has_events);
        let uffd = uffd::create(scope, features)?;
        for region in &regions {
            region.check_mapping()?;
        }
        let memory = Self::assemble(regions, uffd, has_events, None)?;
        // The engine's own zaps come before registration: nobody reads events yet.
        memory.empty()?;
        for region in memory.layout.regions() {
            if let Err(error) = memory.register_region(region) {
                // Nothing has been asked of the userfaultfd yet, and the memory is empty:
                // it goes back to the VMM, which may try again.
                memory.unregister();
                return Err(error);
            }
        }
        Ok(memory)
    }

    fn assemble(
        mut regions: Vec<DestinationRegion>,
        uffd: Uffd,
        has_events: bool,
        planes: Option<OwnedFd>,
    ) -> Result<Self, MemoryError> {
        regions.sort_by_key(|region| region.region.guest_address);
        let layout = GuestLayout::new(regions.iter().map(|region| region.region).collect())?;
        let mut files = Vec::with_capacity(regions.len());
        for DestinationRegion { region, file } in regions {
            let Some((file, offset)) = file else {
                files.push(None);
                continue;
            };
            let alias = Alias::new(&file, offset, region.length).map_err(|source| {
                MemoryError::File { operation: "map", guest_address: region.guest_address, source }
            })?;
            files.push(Some(RegionFile { file, offset, alias }));
        }
        let kept = match planes {
            Some(file) => Kept::in_file(file, &layout),
            None => Kept::for_now(&layout),
        };
        let kept = kept.map_err(MemoryError::Planes)?;
        let (is_taken_over, is_unregistered) = (kept.has_begun(), AtomicBool::new(false));
        let presence = None;
        Ok(Self { layout, files, uffd, has_events, kept, presence, is_taken_over, is_unregistered })
    }

    fn empty(&self) -> Result<(), MemoryError> {
        for (region, file) in self.layout.regions().iter().zip(&self.files) {
            let emptied = match (file, region.local) {
                (Some(file), _) => mapping::punch_hole(&file.file, file.offset, region.length),
                // SAFETY: who made the region promised that it is a private anonymous mapping
                // of which no reference is alive, and that its content may go.
                (None, Some(start)) => unsafe { mapping::empty_private(start.0, region.length) },
                (None, None) => Ok(()),
            };
            emptied.map_err(|source| MemoryError::File {
                operation: "empty",
                guest_address: region.guest_address,
                source,
            })?;
        }
        Ok(())
    }

    fn register_region(&self, region: &Region) -> Result<(), MemoryError> {
        let mode = match region.backing {
            Backing::Shared | Backing::Hugetlb => RegisterMode::MISSING | RegisterMode::MINOR,
            _ => RegisterMode::MISSING,
        };
        let start = region.registered.unwrap_or_default().0 as *mut _;
        self.uffd().register_with_mode(start, region.length as usize, mode).map(drop).map_err(
            |error| MemoryError::Register {
                guest_address: region.guest_address,
                length: region.length,
                source: io::Error::other(error),
            },
        )
    }

    /// Why pages cannot be kept here before the guest's vCPUs have stopped at the source, if they
    /// cannot: then nothing is sent before.
    #[must_use]
    pub fn precopy_lack(&self) -> Option<&'static str> {
        let lacks_file = |local: bool| {
            let regions = self.layout.regions().iter().zip(&self.files);
            regions
                .into_iter()
                .any(|(region, file)| file.is_none() && (local == region.local.is_some()))
        };
        if lacks_file(false) {
            Some("it was handed over without a file, and cannot be emptied from outside")
        } else if self.has_events && lacks_file(true) {
            Some(
                "it has no file, and dropping a page that is out of date would look like a discard",
            )
        } else {
            None
        }
    }

    /// Whether pages of a region are huge and copied: the kernel does not say then whether one is
    /// there or there is no room for it.
    pub(crate) fn copies_huge_pages(&self, region: usize) -> bool {
        let page_size = self.layout.regions()[region].page_size;
        self.files[region].is_none() && page_size != PageSize::KIB_4
    }

    /// What says whether a page of this region is there, where the kernel does not.
    pub(crate) fn presence(&self, region: usize) -> Option<&Presence> {
        self.presence.as_ref().filter(|_| self.copies_huge_pages(region))
    }

    /// Whether pages can be told from missing ones, without which nothing must be put in place.
    pub(crate) fn check_presence(&self) -> io::Result<()> {
        let is_needed = (0..self.files.len()).any(|region| self.copies_huge_pages(region));
        if is_needed && self.presence.is_none() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "huge pages were handed over without a file: say which process has them \
                 (DestinationMemory::of_process)",
            ));
        }
        Ok(())
    }

    /// The userfaultfd.
    pub(crate) const fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Wakes whoever waits for a page of this range; they look again, and fault again if it
    /// is still missing.
    pub(crate) fn wake(&self, start: RegisteredAddress, length: u64) {
        if let Err(error) = self.uffd().wake(start.0 as *mut _, length as usize) {
            // The range has gone from the process, and nobody waits for it.
            tracing::debug!(%error, address = %start, length, "could not wake");
        }
    }

    /// Wakes whoever waits for any page. For a handler that takes over, or doubts what it
    /// has been asked: events that were read once never come again without.
    pub(crate) fn wake_all(&self) {
        for region in self.layout.regions() {
            self.wake(region.registered.unwrap_or_default(), region.length);
        }
    }

    /// Whether somebody waits for an event of his to be read, of memory that is registered no
    /// more: the kernel refuses then to fill anything, before it looks at what.
    pub(crate) fn has_event_pending(&self) -> bool {
        let region = &self.layout.regions()[0];
        let (start, page) = (region.registered.unwrap_or_default(), region.page_size.bytes());
        self.has_events
            && self.is_unregistered.load(Ordering::Acquire)
            && fill::run(&self.uffd, Fill::Zero, start, page, page, None).stopped
                == Some(Stopped::EventPending)
    }

    /// Ends the serving of memory that is complete: the kernel answers faults by itself from
    /// here, with what is there, and with zeros where nothing is. Events must go on being
    /// read until this returns.
    pub(crate) fn unregister(&self) {
        for region in self.layout.regions() {
            let start = region.registered.unwrap_or_default().0 as *mut _;
            if let Err(error) = self.uffd.unregister(start, region.length as usize) {
                tracing::debug!(%error, address = %region.guest_address, "could not unregister");
            }
        }
        // Unregistering wakes first and locks out new faults second: since faults are taken
        // under the lock of their mapping alone (Linux 6.7), one can slip in between and
        // would wait for ever. Waking does not ask whether the range is registered.
        self.wake_all();
        self.is_unregistered.store(true, Ordering::Release);
    }
}

impl Drop for DestinationMemory {
    fn drop(&mut self) {
        if !self.is_unregistered.load(Ordering::Acquire) {
            // A duplicate keeps the userfaultfd alive; this one may be closed.
            match self.uffd.as_fd().try_clone_to_owned() {
                Ok(uffd) => keep_forever(uffd),
                // Out of descriptors: better a guest that ends than one that reads zeros.
                Err(error) => {
                    tracing::error!(%error, "a userfaultfd with missing pages cannot be kept");
                    std::process::abort();
                }
            }
        }
    }
}

/// Userfaultfds whose memory has not all arrived.
static KEPT: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

/// Holds a userfaultfd open until the process ends, with nobody serving it: who touches a
/// missing page then waits instead of reading zeros.
pub(crate) fn keep_forever(uffd: OwnedFd) {
    KEPT.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(uffd);
}

fn needed_features(regions: &[DestinationRegion], has_events: bool) -> Features {
    let mut features = Features::default();
    for region in regions {
        features = features.with(match region.region.backing {
            Backing::Shared => Features::MISSING_SHMEM.with(Features::MINOR_SHMEM),
            Backing::Hugetlb => Features::MISSING_HUGETLBFS.with(Features::MINOR_HUGETLBFS),
            _ => Features::default(),
        });
    }
    if has_events { features.with(Features::EVENT_REMOVE) } else { features }
}

#[cfg(test)]
mod tests;
