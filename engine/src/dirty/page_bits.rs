//! A bit for each page of a range of guest memory.

use super::PAGE;
use crate::GuestAddress;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::Bitmap;
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::io;

/// Takes memory only where bits were set. All methods may be called from any thread.
#[derive(Debug)]
pub(super) struct PageBits {
    guest: GuestAddress,
    length: u64,
    bits: Bitmap<LazyWords>,
}

impl PageBits {
    /// # Errors
    /// If the range is empty, is not made of whole pages or ends beyond the address space; or
    /// the system has no memory.
    pub(super) fn new(guest: GuestAddress, length: u64) -> io::Result<Self> {
        check_range(guest, length)?;
        let pages = length / PAGE;
        Ok(Self { guest, length, bits: Bitmap::over(LazyWords::new(pages)?, pages) })
    }

    /// Marks the pages that `guest..end` has a byte of, as far as they lie here; how many of
    /// its bytes do.
    pub(super) fn mark(&self, guest: u64, end: u64) -> u64 {
        let start = guest.max(self.guest.0);
        let end = end.min(self.guest.0 + self.length);
        if start >= end {
            return 0;
        }
        let first = (start - self.guest.0) / PAGE;
        let count = (end - self.guest.0).div_ceil(PAGE) - first;
        self.bits.set(PageRange::new(PageNumber(first), count), |_| ());
        end - start
    }

    /// Marks a page by its number in the range; `false` if there is none.
    pub(super) fn mark_page(&self, page: u64) -> bool {
        let is_here = page < self.length / PAGE;
        if is_here {
            self.bits.set_one(PageNumber(page));
        }
        is_here
    }

    /// Clears all marks, and reports them.
    pub(super) fn take(&self, marked: &mut dyn FnMut(GuestAddress, u64)) {
        let all = PageRange::new(PageNumber(0), self.length / PAGE);
        self.bits.clear(all, |run| {
            marked(GuestAddress(self.guest.0 + run.start.0 * PAGE), run.count * PAGE);
        });
    }

    /// Clears all marks.
    pub(super) fn forget(&self) {
        self.take(&mut |_, _| ());
    }
}

/// Whether a range of guest memory can be tracked.
pub(super) fn check_range(guest: GuestAddress, length: u64) -> io::Result<()> {
    let is_whole = guest.0.is_multiple_of(PAGE) && length.is_multiple_of(PAGE);
    if is_whole && length > 0 && guest.0.checked_add(length).is_some() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{length} bytes at guest address {guest} are not whole pages of 4 KiB"),
    ))
}
