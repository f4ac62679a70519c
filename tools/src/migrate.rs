//! Guest memory and machine state in the engine's terms.
//!
//! Responsible for describing a [`GuestRam`] to a source and a destination, and for
//! carrying a [`MachineState`] as a section of device state. When what is started and
//! stopped is left to the caller.

use afterimage::{
    DestinationMemory, DestinationRegion, DiscardNotice, FaultScope, GuestAddress, MemoryError,
    PageSize, SourceMemory, SourceMemoryError, SourceRegion, StateSection,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use crate::guest::{MachineState, StateError};
use crate::ram::{Backing, GuestRam, Region};

/// The name of the section that carries the machine state.
const STATE_NAME: &str = "machine";
/// The version of what is around the state, which has a version of its own.
const STATE_VERSION: u32 = 1;

/// Describes `ram` to a source: by its files where it has some, else where it is mapped.
///
/// # Errors
/// If a file cannot be mapped once more.
///
/// # Safety
/// `ram` must live as long as the result and every source of it, and nobody may write it
/// from the switchover on.
pub unsafe fn source_memory(ram: &GuestRam) -> Result<SourceMemory, SourceMemoryError> {
    let regions = ram.regions().iter().map(|region| {
        let guest = guest_base(region);
        let Some((_, offset)) = region.file() else {
            // SAFETY: the region's mapping lives as long as the RAM; for that, and for who
            // writes it, the caller vouches.
            return Ok(unsafe {
                SourceRegion::anonymous(guest, region.host_base(), region.length())
            });
        };
        let file = clone_file(region).map_err(|source| SourceMemoryError::Io {
            operation: "duplicate the descriptor of guest memory",
            source,
        })?;
        SourceRegion::file(guest, file, offset, region.length())
    });
    SourceMemory::new(regions.collect::<Result<_, SourceMemoryError>>()?)
}

/// Empties `ram` and registers it for a destination.
///
/// # Errors
/// [`MemoryError`], of which [`MemoryError::Uffd`] is about rights and features.
///
/// # Safety
/// `ram` must live as long as the result and its destination, and no Rust reference into
/// it may be alive.
pub unsafe fn destination_memory(
    ram: &GuestRam,
    scope: FaultScope,
    discards: DiscardNotice,
) -> Result<DestinationMemory, MemoryError> {
    let regions = ram.regions().iter().map(|region| {
        let (guest, start, length) = (guest_base(region), region.host_base(), region.length());
        let Some((_, offset)) = region.file() else {
            // SAFETY: a private anonymous mapping that lives as long as the RAM, for which
            // and for the references the caller vouches.
            return Ok(unsafe { DestinationRegion::anonymous(guest, start, length) });
        };
        let file = clone_file(region).map_err(|source| MemoryError::File {
            operation: "duplicate the descriptor of",
            guest_address: guest,
            source,
        })?;
        Ok(match ram.backing() {
            // SAFETY: as above, for a shared mapping of this file from this offset.
            Backing::Hugetlb => unsafe {
                DestinationRegion::hugetlb(guest, start, length, PageSize::MIB_2, file, offset)
            },
            // SAFETY: as above.
            _ => unsafe { DestinationRegion::shared(guest, start, length, file, offset) },
        })
    });
    let regions = regions.collect::<Result<_, MemoryError>>()?;
    DestinationMemory::register(regions, scope, discards)
}

/// The state as a source sends it.
#[must_use]
pub fn state_sections(state: &MachineState) -> Vec<StateSection> {
    let bytes = state.to_bytes();
    vec![StateSection { name: STATE_NAME.into(), version: STATE_VERSION, bytes }]
}

/// The state as a destination gets it.
///
/// # Errors
/// If it is not there, of another version, or damaged.
pub fn state_from(sections: &[StateSection]) -> Result<MachineState, StateError> {
    let section = sections.iter().find(|section| section.name == STATE_NAME);
    let section = section.ok_or_else(|| StateError::Missing { name: STATE_NAME.into() })?;
    if section.version != STATE_VERSION {
        return Err(StateError::SectionVersion {
            name: STATE_NAME.into(),
            found: section.version,
            known: STATE_VERSION,
        });
    }
    MachineState::from_bytes(&section.bytes)
}

fn guest_base(region: &Region) -> GuestAddress {
    GuestAddress(region.guest_base().0)
}

fn clone_file(region: &Region) -> io::Result<OwnedFd> {
    let (file, _) = region.file().ok_or(io::ErrorKind::NotFound)?;
    file.as_fd().try_clone_to_owned()
}
