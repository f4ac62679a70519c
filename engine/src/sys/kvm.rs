//! The calls of KVM that tell which pages vCPUs wrote. They take raw descriptors, so that a
//! VMM can make them with whatever crate it likes.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow};
use std::io;
use std::os::fd::{AsFd, AsRawFd};

pub(crate) const CAP_MANUAL_DIRTY_LOG_PROTECT2: i32 = 168;

/// A memory slot as KVM has it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemorySlot {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) guest_address: u64,
    pub(crate) bytes: u64,
    pub(crate) userspace_address: u64,
}

/// `KVM_MEM_LOG_DIRTY_PAGES`
pub(crate) const LOG_DIRTY_PAGES: u32 = 1;

/// What the VM says of a capability: 0 if it has none.
pub(crate) fn check_extension(vm: impl AsFd, capability: i32) -> io::Result<i32> {
    // SAFETY: takes a number and touches no memory.
    Ok(unsafe { kvm_check_extension(vm.as_fd().as_raw_fd(), capability) }?)
}

/// Has the log given out without clearing it, so that pages can be cleared piece by piece.
pub(crate) fn enable_manual_protect(vm: impl AsFd) -> io::Result<()> {
    let capability =
        EnableCap { cap: CAP_MANUAL_DIRTY_LOG_PROTECT2 as u32, args: [1, 0, 0, 0], ..EMPTY_CAP };
    // SAFETY: the argument has the kernel's layout and lives through the call.
    unsafe { kvm_enable_cap(vm.as_fd().as_raw_fd(), &raw const capability) }?;
    Ok(())
}

/// Sets a memory slot.
///
/// # Safety
/// It must differ from the slot that the VM has in its flags only: another address would
/// give the guest memory that it must not have.
pub(crate) unsafe fn set_flags(vm: impl AsFd, slot: &MemorySlot) -> io::Result<()> {
    // SAFETY: the argument has the kernel's layout and lives through the call; the caller
    // vouches for what it does.
    unsafe { kvm_set_user_memory_region(vm.as_fd().as_raw_fd(), std::ptr::from_ref(slot)) }?;
    Ok(())
}

/// Copies a slot's log: a bit a page, set where a vCPU wrote.
///
/// # Panics
/// If the buffer has not a bit for each of so many pages.
pub(crate) fn dirty_log(
    vm: impl AsFd,
    slot: u32,
    pages: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    assert!(bitmap.len() as u64 == pages.div_ceil(64), "{pages} pages");
    let log = DirtyLog { slot, padding: 0, bitmap: bitmap.as_mut_ptr() as u64 };
    // SAFETY: the argument has the kernel's layout; the kernel writes a bit for each page of
    // the slot, rounded up to words, which is what the buffer has: the caller's slot has so
    // many pages. Both live through the call.
    unsafe { kvm_get_dirty_log(vm.as_fd().as_raw_fd(), &raw const log) }?;
    Ok(())
}

/// Clears the log of pages from `first`, where the bitmap's bits are set, and arms them again.
/// `first` is a multiple of 64, and so is `pages` but at the end of the slot.
///
/// # Panics
/// If the bitmap has not a bit for each page.
pub(crate) fn clear_dirty_log(
    vm: impl AsFd,
    slot: u32,
    first: u64,
    pages: u32,
    bitmap: &[u64],
) -> io::Result<()> {
    assert!(bitmap.len() as u64 >= u64::from(pages).div_ceil(64), "{pages} pages");
    let mut log = ClearDirtyLog { slot, pages, first, bitmap: bitmap.as_ptr() as u64 };
    // SAFETY: the argument has the kernel's layout; the kernel reads a bit for each page,
    // which the buffer has. Both live through the call.
    unsafe { kvm_clear_dirty_log(vm.as_fd().as_raw_fd(), &raw mut log) }?;
    Ok(())
}

/// Arms the pages again whose entries have been taken out of the rings, `taken` in number; how
/// many were armed. Fewer are, only if the kernel has met an entry that was not taken.
///
/// Since Linux 6.16 the kernel stops where the calling thread has a signal pending, and says how
/// far it has come: a vCPU that is kicked while it empties its ring must not take that for a
/// ring that has overflowed. So signals wait until this is over.
pub(crate) fn reset_dirty_rings(vm: impl AsFd, taken: usize) -> io::Result<usize> {
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let mut armed = 0;
    let mut in_vain = 0;
    let result = loop {
        // SAFETY: takes nothing and touches no memory of this process.
        match unsafe { kvm_reset_dirty_rings(vm.as_fd().as_raw_fd(), 0) } {
            // What the kernel itself wants of the thread is seen to between two calls.
            Ok(0) | Err(Errno::EINTR) => in_vain += 1,
            Ok(entries) => armed += entries as usize,
            Err(errno) => break Err(errno.into()),
        }
        if armed >= taken || in_vain == MOST_IN_VAIN {
            break Ok(armed);
        }
    };
    mask.thread_set_mask()?;
    result
}

/// Calls that arm nothing, before it is believed that there is nothing to arm.
const MOST_IN_VAIN: u32 = 8;

#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    padding: [u8; 64],
}

const EMPTY_CAP: EnableCap = EnableCap { cap: 0, flags: 0, args: [0; 4], padding: [0; 64] };

#[repr(C)]
struct DirtyLog {
    slot: u32,
    padding: u32,
    bitmap: u64,
}

#[repr(C)]
struct ClearDirtyLog {
    slot: u32,
    pages: u32,
    first: u64,
    bitmap: u64,
}

const _: () = assert!(size_of::<EnableCap>() == 104 && size_of::<MemorySlot>() == 32);
const _: () = assert!(size_of::<DirtyLog>() == 16 && size_of::<ClearDirtyLog>() == 24);

nix::ioctl_write_int_bad!(kvm_check_extension, nix::request_code_none!(0xAE, 0x03));
nix::ioctl_write_int_bad!(kvm_reset_dirty_rings, nix::request_code_none!(0xAE, 0xC7));
nix::ioctl_write_ptr!(kvm_set_user_memory_region, 0xAE, 0x46, MemorySlot);
nix::ioctl_write_ptr!(kvm_get_dirty_log, 0xAE, 0x42, DirtyLog);
nix::ioctl_write_ptr!(kvm_enable_cap, 0xAE, 0xA3, EnableCap);
nix::ioctl_readwrite!(kvm_clear_dirty_log, 0xAE, 0xC0, ClearDirtyLog);
