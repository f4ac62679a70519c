//! Reading what a file has in memory, without waiting for content from a disk.
//!
//! Where it is not there, the kernel may begin to read it: that takes some microseconds, and with a
//! full queue longer.

use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

/// How content of a file can be had by who must not wait.
#[derive(Debug)]
pub(crate) enum AtOnce {
    /// All of it is in memory, or swap.
    Always,
    /// What the page cache has; `false` once the file system has said that it cannot tell.
    Cached(AtomicBool),
}

impl AtOnce {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let is_in_memory = is_in_memory(file)?;
        Ok(if is_in_memory { Self::Always } else { Self::Cached(AtomicBool::new(true)) })
    }

    /// Fills `into`; `false` if somebody else has to read it, who is told what is wrong with it, if
    /// anything is.
    pub(crate) fn read(&self, file: &File, into: &mut [u8], offset: u64) -> bool {
        let is_able = match self {
            Self::Always => return file.read_exact_at(into, offset).is_ok(),
            Self::Cached(is_able) => is_able,
        };
        if !is_able.load(Ordering::Relaxed) {
            return false;
        }
        let read = read_exact_at(file, into, offset);
        if let Err(error) = &read
            && error.raw_os_error() == Some(libc::EOPNOTSUPP)
            && is_able.swap(false, Ordering::Relaxed)
        {
            tracing::info!("the file system of an image does not say what is in the page cache");
        }
        read.unwrap_or(false)
    }
}

/// Whether a file lies in memory as a whole, and in no other place but swap. The kernel does not
/// promise for those that it will not wait (`EOPNOTSUPP`).
fn is_in_memory(file: impl AsFd) -> io::Result<bool> {
    let found = fstatfs(file)?.filesystem_type();
    Ok([TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&found))
}

/// Fills `into` from the page cache; `false` if not all of it is there, or the file ends before.
///
/// # Errors
/// What the kernel says: `EOPNOTSUPP` where the file system cannot do it, as overlayfs and FUSE.
fn read_exact_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<bool> {
    let iov = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: the kernel writes only to `into`, which is borrowed for the call.
    let got = unsafe {
        libc::preadv2(file.as_raw_fd(), &raw const iov, 1, offset as i64, libc::RWF_NOWAIT)
    };
    match usize::try_from(got) {
        Ok(got) => Ok(got == into.len()),
        Err(_) => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cached_is_read_as_a_whole_or_not_at_all() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        let mut into = [0; 4096];
        match read_exact_at(&file, &mut into, 4096) {
            // It was written a moment ago.
            Ok(is_there) => assert!(is_there && into == [7; 4096]),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
        }
        // It ends in the midst of this.
        assert!(!read_exact_at(&file, &mut into, 8192 - 5).unwrap_or(false));
    }

    #[test]
    fn files_in_memory_are_told() {
        assert!(is_in_memory(tempfile::tempfile_in("/dev/shm").unwrap()).unwrap());
        assert!(!is_in_memory(File::open("/proc/self/stat").unwrap()).unwrap());
    }
}
