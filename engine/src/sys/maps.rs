//! What a range of this process's memory is, from `/proc/self/maps`.
//!
//! The engine treats private memory and files very differently: it finds the holes of the
//! one in the page map, of the other in the file. Taking one for the other would turn pages
//! into zeros, so what a VMM says is checked where it can be.

use std::fs;
use std::io;
use std::os::fd::AsFd;

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    is_shared: bool,
    offset: u64,
    inode: u64,
}

/// What is wrong with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// Nothing is mapped at an address of it.
    #[error("nothing is mapped at {address:#x}")]
    Unmapped {
        /// The first such address.
        address: u64,
    },
    /// A part of it is not private anonymous memory.
    #[error(
        "what is mapped at {address:#x} is shared memory, not private anonymous memory: describe \
         it with its file"
    )]
    NotPrivate {
        /// Where.
        address: u64,
    },
    /// A part of it is a private mapping of a file.
    #[error(
        "what is mapped at {address:#x} is a private mapping of a file, or of huge pages without \
         one: what the guest has written there is not in the file, and the rest is in the file \
         alone; map it shared (MAP_SHARED), for huge pages from a memfd or hugetlbfs"
    )]
    PrivateFile {
        /// Where.
        address: u64,
    },
    /// A part of it is not a shared mapping of the file given, or of another place in it.
    #[error(
        "what is mapped at {address:#x} is not a shared mapping of the file given at offset \
         {offset:#x}"
    )]
    NotTheFile {
        /// Where.
        address: u64,
        /// The offset expected there.
        offset: u64,
    },
}

/// Checks that a range is private anonymous memory.
pub(crate) fn check_private(start: u64, length: u64) -> io::Result<Result<(), MappingError>> {
    let text = fs::read_to_string("/proc/self/maps")?;
    Ok(walk(&text, start, length, |mapping, address| match mapping {
        Mapping { is_shared: true, .. } => Err(MappingError::NotPrivate { address }),
        Mapping { inode: 0, .. } => Ok(()),
        _ => Err(MappingError::PrivateFile { address }),
    }))
}

/// Checks that a range is a shared mapping of `file` from `offset`.
pub(crate) fn check_shared(
    start: u64,
    length: u64,
    file: impl AsFd,
    offset: u64,
) -> io::Result<Result<(), MappingError>> {
    let inode = nix::sys::stat::fstat(file)?.st_ino;
    let text = fs::read_to_string("/proc/self/maps")?;
    Ok(walk(&text, start, length, |mapping, address| {
        let expected = offset + (address - start);
        let is_there = mapping.offset + (address - mapping.start) == expected;
        if !mapping.is_shared && mapping.inode == inode && is_there {
            return Err(MappingError::PrivateFile { address });
        }
        if !mapping.is_shared || mapping.inode != inode || !is_there {
            return Err(MappingError::NotTheFile { address, offset: expected });
        }
        Ok(())
    }))
}

/// Calls `check` with each mapping of a range and the first address of the range in it.
fn walk(
    text: &str,
    start: u64,
    length: u64,
    mut check: impl FnMut(&Mapping, u64) -> Result<(), MappingError>,
) -> Result<(), MappingError> {
    let end = start + length;
    let mut next = start;
    // The file is sorted by address.
    for mapping in text.lines().filter_map(parse) {
        if next >= end || mapping.start >= end {
            break;
        }
        if mapping.end <= next {
            continue;
        }
        if mapping.start > next {
            break;
        }
        check(&mapping, next)?;
        next = mapping.end;
    }
    if next < end { Err(MappingError::Unmapped { address: next }) } else { Ok(()) }
}

/// `7f00-8000 rw-s 00001000 00:05 1234 /memfd:ram (deleted)`
fn parse(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let is_shared = fields.next()?.ends_with('s');
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(Mapping { start: number(start)?, end: number(end)?, is_shared, offset, inode })
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{MmapMut, MmapOptions, MmapRaw};

    #[test]
    fn private_memory_and_files_are_told_apart() {
        let private = MmapMut::map_anon(1 << 20).unwrap();
        let start = private.as_ptr() as u64;
        assert_eq!(check_private(start, 1 << 20).unwrap(), Ok(()));

        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let shared: MmapRaw = MmapOptions::new().offset(4096).len(8192).map_raw(&file).unwrap();
        let start = shared.as_ptr() as u64;
        assert_eq!(check_shared(start, 8192, &file, 4096).unwrap(), Ok(()));
        let error = check_private(start, 8192).unwrap().unwrap_err();
        assert_eq!(error, MappingError::NotPrivate { address: start });
        let error = check_shared(start, 8192, &file, 0).unwrap().unwrap_err();
        assert_eq!(error, MappingError::NotTheFile { address: start, offset: 0 });
        let other = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(check_shared(start, 8192, &other, 4096).unwrap().is_err());
    }

    #[test]
    fn a_private_mapping_of_a_file_is_neither() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(8192).unwrap();
        // SAFETY: nobody else has the file.
        let copied = unsafe { MmapOptions::new().len(8192).map_copy(&file).unwrap() };
        let start = copied.as_ptr() as u64;
        let expected = Err(MappingError::PrivateFile { address: start });
        assert_eq!(check_private(start, 8192).unwrap(), expected);
        assert_eq!(check_shared(start, 8192, &file, 0).unwrap(), expected);
    }

    #[test]
    fn a_hole_in_the_address_space_is_found() {
        let text = "1000-2000 rw-p 00000000 00:00 0\n3000-4000 rw-p 00000000 00:00 0 [heap]\n";
        let all = |_: &Mapping, _| Ok(());
        assert_eq!(walk(text, 0x1000, 0x1000, all), Ok(()));
        assert_eq!(
            walk(text, 0x1000, 0x2000, all),
            Err(MappingError::Unmapped { address: 0x2000 })
        );
        assert_eq!(
            walk(text, 0x3000, 0x2000, all),
            Err(MappingError::Unmapped { address: 0x4000 })
        );
        assert_eq!(walk(text, 0, 0x1000, all), Err(MappingError::Unmapped { address: 0 }));
    }
}
