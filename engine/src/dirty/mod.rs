//! Which pages of a running guest were written: for precopy passes of a source, before its
//! vCPUs stop.
//!
//! | tracker | sees | costs |
//! | --- | --- | --- |
//! | [`WriteProtectTracker`] | all writes through one mapping, of threads, system calls and KVM | a short fault for each page written, 8 bytes of page tables a page of shared memory |
//! | [`KvmDirtyLog`] | writes of vCPUs | a copy of one bit a page of all RAM, each time |
//! | [`KvmDirtyRing`] | writes of vCPUs | what was written; an exit whenever a ring is full |
//! | [`DirtyBitmap`] | what it is told | one atomic operation a mark |
//! | `BitmapTracker`, in module `vm_memory` | what is written through rust-vmm's `vm-memory` | as the last; a copy of one bit a page, each time |
//!
//! None sees the DMA of a device that has been assigned to the guest, nor memory that is
//! given up (`MADV_DONTNEED`, holes punched). Writes of the VMM's own devices are seen by the
//! first only. Whatever a tracker does not see, the VMM tells a [`DirtyBitmap`], and
//! [`Trackers`] makes one of both.
//!
//! Invariant of all: a page that `collect` reports was armed again before. So what is read of
//! it afterwards is its content, or the page is reported once more.

mod bitmap;
mod kvm_log;
mod kvm_ring;
mod kvm_slots;
mod page_bits;
mod runs;
mod trackers;
mod write_protect;

pub use bitmap::DirtyBitmap;
pub use kvm_log::KvmDirtyLog;
pub use kvm_ring::{KvmDirtyRing, RingReaper};
pub use kvm_slots::KvmSlot;
#[cfg(feature = "vm-memory")]
pub(crate) use runs::each_run;
pub use trackers::Trackers;
pub use write_protect::{TrackedRegion, WriteProtectTracker};

use crate::GuestAddress;
use std::io;

/// In what all trackers count.
pub(crate) const PAGE: u64 = 4096;

/// Tells which pages of a running guest were written.
///
/// Calls come from one thread at a time; the guest runs meanwhile.
pub trait DirtyTracker: Send + std::fmt::Debug {
    /// Begins. Every write after it returns, and any that overlaps it, is reported by a later
    /// [`collect`](Self::collect).
    ///
    /// # Errors
    /// What is missing, which kernel has it, and what to use instead; or what the system says.
    /// Nothing is tracked then. To begin twice is an error and changes nothing.
    fn start(&mut self) -> io::Result<()>;

    /// Reports, as runs of whole 4 KiB pages (where, how many bytes), what was written since
    /// [`start`](Self::start) or the last call. These pages are armed again before they are
    /// reported: whoever reads one after the call has its content, or hears of it again. More
    /// may be reported than was written, in any order, and a page more than once.
    ///
    /// Once vCPUs have stopped (have left `KVM_RUN`) and devices too, one more call reports
    /// all that is left.
    ///
    /// # Errors
    /// It is not known any more what was written: treat all pages as dirty, or end precopy.
    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()>;

    /// Ends: nothing is tracked any more, and memory, KVM slots and mappings are as before
    /// [`start`](Self::start). May be called at any time, also twice; dropping a tracker does
    /// the same.
    ///
    /// # Errors
    /// What could not be undone.
    fn stop(&mut self) -> io::Result<()>;
}

pub(crate) fn not_started() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "nothing is tracked: start was not called")
}

pub(crate) fn already_started() -> io::Error {
    io::Error::new(io::ErrorKind::AlreadyExists, "writes are being tracked already")
}

/// Ends what a tracker that is dropped began. Nobody is there to hear of an error.
fn stop_dropped(tracker: &mut dyn DirtyTracker) {
    if let Err(error) = tracker.stop() {
        tracing::warn!(%error, "dirty tracking was not undone");
    }
}
