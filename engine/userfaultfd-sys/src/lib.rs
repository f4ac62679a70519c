//! The userfaultfd ABI of Linux up to 5.13, written by hand.
//!
//! This crate stands in for the published `userfaultfd-sys` 0.6, by
//! `[patch.crates-io]`, so that the crate `userfaultfd` 0.9 builds without libclang
//! and without the machine's kernel headers. It has the names, types and features
//! that `userfaultfd` needs, and the rest of the constants of 0.6. Anything newer than
//! that belongs to the `sys` module of the engine: a patch does not reach whoever
//! depends on the engine, so the engine must also build against the published crate.
//!
//! Sizes, offsets and request numbers are asserted at compile time, and the tests
//! compare them with the system's header and with a real fault.
//!
//! The source of all of it is `include/uapi/linux/userfaultfd.h` in the kernel;
//! see also [`ioctl_userfaultfd(2)`](https://man7.org/linux/man-pages/man2/ioctl_userfaultfd.2.html).
//! Request numbers are in the generic encoding of Linux (x86, Arm, RISC-V, s390x).

// The names are the kernel's: who reads its documentation must find them here.
#![allow(non_camel_case_types)]

use std::fmt;

/// Argument of `UFFDIO_API`: the handshake.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_api {
    /// [`UFFD_API`], by the caller.
    pub api: u64,
    /// Features asked for; the kernel answers with all that it has.
    pub features: u64,
    /// Requests that the descriptor supports, one bit each, by the kernel.
    pub ioctls: u64,
}

/// A range of addresses; also the argument of `UFFDIO_UNREGISTER` and `UFFDIO_WAKE`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Argument of `UFFDIO_REGISTER`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_register {
    /// What to register.
    pub range: uffdio_range,
    /// `UFFDIO_REGISTER_MODE_*`.
    pub mode: u64,
    /// Requests that the range supports, one bit each, by the kernel.
    pub ioctls: u64,
}

/// Argument of `UFFDIO_COPY`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_copy {
    /// Registered address to fill.
    pub dst: u64,
    /// Address of the bytes to copy.
    pub src: u64,
    /// Length in bytes.
    pub len: u64,
    /// `UFFDIO_COPY_MODE_*`.
    pub mode: u64,
    /// Bytes copied, or a negative error number, by the kernel.
    pub copy: i64,
}

/// Argument of `UFFDIO_ZEROPAGE`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_zeropage {
    /// What to fill with zeros.
    pub range: uffdio_range,
    /// `UFFDIO_ZEROPAGE_MODE_*`.
    pub mode: u64,
    /// Bytes filled, or a negative error number, by the kernel.
    pub zeropage: i64,
}

/// Argument of `UFFDIO_WRITEPROTECT`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_writeprotect {
    /// What to protect, or to stop protecting.
    pub range: uffdio_range,
    /// `UFFDIO_WRITEPROTECT_MODE_*`.
    pub mode: u64,
}

/// Argument of `UFFDIO_CONTINUE`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct uffdio_continue {
    /// What to map from the page cache.
    pub range: uffdio_range,
    /// `UFFDIO_CONTINUE_MODE_*`.
    pub mode: u64,
    /// Bytes mapped, or a negative error number, by the kernel.
    pub mapped: i64,
}

/// One event, as read(2) gives it.
#[repr(C, packed)]
#[derive(Clone, Copy)]
pub struct uffd_msg {
    /// `UFFD_EVENT_*`; says which field of `arg` is meant.
    pub event: u8,
    /// Zero.
    pub reserved1: u8,
    /// Zero.
    pub reserved2: u16,
    /// Zero.
    pub reserved3: u32,
    /// The event's details.
    pub arg: uffd_msg_arg,
}

/// The details of an event, by its kind.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_arg {
    /// Of [`UFFD_EVENT_PAGEFAULT`].
    pub pagefault: uffd_msg_pagefault,
    /// Of [`UFFD_EVENT_FORK`].
    pub fork: uffd_msg_fork,
    /// Of [`UFFD_EVENT_REMAP`].
    pub remap: uffd_msg_remap,
    /// Of [`UFFD_EVENT_REMOVE`] and [`UFFD_EVENT_UNMAP`].
    pub remove: uffd_msg_remove,
    /// The size of the whole.
    pub reserved: uffd_msg_reserved,
}

/// A fault.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct uffd_msg_pagefault {
    /// `UFFD_PAGEFAULT_FLAG_*`.
    pub flags: u64,
    /// The address, rounded down to its page.
    pub address: u64,
    /// More, where a feature asks for it.
    pub feat: uffd_msg_pagefault_feat,
}

/// What features add to a fault.
#[repr(C)]
#[derive(Clone, Copy)]
pub union uffd_msg_pagefault_feat {
    /// The thread that faulted, under [`UFFD_FEATURE_THREAD_ID`]; otherwise zero.
    pub ptid: u32,
}

/// A fork of the registered process.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct uffd_msg_fork {
    /// The child's userfaultfd, a new descriptor of the reader.
    pub ufd: u32,
}

/// A move of registered memory by mremap(2).
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct uffd_msg_remap {
    /// Old address.
    pub from: u64,
    /// New address.
    pub to: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Memory that was discarded or unmapped.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct uffd_msg_remove {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
}

/// Nothing; says how large the details may become.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct uffd_msg_reserved {
    /// Unused.
    pub reserved1: u64,
    /// Unused.
    pub reserved2: u64,
    /// Unused.
    pub reserved3: u64,
}

impl fmt::Debug for uffd_msg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let event = self.event;
        f.debug_struct("uffd_msg").field("event", &event).finish_non_exhaustive()
    }
}

// The unions do not know which of their fields is meant, so they show none.
impl fmt::Debug for uffd_msg_arg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("uffd_msg_arg").finish_non_exhaustive()
    }
}

impl fmt::Debug for uffd_msg_pagefault_feat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("uffd_msg_pagefault_feat").finish_non_exhaustive()
    }
}

/// Flag of userfaultfd(2): serve only faults taken in user mode.
pub const UFFD_USER_MODE_ONLY: u32 = 1;
/// Request type of `/dev/userfaultfd`.
pub const USERFAULTFD_IOC: u32 = 0xaa;
/// The version of the API, for the handshake.
pub const UFFD_API: u64 = 0xaa;
/// Request type of a userfaultfd.
pub const UFFDIO: u8 = 0xaa;

/// Number of `UFFDIO_REGISTER`.
pub const _UFFDIO_REGISTER: u64 = 0x00;
/// Number of `UFFDIO_UNREGISTER`.
pub const _UFFDIO_UNREGISTER: u64 = 0x01;
/// Number of `UFFDIO_WAKE`.
pub const _UFFDIO_WAKE: u64 = 0x02;
/// Number of `UFFDIO_COPY`.
pub const _UFFDIO_COPY: u64 = 0x03;
/// Number of `UFFDIO_ZEROPAGE`.
pub const _UFFDIO_ZEROPAGE: u64 = 0x04;
/// Number of `UFFDIO_WRITEPROTECT`.
pub const _UFFDIO_WRITEPROTECT: u64 = 0x06;
/// Number of `UFFDIO_CONTINUE`.
pub const _UFFDIO_CONTINUE: u64 = 0x07;
/// Number of `UFFDIO_API`.
pub const _UFFDIO_API: u64 = 0x3f;

/// Request: the handshake, with [`uffdio_api`].
pub const UFFDIO_API: u32 = 0xc018_aa3f;
/// Request: register a range, with [`uffdio_register`].
pub const UFFDIO_REGISTER: u32 = 0xc020_aa00;
/// Request: unregister a range, with [`uffdio_range`].
pub const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;
/// Request: wake who waits in a range, with [`uffdio_range`].
pub const UFFDIO_WAKE: u32 = 0x8010_aa02;
/// Request: fill pages with a copy, with [`uffdio_copy`].
pub const UFFDIO_COPY: u32 = 0xc028_aa03;
/// Request: fill pages with zeros, with [`uffdio_zeropage`].
pub const UFFDIO_ZEROPAGE: u32 = 0xc020_aa04;
/// Request: protect a range against writing, or stop, with [`uffdio_writeprotect`].
#[cfg(feature = "linux5_7")]
pub const UFFDIO_WRITEPROTECT: u32 = 0xc018_aa06;
/// Request: map pages of the page cache, with [`uffdio_continue`].
#[cfg(feature = "linux5_13")]
pub const UFFDIO_CONTINUE: u32 = 0xc020_aa07;

/// Event: a fault.
pub const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// Event: the process forked.
pub const UFFD_EVENT_FORK: u8 = 0x13;
/// Event: registered memory was moved.
pub const UFFD_EVENT_REMAP: u8 = 0x14;
/// Event: registered memory was discarded by madvise(2).
pub const UFFD_EVENT_REMOVE: u8 = 0x15;
/// Event: registered memory was unmapped.
pub const UFFD_EVENT_UNMAP: u8 = 0x16;

/// The access was a write.
pub const UFFD_PAGEFAULT_FLAG_WRITE: u64 = 1 << 0;
/// The page was write-protected.
pub const UFFD_PAGEFAULT_FLAG_WP: u64 = 1 << 1;
/// The page was in the page cache, but not mapped.
pub const UFFD_PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// Write protection of anonymous memory.
pub const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Events of fork(2).
pub const UFFD_FEATURE_EVENT_FORK: u64 = 1 << 1;
/// Events of mremap(2).
pub const UFFD_FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// Events of madvise(2) with `MADV_DONTNEED` or `MADV_REMOVE`.
pub const UFFD_FEATURE_EVENT_REMOVE: u64 = 1 << 3;
/// Missing faults on hugetlbfs.
pub const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
/// Missing faults on shared memory.
pub const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Events of munmap(2).
pub const UFFD_FEATURE_EVENT_UNMAP: u64 = 1 << 6;
/// A signal to who faults, in place of an event.
pub const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
/// The number of the thread that faults.
pub const UFFD_FEATURE_THREAD_ID: u64 = 1 << 8;
/// Minor faults on hugetlbfs.
pub const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
/// Minor faults on shared memory.
pub const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// Faults on pages that are not there.
pub const UFFDIO_REGISTER_MODE_MISSING: u64 = 1 << 0;
/// Faults on pages that are write-protected.
pub const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// Faults on pages that are in the page cache, but not mapped.
#[cfg(feature = "linux5_13")]
pub const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;

/// Wake nobody.
pub const UFFDIO_COPY_MODE_DONTWAKE: u64 = 1 << 0;
/// Map the copy write-protected.
pub const UFFDIO_COPY_MODE_WP: u64 = 1 << 1;
/// Wake nobody.
pub const UFFDIO_ZEROPAGE_MODE_DONTWAKE: u64 = 1 << 0;
/// Protect; without it, stop protecting.
#[cfg(feature = "linux5_7")]
pub const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// Wake nobody.
#[cfg(feature = "linux5_7")]
pub const UFFDIO_WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
/// Wake nobody.
#[cfg(feature = "linux5_13")]
pub const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1 << 0;

/// The features that 0.6 knows, by the Linux version selected.
pub const UFFD_API_FEATURES: u64 = UFFD_FEATURE_EVENT_FORK
    | UFFD_FEATURE_EVENT_REMAP
    | UFFD_FEATURE_EVENT_REMOVE
    | UFFD_FEATURE_EVENT_UNMAP
    | UFFD_FEATURE_MISSING_HUGETLBFS
    | UFFD_FEATURE_MISSING_SHMEM
    | if cfg!(feature = "linux4_14") { UFFD_FEATURE_SIGBUS | UFFD_FEATURE_THREAD_ID } else { 0 };
/// The requests of every descriptor, one bit each.
pub const UFFD_API_IOCTLS: u64 = 1 << _UFFDIO_REGISTER | 1 << _UFFDIO_UNREGISTER | 1 << _UFFDIO_API;
/// The requests of a range of anonymous memory, one bit each.
pub const UFFD_API_RANGE_IOCTLS: u64 = 1 << _UFFDIO_WAKE
    | 1 << _UFFDIO_COPY
    | 1 << _UFFDIO_ZEROPAGE
    | (cfg!(feature = "linux5_7") as u64) << _UFFDIO_WRITEPROTECT
    | (cfg!(feature = "linux5_13") as u64) << _UFFDIO_CONTINUE;
/// The requests of a range of hugetlbfs, one bit each.
pub const UFFD_API_RANGE_IOCTLS_BASIC: u64 =
    if cfg!(feature = "linux4_14") { 1 << _UFFDIO_WAKE | 1 << _UFFDIO_COPY } else { 0 };

/// What the kernel will believe, checked wherever this is compiled.
// Everything above is checked here.
#[allow(clippy::wildcard_imports)]
mod abi {
    use super::*;
    use std::mem::{align_of, offset_of, size_of};

    const READ: u32 = 2;
    const READ_WRITE: u32 = 3;

    /// `_IOC` of `asm-generic/ioctl.h`.
    const fn request<T>(direction: u32, number: u64) -> u32 {
        direction << 30 | (size_of::<T>() as u32) << 16 | (UFFDIO as u32) << 8 | number as u32
    }

    const _: () = assert!(size_of::<uffdio_api>() == 24);
    const _: () = assert!(offset_of!(uffdio_api, features) == 8);
    const _: () = assert!(offset_of!(uffdio_api, ioctls) == 16);
    const _: () = assert!(size_of::<uffdio_range>() == 16);
    const _: () = assert!(offset_of!(uffdio_range, len) == 8);
    const _: () = assert!(size_of::<uffdio_register>() == 32);
    const _: () = assert!(offset_of!(uffdio_register, mode) == 16);
    const _: () = assert!(offset_of!(uffdio_register, ioctls) == 24);
    const _: () = assert!(size_of::<uffdio_copy>() == 40);
    const _: () = assert!(offset_of!(uffdio_copy, src) == 8);
    const _: () = assert!(offset_of!(uffdio_copy, len) == 16);
    const _: () = assert!(offset_of!(uffdio_copy, mode) == 24);
    const _: () = assert!(offset_of!(uffdio_copy, copy) == 32);
    const _: () = assert!(size_of::<uffdio_zeropage>() == 32);
    const _: () = assert!(offset_of!(uffdio_zeropage, mode) == 16);
    const _: () = assert!(offset_of!(uffdio_zeropage, zeropage) == 24);
    const _: () = assert!(size_of::<uffdio_writeprotect>() == 24);
    const _: () = assert!(offset_of!(uffdio_writeprotect, mode) == 16);
    const _: () = assert!(size_of::<uffdio_continue>() == 32);
    const _: () = assert!(offset_of!(uffdio_continue, mode) == 16);
    const _: () = assert!(offset_of!(uffdio_continue, mapped) == 24);

    const _: () = assert!(size_of::<uffd_msg>() == 32);
    const _: () = assert!(align_of::<uffd_msg>() == 1);
    const _: () = assert!(offset_of!(uffd_msg, arg) == 8);
    const _: () = assert!(size_of::<uffd_msg_arg>() == 24);
    const _: () = assert!(offset_of!(uffd_msg_pagefault, address) == 8);
    const _: () = assert!(offset_of!(uffd_msg_pagefault, feat) == 16);
    const _: () = assert!(offset_of!(uffd_msg_remap, to) == 8);
    const _: () = assert!(offset_of!(uffd_msg_remap, len) == 16);
    const _: () = assert!(offset_of!(uffd_msg_remove, end) == 8);

    const _: () = assert!(UFFDIO_API == request::<uffdio_api>(READ_WRITE, _UFFDIO_API));
    const _: () =
        assert!(UFFDIO_REGISTER == request::<uffdio_register>(READ_WRITE, _UFFDIO_REGISTER));
    const _: () = assert!(UFFDIO_UNREGISTER == request::<uffdio_range>(READ, _UFFDIO_UNREGISTER));
    const _: () = assert!(UFFDIO_WAKE == request::<uffdio_range>(READ, _UFFDIO_WAKE));
    const _: () = assert!(UFFDIO_COPY == request::<uffdio_copy>(READ_WRITE, _UFFDIO_COPY));
    const _: () =
        assert!(UFFDIO_ZEROPAGE == request::<uffdio_zeropage>(READ_WRITE, _UFFDIO_ZEROPAGE));
    #[cfg(feature = "linux5_7")]
    const _: () = assert!(
        UFFDIO_WRITEPROTECT == request::<uffdio_writeprotect>(READ_WRITE, _UFFDIO_WRITEPROTECT)
    );
    #[cfg(feature = "linux5_13")]
    const _: () =
        assert!(UFFDIO_CONTINUE == request::<uffdio_continue>(READ_WRITE, _UFFDIO_CONTINUE));
}
