//! Guest memory mapped by this process: allocation, addressing and access.
//!
//! Responsible for where guest RAM lies (its regions, host mappings and files) and
//! for reaching it from the host. What is written there is left to [`crate::guest`].
//!
//! Invariant: building a [`GuestRam`] touches no page. Nothing is faulted in, read
//! or zeroed, so that a destination can register the mappings with userfaultfd
//! before anything has been in them.

mod hugepages;
mod mapping;

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use crate::placing::{HIGH_RAM_START, LOW_RAM_END};
pub use hugepages::{HugePages, HugePagesError};
use mapping::Mapping;

/// Bytes in the unit in which guests write and verification checks: 4 KiB.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes in a huge page: 2 MiB. Every region is a multiple of it, and aligned to it
/// in guest physical memory and on the host.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// A guest physical address, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GuestAddress(pub u64);

/// What guest RAM is made of.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous,
    /// A shared memfd of ordinary pages.
    Memfd,
    /// A shared memfd of 2 MiB hugetlbfs pages.
    Hugetlb,
}

impl Backing {
    /// Bytes of one host page of this backing.
    #[must_use]
    pub fn page_bytes(self) -> u64 {
        match self {
            Self::Anonymous | Self::Memfd => PAGE_BYTES,
            Self::Hugetlb => HUGE_PAGE_BYTES,
        }
    }
}

/// Why guest RAM could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The size is not a positive multiple of 2 MiB.
    #[error("guest RAM of {bytes} bytes: must be a positive multiple of 2 MiB")]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// Regions overlap, are not in ascending order or are not aligned to 2 MiB.
    #[error(
        "guest RAM region at {:#x}, {length:#x} bytes: must be aligned to 2 MiB and above the one before",
        base.0
    )]
    Region {
        /// Where the region would have begun.
        base: GuestAddress,
        /// Its length in bytes.
        length: u64,
    },
    /// The kernel refused a file or a mapping.
    #[error("cannot {operation} {bytes} bytes of {backing:?} guest RAM{hint}")]
    System {
        /// What was being done.
        operation: &'static str,
        /// For how many bytes.
        bytes: u64,
        /// For which backing.
        backing: Backing,
        /// How to mend it, where that is known; else empty.
        hint: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A file to map as a region of guest RAM.
#[derive(Debug)]
pub struct FileRegion {
    /// Where the region begins in guest physical memory.
    pub guest_base: GuestAddress,
    /// Its length in bytes.
    pub length: u64,
    /// The file: a memfd, on ordinary or huge pages.
    pub file: File,
    /// Where in the file the region begins, in bytes.
    pub offset: u64,
}

/// One contiguous piece of guest RAM and its mapping in this process.
#[derive(Debug)]
pub struct Region {
    guest_base: GuestAddress,
    page_bytes: u64,
    mapping: Mapping,
    file: Option<(Arc<File>, u64)>,
}

impl Region {
    /// Where the region begins in guest physical memory.
    #[must_use]
    pub fn guest_base(&self) -> GuestAddress {
        self.guest_base
    }

    /// Where it is mapped in this process.
    #[must_use]
    pub fn host_base(&self) -> NonNull<u8> {
        self.mapping.base()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.mapping.length() as u64
    }

    /// Bytes of one host page: 4 KiB or 2 MiB.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The file behind a shared region, and where in it the region begins.
    #[must_use]
    pub fn file(&self) -> Option<(&Arc<File>, u64)> {
        self.file.as_ref().map(|(file, offset)| (file, *offset))
    }

    fn offset_of(&self, address: GuestAddress) -> Option<u64> {
        let offset = address.0.checked_sub(self.guest_base.0)?;
        (offset < self.length()).then_some(offset)
    }
}

/// All RAM of a guest, mapped by this process. Unmapped on drop.
///
/// Safe to share between threads: access from the host goes through atomics, since
/// the guest writes at any moment.
#[derive(Debug)]
pub struct GuestRam {
    backing: Backing,
    regions: Vec<Region>,
}

impl GuestRam {
    /// Maps `bytes` of fresh RAM, in one region or, above 3 GiB, two.
    ///
    /// # Errors
    /// If the size is not a multiple of 2 MiB, or the kernel has no memory, no
    /// descriptors or no huge pages left.
    pub fn allocate(bytes: u64, backing: Backing) -> Result<Self, RamError> {
        if bytes == 0 || !bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(RamError::Size { bytes });
        }
        let low = bytes.min(LOW_RAM_END);
        let mut regions = vec![fresh_region(GuestAddress(0), low, backing)?];
        if bytes > low {
            let base = GuestAddress(HIGH_RAM_START);
            regions.push(fresh_region(base, bytes - low, backing)?);
        }
        Ok(Self { backing, regions })
    }

    /// Maps RAM that lies in files: what [`Region::file`] names in the process that
    /// allocated it, for instance after the descriptors were handed over.
    ///
    /// # Errors
    /// If regions overlap or are unaligned, or the kernel refuses a mapping.
    pub fn from_files(
        backing: Backing,
        files: impl IntoIterator<Item = FileRegion>,
    ) -> Result<Self, RamError> {
        let mut regions: Vec<Region> = Vec::new();
        for part in files {
            let floor = regions.last().map_or(0, |last| last.guest_base.0 + last.length());
            let aligned = part.length > 0
                && (part.guest_base.0 | part.length).is_multiple_of(HUGE_PAGE_BYTES);
            if !aligned || part.guest_base.0 < floor {
                return Err(RamError::Region { base: part.guest_base, length: part.length });
            }
            let mapping = Mapping::shared(&part.file, part.offset, part.length as usize)
                .map_err(|source| system("map", part.length, backing, source))?;
            regions.push(Region {
                guest_base: part.guest_base,
                page_bytes: backing.page_bytes(),
                mapping,
                file: Some((Arc::new(part.file), part.offset)),
            });
        }
        if regions.is_empty() {
            return Err(RamError::Size { bytes: 0 });
        }
        Ok(Self { backing, regions })
    }

    /// What this RAM is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The regions, in ascending guest physical order.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// All bytes of RAM together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(Region::length).sum()
    }

    /// Whether there is RAM at `address`.
    #[must_use]
    pub fn contains(&self, address: GuestAddress) -> bool {
        self.region_at(address).is_some()
    }

    /// Where `address` is mapped in this process, if it is RAM.
    #[must_use]
    pub fn host_address(&self, address: GuestAddress) -> Option<NonNull<u8>> {
        let (region, offset) = self.region_at(address)?;
        // SAFETY: the offset lies inside the region's mapping.
        Some(unsafe { region.host_base().add(offset as usize) })
    }

    /// The byte at `address`, as an atomic that the guest may be writing.
    ///
    /// # Panics
    /// If `address` is not RAM.
    #[must_use]
    pub fn byte(&self, address: GuestAddress) -> &AtomicU8 {
        let pointer = self.pointer(address, 1);
        // SAFETY: the byte is inside a mapping that lives as long as self, and this
        // process reaches it only by atomics while others do.
        unsafe { AtomicU8::from_ptr(pointer.as_ptr()) }
    }

    /// The little-endian 64-bit word at `address`, as an atomic.
    ///
    /// # Panics
    /// If `address` is not RAM or not a multiple of 8.
    #[must_use]
    pub fn word(&self, address: GuestAddress) -> &AtomicU64 {
        assert!(address.0.is_multiple_of(8), "unaligned word at {:#x}", address.0);
        let pointer = self.pointer(address, 8);
        // SAFETY: as for `byte`; regions are aligned to 2 MiB, so the word is to 8.
        unsafe { AtomicU64::from_ptr(pointer.as_ptr().cast()) }
    }

    /// Copies `bytes` to RAM at `address`.
    ///
    /// # Panics
    /// If the range is not wholly inside one region.
    pub fn write(&self, address: GuestAddress, bytes: &[u8]) {
        let pointer = self.pointer(address, bytes.len());
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: `pointer` reaches over bytes.len() bytes of a live mapping.
            unsafe { pointer.as_ptr().add(index).write_volatile(*byte) };
        }
    }

    /// The 512 words of the 4 KiB page at `address`, read one by one.
    ///
    /// # Panics
    /// If `address` is not RAM or not a multiple of 4096.
    #[must_use]
    pub fn read_page(&self, address: GuestAddress) -> [u64; 512] {
        let page = self.page(address);
        std::array::from_fn(|index| page[index].load(Ordering::Relaxed))
    }

    /// Replaces the 4 KiB page at `address`.
    ///
    /// # Panics
    /// As [`Self::read_page`].
    pub fn write_page(&self, address: GuestAddress, words: &[u64; 512]) {
        for (word, value) in self.page(address).iter().zip(words) {
            word.store(*value, Ordering::Relaxed);
        }
    }

    /// Copies all content of `other`, a RAM of the same geometry, page by page; a
    /// page of zeros that is still untouched here stays so.
    ///
    /// # Panics
    /// If the regions differ in place or length.
    pub fn copy_from(&self, other: &Self) {
        assert_eq!(self.regions.len(), other.regions.len(), "regions differ");
        for (mine, theirs) in self.regions.iter().zip(&other.regions) {
            assert_eq!(mine.guest_base, theirs.guest_base, "regions differ");
            assert_eq!(mine.length(), theirs.length(), "regions differ");
            for offset in (0..mine.length()).step_by(PAGE_BYTES as usize) {
                let address = GuestAddress(mine.guest_base.0 + offset);
                let words = other.read_page(address);
                if words.iter().any(|word| *word != 0) {
                    self.write_page(address, &words);
                }
            }
        }
    }

    fn page(&self, address: GuestAddress) -> &[AtomicU64; 512] {
        assert!(address.0.is_multiple_of(PAGE_BYTES), "unaligned page at {:#x}", address.0);
        let pointer = self.pointer(address, PAGE_BYTES as usize);
        // SAFETY: a whole aligned page of a mapping that lives as long as self;
        // AtomicU64 has the layout of u64 and allows others to write.
        unsafe { pointer.cast().as_ref() }
    }

    fn pointer(&self, address: GuestAddress, length: usize) -> NonNull<u8> {
        let (region, offset) =
            self.region_at(address).unwrap_or_else(|| panic!("{:#x} is not guest RAM", address.0));
        assert!(
            offset + length as u64 <= region.length(),
            "{length} bytes at {:#x} reach beyond their region",
            address.0
        );
        // SAFETY: the offset lies inside the region's mapping.
        unsafe { region.host_base().add(offset as usize) }
    }

    fn region_at(&self, address: GuestAddress) -> Option<(&Region, u64)> {
        self.regions
            .iter()
            .find_map(|region| region.offset_of(address).map(|offset| (region, offset)))
    }
}

fn fresh_region(
    guest_base: GuestAddress,
    length: u64,
    backing: Backing,
) -> Result<Region, RamError> {
    let failed = |operation| move |source| system(operation, length, backing, source);
    let (mapping, file) = match backing {
        Backing::Anonymous => {
            let mapping = Mapping::anonymous(length as usize).map_err(failed("map"))?;
            (mapping, None)
        }
        Backing::Memfd | Backing::Hugetlb => {
            let file = mapping::memfd(backing == Backing::Hugetlb).map_err(failed("create"))?;
            file.set_len(length).map_err(failed("size"))?;
            let mapping = Mapping::shared(&file, 0, length as usize).map_err(failed("map"))?;
            (mapping, Some((Arc::new(file), 0)))
        }
    };
    Ok(Region { guest_base, page_bytes: backing.page_bytes(), mapping, file })
}

fn system(operation: &'static str, bytes: u64, backing: Backing, source: io::Error) -> RamError {
    let hint = match (backing, hugepages::free()) {
        (Backing::Hugetlb, Ok(free)) => format!(
            " ({} huge pages are needed, {free} are free: raise vm.nr_hugepages)",
            bytes / HUGE_PAGE_BYTES
        ),
        _ => String::new(),
    };
    RamError::System { operation, bytes, backing, hint, source }
}

#[cfg(test)]
mod tests;
