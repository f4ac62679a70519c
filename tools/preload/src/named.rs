//! Whether a file is one of those that are named.

use crate::config::Entry;
use crate::refusal::Why;
use crate::system::{
    file_system, last_error, name_of_descriptor, stat_of_descriptor, stat_of_path,
};
use crate::uffd::Pages;
use libc::c_int;

/// Which file it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// A regular file that somebody maps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenFile {
    pub(crate) fd: c_int,
    pub(crate) id: FileId,
    pub(crate) size: u64,
    /// How many bytes of it hold something.
    pub(crate) bytes_held: u64,
    has_a_name: bool,
}

const DELETED: &[u8] = b" (deleted)";
const MEMFD: &[u8] = b"/memfd:";
/// The longest path that the kernel takes, with the 0 at its end.
const PATH: usize = 4096;

impl OpenFile {
    /// `None` for what is no regular file: a device, an eventfd.
    pub(crate) fn of(fd: c_int) -> Option<Self> {
        let stat = stat_of_descriptor(fd)?;
        (stat.st_mode & libc::S_IFMT == libc::S_IFREG).then_some(Self {
            fd,
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            size: stat.st_size as u64,
            bytes_held: stat.st_blocks as u64 * 512,
            has_a_name: stat.st_nlink > 0,
        })
    }

    /// Whether it is what an entry names: the file that is at a path now, or was when it was
    /// removed; or a memfd of that name.
    pub(crate) fn is_named_by(&self, entry: Entry) -> Result<bool, Why> {
        match entry {
            Entry::Path(path) if self.has_a_name => Ok(self.is_at(path)),
            Entry::Path(path) => Ok(self.is_at(path) || self.had_the_name(b"", path)?),
            Entry::Memfd(_) if self.has_a_name => Ok(false),
            Entry::Memfd(name) => self.had_the_name(MEMFD, name),
        }
    }

    fn is_at(&self, path: &[u8]) -> bool {
        let mut with_end = [0; PATH];
        let Some(room) = with_end[..PATH - 1].get_mut(..path.len()) else { return false };
        room.copy_from_slice(path);
        let stat = stat_of_path(&with_end[..=path.len()]);
        stat.is_some_and(|it| self.id == FileId { device: it.st_dev, inode: it.st_ino })
    }

    /// Of a file without a name.
    fn had_the_name(&self, before: &[u8], name: &[u8]) -> Result<bool, Why> {
        let mut buffer = [0; PATH];
        let Some(link) = name_of_descriptor(self.fd, &mut buffer) else {
            return Err(Why::Maps { error: last_error() });
        };
        let rest = link.strip_prefix(before).and_then(|rest| rest.strip_suffix(DELETED));
        Ok(rest == Some(name))
    }

    /// What its pages are and how long, if faults on it can be served.
    pub(crate) fn pages(&self) -> Result<(Pages, u64), Why> {
        match file_system(self.fd) {
            Some((libc::TMPFS_MAGIC, _)) => Ok((Pages::Small, 4096)),
            Some((libc::HUGETLBFS_MAGIC, page @ (0x20_0000 | 0x4000_0000))) => {
                Ok((Pages::Huge, page))
            }
            Some((libc::HUGETLBFS_MAGIC, page)) => Err(Why::PageSize(page)),
            _ => Err(Why::NoMemoryFile),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs;
    use std::os::fd::AsRawFd;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;

    fn named_by_path(file: &OpenFile, path: &Path) -> bool {
        let path: &'static [u8] = path.as_os_str().as_bytes().to_vec().leak();
        file.is_named_by(Entry::Path(path)).unwrap()
    }

    #[test]
    fn a_file_is_known_by_every_name_that_it_has_and_the_last_that_it_had() {
        let directory = tempfile::tempdir().unwrap();
        let [path, link, other] = ["ram", "link", "other"].map(|it| directory.path().join(it));
        let file = fs::File::create(&path).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        fs::write(&other, "").unwrap();
        let open = OpenFile::of(file.as_raw_fd()).unwrap();
        assert!(named_by_path(&open, &path) && named_by_path(&open, &link));
        assert!(!named_by_path(&open, &other));
        assert!(!open.is_named_by(Entry::Memfd(b"ram")).unwrap());
        fs::remove_file(&path).unwrap();
        let open = OpenFile::of(file.as_raw_fd()).unwrap();
        assert!(named_by_path(&open, &path));
        assert!(!named_by_path(&open, &other));
        // Another file in its place is another file.
        let after = fs::File::create(&path).unwrap();
        assert!(named_by_path(&OpenFile::of(after.as_raw_fd()).unwrap(), &path));
    }

    #[test]
    fn a_memfd_is_known_by_its_name() {
        let file = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap();
        let open = OpenFile::of(file.as_raw_fd()).unwrap();
        assert!(open.is_named_by(Entry::Memfd(b"ram")).unwrap());
        for other in [b"ra".as_slice(), b"ram2", b"memfd:ram"] {
            assert!(!open.is_named_by(Entry::Memfd(other)).unwrap());
        }
        assert_eq!(open.pages().unwrap(), (Pages::Small, 4096));
        assert_eq!(open.bytes_held, 0);
    }

    #[test]
    fn what_is_no_regular_file_is_none() {
        let null = fs::File::open("/dev/null").unwrap();
        assert!(OpenFile::of(null.as_raw_fd()).is_none());
        assert!(OpenFile::of(1_000_000).is_none());
    }

    #[test]
    fn a_path_that_is_too_long_names_nothing() {
        let file = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap();
        let open = OpenFile::of(file.as_raw_fd()).unwrap();
        for length in [4094, 4095, 4096, 10_000] {
            let path = vec![b'/'; length].leak();
            assert!(!open.is_named_by(Entry::Path(path)).unwrap());
        }
    }
}
