//! Memory of each backing, as a VMM would have it.

use super::{DEADLINE, skip};
use crate::destination::DestinationRegion;
use afterimage_protocol::layout::{GuestAddress, PageSize};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Condvar, Mutex, PoisonError};

/// What kind of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Memfd,
    /// A file on a tmpfs mounted with `huge=always`.
    TmpfsHuge,
    /// A memfd of huge pages of 2 MiB.
    Hugetlb,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] =
        [Self::Anonymous, Self::Memfd, Self::TmpfsHuge, Self::Hugetlb];

    pub(crate) const fn page_size(self) -> PageSize {
        match self {
            Self::Hugetlb => PageSize::MIB_2,
            _ => PageSize::KIB_4,
        }
    }

    pub(crate) const fn page_bytes(self) -> u64 {
        self.page_size().bytes()
    }
}

/// A mapping. Threads that touch it hold it alive, so that those which a failed test leaves
/// behind, waiting for a page, keep it.
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) kind: Kind,
    start: u64,
    pub(crate) length: u64,
    pub(crate) file: Option<File>,
}

const ALIGNMENT: u64 = 2 << 20;

impl Area {
    /// `pages` pages, at most 32 of huge ones, or `None` (said aloud) where the machine has no such memory.
    pub(crate) fn new(kind: Kind, pages: u64) -> Option<Self> {
        let length = pages * kind.page_bytes();
        if kind == Kind::Hugetlb {
            HUGE_PAGES.take(pages);
        }
        let file = match kind {
            Kind::Anonymous => None,
            Kind::Memfd => Some(memfd(0, length)),
            Kind::Hugetlb => Some(memfd(libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, length)),
            Kind::TmpfsHuge => match tmpfs_huge(length) {
                Ok(file) => Some(file),
                Err(error) => {
                    skip("tmpfs-huge", format_args!("cannot mount tmpfs huge=always: {error}"));
                    return None;
                }
            },
        };
        match map(length, file.as_ref()) {
            Ok(start) => Some(Self { kind, start, length, file }),
            Err(error) if kind == Kind::Hugetlb => {
                HUGE_PAGES.give(pages);
                skip("hugetlb", format_args!("cannot map {pages} huge pages: {error}"));
                None
            }
            Err(error) => panic!("cannot map {kind:?}: {error}"),
        }
    }

    /// `pages` huge pages of which only `room` can be there at a time; `None` (said aloud) where
    /// the machine has no such memory.
    pub(crate) fn narrow(pages: u64, room: u64) -> Option<Self> {
        let (kind, length) = (Kind::Hugetlb, pages * PageSize::MIB_2.bytes());
        HUGE_PAGES.take(pages);
        let options = format!("pagesize=2M,size={}", room * kind.page_bytes());
        let file = mounted(c"hugetlbfs", &options).and_then(|file| {
            file.set_len(length)?;
            Ok(file)
        });
        // Not set aside for it: there is not so much room.
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        match file.and_then(|file| Ok((map_with(flags, length, Some(&file))?, file))) {
            Ok((start, file)) => Some(Self { kind, start, length, file: Some(file) }),
            Err(error) => {
                HUGE_PAGES.give(pages);
                skip("hugetlb", format_args!("cannot mount hugetlbfs: {error}"));
                None
            }
        }
    }

    pub(crate) fn address(&self) -> u64 {
        self.start
    }

    pub(crate) fn page_bytes(&self) -> u64 {
        self.kind.page_bytes()
    }

    /// The region that it is for a destination in this process.
    pub(crate) fn region(&self) -> DestinationRegion {
        let start = NonNull::new(self.start as *mut u8).unwrap();
        let guest = GuestAddress(0);
        let file = self.file.as_ref().map(|file| file.try_clone().unwrap().into());
        // SAFETY: a test holds the area as long as the destination; it gives out no
        // references but atomics.
        unsafe {
            match (self.kind, file) {
                (Kind::Hugetlb, Some(file)) => {
                    DestinationRegion::hugetlb(guest, start, self.length, PageSize::MIB_2, file, 0)
                }
                (_, Some(file)) => DestinationRegion::shared(guest, start, self.length, file, 0),
                (_, None) => DestinationRegion::anonymous(guest, start, self.length),
            }
        }
    }

    /// A word of it. Reading or writing it may fault, and wait for the page.
    pub(crate) fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset < self.length);
        // SAFETY: inside the mapping; only atomics and the kernel reach it.
        unsafe { AtomicU64::from_ptr((self.start + offset) as *mut u64) }
    }

    /// `madvise` on a piece of it.
    pub(crate) fn advise(&self, offset: u64, length: u64, advice: i32) -> io::Result<()> {
        assert!(offset + length <= self.length);
        let start = (self.start + offset) as *mut _;
        // SAFETY: inside the mapping; there are no references into it.
        match unsafe { libc::madvise(start, length as usize, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whose last user has gone. Nothing is registered for the
        // event that would make this wait.
        unsafe { libc::munmap(self.start as *mut _, self.length as usize) };
        if self.kind == Kind::Hugetlb {
            HUGE_PAGES.give(self.length / self.page_bytes());
        }
    }
}

/// Huge pages that tests of this process may hold at one time: 64 MiB.
static HUGE_PAGES: Budget = Budget { left: Mutex::new(32), given: Condvar::new() };

struct Budget {
    left: Mutex<u64>,
    given: Condvar,
}

impl Budget {
    fn take(&self, pages: u64) {
        let left = self.left.lock().unwrap();
        let lacks = |left: &mut u64| *left < pages;
        let (mut left, waited) = self.given.wait_timeout_while(left, 3 * DEADLINE, lacks).unwrap();
        assert!(!waited.timed_out(), "waited in vain for {pages} huge pages of other tests");
        *left -= pages;
    }

    fn give(&self, pages: u64) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) += pages;
        self.given.notify_all();
    }
}

fn memfd(flags: u32, length: u64) -> File {
    // SAFETY: the name is a string of C; a fresh descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), flags | libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    file.set_len(length).unwrap();
    file
}

fn map(length: u64, file: Option<&File>) -> io::Result<u64> {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    map_with(if file.is_some() { libc::MAP_SHARED } else { private }, length, file)
}

fn map_with(flags: i32, length: u64, file: Option<&File>) -> io::Result<u64> {
    let fd = file.map_or(-1, AsRawFd::as_raw_fd);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let reserve = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let whole = (length + ALIGNMENT) as usize;
    // SAFETY: the second mapping replaces a part of the first, which nobody else knows.
    unsafe {
        let room = libc::mmap(std::ptr::null_mut(), whole, libc::PROT_NONE, reserve, -1, 0);
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = (room as u64).next_multiple_of(ALIGNMENT) as *mut _;
        let placed = libc::mmap(start, length as usize, access, flags | libc::MAP_FIXED, fd, 0);
        if placed == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(placed as u64)
    }
}

/// A file on a tmpfs of its own with huge pages.
fn tmpfs_huge(length: u64) -> io::Result<File> {
    let file = mounted(c"tmpfs", "huge=always")?;
    file.set_len(length)?;
    file.write_all_at(&[0], 5 * 4096)?;
    if file.metadata()?.blocks() * 512 < ALIGNMENT.min(length) {
        return Err(io::Error::other("it has no huge pages"));
    }
    super::super::mapping::punch_hole(&file, 0, length)?;
    Ok(file)
}

/// A file on a file system of its own, mounted where only a thread that has ended since could
/// see it.
fn mounted(kind: &'static CStr, options: &str) -> io::Result<File> {
    let options = CString::new(options)?;
    std::thread::spawn(move || -> io::Result<File> {
        let place = tempfile::tempdir()?;
        let path = CString::new(place.path().as_os_str().as_bytes())?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let private = libc::MS_REC | libc::MS_PRIVATE;
        mount(c"none", c"/", c"", private, c"")?;
        mount(kind, &path, kind, 0, &options)?;
        let file = nix::fcntl::open(
            &place.path().join("guest"),
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::S_IRUSR,
        )
        .map(File::from);
        // The file keeps the file system alive; the directory must be empty to be removed.
        // SAFETY: detaching a mount touches no memory; the path is a string of C.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        Ok(file?)
    })
    .join()
    .expect("mounting does not panic")
}

fn mount(
    what: &CStr,
    place: &CStr,
    kind: &CStr,
    flags: libc::c_ulong,
    options: &CStr,
) -> io::Result<()> {
    // SAFETY: four strings of C that live through the call.
    let result = unsafe {
        libc::mount(what.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
