//! KVM's dirty log: a bitmap for each memory slot.

use super::kvm_slots::{KvmSlot, Slots};
use super::runs::each_run;
use super::{DirtyTracker, PAGE, not_started, stop_dropped};
use crate::GuestAddress;
use crate::sys::kvm;
use std::io;
use std::os::fd::OwnedFd;

/// Tracks the writes of vCPUs by KVM's dirty log (`KVM_GET_DIRTY_LOG`,
/// `KVM_CLEAR_DIRTY_LOG`).
///
/// **Needs** Linux 5.2 (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, which is turned on for the VM by
/// [`new`](Self::new), and stays on) and a VM of this process without a dirty ring. **Costs**
/// at each `collect` a copy of one bit for each page of RAM, 32 MiB for 1 TiB, and an exit for
/// the first write of a page after it (none with PML); the slots' huge mappings are split
/// while it runs.
///
/// **Does not see** what is not written by vCPUs or KVM: the VMM's own devices, vhost, DMA, and
/// memory given up; those need a [`DirtyBitmap`](super::DirtyBitmap). Slots on guest memory
/// that is private to the guest (`guest_memfd`) cannot be tracked.
///
/// Slots must not change from [`start`](DirtyTracker::start) to [`stop`](DirtyTracker::stop),
/// and nobody else may read their logs.
#[derive(Debug)]
pub struct KvmDirtyLog {
    slots: Slots,
    /// As long as the largest slot needs.
    bitmap: Vec<u64>,
}

impl KvmDirtyLog {
    /// For these slots of a VM, whose descriptor is duplicated for it.
    ///
    /// # Errors
    /// If KVM lacks the log, or a slot is logged by somebody else already.
    pub fn new(vm: OwnedFd, slots: Vec<KvmSlot>) -> io::Result<Self> {
        let slots = Slots::new(vm, slots)?;
        if kvm::check_extension(&slots.vm, kvm::CAP_MANUAL_DIRTY_LOG_PROTECT2)? == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "KVM has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, which came with Linux 5.2; use \
                 WriteProtectTracker (Linux 6.7) instead",
            ));
        }
        kvm::enable_manual_protect(&slots.vm)?;
        let words = slots.all().iter().map(|slot| slot.pages().div_ceil(64)).max();
        Ok(Self { slots, bitmap: vec![0; words.unwrap_or(0) as usize] })
    }
}

impl DirtyTracker for KvmDirtyLog {
    fn start(&mut self) -> io::Result<()> {
        self.slots.start()
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        if !self.slots.is_started() {
            return Err(not_started());
        }
        for slot in self.slots.all() {
            let bitmap = &mut self.bitmap[..slot.pages().div_ceil(64) as usize];
            kvm::dirty_log(&self.slots.vm, slot.number(), slot.pages(), bitmap).map_err(
                |error| {
                    let text = format!(
                        "KVM does not give out the log of slot {} (it has changed, or the VM \
                         has a dirty ring: use KvmDirtyRing): {error}",
                        slot.number()
                    );
                    io::Error::new(error.kind(), text)
                },
            )?;
            for (piece, words) in bitmap.chunks(PIECE_WORDS).enumerate() {
                if words.iter().all(|word| *word == 0) {
                    continue;
                }
                let first = piece as u64 * PIECE_PAGES;
                let pages = PIECE_PAGES.min(slot.pages() - first);
                kvm::clear_dirty_log(&self.slots.vm, slot.number(), first, pages as u32, words)?;
                each_run(words, |page, count| {
                    let at = slot.guest().0 + (first + page) * PAGE;
                    written(GuestAddress(at), count * PAGE);
                });
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.slots.stop()
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        stop_dropped(self);
    }
}

/// KVM clears a piece under the lock that vCPUs need for their faults: 1 GiB.
const PIECE_PAGES: u64 = 1 << 18;
const PIECE_WORDS: usize = PIECE_PAGES as usize / 64;
