//! Guest memory as Firecracker has it: mappings, the userfaultfd, and the message about both.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use nix::libc;
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};

use crate::support::{PAGE, word_of};

pub(crate) const HUGE: u64 = 2 << 20;

/// What a VM's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// As it is by default.
    Private,
    /// A memfd, as with a vhost-user device.
    Shared,
    /// `huge_pages: 2M`.
    Huge,
    /// The same in a memfd.
    SharedHuge,
    /// The same where [`ROOM`] huge pages are to be had, and no more.
    ScarceHuge,
}

pub(crate) const ROOM: u64 = 4;

impl Kind {
    pub(crate) fn page_size(self) -> u64 {
        if self.is_huge() { HUGE } else { PAGE }
    }

    fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::SharedHuge | Self::ScarceHuge)
    }

    fn is_shared(self) -> bool {
        matches!(self, Self::Shared | Self::SharedHuge | Self::ScarceHuge)
    }
}

/// Regions, by their lengths, in the order of the file. Each begins in host memory where the
/// next one ends, as it was seen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) lengths: Vec<u64>,
}

impl Layout {
    pub(crate) fn bytes(&self) -> u64 {
        self.lengths.iter().sum()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bytes() / PAGE
    }
}

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, Api);
nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, Register);

/// `UFFD_FEATURE_EVENT_REMOVE`.
const EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;

/// The memory of one VM, registered.
pub(crate) struct Memory {
    regions: Vec<Region>,
    kind: Kind,
    pub(crate) uffd: OwnedFd,
    /// The file of all of it, where it has one.
    pub(crate) file: Option<OwnedFd>,
}

struct Region {
    address: u64,
    length: u64,
    offset: u64,
}

impl Memory {
    pub(crate) fn map(layout: &Layout) -> Self {
        let (kind, bytes) = (layout.kind, layout.bytes());
        let file = kind.is_shared().then(|| memory_file(kind, bytes));
        // Room for all of it, at a border of huge pages.
        let room = reserve(bytes + HUGE);
        let mut top = room.next_multiple_of(HUGE) + bytes;
        let mut offset = 0;
        let mut regions = Vec::new();
        for &length in &layout.lengths {
            top -= length;
            map_at(kind, top, length, file.as_ref(), offset);
            regions.push(Region { address: top, length, offset });
            offset += length;
        }
        let uffd = userfaultfd();
        for region in &regions {
            let (start, len) = (region.address, region.length);
            let mut register = Register { start, len, mode: MODE_MISSING, ioctls: 0 };
            // SAFETY: the argument has the kernel's layout.
            unsafe { uffdio_register(uffd.as_raw_fd(), &raw mut register) }.unwrap();
        }
        Self { regions, kind, uffd, file }
    }

    /// The message, to the letter.
    pub(crate) fn message(&self) -> String {
        let page = self.kind.page_size();
        let regions = self.regions.iter().map(|Region { address, length, offset }| {
            format!(
                "{{\"base_host_virt_addr\":{address},\"size\":{length},\"offset\":{offset},\
                 \"page_size\":{page},\"page_size_kib\":{page}}}"
            )
        });
        format!("[{}]", regions.collect::<Vec<_>>().join(","))
    }

    fn address(&self, page: u64) -> u64 {
        let at = page * PAGE;
        let holds = |region: &&Region| (region.offset..region.offset + region.length).contains(&at);
        let region = self.regions.iter().find(holds).expect("a page of this memory");
        region.address + (at - region.offset)
    }

    fn word(&self, page: u64, word: u64) -> &AtomicU64 {
        let address = self.address(page) + word * 8;
        // SAFETY: mapped as long as the process lives, aligned, and reached by atomics only.
        unsafe { AtomicU64::from_ptr(address as *mut u64) }
    }

    pub(crate) fn read(&self, page: u64, word: u64) -> u64 {
        self.word(page, word).load(Ordering::Relaxed)
    }

    pub(crate) fn write(&self, page: u64, word: u64, value: u64) {
        self.word(page, word).store(value, Ordering::Relaxed);
    }

    /// The page is as in the snapshot.
    pub(crate) fn check(&self, page: u64) {
        for word in [0, 1, 255, 511] {
            assert_eq!(self.read(page, word), word_of(page, word), "page {page}, word {word}");
        }
    }

    pub(crate) fn check_zero(&self, page: u64) {
        for word in [0, 1, 255, 511] {
            assert_eq!(self.read(page, word), 0, "page {page}, word {word} was given up");
        }
    }

    /// The same, read by the kernel, as when a snapshot is written.
    pub(crate) fn check_in_kernel(&self, page: u64) {
        let scratch = memory_file(Kind::Shared, PAGE);
        let address = self.address(page) as *const libc::c_void;
        // SAFETY: the page is mapped; the kernel reads it, and waits where it is missing.
        let written = unsafe { libc::pwrite(scratch.as_raw_fd(), address, PAGE as usize, 0) };
        assert_eq!(written, PAGE as isize, "{}", std::io::Error::last_os_error());
        let mut bytes = vec![0; PAGE as usize];
        std::os::unix::fs::FileExt::read_exact_at(&File::from(scratch), &mut bytes, 0).unwrap();
        for (word, found) in bytes.chunks(8).enumerate() {
            let expected = word_of(page, word as u64).to_le_bytes();
            assert_eq!(found, expected, "page {page}, word {word}");
        }
    }

    /// The balloon takes whole host pages from this page on: its file keeps nothing, if it has one.
    pub(crate) fn remove(&self, page: u64, pages: u64) {
        let advice = if self.kind.is_shared() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        let (start, length) = (self.address(page), (pages * PAGE) as usize);
        // SAFETY: our own mapping, of which there are no references but atomics.
        let result = unsafe { libc::madvise(start as *mut _, length, advice) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

fn userfaultfd() -> OwnedFd {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // Without the right to a full one, for faults of user mode.
    let opened = [flags, flags | 1].into_iter().find_map(|flags| {
        // SAFETY: the call takes flags only and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        // SAFETY: a fresh descriptor.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    });
    let uffd = opened.expect("a userfaultfd");
    let mut api = Api { version: 0xAA, features: EVENT_REMOVE, ioctls: 0 };
    // SAFETY: the argument has the kernel's layout.
    unsafe { uffdio_api(uffd.as_raw_fd(), &raw mut api) }.unwrap();
    uffd
}

pub(crate) fn memory_file(kind: Kind, bytes: u64) -> OwnedFd {
    if kind == Kind::ScarceHuge {
        let file = scarce_file().unwrap();
        file.set_len(bytes).unwrap();
        return file.into();
    }
    let huge = if kind.is_huge() { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: a name that ends, and flags.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC | huge) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: a fresh descriptor.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).unwrap();
    file.into()
}

/// A file on a hugetlbfs of its own, mounted where only a thread that has ended since could see
/// it.
pub(crate) fn scarce_file() -> std::io::Result<File> {
    thread::spawn(|| {
        let place = tempfile::tempdir()?;
        let path = CString::new(place.path().as_os_str().as_bytes())?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let options = CString::new(format!("pagesize=2M,size={}", ROOM * HUGE))?;
        mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE, c"")?;
        mount(c"hugetlbfs", &path, 0, &options)?;
        let file = File::create_new(place.path().join("guest"));
        // The file keeps the file system alive; the directory must be empty to be removed.
        // SAFETY: detaching touches no memory; the path is a string of C.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        file
    })
    .join()
    .expect("mounting does not panic")
}

fn mount(kind: &CStr, place: &CStr, flags: libc::c_ulong, options: &CStr) -> std::io::Result<()> {
    let (kind, options) = (kind.as_ptr(), options.as_ptr().cast());
    // SAFETY: strings of C that live through the call.
    match unsafe { libc::mount(kind, place.as_ptr(), kind, flags, options) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn reserve(bytes: u64) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a mapping wherever there is room.
    let at = unsafe { libc::mmap(null_mut(), bytes as usize, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

fn map_at(kind: Kind, at: u64, length: u64, file: Option<&OwnedFd>, offset: u64) {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let huge = if kind == Kind::Huge { libc::MAP_HUGETLB } else { 0 };
    let (flags, fd) = match file {
        // As Firecracker does: nothing is set aside.
        Some(file) => (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE, file.as_raw_fd()),
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | huge, -1),
    };
    // SAFETY: inside of what was reserved for it.
    let mapped =
        unsafe { libc::mmap(at as *mut _, length as usize, protection, flags, fd, offset as i64) };
    assert_eq!(mapped as u64, at, "{}", std::io::Error::last_os_error());
}
