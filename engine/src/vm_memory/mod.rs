//! Guest memory of rust-vmm (crate `vm-memory` 0.18), with the feature `vm-memory`.
//!
//! | to do | use |
//! | --- | --- |
//! | describe all of a guest's memory at the source | [`source_regions`] |
//! | the same at the destination | [`destination_regions`] |
//! | see for precopy what the VMM's own devices write | [`BitmapTracker`] |
//!
//! What lies behind a region is asked of the kernel, because `vm-memory` does not tell for
//! every region, and its word may be wrong (`is_hugetlbfs` is whatever somebody has set):
//!
//! | region | how it is served |
//! | --- | --- |
//! | private anonymous memory (`GuestMemoryMmap::from_ranges`) | [`SourceRegion::anonymous`], [`DestinationRegion::anonymous`] |
//! | shared mapping of its `file_offset`: memfd, tmpfs | [`SourceRegion::file`], [`DestinationRegion::shared`] |
//! | the same on hugetlbfs, or a memfd with huge pages | [`SourceRegion::file`], [`DestinationRegion::hugetlb`] |
//! | shared, without a `file_offset` | refused: other mappings, and the engine, need its file |
//! | private mapping of a file, huge pages without a file | refused: no file holds what the guest wrote there |
//!
//! ```
//! use afterimage::{vm_memory::*, *};
//! use std::sync::Arc;
//! use ::vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, bitmap::AtomicBitmap};
//!
//! // A PC's memory, with its hole below 4 GiB.
//! let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(4 << 30), 4 << 20)];
//! let old = GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges)?;
//! let new = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
//! old.write_slice(b"written by a device", GuestAddress((4 << 30) + 0x1ff8))?;
//!
//! // SAFETY: `old` outlives the source, and is not written from the switchover on.
//! let regions = unsafe { source_regions(&old) }?;
//! let listener = Listener::bind(&"tcp:127.0.0.1:0".parse()?, Plaintext::LoopbackOnly)?;
//! let address = listener.address().clone();
//! let mut options = SourceOptions::default();
//! // Nothing but `old.write…` writes here. On KVM: one of KVM's trackers and this, as `Trackers`.
//! options.precopy = Some(Precopy::new(Box::new(BitmapTracker::new(&old)?)));
//! let (source, at_source) = Source::start(
//!     Arc::new(SourceMemory::new(regions)?), Endpoint::Listen(listener), options)?;
//!
//! // SAFETY: `new` outlives the destination, and no reference into it is alive.
//! let regions = unsafe { destination_regions(&new) }?;
//! let memory =
//!     DestinationMemory::register(regions, FaultScope::UserOnly, DiscardNotice::Called)?;
//! let (destination, at_destination) =
//!     Destination::start(memory, Endpoint::Connect(address), DestinationOptions::default())?;
//!
//! while let Some(event) = at_source.next() {
//!     if let SourceEvent::SwitchoverDue(_) = event {
//!         break;
//!     }
//! }
//! source.switch_over(vec![])?;
//! while let Some(event) = at_destination.next() {
//!     match event {
//!         DestinationEvent::State(_) => destination.ready()?,
//!         DestinationEvent::Finished => break,
//!         _ => {}
//!     }
//! }
//! let mut text = [0; 19];
//! new.read_slice(&mut text, GuestAddress((4 << 30) + 0x1ff8))?;
//! assert_eq!(&text, b"written by a device");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod bitmap;

pub use bitmap::{AtomicMarks, BitmapTracker, BitmapTrackerError};

use crate::sys::mapping;
use crate::sys::maps::{self, MappingError};
use crate::{DestinationRegion, GuestAddress, PageSize, SourceMemoryError, SourceRegion};
use ::vm_memory::{
    Address, FileOffset, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

/// Why a region of a `GuestMemoryBackend` cannot be a source's or a destination's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegionError {
    /// It is not mapped in this process, as far as `vm-memory` says.
    #[error("the region at guest address {guest_address} has no address in this process")]
    Address {
        /// Which region.
        guest_address: GuestAddress,
        /// What `vm-memory` said.
        source: ::vm_memory::GuestMemoryError,
    },
    /// It is no memory that the engine can move, or not where its `file_offset` says.
    #[error("the region at guest address {guest_address} cannot be moved as it is mapped")]
    Mapping {
        /// Which region.
        guest_address: GuestAddress,
        /// What is wrong with it.
        source: MappingError,
    },
    /// Its file is no source's memory.
    #[error(transparent)]
    File(#[from] SourceMemoryError),
    /// The system refuses something.
    #[error("could not {operation} of the region at guest address {guest_address}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// Which region.
        guest_address: GuestAddress,
        /// What the system said.
        source: io::Error,
    },
}

/// All regions of a guest's memory, for [`SourceMemory::new`](crate::SourceMemory::new). Files
/// are duplicated.
///
/// # Errors
/// [`RegionError`]: what is wrong with a region, and how to map it instead.
///
/// # Safety
/// The memory must stay mapped as long as the source lives: keep a clone of it, and remove no
/// region. From the switchover on nobody may write it. Where the source is to free pages
/// ([`Release::Free`](crate::Release::Free)) nobody else may need their content.
pub unsafe fn source_regions<M: GuestMemoryBackend>(
    memory: &M,
) -> Result<Vec<SourceRegion>, RegionError> {
    let regions = memory.iter().map(|region| {
        let Found { guest, start, length, behind } = Found::of(region)?;
        Ok(match behind {
            // SAFETY: mapped, as was looked up; the rest is the caller's promise.
            None => unsafe { SourceRegion::anonymous(guest, start, length) },
            Some(Behind { file, offset, .. }) => SourceRegion::file(guest, file, offset, length)?,
        })
    });
    regions.collect()
}

/// All regions of a guest's memory, for
/// [`DestinationMemory::register`](crate::DestinationMemory::register). Files are duplicated.
/// Page sizes are those of the files.
///
/// # Errors
/// As for [`source_regions`].
///
/// # Safety
/// The memory must stay mapped as long as the destination lives: keep a clone of it, and remove
/// no region. No Rust reference into it may be alive; `vm-memory` makes none by itself. What it
/// holds is dropped.
pub unsafe fn destination_regions<M: GuestMemoryBackend>(
    memory: &M,
) -> Result<Vec<DestinationRegion>, RegionError> {
    let regions = memory.iter().map(|region| {
        let Found { guest, start, length, behind } = Found::of(region)?;
        // SAFETY (of all): mapped like this, as was looked up; the rest is the caller's promise.
        Ok(match behind {
            // SAFETY: see above.
            None => unsafe { DestinationRegion::anonymous(guest, start, length) },
            Some(Behind { file, offset, huge: None }) => {
                // SAFETY: see above.
                unsafe { DestinationRegion::shared(guest, start, length, file, offset) }
            }
            Some(Behind { file, offset, huge: Some(size) }) => {
                // SAFETY: see above.
                unsafe { DestinationRegion::hugetlb(guest, start, length, size, file, offset) }
            }
        })
    });
    regions.collect()
}

/// A region, as the kernel has it.
struct Found {
    guest: GuestAddress,
    start: NonNull<u8>,
    length: u64,
    behind: Option<Behind>,
}

/// What it is a shared mapping of.
struct Behind {
    file: OwnedFd,
    offset: u64,
    huge: Option<PageSize>,
}

impl Found {
    fn of(region: &impl GuestMemoryRegion) -> Result<Self, RegionError> {
        let guest_address = GuestAddress(region.start_addr().raw_value());
        let length = region.len();
        let failed = |operation| move |source| RegionError::Io { operation, guest_address, source };
        let start = region
            .get_host_address(MemoryRegionAddress(0))
            .and_then(|start| {
                NonNull::new(start).ok_or(::vm_memory::GuestMemoryError::HostAddressNotAvailable)
            })
            .map_err(|source| RegionError::Address { guest_address, source })?;
        let address = start.as_ptr() as u64;
        let (checked, behind) = match region.file_offset() {
            None => (maps::check_private(address, length), None),
            Some(file) => (
                maps::check_shared(address, length, file.file(), file.start()),
                Some(Behind::of(file).map_err(failed("duplicate the file"))?),
            ),
        };
        checked
            .map_err(failed("find the mapping"))?
            .map_err(|source| RegionError::Mapping { guest_address, source })?;
        Ok(Self { guest: guest_address, start, length, behind })
    }
}

impl Behind {
    fn of(file: &FileOffset) -> io::Result<Self> {
        let offset = file.start();
        let file = file.file().as_fd().try_clone_to_owned()?;
        let huge = mapping::huge_page_bytes(&file)?.and_then(PageSize::from_bytes);
        Ok(Self { file, offset, huge })
    }
}

#[cfg(test)]
mod tests;
