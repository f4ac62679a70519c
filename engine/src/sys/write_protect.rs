//! Pages of a process that are protected against writing by its kernel alone: a write takes
//! the protection away and goes on (`UFFD_FEATURE_WP_ASYNC`), and the page map tells where.

use super::pagemap_scan::{
    self, Action, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PageRegion, Wanted,
};
use super::uffd::{self, FaultScope, Features, UffdError};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use userfaultfd::{RegisterMode, Uffd};

/// How much one call looks at: it holds the lock of the address space, and takes the mappings
/// of KVM away for all of it.
const AT_ONCE: u64 = 1 << 30;
/// How many runs one call tells.
const RUNS: usize = 512;

/// A userfaultfd and the page map of the same process.
#[derive(Debug)]
pub(crate) struct Protection {
    uffd: Uffd,
    pagemap: File,
}

impl Protection {
    /// For memory of this process. No fault is ever reported, so that of KVM and of system
    /// calls needs no privilege.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        let features = Features::WP_ASYNC.with(Features::WP_UNPOPULATED).with(Features::WP_SHARED);
        let uffd = uffd::create(FaultScope::UserOnly, features)
            .or_else(|error| match error {
                // Where only /dev/userfaultfd is allowed, it does as well.
                UffdError::NotPermitted | UffdError::Unavailable(_) => {
                    uffd::create(FaultScope::KernelAndUser, features)
                }
                error => Err(error),
            })
            .map_err(refused)?;
        Ok(Self { uffd, pagemap: File::open("/proc/self/pagemap")? })
    }

    /// For memory of the process that made this userfaultfd.
    pub(crate) fn of(uffd: OwnedFd, pagemap: File) -> Self {
        // SAFETY: whether it is a userfaultfd shows at the first call; ownership moves.
        Self { uffd: unsafe { Uffd::from_raw_fd(uffd.into_raw_fd()) }, pagemap }
    }

    /// Has writes to a range tracked; protects nothing yet.
    pub(crate) fn register(&self, range: &Range<u64>) -> io::Result<()> {
        let length = (range.end - range.start) as usize;
        self.uffd
            .register_with_mode(range.start as *mut _, length, RegisterMode::WRITE_PROTECT)
            .map(drop)
            .map_err(|error| system_error(&error))
    }

    /// Ends that, and takes all protection away.
    pub(crate) fn unregister(&self, range: &Range<u64>) -> io::Result<()> {
        let length = (range.end - range.start) as usize;
        self.uffd.unregister(range.start as *mut _, length).map_err(|error| system_error(&error))
    }

    /// Protects the pages that are mapped, and makes no page tables for others.
    pub(crate) fn protect_mapped(&self, range: Range<u64>) -> io::Result<()> {
        let wanted = Wanted { action: Action::Protect, any_of: MAPPED, ..Wanted::default() };
        self.each(range, wanted, &mut [], &mut |_| Ok(()))
    }

    /// Protects all pages, holes included; takes 8 bytes of page tables a page.
    pub(crate) fn protect_all(&self, range: Range<u64>) -> io::Result<()> {
        let wanted = Wanted { action: Action::Protect, ..Wanted::default() };
        self.each(range, wanted, &mut [], &mut |_| Ok(()))
    }

    /// Finds pages that are mapped and were written, and protects them in the same step.
    pub(crate) fn take_written(
        &self,
        range: Range<u64>,
        written: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let wanted = Wanted {
            action: Action::Protect,
            all_of: PAGE_IS_WRITTEN,
            any_of: MAPPED,
            ..Wanted::default()
        };
        self.each(range, wanted, &mut [PageRegion::default(); RUNS], &mut |run| {
            written(run.start..run.end);
            Ok(())
        })
    }

    /// The same in memory of which all pages were protected: whatever is not protected any
    /// more was written, mapped or not. So the clean pages are looked for, and the others
    /// taken: kernels differ in what they say of pages whose page table has gone.
    pub(crate) fn take_unprotected(
        &self,
        range: Range<u64>,
        written: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let clean = Wanted {
            action: Action::LookAtTracked,
            any_of: MAPPED,
            none_of: PAGE_IS_WRITTEN,
            ..Wanted::default()
        };
        let mut take = |run: Range<u64>| {
            if !run.is_empty() {
                self.protect_all(run.clone())?;
                written(run);
            }
            Ok::<_, io::Error>(())
        };
        let mut from = range.start;
        self.each(range.clone(), clean, &mut [PageRegion::default(); RUNS], &mut |run| {
            let before = from..run.start;
            from = run.end;
            take(before)
        })?;
        take(from..range.end)
    }

    /// Fails if the process has ended or become another program. Not every kernel says so when
    /// it is asked to scan: it may only find nothing.
    pub(crate) fn check_alive(&self, address: u64) -> io::Result<()> {
        match self.pagemap.read_at(&mut [0; 8], address / 4096 * 8)? {
            8 => Ok(()),
            _ => Err(has_ended()),
        }
    }

    /// Calls `act` with every run that is found.
    fn each(
        &self,
        range: Range<u64>,
        wanted: Wanted,
        found: &mut [PageRegion],
        act: &mut dyn FnMut(&PageRegion) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut from = range.start;
        while from < range.end {
            // Whole huge pages, wherever the range begins.
            let end = range.end.min((from / AT_ONCE + 1).saturating_mul(AT_ONCE));
            let scanned = pagemap_scan::scan(&self.pagemap, from..end, wanted, found)
                .map_err(explain_scan)?;
            found[..scanned.found].iter().try_for_each(&mut *act)?;
            // The kernel stops before a huge page that it cannot protect.
            if scanned.end <= from {
                return Err(unsupported(format!(
                    "the huge page at {from:#x} cannot be write-protected: the kernel does so \
                     with pages of 4 KiB and 2 MiB that lie whole in a region; use KvmDirtyLog \
                     or KvmDirtyRing instead"
                )));
            }
            from = scanned.end;
        }
        Ok(())
    }
}

const MAPPED: u64 = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;

fn refused(error: UffdError) -> io::Error {
    match error {
        UffdError::System { source, .. } => source,
        UffdError::Features { .. } => {
            unsupported(format!("{error}; use KvmDirtyLog or KvmDirtyRing instead"))
        }
        _ => io::Error::new(io::ErrorKind::PermissionDenied, error),
    }
}

fn explain_scan(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOTTY) => unsupported(
            "the kernel has no PAGEMAP_SCAN, which came with Linux 6.7; use KvmDirtyLog or \
             KvmDirtyRing instead"
                .to_owned(),
        ),
        Some(libc::ESRCH) => has_ended(),
        Some(libc::EPERM) => io::Error::new(
            io::ErrorKind::PermissionDenied,
            "memory that should be tracked is not, or not any more: it was mapped anew, or its \
             userfaultfd was made without UFFD_FEATURE_WP_ASYNC (Linux 6.7)",
        ),
        _ => error,
    }
}

fn has_ended() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotFound,
        "the process whose memory is tracked has ended: what it wrote last is not known",
    )
}

fn unsupported(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

fn system_error(error: &userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno) => io::Error::from_raw_os_error(*errno as i32),
        other => io::Error::other(other.to_string()),
    }
}
