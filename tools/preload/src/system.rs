//! System calls and what belongs to the calling thread, without allocating.

use libc::{c_int, c_void, off_t};
use std::fmt::{self, Write};
use std::mem::MaybeUninit;

/// The status with which a process ends that would run its guest in memory that is not served:
/// that of `env` and `timeout` where they fail themselves, and not what they start.
pub(crate) const EXIT_STATUS: c_int = 125;

/// The error number of this thread, put back when this is used up.
pub(crate) struct Errno(c_int);

impl Errno {
    pub(crate) fn keep() -> Self {
        // SAFETY: the C library gives a valid address to each thread.
        Self(unsafe { *libc::__errno_location() })
    }

    fn set(number: c_int) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = number };
    }

    /// Puts it back and makes a call, which sets it if it fails.
    pub(crate) fn after<T>(self, call: impl FnOnce() -> T) -> T {
        Self::set(self.0);
        call()
    }

    /// What a function of the C library returns.
    pub(crate) fn answer(self, answer: Result<*mut c_void, c_int>) -> *mut c_void {
        match answer {
            Ok(address) => {
                Self::set(self.0);
                address
            }
            Err(number) => {
                Self::set(number);
                libc::MAP_FAILED
            }
        }
    }
}

/// The error number that the last call has left.
pub(crate) fn last_error() -> c_int {
    Errno::keep().0
}

/// A call of mmap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MapCall {
    pub(crate) address: *mut c_void,
    pub(crate) length: usize,
    pub(crate) protection: c_int,
    pub(crate) flags: c_int,
    pub(crate) fd: c_int,
    pub(crate) offset: off_t,
}

impl MapCall {
    pub(crate) const fn has_file(&self) -> bool {
        self.fd >= 0 && self.flags & libc::MAP_ANONYMOUS == 0
    }

    pub(crate) const fn is_shared(&self) -> bool {
        matches!(self.flags & libc::MAP_TYPE, libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE)
    }

    pub(crate) const fn is_writable(&self) -> bool {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        self.protection & both == both
    }

    /// # Safety
    /// As for mmap: with `MAP_FIXED`, whatever is at the address goes.
    pub(crate) unsafe fn make(&self) -> *mut c_void {
        let Self { address, length, protection, flags, fd, offset } = *self;
        // SAFETY: the caller's promise.
        let result = unsafe {
            libc::syscall(libc::SYS_mmap, address, length, protection, flags, fd, offset)
        };
        result as *mut c_void
    }
}

/// A call of mremap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MoveCall {
    pub(crate) address: *mut c_void,
    pub(crate) length: usize,
    pub(crate) new_length: usize,
    pub(crate) flags: c_int,
    pub(crate) new_address: *mut c_void,
}

impl MoveCall {
    /// # Safety
    /// As for mremap.
    pub(crate) unsafe fn make(&self) -> *mut c_void {
        let Self { address, length, new_length, flags, .. } = *self;
        let has_address = flags & (libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP) != 0;
        let to = if has_address { self.new_address } else { std::ptr::null_mut() };
        // SAFETY: the caller's promise.
        let result =
            unsafe { libc::syscall(libc::SYS_mremap, address, length, new_length, flags, to) };
        result as *mut c_void
    }
}

/// What is known of an open file.
pub(crate) fn stat_of_descriptor(fd: c_int) -> Option<libc::stat> {
    let mut stat = MaybeUninit::uninit();
    // SAFETY: the call fills the struct, or fails.
    let is_known = unsafe { libc::fstat(fd, stat.as_mut_ptr()) } == 0;
    // SAFETY: it was filled.
    is_known.then(|| unsafe { stat.assume_init() })
}

/// What is known of the file at a path, which ends with a 0.
pub(crate) fn stat_of_path(path: &[u8]) -> Option<libc::stat> {
    debug_assert_eq!(path.last(), Some(&0));
    let mut stat = MaybeUninit::uninit();
    // SAFETY: the path ends with a 0; the call fills the struct, or fails.
    let is_known = unsafe { libc::stat(path.as_ptr().cast(), stat.as_mut_ptr()) } == 0;
    // SAFETY: it was filled.
    is_known.then(|| unsafe { stat.assume_init() })
}

/// The type and the block size of the file system that an open file is on.
pub(crate) fn file_system(fd: c_int) -> Option<(libc::c_long, u64)> {
    let mut found = MaybeUninit::uninit();
    // SAFETY: the call fills the struct, or fails.
    let is_known = unsafe { libc::fstatfs(fd, found.as_mut_ptr()) } == 0;
    // SAFETY: it was filled.
    let found: libc::statfs = is_known.then(|| unsafe { found.assume_init() })?;
    Some((found.f_type, found.f_bsize as u64))
}

/// The name that an open file has in `/proc`, as far as the buffer takes it.
pub(crate) fn name_of_descriptor(fd: c_int, buffer: &mut [u8]) -> Option<&[u8]> {
    let mut path = Text::<32>::new();
    write!(path, "/proc/self/fd/{fd}\0").ok()?;
    // SAFETY: the path ends with a 0, and the call writes no more than the buffer's length.
    let length = unsafe {
        libc::readlink(path.bytes().as_ptr().cast(), buffer.as_mut_ptr().cast(), buffer.len())
    };
    buffer.get(..usize::try_from(length).ok()?)
}

/// A child of this process gets nothing of the range, and cannot come into the way of discards.
pub(crate) fn keep_from_children(start: u64, length: u64) -> Result<(), c_int> {
    // SAFETY: this changes what children get, and no content.
    let result =
        unsafe { libc::madvise(start as *mut c_void, length as usize, libc::MADV_DONTFORK) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
}

pub(crate) fn process() -> c_int {
    // SAFETY: it only returns a number.
    unsafe { libc::getpid() }
}

/// All signals are kept from this thread until this is dropped: no handler finds a lock taken,
/// and threads that are started meanwhile never run one.
pub(crate) struct NoSignals(libc::sigset_t);

impl NoSignals {
    pub(crate) fn begin() -> Self {
        let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: both sets are valid to be filled, the first before it is used.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for NoSignals {
    fn drop(&mut self) {
        // SAFETY: the set is that of before.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}

/// Says a line on the standard error.
pub(crate) fn say(line: &dyn fmt::Display) {
    let mut text = Text::<4096>::new();
    // What does not fit is cut off; the end of the line is not.
    let _ = write!(text, "libafterimage_preload: {line}");
    text.end_line();
    // SAFETY: the buffer is valid for its length. Whether anybody reads it is not known.
    unsafe { libc::write(libc::STDERR_FILENO, text.bytes().as_ptr().cast(), text.bytes().len()) };
}

/// Ends the process: its guest must not run.
pub(crate) fn end(why: &dyn fmt::Display) -> ! {
    say(why);
    // SAFETY: ends the process at once. Nothing of the VMM's runs any more: it might touch memory
    // that is not what it takes it for.
    unsafe { libc::_exit(EXIT_STATUS) }
}

/// Text of limited length that is not allocated.
pub(crate) struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
}

impl<const N: usize> Text<N> {
    pub(crate) const fn new() -> Self {
        Self { bytes: [0; N], length: 0 }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn end_line(&mut self) {
        self.length = self.length.min(N - 1);
        self.bytes[self.length] = b'\n';
        self.length += 1;
    }
}

impl<const N: usize> Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let taken = text.len().min(N - self.length);
        self.bytes[self.length..][..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.length += taken;
        if taken == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_too_long_is_cut_and_still_ends_its_line() {
        let mut text = Text::<8>::new();
        assert!(text.write_str("123456789").is_err());
        text.end_line();
        assert_eq!(text.bytes(), b"1234567\n");
        let mut text = Text::<8>::new();
        write!(text, "12").unwrap();
        text.end_line();
        assert_eq!(text.bytes(), b"12\n");
    }

    #[test]
    fn errno_is_kept_and_set() {
        Errno::set(7);
        let errno = Errno::keep();
        Errno::set(9);
        assert_eq!(errno.answer(Ok(std::ptr::null_mut())), std::ptr::null_mut());
        assert_eq!(last_error(), 7);
        assert_eq!(Errno::keep().answer(Err(3)), libc::MAP_FAILED);
        assert_eq!(last_error(), 3);
    }

    #[test]
    fn signals_come_again_afterwards() {
        let blocked = || {
            let set = nix::sys::signal::SigSet::thread_get_mask().unwrap();
            set.contains(nix::sys::signal::Signal::SIGTERM)
        };
        assert!(!blocked());
        let none = NoSignals::begin();
        assert!(blocked());
        drop(none);
        assert!(!blocked());
    }
}
