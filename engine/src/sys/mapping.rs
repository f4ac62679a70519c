//! Memory of a guest as this process sees it: raw, because the guest or another thread may
//! write it at any time, so that no Rust reference to it may exist.

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc::off_t;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A shared mapping of a piece of a file, besides the one that the guest uses. Whole runs
/// are written through it and then shown to the guest with `UFFDIO_CONTINUE`.
#[derive(Debug)]
pub(crate) struct Alias {
    map: MmapRaw,
}

impl Alias {
    /// Maps `length` bytes of `file` from `offset`, readable and writable. Touches nothing.
    pub(crate) fn new(file: impl AsFd, offset: u64, length: u64) -> io::Result<Self> {
        let fd = file.as_fd().as_raw_fd();
        let map =
            MmapOptions::new().offset(offset).len(length as usize).no_reserve_swap().map_raw(fd)?;
        // A child of this process has no business with guest memory, and a fork would
        // copy its page tables.
        map.advise(memmap2::Advice::DontFork)?;
        Ok(Self { map })
    }

    /// Where a run lies.
    ///
    /// # Panics
    /// If it does not lie in the mapping.
    pub(crate) fn run(&self, offset: u64, length: u64) -> RawRun {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.map.len() as u64));
        RawRun {
            start: self.map.as_mut_ptr().wrapping_add(offset as usize),
            length: length as usize,
        }
    }

    /// Gives back the page tables of the whole mapping; the content stays in the file.
    pub(crate) fn drop_page_tables(&self) {
        // SAFETY: on a shared mapping MADV_DONTNEED keeps the content: the next access maps
        // it again. Nobody holds a reference into the mapping.
        let result = unsafe {
            libc::madvise(self.map.as_mut_ptr().cast(), self.map.len(), libc::MADV_DONTNEED)
        };
        if result != 0 {
            tracing::debug!(error = %io::Error::last_os_error(), "an alias keeps its page tables");
        }
    }

    /// Fills the page tables of a run and allocates its pages in one call, far cheaper than
    /// a fault for each. Who writes a run that could not be populated (a file cut short, a
    /// full file system, no huge pages left) is ended by SIGBUS.
    pub(crate) fn populate(&self, offset: u64, length: u64) -> io::Result<()> {
        let run = self.run(offset, length);
        loop {
            // SAFETY: the range lies in the mapping; populating changes no content.
            let result =
                unsafe { libc::madvise(run.start.cast(), run.length, libc::MADV_POPULATE_WRITE) };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// A run of bytes in guest memory, valid as long as the mapping it came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRun {
    pub(crate) start: *mut u8,
    pub(crate) length: usize,
}

impl RawRun {
    /// `length` bytes of it from `offset`.
    pub(crate) fn part(&self, offset: usize, length: usize) -> Self {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length));
        Self { start: self.start.wrapping_add(offset), length }
    }

    /// Its bytes, for a checksum.
    ///
    /// # Safety
    /// The mapping must still be there, and its content final.
    pub(crate) unsafe fn bytes<'a>(&self) -> &'a [u8] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// The memory must still be there, writable, and nobody else may use these bytes as long
    /// as the slice lives.
    pub(crate) unsafe fn bytes_mut<'a>(&self) -> &'a mut [u8] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }

    /// Copies what is in a run of the same length; it may change meanwhile.
    ///
    /// # Safety
    /// Both must be mapped, and nobody else may use these bytes.
    pub(crate) unsafe fn copy_from(&self, from: Self) {
        assert_eq!(self.length, from.length);
        // SAFETY: the caller's promise; one is the engine's own buffer, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(from.start, self.start, self.length) }
    }

    /// Writes `content` to the start of the run.
    ///
    /// # Safety
    /// The mapping must still be there, and nobody else may write these bytes meanwhile.
    pub(crate) unsafe fn write(&self, content: &[u8]) {
        assert!(content.len() <= self.length);
        // SAFETY: the run is mapped writable (the caller's promise), `content` is not part of
        // it because no reference into guest memory exists.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), self.start, content.len()) }
    }
}

/// A buffer of whole words, for content on its way out.
#[derive(Debug, Default)]
pub(crate) struct Staging(Vec<u64>);

impl Staging {
    /// `length` bytes of it, aligned to words, with whatever they hold.
    pub(crate) fn bytes(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() * 8 < length {
            self.0.resize(length.div_ceil(8), 0);
        }
        // SAFETY: the words are initialised and exclusively borrowed; bytes have no alignment.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), length) }
    }

    /// The same as raw memory, which stays in place until more is asked for.
    pub(crate) fn run(&mut self, length: usize) -> RawRun {
        RawRun { start: self.bytes(length).as_mut_ptr(), length }
    }
}

/// Whether a run of whole words is all zeros.
///
/// # Safety
/// The run must be readable and its start a multiple of 8.
pub(crate) unsafe fn is_zero(run: RawRun) -> bool {
    debug_assert!((run.start as usize).is_multiple_of(8));
    #[expect(clippy::cast_ptr_alignment, reason = "the caller promises it")]
    let words = run.start.cast::<u64>();
    (0..run.length / 8).all(|index| {
        // SAFETY: in the run, aligned; volatile because somebody else may (wrongly) write it.
        unsafe { words.add(index).read_volatile() == 0 }
    })
}

/// How many bytes from `start`, of `length`, can be touched without being ended by SIGBUS: brings
/// in what is swapped out. Both are multiples of 4 KiB.
///
/// Blocks as long as the swap takes.
pub(crate) fn readable(start: u64, length: u64) -> u64 {
    if populate_to_read(start, length).is_ok() {
        return length;
    }
    let mut pages = (0..length).step_by(4096);
    pages.find(|at| populate_to_read(start + at, 4096).is_err()).unwrap_or(length)
}

/// An error if a page has failed (`EHWPOISON`), or cannot be read for another lasting reason.
/// Other failures are left to whoever touches the page.
fn populate_to_read(start: u64, length: u64) -> io::Result<()> {
    loop {
        // SAFETY: populating for reading changes no content, and says so if nothing is mapped.
        let result =
            unsafe { libc::madvise(start as *mut _, length as usize, libc::MADV_POPULATE_READ) };
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if result == 0 => return Ok(()),
            Some(libc::EINTR) => {}
            Some(libc::EHWPOISON | libc::EFAULT) => return Err(error),
            _ => {
                tracing::debug!(%error, "memory cannot be brought in before it is read");
                return Ok(());
            }
        }
    }
}

/// Frees the pages of a file in a range: they read as zeros afterwards, through every
/// mapping. Raises no userfaultfd event.
pub(crate) fn punch_hole(file: impl AsFd, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, offset as off_t, length as off_t).map_err(io::Error::from)
}

/// The size of a file's huge pages, if it is on hugetlbfs.
pub(crate) fn huge_page_bytes(file: impl AsFd) -> io::Result<Option<u64>> {
    let found = nix::sys::statfs::fstatfs(file)?;
    let is_huge = found.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC;
    Ok(is_huge.then(|| found.block_size() as u64))
}

/// `linux/mman.h`.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// Drops the pages of a private mapping: they are missing afterwards.
///
/// # Safety
/// The range must be a private anonymous mapping of this process whose content nobody needs.
pub(crate) unsafe fn empty_private(start: u64, length: u64) -> io::Result<()> {
    // SAFETY: the caller's promise.
    let advise = |how| unsafe { libc::madvise(start as *mut _, length as usize, how) };
    // Memory that a VMM has locked (mlock) needs a call of its own, since Linux 5.18.
    if advise(libc::MADV_DONTNEED) == 0 || advise(MADV_DONTNEED_LOCKED) == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}

/// The same for many ranges, each a start and a length, in one call: then processors are told once
/// that these pages have gone, and not once for each range. Returns how many are missing now, from
/// the first on; the others are to be emptied one by one, all of them before Linux 6.13.
///
/// # Safety
/// As for [`empty_private`].
pub(crate) unsafe fn empty_private_at_once(ranges: &[(u64, u64)]) -> usize {
    // For a few it does not pay.
    if ranges.len() < 4 {
        return 0;
    }
    let places: Vec<_> = ranges
        .iter()
        .map(|&(start, length)| libc::iovec { iov_base: start as *mut _, iov_len: length as usize })
        .collect();
    // SAFETY: no memory is passed.
    let this = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let Ok(this @ 0..) = i32::try_from(this) else { return 0 };
    // SAFETY: it was just opened, and is nobody else's.
    let this = unsafe { OwnedFd::from_raw_fd(this) };
    // SAFETY: the kernel reads the ranges; of their content the caller's promise.
    let advised = unsafe {
        let (descriptor, places, count) = (this.as_raw_fd(), places.as_ptr(), places.len());
        let how = MADV_DONTNEED_LOCKED;
        libc::syscall(libc::SYS_process_madvise, descriptor, places, count, how, 0)
    };
    let mut left = u64::try_from(advised).unwrap_or(0);
    let is_done = |&&(_, length): &&(u64, u64)| {
        let done = left >= length;
        left = left.saturating_sub(length);
        done
    };
    ranges.iter().take_while(is_done).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{Area, Kind};
    use std::sync::atomic::Ordering;

    const PAGE: u64 = 4096;

    /// Whether the kernel can empty memory of this process so.
    fn is_offered() -> bool {
        let release = nix::sys::utsname::uname().unwrap();
        let release = release.release().to_string_lossy().into_owned();
        let mut parts = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        (parts.next(), parts.next()) >= (Some(6), Some(13))
    }

    #[test]
    fn ranges_are_emptied_at_once_up_to_the_first_that_cannot_be() {
        let area = Area::new(Kind::Anonymous, 64).unwrap();
        area.advise(0, 64 * PAGE, libc::MADV_NOHUGEPAGE).unwrap();
        let fill = || (0..64).for_each(|page| area.word(page * PAGE).store(1, Ordering::Relaxed));
        let empty: Vec<_> = (0..8).map(|run| (8 * run, 1 + run % 3)).collect();
        let at = |&(page, count): &(u64, u64)| (area.address() + page * PAGE, count * PAGE);
        let check = |done: usize| {
            for page in 0..64 {
                let is_empty =
                    empty[..done].iter().any(|&(from, n)| (from..from + n).contains(&page));
                let word = area.word(page * PAGE).load(Ordering::Relaxed);
                assert_eq!(word, u64::from(!is_empty), "page {page}");
            }
        };
        fill();
        let mut ranges: Vec<_> = empty.iter().map(at).collect();
        // SAFETY: pages of the area, which nobody else uses.
        let done = unsafe { empty_private_at_once(&ranges) };
        assert_eq!(done, if is_offered() { 8 } else { 0 });
        check(done);

        // No page boundary: the kernel takes the others before it.
        fill();
        ranges[5].0 += 8;
        // SAFETY: likewise; the sixth is refused.
        let done = unsafe { empty_private_at_once(&ranges) };
        assert_eq!(done, if is_offered() { 5 } else { 0 });
        check(done);

        // SAFETY: likewise.
        assert_eq!(unsafe { empty_private_at_once(&ranges[..3]) }, 0, "one by one is as good");
    }

    #[test]
    fn memory_that_is_locked_is_emptied_too() {
        let area = Area::new(Kind::Anonymous, 16).unwrap();
        let start = std::ptr::NonNull::new(area.address() as *mut _).unwrap();
        // SAFETY: a mapping of this test.
        if unsafe { nix::sys::mman::mlock(start, 16 * PAGE as usize) }.is_err() {
            // Nobody may lock so much here.
            return;
        }
        let ranges: Vec<_> = (0..8).map(|run| (area.address() + 2 * run * PAGE, PAGE)).collect();
        (0..16).for_each(|page| area.word(page * PAGE).store(1, Ordering::Relaxed));
        // SAFETY: pages of the area, which nobody else uses.
        let done = unsafe { empty_private_at_once(&ranges) };
        assert_eq!(done, if is_offered() { 8 } else { 0 });
        // SAFETY: likewise.
        unsafe { empty_private(ranges[0].0, PAGE) }.unwrap();
        let left: u64 = (0..16).map(|page| area.word(page * PAGE).load(Ordering::Relaxed)).sum();
        assert_eq!(left, if is_offered() { 8 } else { 15 });
    }
}
