//! What tells which pages a guest on KVM writes.
//!
//! KVM's trackers see the vCPUs only. What the VMM itself writes, its mailbox, is marked in a
//! bitmap beside them ([`Written`]).
//!
//! Invariant: whoever empties the rings for a vCPU is the reader that was made last.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage::GuestAddress;
use afterimage::dirty::{
    DirtyBitmap, DirtyTracker, KvmDirtyLog, KvmDirtyRing, KvmSlot, RingReaper, Trackers,
    WriteProtectTracker,
};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use memmap2::MmapOptions;

use super::runner::Vcpu;
use super::{KvmGuest, refused};
use crate::guest::{GuestError, GuestKind, TrackerKind, mailbox, tracked_regions};
use crate::ram::PAGE_BYTES;

/// Bytes of an entry of a dirty ring.
const RING_ENTRY_BYTES: u64 = 16;
/// Where a vCPU's ring is mapped from its descriptor.
const RING_AT: u64 = KVM_DIRTY_LOG_PAGE_OFFSET as u64 * PAGE_BYTES;
/// Of an entry that KVM has filled.
const KVM_DIRTY_GFN_F_DIRTY: u32 = 1;

/// What is written behind KVM's back, and what vCPUs need of a tracker.
#[derive(Clone, Debug)]
pub(super) struct Written {
    /// By the VMM.
    by_vmm: Arc<DirtyBitmap>,
    reaper: Arc<Mutex<Option<RingReaper>>>,
}

impl Written {
    pub(super) fn new() -> Result<Self, GuestError> {
        let page = (GuestAddress(mailbox::PAGE.0), PAGE_BYTES);
        let by_vmm = DirtyBitmap::new(&[page])
            .map_err(|source| GuestError::Kvm { operation: "note writes".to_owned(), source })?;
        Ok(Self { by_vmm: Arc::new(by_vmm), reaper: Arc::default() })
    }

    /// The VMM has written a word at `address`.
    pub(super) fn mark(&self, address: crate::ram::GuestAddress) {
        self.by_vmm.mark(GuestAddress(address.0), 8);
    }

    /// Empties the rings for a vCPU whose own is full.
    pub(super) fn reap(&self) -> Result<(), String> {
        let reaper = self.reaper.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let reaper = reaper.ok_or("its dirty ring is full, and nobody empties it")?;
        reaper.reap().map_err(|error| format!("its dirty ring cannot be emptied: {error}"))
    }
}

/// Has the vCPUs that are made from now on keep dirty rings.
pub(super) fn enable_rings(vm: &VmFd, entries: u32) -> Result<(), GuestError> {
    let enable = |cap| {
        let bytes = u64::from(entries) * RING_ENTRY_BYTES;
        vm.enable_cap(&kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() })
    };
    enable(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
        .or_else(|_| enable(KVM_CAP_DIRTY_LOG_RING))
        .map_err(refused(format!("have dirty rings of {entries} entries")))
}

/// Descriptors of vCPUs beside those that their threads have.
pub(super) fn duplicates(vcpus: &[Vcpu]) -> Result<Vec<OwnedFd>, GuestError> {
    let copies = vcpus.iter().map(|vcpu| duplicate(&vcpu.fd));
    copies.collect::<io::Result<_>>().map_err(|source| {
        let operation = "duplicate the descriptors of vCPUs".to_owned();
        GuestError::Kvm { operation, source }
    })
}

fn duplicate(fd: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open as long as its owner is borrowed.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned()
}

impl KvmGuest {
    pub(super) fn build_tracker(
        &self,
        kind: TrackerKind,
    ) -> Result<Box<dyn DirtyTracker>, GuestError> {
        kind.check(GuestKind::Kvm)?;
        let of_vcpus = match kind {
            TrackerKind::Pagemap => {
                let built = tracked_regions(&self.ram).and_then(WriteProtectTracker::new);
                return built.map(|it| Box::new(it) as _).map_err(|error| kind.refused(error));
            }
            TrackerKind::Ring => self.ring(),
            _ => self.log(),
        };
        let of_vcpus = of_vcpus.map_err(|error| kind.refused(error))?;
        Ok(Box::new(Trackers::new(vec![of_vcpus, Box::new(self.written.by_vmm.clone())])))
    }

    fn log(&self) -> io::Result<Box<dyn DirtyTracker>> {
        if !self.ring_vcpus.is_empty() {
            let reason = "this VM has dirty rings, and no log beside them; use ring or pagemap";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        Ok(Box::new(KvmDirtyLog::new(duplicate(&self.vm)?, self.slots_to_track())?))
    }

    fn ring(&self) -> io::Result<Box<dyn DirtyTracker>> {
        if self.ring_vcpus.is_empty() {
            let reason = "this VM was built without dirty rings; use log or pagemap";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        }
        let ring =
            KvmDirtyRing::new(duplicate(&self.vm)?, &self.ring_vcpus, self.slots_to_track())?;
        let mut reaper = self.written.reaper.lock().unwrap_or_else(PoisonError::into_inner);
        *reaper = Some(ring.reaper());
        Ok(Box::new(ring))
    }

    fn slots_to_track(&self) -> Vec<KvmSlot> {
        let slot = |slot: &kvm_userspace_memory_region| {
            let guest = GuestAddress(slot.guest_phys_addr);
            // SAFETY: the VM was given exactly this, and nothing else since.
            unsafe {
                KvmSlot::new(slot.slot, guest, slot.memory_size, slot.userspace_addr, slot.flags)
            }
        };
        self.slots.iter().map(slot).collect()
    }

    /// Whether KVM notes what is written to any slot, by a log or in rings. For tests of what
    /// a tracker leaves behind.
    ///
    /// # Errors
    /// If a slot cannot be described to KVM.
    pub fn is_tracked(&self) -> Result<bool, GuestError> {
        // Nothing says so outright. A log is told only where there is one, and a VM with rings
        // tells none at all.
        if !self.ring_vcpus.is_empty() {
            return self.has_ring_entries().map_err(|source| GuestError::Kvm {
                operation: "look into the dirty rings".to_owned(),
                source,
            });
        }
        for slot in &self.slots {
            match self.vm.get_dirty_log(slot.slot, slot.memory_size as usize) {
                Ok(_) => return Ok(true),
                Err(error) if error.errno() == libc::ENOENT => {}
                Err(error) => return Err(refused("look for a dirty log")(error)),
            }
        }
        Ok(false)
    }

    fn has_ring_entries(&self) -> io::Result<bool> {
        for vcpu in &self.ring_vcpus {
            let bytes = self.ring_entries as usize * RING_ENTRY_BYTES as usize;
            let ring = MmapOptions::new().offset(RING_AT).len(bytes).map_raw(vcpu)?;
            let is_filled = |entry: usize| {
                // SAFETY: in the mapping, aligned, and reached by atomic accesses only.
                let flags = unsafe {
                    AtomicU32::from_ptr(
                        ring.as_mut_ptr().add(entry * RING_ENTRY_BYTES as usize).cast(),
                    )
                };
                flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_DIRTY != 0
            };
            if (0..self.ring_entries as usize).any(is_filled) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
