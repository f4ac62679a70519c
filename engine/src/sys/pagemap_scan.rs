//! `PAGEMAP_SCAN` (Linux 6.7): which pages of a mapping are of a kind, found by runs, and
//! protected against writing in the same step if asked to.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

/// Nobody has protected it, or it was written since.
pub(crate) const PAGE_IS_WRITTEN: u64 = 1 << 1;
pub(crate) const PAGE_IS_PRESENT: u64 = 1 << 3;
/// Neither present nor a hole: swapped out, failed, or a hole that is protected.
pub(crate) const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// What is looked for. No category at all stands for all pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wanted {
    /// What is done with pages that are found.
    pub(crate) action: Action,
    /// Categories that a page must have.
    pub(crate) all_of: u64,
    /// Categories of which it must have one.
    pub(crate) any_of: u64,
    /// Categories that it must not have.
    pub(crate) none_of: u64,
    /// Categories that are told; neighbours that differ in these are runs of their own.
    pub(crate) told: u64,
}

/// What is done with pages that are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Action {
    #[default]
    Look,
    /// The same, but memory that is not registered for asynchronous write protection is
    /// EPERM.
    LookAtTracked,
    /// They are protected; memory that is not registered for it is EPERM.
    Protect,
}

/// How far a scan came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// So many runs were filled in.
    pub(crate) found: usize,
    /// It looked at everything before this address.
    pub(crate) end: u64,
}

/// A run of pages that was found.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// Looks at `range` of the process whose page map this is, and fills `found` from its start.
/// Without room for any run nothing is told, and the scan goes to the end.
pub(crate) fn scan(
    pagemap: impl AsFd,
    range: Range<u64>,
    wanted: Wanted,
    found: &mut [PageRegion],
) -> io::Result<Scanned> {
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags: wanted.action.flags(),
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: if found.is_empty() { 0 } else { found.as_mut_ptr() as u64 },
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: wanted.none_of,
        category_mask: wanted.all_of | wanted.none_of,
        category_anyof_mask: wanted.any_of,
        return_mask: wanted.told,
    };
    // SAFETY: the argument has the kernel's layout; `found` is the vector that it points to,
    // with its length; both live through the call. Protection changes no content.
    let regions = unsafe { pagemap_scan(pagemap.as_fd().as_raw_fd(), &raw mut argument) }?;
    Ok(Scanned { found: regions as usize, end: argument.walk_end })
}

impl Action {
    const fn flags(self) -> u64 {
        match self {
            Self::Look => 0,
            Self::LookAtTracked => PM_SCAN_CHECK_WPASYNC,
            Self::Protect => PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        }
    }
}

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96);

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArgument);
