//! What floors need of the kernel: a userfaultfd without a library around it, the page map,
//! processor time and memory of this process.
//!
//! Floors measure the machine, so nothing of the engine's is used here.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use ioctl::{
    uffdio_api, uffdio_continue, uffdio_copy, uffdio_move, uffdio_register, uffdio_zeropage,
};

const API: u64 = 0xAA;
const MISSING: u64 = 1;
const MINOR: u64 = 4;
const USER_MODE_ONLY: i32 = 1;
const FAULT_EVENT: u8 = 0x12;

/// Minor faults of hugetlbfs and of shared memory.
pub const FEATURES_MINOR: u64 = (1 << 9) | (1 << 10);
/// Pages can be moved.
pub const FEATURE_MOVE: u64 = 1 << 16;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct RegisterArgument {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// The argument of COPY and of MOVE.
#[repr(C)]
struct FromArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// The argument of ZEROPAGE and of CONTINUE.
#[repr(C)]
struct RangeArgument {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

mod ioctl {
    use super::{ApiArgument, FromArgument, RangeArgument, RegisterArgument};

    nix::ioctl_readwrite!(
        /// The handshake.
        uffdio_api,
        0xAA,
        0x3F,
        ApiArgument
    );
    nix::ioctl_readwrite!(
        /// Registers a range.
        uffdio_register,
        0xAA,
        0x00,
        RegisterArgument
    );
    nix::ioctl_readwrite!(
        /// Places copies.
        uffdio_copy,
        0xAA,
        0x03,
        FromArgument
    );
    nix::ioctl_readwrite!(
        /// Places zeros.
        uffdio_zeropage,
        0xAA,
        0x04,
        RangeArgument
    );
    nix::ioctl_readwrite!(
        /// Moves pages.
        uffdio_move,
        0xAA,
        0x05,
        FromArgument
    );
    nix::ioctl_readwrite!(
        /// Maps pages of the page cache.
        uffdio_continue,
        0xAA,
        0x07,
        RangeArgument
    );
}

/// A userfaultfd for faults of user mode.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Creates one, non-blocking, with `features`.
    ///
    /// # Errors
    /// What the kernel says: `EPERM` without a right, `EINVAL` without the features.
    pub fn new(features: u64) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
        // SAFETY: takes flags only.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        let mut api = ApiArgument { api: API, features, ioctls: 0 };
        // SAFETY: the argument has the kernel's layout.
        unsafe { uffdio_api(uffd.0.as_raw_fd(), &raw mut api) }?;
        Ok(uffd)
    }

    /// Registers memory for missing and, if `minor`, for minor faults.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Safety
    /// The range is mapped, and whoever reads it copes with waiting for this descriptor.
    pub unsafe fn register(&self, start: *mut u8, length: u64, minor: bool) -> io::Result<()> {
        let mode = MISSING | if minor { MINOR } else { 0 };
        let mut argument = RegisterArgument { start: start as u64, len: length, mode, ioctls: 0 };
        // SAFETY: the argument has the kernel's layout; the rest is the caller's promise.
        unsafe { uffdio_register(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// The address of the next fault, if one waits.
    ///
    /// # Errors
    /// What the kernel says; another event than a fault is an error.
    pub fn next_fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0u8; 32];
        match nix::unistd::read(&self.0, &mut message) {
            Ok(32) if message[0] == FAULT_EVENT => {
                let address = message[16..24].try_into().expect("eight bytes");
                Ok(Some(u64::from_ne_bytes(address)))
            }
            Ok(_) => Err(io::Error::other("an event that is no fault")),
            Err(nix::errno::Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// `UFFDIO_COPY` of all of `content`.
    ///
    /// # Errors
    /// What the kernel says, also if a page was there.
    pub fn copy(&self, start: u64, content: &[u8]) -> io::Result<()> {
        let src = content.as_ptr() as u64;
        let mut argument =
            FromArgument { dst: start, src, len: content.len() as u64, mode: 0, done: 0 };
        // SAFETY: `content` is readable; only missing pages of registered memory are written.
        unsafe { uffdio_copy(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// `UFFDIO_ZEROPAGE`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn zero(&self, start: u64, len: u64) -> io::Result<()> {
        let mut argument = RangeArgument { start, len, mode: 0, done: 0 };
        // SAFETY: only missing pages of registered memory are written.
        unsafe { uffdio_zeropage(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// `UFFDIO_CONTINUE`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn resume(&self, start: u64, len: u64) -> io::Result<()> {
        let mut argument = RangeArgument { start, len, mode: 0, done: 0 };
        // SAFETY: only missing pages of registered memory are mapped.
        unsafe { uffdio_continue(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }

    /// `UFFDIO_MOVE`.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Safety
    /// Nobody uses the bytes at `src` any more.
    pub unsafe fn take(&self, start: u64, src: *mut u8, len: u64) -> io::Result<()> {
        let mut argument = FromArgument { dst: start, src: src as u64, len, mode: 0, done: 0 };
        // SAFETY: the caller's promise.
        unsafe { uffdio_move(self.0.as_raw_fd(), &raw mut argument) }?;
        Ok(())
    }
}

/// Which pages of this process are there.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Whether the page at `address` is mapped: whether touching it would fault.
    #[must_use]
    pub fn is_present(&self, address: u64) -> bool {
        let mut entry = [0; 8];
        // What cannot be read counts as missing: then it is touched.
        let read = self.0.read_exact_at(&mut entry, address / 4096 * 8);
        read.is_ok() && u64::from_ne_bytes(entry) >> 63 == 1
    }
}

/// Asks for huge pages, or for none. Only speed depends on it.
pub fn advise_huge(start: *mut u8, length: u64, huge: bool) {
    let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
    // SAFETY: changes how memory is filled, not what is in it.
    unsafe { libc::madvise(start.cast(), length as usize, advice) };
}

/// Touches and gives back so many bytes. A virtual machine's host may have taken free memory
/// away, and what is touched first then costs several times as much: by chance, and not by
/// anything that is measured here. If there is not so much, nothing is lost.
pub fn warm_up(bytes: u64) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_POPULATE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let length = bytes as usize;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, access, flags, -1, 0) };
    if start != libc::MAP_FAILED {
        // SAFETY: mapped above, and used by nobody.
        unsafe { libc::munmap(start, length) };
    }
}

/// Processor time that this process has used, in seconds: its own and the kernel's for it.
#[must_use]
pub fn cpu_seconds() -> f64 {
    // SAFETY: all zeros is a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: a valid place for the answer.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Nanoseconds of `CLOCK_MONOTONIC`, which all processes of a machine share.
#[must_use]
pub fn now_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Whether a thread of this process sleeps in the kernel.
///
/// # Errors
/// If there is no such thread.
pub fn is_asleep(thread: i32) -> io::Result<bool> {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/stat"))?;
    // The name before it may have anything in it.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    Ok(state.is_some_and(|state| state.starts_with('S')))
}

/// Bytes of memory that only this process has, and bytes of its page tables. Shared memory
/// does not count: mapped twice it would count twice.
///
/// # Errors
/// If the kernel does not say.
pub fn resident() -> io::Result<u64> {
    status_bytes(&["RssAnon:", "RssFile:", "VmPTE:"])
}

/// Bytes of anonymous memory of this process.
///
/// # Errors
/// If the kernel does not say.
pub fn resident_anonymous() -> io::Result<u64> {
    status_bytes(&["RssAnon:"])
}

/// The sum of lines of `/proc/self/status`.
fn status_bytes(keys: &[&str]) -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let kib = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let sum: Option<u64> = keys.iter().map(|key| kib(key)).sum();
    let sum = sum.ok_or_else(|| io::Error::other("/proc/self/status has other lines"))?;
    Ok(sum * 1024)
}
