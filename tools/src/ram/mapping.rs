//! The mappings behind guest RAM: reserved, aligned to 2 MiB, unmapped on drop.
//!
//! All `mmap` of guest memory is here. Invariant: a mapping owns exactly its range.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{self, NonNull};

use super::HUGE_PAGE_BYTES;

/// A readable and writable range of this process.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping is a range of the process, bound to no thread; who reaches into
// it answers for data races.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods only give out the base and the length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps private zero memory. The kernel's policy on huge pages is left alone.
    pub(super) fn anonymous(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Self::aligned(length, flags, -1, 0)
    }

    /// Maps part of a file, shared with whoever else maps it.
    pub(super) fn shared(file: &File, offset: u64, length: usize) -> io::Result<Self> {
        Self::aligned(length, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    fn aligned(length: usize, flags: libc::c_int, fd: libc::c_int, at: u64) -> io::Result<Self> {
        let alignment = HUGE_PAGE_BYTES as usize;
        let reserve_flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let reserved = length.checked_add(alignment).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new range at an address of the kernel's choice replaces nothing.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, reserve_flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let lead = start.align_offset(alignment);
        let base = start.wrapping_byte_add(lead);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: MAP_FIXED replaces only a part of what was just reserved.
        let mapped = unsafe {
            libc::mmap(base, length, access, flags | libc::MAP_FIXED, fd, at.cast_signed())
        };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            unmap(start, reserved);
            return Err(error);
        }
        unmap(start, lead);
        unmap(base.wrapping_byte_add(length), reserved - lead - length);
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::Other)?;
        Ok(Self { base, length })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.base.as_ptr().cast(), self.length);
    }
}

/// Unmaps a range that the caller owns and that nothing refers to any more.
fn unmap(start: *mut libc::c_void, length: usize) {
    if length > 0 {
        // SAFETY: the callers own the range. A failure would leave it mapped, which
        // harms nobody.
        unsafe { libc::munmap(start, length) };
    }
}

/// Creates an empty memfd, on ordinary or on 2 MiB pages; it may be sealed.
pub(super) fn memfd(huge: bool) -> io::Result<File> {
    let huge_flags = libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | if huge { huge_flags } else { 0 };
    // SAFETY: the name is a terminated string.
    let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { File::from_raw_fd(fd) })
}
