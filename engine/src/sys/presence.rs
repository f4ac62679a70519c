//! Whether a page is there in the memory of some process, from its page map.
//!
//! Needed where the kernel's answer does not say so: a COPY into huge pages for which none is free
//! fails with EEXIST, as if the page were there already (Linux 5.13 to 6.18 at least:
//! `hugetlb_mfill_atomic_pte` takes a page table without an entry for an entry).

use afterimage_protocol::layout::RegisteredAddress;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The page map of one process. It is bound to the memory that the process had when it was
/// opened, whoever gets its number later.
#[derive(Debug)]
pub(crate) struct Presence {
    /// None of a process that had ended by then.
    map: Option<File>,
}

/// The page size in which page maps count.
const BASE_PAGE: u64 = 4096;
const ENTRY: u64 = 8;
/// Bits of an entry: mapped; swapped, or marked as failed.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

impl Presence {
    /// Of a process that this one may look at: its own user's, unless that forbids it.
    pub(crate) fn of(process: u32) -> io::Result<Self> {
        match File::open(format!("/proc/{process}/pagemap")) {
            Ok(map) => Ok(Self { map: Some(map) }),
            // The second one while its end has not been taken note of by its parent.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                Ok(Self { map: None })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether anything is at this address.
    ///
    /// # Errors
    /// `UnexpectedEof` once the process has ended.
    pub(crate) fn is_there(&self, address: RegisteredAddress) -> io::Result<bool> {
        let Some(map) = &self.map else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        let mut entry = [0; ENTRY as usize];
        map.read_exact_at(&mut entry, address.0 / BASE_PAGE * ENTRY)?;
        Ok(u64::from_le_bytes(entry) & (PRESENT | SWAPPED) != 0)
    }
}
