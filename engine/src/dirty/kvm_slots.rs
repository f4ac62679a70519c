//! Memory slots of a VM, whose logging is turned on and off.

use super::page_bits::check_range;
use super::{PAGE, already_started};
use crate::GuestAddress;
use crate::sys::kvm::{self, LOG_DIRTY_PAGES, MemorySlot};
use std::io;
use std::os::fd::OwnedFd;

/// A memory slot of a VM on KVM, as it was given to `KVM_SET_USER_MEMORY_REGION`.
#[derive(Debug)]
pub struct KvmSlot(MemorySlot);

impl KvmSlot {
    /// Describes a slot: its number (with the address space in the upper 16 bits), where its
    /// `length` bytes lie in the guest and in this process, and its flags.
    ///
    /// # Safety
    /// The VM must have exactly this slot, and must keep it as long as a tracker has it. KVM
    /// takes a description that differs for a new slot, which gives the guest whatever lies
    /// at that address.
    #[must_use]
    pub const unsafe fn new(
        slot: u32,
        guest: GuestAddress,
        length: u64,
        userspace_address: u64,
        flags: u32,
    ) -> Self {
        Self(MemorySlot { slot, flags, guest_address: guest.0, bytes: length, userspace_address })
    }

    pub(super) const fn number(&self) -> u32 {
        self.0.slot
    }

    pub(super) const fn guest(&self) -> GuestAddress {
        GuestAddress(self.0.guest_address)
    }

    pub(super) const fn length(&self) -> u64 {
        self.0.bytes
    }

    pub(super) const fn pages(&self) -> u64 {
        self.0.bytes / PAGE
    }
}

/// The slots of a VM that are tracked together.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) vm: OwnedFd,
    all: Vec<KvmSlot>,
    /// So many, from the first, are being logged.
    logged: usize,
    is_started: bool,
}

impl Slots {
    pub(super) fn new(vm: OwnedFd, slots: Vec<KvmSlot>) -> io::Result<Self> {
        for slot in &slots {
            check_range(slot.guest(), slot.length())?;
            if slot.0.flags & LOG_DIRTY_PAGES != 0 {
                let text = format!("slot {} is logged by somebody else already", slot.number());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
        Ok(Self { vm, all: slots, logged: 0, is_started: false })
    }

    pub(super) fn all(&self) -> &[KvmSlot] {
        &self.all
    }

    pub(super) const fn is_started(&self) -> bool {
        self.is_started
    }

    /// Has all of them logged, or none.
    pub(super) fn start(&mut self) -> io::Result<()> {
        if self.is_started {
            return Err(already_started());
        }
        self.is_started = true;
        for index in 0..self.all.len() {
            if let Err(error) = self.set_flags(index, LOG_DIRTY_PAGES) {
                // What the first failure says matters more.
                drop(self.stop());
                return Err(error);
            }
            self.logged = index + 1;
        }
        Ok(())
    }

    /// Gives them their flags back.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.is_started = false;
        let logged = std::mem::take(&mut self.logged);
        // Each is tried, whatever becomes of the others.
        (0..logged).map(|index| self.set_flags(index, 0)).fold(Ok(()), io::Result::and)
    }

    fn set_flags(&self, index: usize, added: u32) -> io::Result<()> {
        let slot = &self.all[index].0;
        let wanted = MemorySlot { flags: slot.flags | added, ..*slot };
        // SAFETY: whoever described the slot vouched for it; only its flags differ.
        unsafe { kvm::set_flags(&self.vm, &wanted) }.map_err(|error| {
            let text = format!("could not change the flags of KVM's slot {}: {error}", slot.slot);
            io::Error::new(error.kind(), text)
        })
    }
}
