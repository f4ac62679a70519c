//! Making a userfaultfd.
//!
//! The `userfaultfd` crate reads events, registers and wakes; creation is ours, because
//! its builder does not fall back from one way to the other and does not know newer
//! features: first the system call, then `/dev/userfaultfd`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use userfaultfd::Uffd;

/// What faults a userfaultfd must see.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultScope {
    /// Those of KVM and of system calls too; needs a privilege.
    #[default]
    KernelAndUser,
    /// Those of plain threads only; needs none. Never for a guest on KVM, which would read
    /// zeros instead of missing pages.
    UserOnly,
}

/// Features as the kernel numbers them (`UFFD_FEATURE_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    pub(crate) const EVENT_REMOVE: Self = Self(1 << 3);
    pub(crate) const MISSING_HUGETLBFS: Self = Self(1 << 4);
    pub(crate) const MISSING_SHMEM: Self = Self(1 << 5);
    pub(crate) const MINOR_HUGETLBFS: Self = Self(1 << 9);
    pub(crate) const MINOR_SHMEM: Self = Self(1 << 10);
    pub(crate) const WP_SHARED: Self = Self(1 << 12);
    pub(crate) const WP_UNPOPULATED: Self = Self(1 << 13);
    pub(crate) const WP_ASYNC: Self = Self(1 << 15);

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn lacking(self, available: Self) -> Self {
        Self(self.0 & !available.0)
    }
}

/// Why there is no userfaultfd.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UffdError {
    /// This process may not have one that sees the faults of KVM and system calls.
    #[error(
        "no right to a userfaultfd that sees kernel faults, which a guest on KVM needs: run as \
         root, or give the process CAP_SYS_PTRACE, or access to /dev/userfaultfd \
         (chgrp kvm /dev/userfaultfd && chmod 660 /dev/userfaultfd), or set \
         vm.unprivileged_userfaultfd=1; plain threads can be served without (user-mode only)"
    )]
    NotPermitted,
    /// The kernel has no userfaultfd, or a sandbox forbids the system call.
    #[error(
        "the userfaultfd system call is not available: the kernel needs CONFIG_USERFAULTFD, \
         and a container's seccomp profile must allow it"
    )]
    Unavailable(#[source] io::Error),
    /// The kernel lacks features that the memory needs.
    #[error("this kernel's userfaultfd lacks {names}: Linux {needed} or newer has it")]
    Features {
        /// What is missing.
        names: &'static str,
        /// The first release that has it.
        needed: &'static str,
    },
    /// Another failure of the system.
    #[error("could not {operation}")]
    System {
        /// What was being done.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl UffdError {
    pub(crate) fn system(operation: &'static str, source: impl Into<io::Error>) -> Self {
        Self::System { operation, source: source.into() }
    }
}

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: i32 = 1;

#[repr(C)]
struct ApiArgument {
    version: u64,
    features: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, ApiArgument);
nix::ioctl_write_int_bad!(new_from_device, nix::request_code_none!(0xAA, 0x00));

/// Makes a userfaultfd that is close-on-exec and non-blocking, with these features.
pub(crate) fn create(scope: FaultScope, features: Features) -> Result<Uffd, UffdError> {
    let lacking = features.lacking(available_features(scope)?);
    if lacking != Features::default() {
        return Err(describe(lacking));
    }
    let fd = open(scope)?;
    handshake(&fd, features)?;
    // SAFETY: the descriptor is a userfaultfd of ours, and its ownership moves.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}

/// What the kernel offers; asked of a descriptor of its own, because each can be asked once.
pub(crate) fn available_features(scope: FaultScope) -> Result<Features, UffdError> {
    handshake(&open(scope)?, Features::default())
}

fn handshake(fd: &OwnedFd, features: Features) -> Result<Features, UffdError> {
    let mut api = ApiArgument { version: UFFD_API, features: features.0, ioctls: 0 };
    // SAFETY: `api` has the layout of `struct uffdio_api` and lives through the call.
    unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api) }
        .map_err(|errno| UffdError::system("agree with the kernel on userfaultfd", errno))?;
    Ok(Features(api.features))
}

fn open(scope: FaultScope) -> Result<OwnedFd, UffdError> {
    let error = match by_call(scope) {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    match error.raw_os_error() {
        Some(libc::EPERM) => by_device(scope).map_err(|_| UffdError::NotPermitted),
        // A seccomp profile answers ENOSYS or EPERM; the device may still be there.
        Some(libc::ENOSYS) => by_device(scope).map_err(|_| UffdError::Unavailable(error)),
        _ => Err(UffdError::system("create a userfaultfd", error)),
    }
}

/// By the system call.
pub(crate) fn by_call(scope: FaultScope) -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags only and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags(scope)) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// By `/dev/userfaultfd`, which the rights of a file guard.
pub(crate) fn by_device(scope: FaultScope) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd")?;
    // SAFETY: the device's ioctl takes flags as an integer and touches no memory.
    let fd = unsafe { new_from_device(device.as_raw_fd(), flags(scope)) }?;
    // SAFETY: a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn flags(scope: FaultScope) -> i32 {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    match scope {
        FaultScope::KernelAndUser => flags,
        FaultScope::UserOnly => flags | UFFD_USER_MODE_ONLY,
    }
}

fn describe(lacking: Features) -> UffdError {
    let has = |feature: Features| lacking.0 & feature.0 != 0;
    let (names, needed) = if has(Features::WP_ASYNC) {
        ("asynchronous write protection", "6.7")
    } else if has(Features::MINOR_SHMEM) {
        ("minor faults on shared memory", "5.14")
    } else if has(Features::MINOR_HUGETLBFS) {
        ("minor faults on hugetlbfs", "5.13")
    } else if has(Features::EVENT_REMOVE) {
        ("events on removed memory", "4.11")
    } else {
        ("missing faults on shared memory or hugetlbfs", "4.11")
    };
    UffdError::Features { names, needed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_mode_descriptor_needs_no_right() {
        let available = available_features(FaultScope::UserOnly).unwrap();
        let wanted = Features::MINOR_SHMEM.with(Features::MISSING_SHMEM);
        assert_eq!(wanted.lacking(available), Features::default());
        create(FaultScope::UserOnly, wanted).unwrap();
    }

    #[test]
    fn a_missing_feature_is_named_with_its_release() {
        let error = create(FaultScope::UserOnly, Features(1 << 62)).unwrap_err();
        assert!(matches!(error, UffdError::Features { .. }), "{error}");
        assert!(describe(Features::MINOR_SHMEM).to_string().contains("5.14"));
    }
}
