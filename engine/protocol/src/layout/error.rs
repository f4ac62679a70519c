//! What can be wrong with a layout, and the checks that find it.

use super::{Backing, GuestAddress, PageSize, Region};
use std::fmt;

/// Which address of a region an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegionField {
    /// The guest address.
    Guest,
    /// The registered address.
    Registered,
    /// The local mapping.
    Local,
}

impl RegionField {
    fn of(self, region: &Region) -> Option<u64> {
        match self {
            Self::Guest => Some(region.guest_address.0),
            Self::Registered => region.registered.map(|address| address.0),
            Self::Local => region.local.map(|address| address.0),
        }
    }
}

impl fmt::Display for RegionField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest address",
            Self::Registered => "registered address",
            Self::Local => "local mapping",
        })
    }
}

/// Why a list of regions is no [`GuestLayout`](super::GuestLayout).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no region.
    #[error("the layout has no region: give at least one")]
    Empty,
    /// A region of length zero.
    #[error("the region at guest address {guest_address} has length 0: leave it out")]
    ZeroLength {
        /// Which region.
        guest_address: GuestAddress,
    },
    /// A length that is no multiple of the page size.
    #[error(
        "the region at guest address {guest_address} has length {length:#x}, \
         which is no multiple of its page size {page_size}"
    )]
    UnalignedLength {
        /// Which region.
        guest_address: GuestAddress,
        /// Its length in bytes.
        length: u64,
        /// Its page size.
        page_size: PageSize,
    },
    /// An address that is no multiple of the page size.
    #[error(
        "the region at guest address {guest_address} has {field} {address:#x}, \
         which is no multiple of its page size {page_size}"
    )]
    Unaligned {
        /// Which region.
        guest_address: GuestAddress,
        /// Which of its addresses.
        field: RegionField,
        /// Its value.
        address: u64,
        /// Its page size.
        page_size: PageSize,
    },
    /// An address plus the length that does not fit 64 bits.
    #[error(
        "the region at guest address {guest_address} ends beyond 2^64: \
         {field} {address:#x}, length {length:#x}"
    )]
    Overflow {
        /// Which region.
        guest_address: GuestAddress,
        /// Which of its addresses.
        field: RegionField,
        /// Its value.
        address: u64,
        /// The region's length in bytes.
        length: u64,
    },
    /// Huge pages declared smaller than the smallest huge page.
    #[error(
        "the hugetlbfs region at guest address {guest_address} has page size {page_size}: \
         give the size of its huge pages"
    )]
    NotHuge {
        /// Which region.
        guest_address: GuestAddress,
        /// Its page size.
        page_size: PageSize,
    },
    /// Two regions overlap.
    #[error(
        "the regions at guest addresses {first} and {second} overlap: {field} \
         {first_start:#x}..{first_end:#x} and {second_start:#x}.."
    )]
    Overlap {
        /// Guest address of the one.
        first: GuestAddress,
        /// Guest address of the other.
        second: GuestAddress,
        /// In which address space.
        field: RegionField,
        /// Where the first begins there.
        first_start: u64,
        /// Where the first ends there.
        first_end: u64,
        /// Where the second begins there.
        second_start: u64,
    },
}

/// The first difference between the layouts of source and destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutMismatch {
    /// They have different numbers of regions.
    #[error(
        "the source has {source_regions} memory regions, the destination {destination_regions}"
    )]
    Count {
        /// At the source.
        source_regions: usize,
        /// At the destination.
        destination_regions: usize,
    },
    /// A region begins elsewhere.
    #[error(
        "memory region {index} begins at guest address {at_source} at the source, \
         at {at_destination} at the destination"
    )]
    Address {
        /// Which region, in the order of guest addresses.
        index: usize,
        /// At the source.
        at_source: GuestAddress,
        /// At the destination.
        at_destination: GuestAddress,
    },
    /// A region is longer on one side.
    #[error(
        "memory region {index} (guest address {guest_address}) has {at_source:#x} bytes at the \
         source, {at_destination:#x} at the destination"
    )]
    Length {
        /// Which region.
        index: usize,
        /// Where it begins.
        guest_address: GuestAddress,
        /// Bytes at the source.
        at_source: u64,
        /// Bytes at the destination.
        at_destination: u64,
    },
}

pub(super) fn check_region(region: &Region) -> Result<(), LayoutError> {
    let guest_address = region.guest_address;
    let (length, page_size) = (region.length, region.page_size);
    if length == 0 {
        return Err(LayoutError::ZeroLength { guest_address });
    }
    if region.backing == Backing::Hugetlb && page_size < PageSize::MIB_2 {
        return Err(LayoutError::NotHuge { guest_address, page_size });
    }
    if !length.is_multiple_of(page_size.bytes()) {
        return Err(LayoutError::UnalignedLength { guest_address, length, page_size });
    }
    for field in [RegionField::Guest, RegionField::Registered, RegionField::Local] {
        let Some(address) = field.of(region) else { continue };
        if !address.is_multiple_of(page_size.bytes()) {
            return Err(LayoutError::Unaligned { guest_address, field, address, page_size });
        }
        if address.checked_add(length).is_none() {
            return Err(LayoutError::Overflow { guest_address, field, address, length });
        }
    }
    Ok(())
}

pub(super) fn check_overlap(regions: &[Region], field: RegionField) -> Result<(), LayoutError> {
    let mut placed: Vec<(u64, &Region)> = regions
        .iter()
        .filter_map(|region| field.of(region).map(|address| (address, region)))
        .collect();
    placed.sort_by_key(|&(address, _)| address);
    for pair in placed.windows(2) {
        let [(first_start, first), (second_start, second)] = *pair else { continue };
        let first_end = first_start + first.length;
        if first_end > second_start {
            return Err(LayoutError::Overlap {
                first: first.guest_address,
                second: second.guest_address,
                field,
                first_start,
                first_end,
                second_start,
            });
        }
    }
    Ok(())
}

pub(super) fn compare(source: &[Region], destination: &[Region]) -> Result<(), LayoutMismatch> {
    if source.len() != destination.len() {
        return Err(LayoutMismatch::Count {
            source_regions: source.len(),
            destination_regions: destination.len(),
        });
    }
    for (index, (ours, theirs)) in source.iter().zip(destination).enumerate() {
        let guest_address = ours.guest_address;
        if guest_address != theirs.guest_address {
            return Err(LayoutMismatch::Address {
                index,
                at_source: guest_address,
                at_destination: theirs.guest_address,
            });
        }
        if ours.length != theirs.length {
            return Err(LayoutMismatch::Length {
                index,
                guest_address,
                at_source: ours.length,
                at_destination: theirs.length,
            });
        }
    }
    Ok(())
}
