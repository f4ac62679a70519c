//! Whether memory is still mapped where it was, from `/proc/self/maps`, read without allocating.

use crate::named::FileId;
use crate::system::last_error;
use crate::table::Table;
use libc::c_int;

/// A piece of a file, and where it is to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapped {
    pub(crate) file: FileId,
    pub(crate) offset: u64,
    pub(crate) address: u64,
    pub(crate) length: u64,
}

/// Whether all of it is there, shared.
pub(crate) fn is_there(mapped: &Mapped) -> Result<bool, c_int> {
    let mut search = Search { mapped: *mapped, next: mapped.address, is_over: false };
    each_line(|line| search.look_at(line))?;
    Ok(search.next >= mapped.address + mapped.length)
}

/// Where the files of a table are mapped for writing besides its regions, if they are.
pub(crate) fn second_writable(table: &Table) -> Result<Option<u64>, c_int> {
    let mut second = None;
    each_line(|line| {
        let Some(line) = Line::parse(line) else { return };
        if !line.is_shared || !line.is_writable || table.file(line.file).is_none() {
            return;
        }
        // The kernel may have joined regions.
        let mut at = line.start;
        while at < line.end {
            let offset = line.offset + (at - line.start);
            let region = table.regions().find(|it| {
                it.file == line.file
                    && (it.address..it.address + it.length).contains(&at)
                    && it.offset + (at - it.address) == offset
            });
            let Some(region) = region else {
                second = second.or(Some(at));
                return;
            };
            at = region.address + region.length;
        }
    })?;
    Ok(second)
}

/// A walk through the mappings, which are sorted by address.
struct Search {
    mapped: Mapped,
    /// All before this is there.
    next: u64,
    is_over: bool,
}

impl Search {
    fn look_at(&mut self, line: &[u8]) {
        let wanted = &self.mapped;
        let Some(found) = Line::parse(line) else { return };
        let is_before = found.end <= self.next;
        if self.is_over || is_before || self.next >= wanted.address + wanted.length {
            return;
        }
        let is_it = found.start <= self.next
            && found.is_shared
            && found.file == wanted.file
            && found.offset + (self.next - found.start)
                == wanted.offset + (self.next - wanted.address);
        if is_it { self.next = found.end } else { self.is_over = true }
    }
}

/// `7f00-8000 rw-s 00001000 00:05 1234 /memfd:ram (deleted)`
struct Line {
    start: u64,
    end: u64,
    is_shared: bool,
    is_writable: bool,
    offset: u64,
    file: FileId,
}

impl Line {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut next = || std::str::from_utf8(fields.next()?).ok();
        let (start, end) = next()?.split_once('-')?;
        let rights = next()?;
        let (is_shared, is_writable) = (rights.ends_with('s'), rights.contains('w'));
        let offset = hexadecimal(next()?)?;
        let (major, minor) = next()?.split_once(':')?;
        let (major, minor) = (hexadecimal(major)?, hexadecimal(minor)?);
        let inode = next()?.parse().ok()?;
        let device = libc::makedev(major as u32, minor as u32);
        let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
        Some(Self { start, end, is_shared, is_writable, offset, file: FileId { device, inode } })
    }
}

fn hexadecimal(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// Calls `take` with the beginning of each line, up to where the name of the file begins.
fn each_line(mut take: impl FnMut(&[u8])) -> Result<(), c_int> {
    // SAFETY: the path ends with a 0.
    let fd = unsafe { libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(last_error());
    }
    let (mut buffer, mut line, mut length) = ([0_u8; 4096], [0_u8; 128], 0);
    let result = loop {
        // SAFETY: the buffer is valid for its length.
        let read = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
        let Ok(read) = usize::try_from(read) else {
            match last_error() {
                libc::EINTR => continue,
                error => break Err(error),
            }
        };
        if read == 0 {
            break Ok(());
        }
        for byte in &buffer[..read] {
            if *byte == b'\n' {
                take(&line[..length]);
                length = 0;
            } else if length < line.len() {
                line[length] = *byte;
                length += 1;
            }
        }
    };
    // SAFETY: it was opened here, and is closed once.
    unsafe { libc::close(fd) };
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::named::OpenFile;
    use memmap2::MmapOptions;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_mapping_is_found_as_long_as_it_is_there() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(1 << 20).unwrap();
        let map = MmapOptions::new().offset(4096).len(16384).map_raw(&file).unwrap();
        let id = OpenFile::of(file.as_raw_fd()).unwrap().id;
        let address = map.as_mut_ptr() as u64;
        let mapped = Mapped { file: id, offset: 4096, address, length: 16384 };
        assert_eq!(is_there(&mapped), Ok(true));
        let part = Mapped { offset: 8192, address: address + 4096, length: 4096, ..mapped };
        assert_eq!(is_there(&part), Ok(true));
        assert_eq!(is_there(&Mapped { offset: 0, ..mapped }), Ok(false));
        let other = FileId { inode: id.inode + 1, ..id };
        assert_eq!(is_there(&Mapped { file: other, ..mapped }), Ok(false));
        // Another mapping lies in the middle of it.
        let middle = address + 4096;
        // SAFETY: a page of the mapping above, of which there is no reference.
        let replaced = unsafe {
            libc::mmap(
                middle as *mut _,
                4096,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_eq!(replaced as u64, middle);
        assert_eq!(is_there(&mapped), Ok(false));
        assert_eq!(is_there(&Mapped { length: 4096, ..mapped }), Ok(true));
    }

    #[test]
    fn a_private_mapping_of_the_file_is_not_it() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(4096).unwrap();
        // SAFETY: nobody writes the file.
        let map = unsafe { MmapOptions::new().map_copy(&file) }.unwrap();
        let id = OpenFile::of(file.as_raw_fd()).unwrap().id;
        let address = map.as_ptr() as u64;
        let mapped = Mapped { file: id, offset: 0, address, length: 4096 };
        assert_eq!(is_there(&mapped), Ok(false));
    }
}
