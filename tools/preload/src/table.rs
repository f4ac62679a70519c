//! Which named memory is mapped, and where. Of limited size, so that nothing is allocated.

use crate::config::{Config, Entry, Hole};
use crate::maps::{self, Mapped};
use crate::named::{FileId, OpenFile};
use crate::placing::Placing;
use crate::refusal::Why;
use crate::system::last_error;
use libc::c_int;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// The most files.
pub(crate) const MAX_FILES: usize = 64;
/// The most mappings of them.
pub(crate) const MAX_REGIONS: usize = 256;

/// A file that was mapped.
#[derive(Debug)]
pub(crate) struct File {
    /// Which of the names it goes by.
    pub(crate) entry: usize,
    pub(crate) id: FileId,
    pub(crate) size: u64,
    pub(crate) page: u64,
    /// The VMM may close its own.
    descriptor: OwnedFd,
}

/// A region of guest memory as it is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) guest_address: u64,
    pub(crate) address: u64,
    pub(crate) length: u64,
    pub(crate) page: u64,
    /// Which of the files, in the order of their names, and where in it.
    pub(crate) file: usize,
    pub(crate) offset: u64,
}

/// What is mapped.
#[derive(Debug)]
pub(crate) struct Table {
    files: [Option<File>; MAX_FILES],
    regions: [Option<Mapped>; MAX_REGIONS],
}

impl Table {
    pub(crate) const fn new() -> Self {
        Self { files: [const { None }; MAX_FILES], regions: [None; MAX_REGIONS] }
    }

    pub(crate) fn file(&self, id: FileId) -> Option<&File> {
        self.files.iter().flatten().find(|file| file.id == id)
    }

    /// Which of the names a file goes by that is mapped for the first time. Several memfds may
    /// have the same name, and are taken in the order in which they are mapped.
    pub(crate) fn entry_for(&self, config: &Config, file: &OpenFile) -> Result<usize, Why> {
        let is_taken = |entry| self.files.iter().flatten().any(|file| file.entry == entry);
        let mut found = None;
        for (number, entry) in config.entries().enumerate() {
            let Ok(entry) = entry else { continue };
            if !file.is_named_by(entry)? {
                continue;
            }
            match found {
                Some(_) if matches!(entry, Entry::Path(_)) => return Err(Why::NamedTwice),
                None if !is_taken(number) => found = Some(number),
                _ => {}
            }
        }
        found.ok_or(Why::MoreOfThatName)
    }

    pub(crate) fn add_file(&mut self, entry: usize, page: u64, file: &OpenFile) -> Result<(), Why> {
        let room = self.files.iter_mut().find(|it| it.is_none());
        let room = room.ok_or(Why::TooMuch { most: MAX_FILES })?;
        let descriptor = duplicate(file.fd).map_err(|error| Why::Descriptor { error })?;
        *room = Some(File { entry, id: file.id, size: file.size, page, descriptor });
        Ok(())
    }

    /// The region that holds a part of this piece of a file, if there is one.
    pub(crate) fn overlapping(&self, piece: &Mapped) -> Option<Mapped> {
        let regions = self.regions.iter().flatten().filter(|it| it.file == piece.file);
        let end = piece.offset + piece.length;
        regions.copied().find(|it| it.offset < end && piece.offset < it.offset + it.length)
    }

    pub(crate) fn has_room(&self) -> Result<(), Why> {
        let room = self.regions.iter().any(Option::is_none);
        if room { Ok(()) } else { Err(Why::TooMuch { most: MAX_REGIONS }) }
    }

    pub(crate) fn add_region(&mut self, region: Mapped) {
        let room = self.regions.iter_mut().find(|it| it.is_none());
        *room.expect("asked for before it was mapped") = Some(region);
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = &Mapped> {
        self.regions.iter().flatten()
    }

    pub(crate) fn forget(&mut self, region: &Mapped) {
        let found = self.regions.iter_mut().find(|it| it.as_ref() == Some(region));
        *found.expect("one of the table's") = None;
    }

    /// Forgets everything, and lets go of the files.
    pub(crate) fn clear(&mut self) {
        self.files.fill_with(|| None);
        self.regions.fill(None);
    }

    /// Forgets a region that was unmapped.
    pub(crate) fn forget_unmapped(&mut self) -> Result<(), c_int> {
        for place in &mut self.regions {
            if let Some(region) = place
                && !maps::is_there(region)?
            {
                *place = None;
            }
        }
        Ok(())
    }

    /// Whether all of so many files is mapped. No piece is twice.
    pub(crate) fn is_whole(&self, entries: usize) -> bool {
        let files = self.files.iter().flatten();
        files.clone().count() == entries && files.clone().all(|file| self.mapped(file) == file.size)
    }

    fn mapped(&self, file: &File) -> u64 {
        self.regions().filter(|it| it.file == file.id).map(|it| it.length).sum()
    }

    /// The files in the order of their names.
    pub(crate) fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.sorted_files().iter().map(|file| file.descriptor.as_fd()).collect()
    }

    fn sorted_files(&self) -> Vec<&File> {
        let mut files: Vec<_> = self.files.iter().flatten().collect();
        files.sort_by_key(|file| file.entry);
        files
    }

    /// All regions, where they lie for the guest: the files one after the other, in the order of
    /// their names.
    pub(crate) fn layout(&self, hole: Hole) -> Vec<Placed> {
        let mut placing = match hole {
            Hole::Pc => Placing::as_in_a_pc(),
            Hole::None => Placing::without_hole(),
        };
        let mut placed = Vec::new();
        for (number, file) in self.sorted_files().into_iter().enumerate() {
            let mut regions: Vec<_> = self.regions().filter(|it| it.file == file.id).collect();
            regions.sort_by_key(|region| region.offset);
            for region in regions {
                let mut done = 0;
                while done < region.length {
                    let (guest_address, length) = placing.place(region.length - done);
                    let (address, offset) = (region.address + done, region.offset + done);
                    let (page, file) = (file.page, number);
                    placed.push(Placed { guest_address, address, length, page, file, offset });
                    done += length;
                }
            }
        }
        placed
    }
}

fn duplicate(fd: c_int) -> Result<OwnedFd, c_int> {
    // SAFETY: the call takes numbers only.
    let duplicate = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if duplicate < 0 {
        return Err(last_error());
    }
    // SAFETY: a new descriptor, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    const GIB: u64 = 1 << 30;

    fn table(files: &[(usize, u64)]) -> (Table, Vec<FileId>) {
        let mut table = Table::new();
        let ids = files.iter().map(|(entry, size)| {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            file.set_len(*size).unwrap();
            let open = OpenFile::of(file.as_raw_fd()).unwrap();
            table.add_file(*entry, 4096, &open).unwrap();
            open.id
        });
        let ids = ids.collect();
        (table, ids)
    }

    fn region(file: FileId, offset: u64, address: u64, length: u64) -> Mapped {
        Mapped { file, offset, address, length }
    }

    #[test]
    fn memory_lies_in_the_order_of_its_names_around_the_hole() {
        // The second name was mapped first.
        let (mut table, ids) = table(&[(1, 2 * GIB), (0, 2 * GIB)]);
        table.add_region(region(ids[0], 0, 10 * GIB, 2 * GIB));
        assert!(!table.is_whole(2));
        table.add_region(region(ids[1], GIB, 20 * GIB, GIB));
        table.add_region(region(ids[1], 0, 30 * GIB, GIB));
        assert!(table.is_whole(2) && !table.is_whole(3));
        let of = |hole| {
            let placed = table.layout(hole).into_iter();
            placed.map(|it| (it.guest_address, it.address, it.length, it.file, it.offset))
        };
        let first = [(0, 30 * GIB, GIB, 0, 0), (GIB, 20 * GIB, GIB, 0, GIB)];
        let in_a_pc = [(2 * GIB, 10 * GIB, GIB, 1, 0), (4 * GIB, 11 * GIB, GIB, 1, GIB)];
        assert!(of(Hole::Pc).eq(first.into_iter().chain(in_a_pc)));
        let elsewhere = [(2 * GIB, 10 * GIB, 2 * GIB, 1, 0)];
        assert!(of(Hole::None).eq(first.into_iter().chain(elsewhere)));
    }

    #[test]
    fn a_piece_that_is_there_already_is_found() {
        let (mut table, ids) = table(&[(0, GIB), (1, GIB)]);
        let there = region(ids[0], 8192, GIB, 8192);
        table.add_region(there);
        assert_eq!(table.overlapping(&region(ids[0], 12288, 0, 4096)), Some(there));
        assert_eq!(table.overlapping(&region(ids[0], 0, 0, 8193)), Some(there));
        for other in [region(ids[0], 0, 0, 8192), region(ids[0], 16384, 0, 1)] {
            assert_eq!(table.overlapping(&other), None);
        }
        assert_eq!(table.overlapping(&region(ids[1], 8192, GIB, 8192)), None);
        table.forget(&there);
        assert_eq!(table.regions().count(), 0);
    }

    #[test]
    fn what_was_unmapped_is_forgotten() {
        let (mut table, ids) = table(&[(0, GIB)]);
        table.add_region(region(ids[0], 0, 4096, 4096));
        table.forget_unmapped().unwrap();
        assert_eq!(table.regions().count(), 0);
    }
}
