//! What the VMM itself, or a device of it, has written.

use super::page_bits::PageBits;
use super::{DirtyTracker, PAGE};
use crate::GuestAddress;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Filled by the VMM with what it knows to be written and no tracker sees: emulated devices
/// beside KVM's trackers, vhost, assigned devices, pages that were given up.
///
/// An `Arc<DirtyBitmap>` is a [`DirtyTracker`]; clones of the `Arc` are given to the devices.
/// It takes one bit a page, only where pages were marked, and has nothing to undo.
///
/// ```
/// use afterimage::{GuestAddress, dirty::{DirtyBitmap, DirtyTracker}};
/// use std::sync::Arc;
///
/// let mut bitmap = Arc::new(DirtyBitmap::new(&[(GuestAddress(0), 1 << 40)])?);
/// let device = Arc::clone(&bitmap);
/// bitmap.start()?;
/// // The device has written 512 bytes.
/// device.mark(GuestAddress(0x1ff0), 512);
/// let mut found = Vec::new();
/// bitmap.collect(&mut |guest, length| found.push((guest, length)))?;
/// assert_eq!(found, [(GuestAddress(0x1000), 8192)]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct DirtyBitmap {
    ranges: Vec<PageBits>,
    /// An address that was marked and is in no range.
    outside: AtomicU64,
}

impl DirtyBitmap {
    /// For these pieces of guest memory (where, how many bytes).
    ///
    /// # Errors
    /// If one is not made of whole pages of 4 KiB, or there is no memory for the bits.
    pub fn new(ranges: &[(GuestAddress, u64)]) -> io::Result<Self> {
        let ranges = ranges.iter().map(|(guest, length)| PageBits::new(*guest, *length));
        Ok(Self { ranges: ranges.collect::<io::Result<_>>()?, outside: AtomicU64::new(NOWHERE) })
    }

    /// Says that `length` bytes at `guest` were written. Lock-free; from any thread.
    ///
    /// Mark **after** the write is complete: a mark that comes first may be collected, and the
    /// page read, before the write. Marking memory that the bitmap does not have makes the
    /// next `collect` fail.
    pub fn mark(&self, guest: GuestAddress, length: u64) {
        let end = guest.0.saturating_add(length);
        let marked: u64 = self.ranges.iter().map(|range| range.mark(guest.0, end)).sum();
        if marked < length {
            self.outside.store(guest.0.min(NOWHERE - 1), Ordering::Release);
        }
    }
}

impl DirtyTracker for Arc<DirtyBitmap> {
    // Marks are kept whether or not anybody tracks: a mark that looked first whether to do
    // anything could miss a start, and the page would be lost.
    fn start(&mut self) -> io::Result<()> {
        self.stop()
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        self.ranges.iter().for_each(|range| range.take(written));
        match self.outside.swap(NOWHERE, Ordering::AcqRel) {
            NOWHERE => Ok(()),
            outside => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a write at {:#x} was marked, which is not tracked", outside & !(PAGE - 1)),
            )),
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        self.ranges.iter().for_each(PageBits::forget);
        self.outside.store(NOWHERE, Ordering::Release);
        Ok(())
    }
}

const NOWHERE: u64 = u64::MAX;
