//! KVM's dirty rings: a list of pages for each vCPU.

use super::kvm_slots::{KvmSlot, Slots};
use super::page_bits::PageBits;
use super::{DirtyTracker, not_started, stop_dropped};
use crate::GuestAddress;
use crate::sys::kvm;
use crate::sys::kvm_ring::{DirtyPage, Ring, Room};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tracks the writes of vCPUs by KVM's dirty rings.
///
/// **Needs** Linux 5.11 (`KVM_CAP_DIRTY_LOG_RING`; 6.1 has `KVM_CAP_DIRTY_LOG_RING_ACQ_REL`,
/// for weakly ordered CPUs), which the VMM enables with the rings' size in bytes before it
/// makes the first vCPU: 16 bytes an entry, a power of two, at most 1 MiB; 64 KiB (4,096 pages)
/// is a good start. The VM has no dirty log then. **Costs** what was written, however large RAM
/// is, 1 bit a page where it was written, and exits of vCPUs whose ring is full; huge mappings
/// are split while it runs.
///
/// A vCPU whose ring is full leaves `KVM_RUN` with `KVM_EXIT_DIRTY_RING_FULL` and does not
/// enter the guest again before its ring was emptied: its thread calls [`RingReaper::reap`].
///
/// **Does not see** what [`KvmDirtyLog`](super::KvmDirtyLog) does not, nor what KVM itself
/// writes while no vCPU runs (none on x86 without Xen or Hyper-V features). Where the processor
/// logs by itself (PML), a page gets into the ring when its vCPU leaves the guest the next
/// time: let vCPUs leave `KVM_RUN` before the last `collect`.
///
/// KVM asks for the exit while there is room for 64 more entries. Where it emulates the guest's
/// instructions it may go on for longer; a ring that overflows then is noticed, is an error of
/// every `collect` from then on, and needs a new VM.
///
/// Rings have one reader: no two trackers at a time for one VM, and nobody beside.
#[derive(Debug)]
pub struct KvmDirtyRing {
    slots: Slots,
    shared: Arc<Shared>,
}

/// Empties all rings into the bitmap of its [`KvmDirtyRing`], from any thread; for a vCPU that
/// exits with `KVM_EXIT_DIRTY_RING_FULL`. Cheap to clone. Works, and keeps the vCPUs going,
/// also after the tracker has stopped or was dropped.
#[derive(Clone, Debug)]
pub struct RingReaper(Arc<Shared>);

struct Shared {
    vm: OwnedFd,
    records: Vec<Record>,
    rings: Mutex<Rings>,
}

/// The pages of a slot that were taken out of rings and are armed again.
struct Record {
    slot: u32,
    pages: PageBits,
}

struct Rings {
    of_vcpus: Vec<Ring>,
    /// What was taken and is not armed again yet.
    taken: Vec<DirtyPage>,
    /// A page that no slot of ours has.
    stranger: Option<DirtyPage>,
    /// The kernel has written over entries. It does not recover from that, nor can we.
    has_overflowed: bool,
}

impl KvmDirtyRing {
    /// For these slots of a VM and all of its vCPUs, whose descriptors are duplicated for it.
    ///
    /// # Errors
    /// If the VM has no rings, or a slot is logged by somebody else already.
    pub fn new(vm: OwnedFd, vcpus: &[impl AsFd], slots: Vec<KvmSlot>) -> io::Result<Self> {
        let of_vcpus = vcpus.iter().map(|vcpu| Ring::new(vcpu)?.ok_or_else(no_ring));
        let of_vcpus = of_vcpus.collect::<io::Result<_>>()?;
        let records = slots.iter().map(|slot| {
            let pages = PageBits::new(slot.guest(), slot.length())?;
            Ok(Record { slot: slot.number(), pages })
        });
        let shared = Shared {
            records: records.collect::<io::Result<_>>()?,
            rings: Mutex::new(Rings {
                of_vcpus,
                taken: Vec::new(),
                stranger: None,
                has_overflowed: false,
            }),
            vm: vm.try_clone()?,
        };
        Ok(Self { slots: Slots::new(vm, slots)?, shared: Arc::new(shared) })
    }

    /// For the threads of the vCPUs.
    #[must_use]
    pub fn reaper(&self) -> RingReaper {
        RingReaper(Arc::clone(&self.shared))
    }
}

impl RingReaper {
    /// Takes out of the rings what is there, remembers it for the next
    /// [`collect`](DirtyTracker::collect), and arms the pages again. Waits for whoever does the
    /// same, and for KVM, never for the guest. Not to be called from a signal handler.
    ///
    /// # Errors
    /// If KVM cannot arm them, or a ring has overflowed, which the next `collect` says too. What
    /// was taken is remembered all the same.
    pub fn reap(&self) -> io::Result<()> {
        self.0.reap().map(drop)
    }
}

impl Shared {
    /// Pages are marked after they were armed, so that whoever finds a mark may read the page.
    fn reap(&self) -> io::Result<MutexGuard<'_, Rings>> {
        // Nothing under the lock is left half done by a panic: there is none.
        let mut guard = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let rings = &mut *guard;
        for ring in &mut rings.of_vcpus {
            rings.has_overflowed |= ring.take(&mut rings.taken) == Room::Overflowed;
        }
        let taken = rings.taken.len();
        let armed = kvm::reset_dirty_rings(&self.vm, taken);
        for page in rings.taken.drain(..) {
            let record = self.records.iter().find(|record| record.slot == page.slot);
            if !record.is_some_and(|record| record.pages.mark_page(page.page)) {
                rings.stranger = Some(page);
            }
        }
        // An entry that was taken and not armed was written over in between.
        rings.has_overflowed |= armed? != taken;
        if rings.has_overflowed {
            return Err(overflowed());
        }
        Ok(guard)
    }

    fn forget(&self) -> io::Result<()> {
        self.reap()?.stranger = None;
        self.records.iter().for_each(|record| record.pages.forget());
        Ok(())
    }
}

impl DirtyTracker for KvmDirtyRing {
    fn start(&mut self) -> io::Result<()> {
        if !self.slots.is_started() {
            self.shared.forget()?;
        }
        self.slots.start()
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        if !self.slots.is_started() {
            return Err(not_started());
        }
        // Marks are taken without the lock: a vCPU with a full ring need not wait for it.
        let stranger = self.shared.reap()?.stranger.take();
        self.shared.records.iter().for_each(|record| record.pages.take(written));
        match stranger {
            None => Ok(()),
            Some(page) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "a vCPU wrote page {} of slot {}, which is not tracked",
                    page.page, page.slot
                ),
            )),
        }
    }

    fn stop(&mut self) -> io::Result<()> {
        if !self.slots.is_started() {
            return Ok(());
        }
        self.slots.stop().and(self.shared.forget())
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        stop_dropped(self);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("vm", &self.vm).finish_non_exhaustive()
    }
}

fn overflowed() -> io::Error {
    io::Error::other(
        "a dirty ring has overflowed, and what was written is not known any more: KVM did not \
         let the vCPU leave in time; use KvmDirtyLog in a new VM without rings instead",
    )
}

fn no_ring() -> io::Error {
    io::Error::new(
        io::ErrorKind::Unsupported,
        "the VM has no dirty rings: enable KVM_CAP_DIRTY_LOG_RING_ACQ_REL (Linux 6.1) or \
         KVM_CAP_DIRTY_LOG_RING (Linux 5.11) with their size before the first vCPU is made, or use \
         KvmDirtyLog instead",
    )
}
