//! Where memory has content and where it has holes, found without touching it.
//!
//! A file says it itself (`SEEK_DATA`); for private memory `/proc/self/pagemap` does.
//! Reading a hole through a mapping would allocate it, so a source asks first.

use super::pagemap_scan::{self, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PageRegion, Wanted};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

/// A piece of memory in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) presence: Presence,
}

/// Whether the pages of a mapping are in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// All of them were when somebody looked.
    Present,
    /// They may be swapped out, or have failed: who touches one of those is ended by SIGBUS.
    Unknown,
}

/// Where the next content of a file at or after `from`, before `end`, begins. Where it ends is
/// not asked: the kernel would look at every page up to there.
pub(crate) fn next_data(file: impl AsFd, from: u64, end: u64) -> io::Result<Option<u64>> {
    if from >= end {
        return Ok(None);
    }
    match lseek(&file, from as i64, Whence::SeekData) {
        Ok(start) => Ok(Some(start as u64).filter(|start| *start < end)),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The same, with where it ends: for who looks once, and at all of a file.
pub(crate) fn next_extent(file: impl AsFd, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let Some(start) = next_data(&file, from, end)? else { return Ok(None) };
    let hole = lseek(&file, start as i64, Whence::SeekHole)? as u64;
    // Content that was taken away in between: a page of it at least is gone over.
    Ok(Some(start..hole.min(end).max(start + 1)))
}

/// How many pieces with content one look finds.
pub(crate) const EXTENTS_AT_ONCE: usize = 256;

/// The page maps of this process.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
}

impl Pagemap {
    pub(crate) fn of_this_process() -> io::Result<Self> {
        Ok(Self { file: File::open("/proc/self/pagemap")? })
    }

    /// The next run of private memory at or after `from`, before `end`, that has pages of
    /// its own, all of them present, or none. Addresses are multiples of 4 KiB.
    pub(crate) fn next_present(&self, from: u64, end: u64) -> io::Result<Option<Extent>> {
        let mut found = [PageRegion::default()];
        let mut next = None;
        self.find(from, end, &mut found, |extent| next = Some(extent))?;
        Ok(next)
    }

    /// Calls `present` with the next such runs in order: with all of them, or with
    /// [`EXTENTS_AT_ONCE`].
    pub(crate) fn each_present(
        &self,
        from: u64,
        end: u64,
        present: impl FnMut(Extent),
    ) -> io::Result<()> {
        self.find(from, end, &mut [PageRegion::default(); EXTENTS_AT_ONCE], present)
    }

    /// Whether the kernel can scan.
    pub(crate) fn try_scan(&self) -> io::Result<()> {
        self.scan(0, 4096, &mut [PageRegion::default()]).map(drop)
    }

    fn find(
        &self,
        from: u64,
        end: u64,
        found: &mut [PageRegion],
        mut present: impl FnMut(Extent),
    ) -> io::Result<()> {
        if from >= end {
            return Ok(());
        }
        match self.scan(from, end, found) {
            Ok(count) => {
                for it in &found[..count] {
                    let is_out = it.categories & PAGE_IS_SWAPPED != 0;
                    let presence = if is_out { Presence::Unknown } else { Presence::Present };
                    present(Extent { start: it.start, end: it.end, presence });
                }
                Ok(())
            }
            // PAGEMAP_SCAN came with Linux 6.7.
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                self.read_on(from, end, found.len(), present)
            }
            Err(error) => Err(error),
        }
    }

    /// Fills `found` from its start; how many there are.
    fn scan(&self, from: u64, end: u64, found: &mut [PageRegion]) -> io::Result<usize> {
        let wanted = Wanted {
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            // A page that has failed counts as swapped.
            told: PAGE_IS_SWAPPED,
            ..Wanted::default()
        };
        Ok(pagemap_scan::scan(&self.file, from..end, wanted, found)?.found)
    }

    /// The same by reading one entry of 8 bytes a page; at most so many runs.
    fn read_on(
        &self,
        from: u64,
        end: u64,
        most: usize,
        mut present: impl FnMut(Extent),
    ) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let mut buffer = [0_u8; 8 * 512];
        let (mut at, mut run, mut count) = (from, None::<Extent>, 0);
        while at < end {
            let pages = ((end - at) / 4096).min(512) as usize;
            self.file.read_exact_at(&mut buffer[..pages * 8], at / 4096 * 8)?;
            for entry in buffer[..pages * 8].chunks_exact(8) {
                // Bits 63 and 62: present, swapped; little-endian puts them in the last byte.
                let presence = match entry[7] & 0xc0 {
                    0 => None,
                    0x80 => Some(Presence::Present),
                    _ => Some(Presence::Unknown),
                };
                if let Some(ended) = run.take_if(|run| Some(run.presence) != presence) {
                    present(ended);
                    count += 1;
                    if count == most {
                        return Ok(());
                    }
                }
                at += 4096;
                if let Some(presence) = presence {
                    let start = run.map_or(at - 4096, |run| run.start);
                    run = Some(Extent { start, end: at, presence });
                }
            }
        }
        if let Some(run) = run {
            present(run);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    const PAGE: u64 = 4096;

    #[test]
    fn holes_of_a_file_are_found_without_allocating_them() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(100 * PAGE).unwrap();
        assert_eq!(next_data(&file, 0, 100 * PAGE).unwrap(), None);
        file.write_all_at(&[1], 10 * PAGE).unwrap();
        file.write_all_at(&[1; 8192], 50 * PAGE).unwrap();
        let next = |from, end| next_data(&file, from * PAGE, end * PAGE).unwrap();
        assert_eq!(next(0, 100), Some(10 * PAGE));
        assert_eq!(next(10, 100), Some(10 * PAGE));
        assert_eq!(next(11, 100), Some(50 * PAGE));
        assert_eq!(next(11, 50), None);
        assert_eq!(next(51, 100), Some(51 * PAGE));
        assert_eq!(next(52, 100), None);
        let before = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert_eq!(before, 3 * PAGE / 512, "looking allocated pages");
        assert_eq!(next_data(&file, 100 * PAGE, 100 * PAGE).unwrap(), None);
    }

    #[test]
    fn present_pages_of_private_memory_are_found_both_ways() {
        let mut map = MmapMutAligned::new(1000);
        map.touch(10);
        map.touch(700);
        map.touch(701);
        let start = map.start();
        let pagemap = Pagemap::of_this_process().unwrap();
        let end = start + 1000 * PAGE;
        let pages = |extent: Extent| ((extent.start - start) / PAGE, (extent.end - start) / PAGE);
        let all = [(10, 11), (700, 702)];
        let mut found = Vec::new();
        let mut from = start;
        while let Some(extent) = pagemap.next_present(from, end).unwrap() {
            found.push(pages(extent));
            from = extent.end;
        }
        assert_eq!(found, all);
        found.clear();
        pagemap.each_present(start, end, |extent| found.push(pages(extent))).unwrap();
        assert_eq!(found, all);
        for most in 1..4 {
            found.clear();
            pagemap.read_on(start, end, most, |extent| found.push(pages(extent))).unwrap();
            assert_eq!(found, all[..most.min(2)]);
        }
    }

    #[test]
    fn one_look_finds_many_pieces_and_the_next_goes_on_behind_them() {
        let pieces = 2 * EXTENTS_AT_ONCE + 3;
        let mut map = MmapMutAligned::new(2 * pieces);
        (0..pieces).for_each(|piece| map.touch(2 * piece));
        let (start, end) = (map.start(), map.start() + 2 * pieces as u64 * PAGE);
        let pagemap = Pagemap::of_this_process().unwrap();
        let (mut found, mut looks, mut from) = (Vec::new(), 0, start);
        while from < end {
            let before = found.len();
            pagemap.each_present(from, end, |extent| found.push(extent)).unwrap();
            assert!(found.len() - before <= EXTENTS_AT_ONCE);
            looks += 1;
            from = if found.len() == before { end } else { found[found.len() - 1].end };
        }
        let page = |piece: u64| start + 2 * piece * PAGE;
        let expected = (0..pieces as u64)
            .map(|piece| Extent {
                start: page(piece),
                end: page(piece) + PAGE,
                presence: Presence::Present,
            })
            .collect::<Vec<_>>();
        assert_eq!(found, expected);
        assert!(looks <= 4, "{looks} looks");
    }

    struct MmapMutAligned(memmap2::MmapMut);

    impl MmapMutAligned {
        fn new(pages: usize) -> Self {
            let map = memmap2::MmapMut::map_anon(pages * PAGE as usize).unwrap();
            // SAFETY: advice on our own mapping; a huge page would make neighbours present.
            unsafe {
                libc::madvise(map.as_ptr() as *mut _, map.len(), libc::MADV_NOHUGEPAGE);
            }
            Self(map)
        }

        fn touch(&mut self, page: usize) {
            self.0[page * PAGE as usize] = 1;
        }

        fn start(&self) -> u64 {
            self.0.as_ptr() as u64
        }
    }
}
