//! The dirty ring of one vCPU: entries that the kernel fills and this process takes.
//!
//! Invariant: entries are taken in the order in which the kernel fills them. It arms their
//! pages again in this order, and stops at the first that was not taken.

use memmap2::{MmapOptions, MmapRaw};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A page that a vCPU wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyPage {
    pub(crate) slot: u32,
    /// Its number in the slot.
    pub(crate) page: u64,
}

/// Whether the kernel had room for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Left,
    Overflowed,
}

#[derive(Debug)]
pub(crate) struct Ring {
    map: MmapRaw,
    entries: usize,
    /// Where the next entry will be; not known before the first was seen, because the ring may
    /// have been used before.
    next: Option<usize>,
}

impl Ring {
    /// Maps the ring of a vCPU; `None` if the VM was made without.
    pub(crate) fn new(vcpu: impl AsFd) -> io::Result<Option<Self>> {
        let bytes = ring_bytes(&map(&vcpu, MOST_BYTES)?)?;
        if bytes == 0 {
            return Ok(None);
        }
        let map = map(&vcpu, bytes)?;
        Ok(Some(Self { map, entries: bytes / ENTRY_BYTES, next: None }))
    }

    /// Takes all entries that are there. `Overflowed` if the ring had no room left: the kernel
    /// may have written over some, and the ring is of no use any more.
    pub(crate) fn take(&mut self, taken: &mut Vec<DirtyPage>) -> Room {
        let Some(mut at) = self.next.or_else(|| self.first()) else { return Room::Left };
        // The kernel uses no entry again before its page has been armed, so no more than all
        // can come.
        for _ in 0..self.entries {
            if !self.is_filled(at) {
                self.next = Some(at);
                return Room::Left;
            }
            taken.push(DirtyPage {
                slot: self.half(at, 1).load(Ordering::Relaxed),
                page: self.page(at).load(Ordering::Relaxed),
            });
            self.half(at, 0).store(TAKEN, Ordering::Release);
            at = (at + 1) % self.entries;
        }
        Room::Overflowed
    }

    /// The first entry that is filled, behind one that is not; any, if all are.
    fn first(&self) -> Option<usize> {
        let before = |at: usize| (at + self.entries - 1) % self.entries;
        // The later one is looked at first: it was filled last.
        (0..self.entries)
            .find(|at| self.is_filled(*at) && !self.is_filled(before(*at)))
            .or_else(|| (0..self.entries).all(|at| self.is_filled(at)).then_some(0))
    }

    fn is_filled(&self, entry: usize) -> bool {
        self.half(entry, 0).load(Ordering::Acquire) & FILLED != 0
    }

    /// The first or second 4 bytes of an entry: flags, slot.
    fn half(&self, entry: usize, half: usize) -> &AtomicU32 {
        assert!(entry < self.entries && half < 2);
        // SAFETY: in the mapping, which lives as long as `self`, and aligned; this process
        // and the kernel reach it by atomic accesses only.
        unsafe {
            AtomicU32::from_ptr(self.map.as_mut_ptr().add(entry * ENTRY_BYTES + half * 4).cast())
        }
    }

    fn page(&self, entry: usize) -> &AtomicU64 {
        assert!(entry < self.entries);
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(entry * ENTRY_BYTES + 8).cast()) }
    }
}

fn map(vcpu: impl AsFd, bytes: usize) -> io::Result<MmapRaw> {
    MmapOptions::new().offset(RING_AT).len(bytes).map_raw(vcpu.as_fd().as_raw_fd())
}

/// How many bytes of the mapping are a ring: the kernel gives out no page beyond its end. Its
/// size is a power of two.
fn ring_bytes(map: &MmapRaw) -> io::Result<usize> {
    let mut bytes = 0;
    let mut next = PAGE;
    while next <= MOST_BYTES {
        // SAFETY: a page in the mapping; reading it in changes nothing.
        let result = unsafe {
            libc::madvise(map.as_mut_ptr().add(next - PAGE).cast(), PAGE, libc::MADV_POPULATE_READ)
        };
        if result != 0 {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::EFAULT) { Ok(bytes) } else { Err(error) };
        }
        bytes = next;
        next *= 2;
    }
    Ok(bytes)
}

const PAGE: usize = 4096;
const ENTRY_BYTES: usize = 16;
/// `KVM_DIRTY_RING_MAX_ENTRIES` is 65,536.
const MOST_BYTES: usize = 65_536 * ENTRY_BYTES;
/// `KVM_DIRTY_LOG_PAGE_OFFSET` pages.
const RING_AT: u64 = 64 * PAGE as u64;
/// `KVM_DIRTY_GFN_F_DIRTY`
const FILLED: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`
const TAKEN: u32 = 2;
