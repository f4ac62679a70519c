//! The userfaultfd that named memory is registered with.

use crate::refusal::Failed;
use crate::system::last_error;
use libc::c_int;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use userfaultfd::{RegisterMode, Uffd};

/// What its pages are, which decides what the kernel must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// tmpfs and memfds.
    Small,
    /// hugetlbfs.
    Huge,
}

/// Sees faults of KVM and of system calls, and tells when memory is given up.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    uffd: Uffd,
    features: u64,
}

/// Why there is none.
#[derive(Debug)]
pub(crate) enum UffdError {
    NotPermitted,
    Unavailable,
    Lacks { what: &'static str, needed: &'static str },
    System { error: c_int },
}

impl fmt::Display for UffdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotPermitted => f.write_str(
                "no right to a userfaultfd that sees kernel faults, which a guest on KVM needs: \
                 give the process CAP_SYS_PTRACE, or access to /dev/userfaultfd (chgrp kvm \
                 /dev/userfaultfd && chmod 660 /dev/userfaultfd), or set \
                 vm.unprivileged_userfaultfd=1",
            ),
            Self::Unavailable => f.write_str(
                "the userfaultfd system call is not available: the kernel needs \
                 CONFIG_USERFAULTFD, and a container's seccomp profile must allow it",
            ),
            Self::Lacks { what, needed } => {
                write!(f, "this kernel's userfaultfd lacks {what}: Linux {needed} or newer has it")
            }
            Self::System { error } => write!(f, "no userfaultfd: {}", Failed(*error)),
        }
    }
}

impl Userfaultfd {
    /// One with all that the kernel has of what guest memory needs. Non-blocking, and closed on
    /// exec.
    pub(crate) fn new() -> Result<Self, UffdError> {
        // Each can be asked once, so that another is asked what there is.
        let available = agree(&open(0)?, 0)?;
        if available & EVENT_REMOVE == 0 {
            return Err(UffdError::Lacks { what: "events on removed memory", needed: "4.11" });
        }
        let uffd = open(0)?;
        let features = available & WANTED;
        agree(&uffd, features)?;
        // SAFETY: the descriptor is a userfaultfd of ours, and its ownership moves.
        let uffd = unsafe { Uffd::from_raw_fd(uffd.into_raw_fd()) };
        Ok(Self { uffd, features })
    }

    /// Whether it can serve such memory.
    pub(crate) fn check(&self, pages: Pages) -> Result<(), UffdError> {
        let (missing, minor) = match pages {
            Pages::Small => (MISSING_SHMEM, MINOR_SHMEM),
            Pages::Huge => (MISSING_HUGETLBFS, MINOR_HUGETLBFS),
        };
        if self.features & (missing | minor) == missing | minor {
            return Ok(());
        }
        Err(match pages {
            Pages::Small => {
                UffdError::Lacks { what: "minor faults on shared memory", needed: "5.14" }
            }
            Pages::Huge => UffdError::Lacks { what: "minor faults on hugetlbfs", needed: "5.13" },
        })
    }

    /// From here on, whoever touches a page of the range that is not there waits for it.
    pub(crate) fn register(&self, start: u64, length: u64) -> Result<(), c_int> {
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        let registered = self.uffd.register_with_mode(start as *mut _, length as usize, mode);
        registered.map(drop).map_err(|error| match error {
            userfaultfd::Error::SystemError(errno) => errno as c_int,
            _ => libc::EINVAL,
        })
    }
}

/// One whose registration finds out what is written, by asynchronous write protection. It reports
/// no fault, so that it need not see those of the kernel, and needs no right.
pub(crate) fn for_tracking() -> Result<OwnedFd, UffdError> {
    let open = || match open(USER_MODE_ONLY) {
        Err(UffdError::NotPermitted | UffdError::Unavailable) => open(0),
        other => other,
    };
    if agree(&open()?, 0)? & TRACKING != TRACKING {
        return Err(UffdError::Lacks { what: "asynchronous write protection", needed: "6.7" });
    }
    let uffd = open()?;
    agree(&uffd, TRACKING)?;
    Ok(uffd)
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// With flags beside those that every one has.
fn open(flags: c_int) -> Result<OwnedFd, UffdError> {
    let flags = flags | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags only and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as c_int;
    if fd >= 0 {
        // SAFETY: a new descriptor, which nobody else owns.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    match last_error() {
        libc::EPERM => by_device(flags).ok_or(UffdError::NotPermitted),
        // A seccomp profile answers so, too; the device may be there all the same.
        libc::ENOSYS => by_device(flags).ok_or(UffdError::Unavailable),
        error => Err(UffdError::System { error }),
    }
}

fn by_device(flags: c_int) -> Option<OwnedFd> {
    // SAFETY: the path ends with a 0.
    let device =
        unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    if device < 0 {
        return None;
    }
    // SAFETY: the device's ioctl takes flags as a number; the device is closed once.
    let fd = unsafe {
        let fd = libc::ioctl(device, NEW_FROM_DEVICE, flags);
        libc::close(device);
        fd
    };
    // SAFETY: a new descriptor, which nobody else owns.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Agrees on features with the kernel, and returns all that it has.
fn agree(uffd: &OwnedFd, features: u64) -> Result<u64, UffdError> {
    use std::os::fd::AsRawFd;
    let mut api = Api { version: API_VERSION, features, ioctls: 0 };
    // SAFETY: `api` has the layout of `struct uffdio_api` and lives through the call.
    let result = unsafe { libc::ioctl(uffd.as_raw_fd(), API, &raw mut api) };
    if result == 0 { Ok(api.features) } else { Err(UffdError::System { error: last_error() }) }
}

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

/// `linux/userfaultfd.h`.
const API_VERSION: u64 = 0xAA;
const API: libc::c_ulong = 0xC018_AA3F;
const NEW_FROM_DEVICE: libc::c_ulong = 0xAA00;
const USER_MODE_ONLY: c_int = 1;
const EVENT_REMOVE: u64 = 1 << 3;
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_HUGETLBFS: u64 = 1 << 9;
const MINOR_SHMEM: u64 = 1 << 10;
const WANTED: u64 =
    EVENT_REMOVE | MISSING_HUGETLBFS | MISSING_SHMEM | MINOR_HUGETLBFS | MINOR_SHMEM;
const WP_SHARED: u64 = 1 << 12;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;
const TRACKING: u64 = WP_SHARED | WP_UNPOPULATED | WP_ASYNC;
