//! Writes found by the kernel's asynchronous write protection.

use super::page_bits::check_range;
use super::{DirtyTracker, already_started, not_started, stop_dropped};
use crate::GuestAddress;
use crate::sys::write_protect::Protection;
use crate::sys::{holes, maps};
use afterimage_protocol::bitmap::Bitmap;
use afterimage_protocol::layout::{PageNumber, PageRange, RegisteredAddress};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

/// Tracks writes of anybody through one mapping: threads, system calls and KVM.
///
/// **Needs** Linux 6.7 (`UFFD_FEATURE_WP_ASYNC`, `PAGEMAP_SCAN`) and no privilege; memory that
/// is registered with no other userfaultfd. **Costs** a short fault for the first write to a
/// page after each `collect`, which nobody has to answer; a walk through the page tables at
/// `start` and `collect`, not through holes; with KVM, its mappings of what is armed again.
/// Memory that nobody has ever touched costs nothing; shared memory takes 8 bytes of page
/// tables for each page of every 2 MiB that have content. A huge page of the system's own
/// choice (THP) is split when it is written.
///
/// **Does not see** writes through another mapping of the same file, or by `write`; DMA of
/// assigned devices; pages given up (private memory: `MADV_DONTNEED`; files: holes punched;
/// hugetlbfs: both). Reads of pages that were never touched may be reported as writes.
///
/// While it runs, regions must stay mapped as they are: `collect` fails where one was mapped
/// anew.
///
/// ```
/// use afterimage::{GuestAddress, RegisteredAddress};
/// use afterimage::dirty::{DirtyTracker, TrackedRegion, WriteProtectTracker};
///
/// let mut memory = memmap2::MmapMut::map_anon(1 << 20)?;
/// # memory.advise(memmap2::Advice::NoHugePage)?;
/// let start = RegisteredAddress(memory.as_ptr() as u64);
/// let region = TrackedRegion::private(GuestAddress(0), start, 1 << 20);
/// let mut tracker = WriteProtectTracker::new(vec![region])?;
/// # if tracker.start().is_err_and(|it| it.kind() == std::io::ErrorKind::Unsupported) {
/// #     return Ok(());
/// # }
/// # tracker.stop()?;
/// tracker.start()?;
/// memory[5000] = 1;
/// let mut found = Vec::new();
/// tracker.collect(&mut |guest, length| found.push((guest, length)))?;
/// assert_eq!(found, [(GuestAddress(4096), 4096)]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct WriteProtectTracker {
    regions: Vec<TrackedRegion>,
    memory_of: Owner,
    is_started: bool,
    /// So many regions, from the first, are registered. No other may be unregistered: the
    /// kernel would take it away from whoever has it.
    registered: usize,
}

/// A piece of guest memory whose writes are tracked.
#[derive(Debug)]
pub struct TrackedRegion {
    guest: GuestAddress,
    addresses: Range<u64>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// Its page tables remember a write until it is collected.
    Private,
    /// The same.
    Huge,
    Shared(Shared),
}

/// Memory whose page tables may forget: the kernel takes pages of shared memory out of them
/// when it needs memory or splits a huge page, and then the page map shows a hole where one
/// was written. So all pages are protected, holes too, wherever the file has content.
#[derive(Debug)]
struct Shared {
    file: File,
    offset: u64,
    /// A bit for each [`BLOCK`]: all of its pages were protected.
    armed: Bitmap,
}

#[derive(Debug)]
enum Owner {
    ThisProcess(Option<Protection>),
    Another(Protection),
}

impl TrackedRegion {
    /// Private anonymous memory of `length` bytes.
    #[must_use]
    pub const fn private(guest: GuestAddress, start: RegisteredAddress, length: u64) -> Self {
        Self::new(guest, start, length, Kind::Private)
    }

    /// Memory on hugetlbfs, private or shared, with pages of 2 MiB: those of 1 GiB cannot be
    /// protected. Reported in whole huge pages.
    #[must_use]
    pub const fn hugetlb(guest: GuestAddress, start: RegisteredAddress, length: u64) -> Self {
        Self::new(guest, start, length, Kind::Huge)
    }

    /// A shared mapping of a memfd or a file on tmpfs, from its byte `offset`. The file tells
    /// where there is content.
    #[must_use]
    pub fn shared(
        guest: GuestAddress,
        start: RegisteredAddress,
        length: u64,
        file: OwnedFd,
        offset: u64,
    ) -> Self {
        let armed = Bitmap::new(length.div_ceil(BLOCK));
        Self::new(guest, start, length, Kind::Shared(Shared { file: file.into(), offset, armed }))
    }

    const fn new(guest: GuestAddress, start: RegisteredAddress, length: u64, kind: Kind) -> Self {
        Self { guest, addresses: start.0..start.0.saturating_add(length), kind }
    }

    fn check(&self) -> io::Result<()> {
        check_range(self.guest, self.length())?;
        check_range(GuestAddress(self.addresses.start), self.length())
    }

    /// Whether this process has the region mapped as it was described.
    fn check_mapping(&self) -> io::Result<()> {
        let (start, length) = (self.addresses.start, self.length());
        let checked = match &self.kind {
            Kind::Private => maps::check_private(start, length),
            Kind::Shared(shared) => maps::check_shared(start, length, &shared.file, shared.offset),
            // A wrong answer here can only be that pages are no huge ones, which is no harm.
            Kind::Huge => return Ok(()),
        };
        checked?.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
    }

    const fn length(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    fn guest_of(&self, address: u64) -> GuestAddress {
        GuestAddress(self.guest.0 + (address - self.addresses.start))
    }

    fn register(&self, protection: &Protection) -> io::Result<()> {
        protection.register(&self.addresses).map_err(|error| self.explain(&error))
    }

    fn start(&self, protection: &Protection) -> io::Result<()> {
        match &self.kind {
            Kind::Private | Kind::Huge => protection.protect_mapped(self.addresses.clone()),
            Kind::Shared(shared) => {
                shared.forget();
                self.arm_content(shared, protection, &mut |_| ())
            }
        }
    }

    fn collect(
        &self,
        protection: &Protection,
        written: &mut dyn FnMut(GuestAddress, u64),
    ) -> io::Result<()> {
        let mut report = |run: Range<u64>| written(self.guest_of(run.start), run.end - run.start);
        match &self.kind {
            Kind::Private | Kind::Huge => {
                protection.take_written(self.addresses.clone(), &mut report)
            }
            Kind::Shared(shared) => {
                for blocks in shared.armed.runs() {
                    protection.take_unprotected(self.addresses_of(blocks), &mut report)?;
                }
                self.arm_content(shared, protection, &mut report)
            }
        }
    }

    /// Protects all pages of the blocks that have content by now, and reports them.
    fn arm_content(
        &self,
        shared: &Shared,
        protection: &Protection,
        armed: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut from = 0;
        while let Some(gap) = shared.armed.next_clear(PageNumber(from), u64::MAX) {
            let end = gap.start.0 + gap.count;
            from = gap.start.0;
            while let Some(block) = shared.next_content(from..end, self.length())? {
                let block = PageRange::one(PageNumber(block));
                protection.protect_all(self.addresses_of(block))?;
                shared.armed.set(block, |_| ());
                armed(self.addresses_of(block));
                from = block.start.0 + 1;
            }
            from = end;
        }
        Ok(())
    }

    fn addresses_of(&self, blocks: PageRange) -> Range<u64> {
        let start = self.addresses.start + blocks.start.0 * BLOCK;
        start..(start + blocks.count * BLOCK).min(self.addresses.end)
    }

    fn explain(&self, error: &io::Error) -> io::Error {
        let why = match error.raw_os_error() {
            Some(libc::EBUSY) => "it is registered with another userfaultfd".to_owned(),
            _ => error.to_string(),
        };
        let text = format!("cannot track writes to memory at guest address {}: {why}", self.guest);
        io::Error::new(error.kind(), text)
    }
}

impl Shared {
    /// The first of these blocks that has content in the file.
    fn next_content(&self, blocks: Range<u64>, length: u64) -> io::Result<Option<u64>> {
        let place = |block: u64| self.offset + (block * BLOCK).min(length);
        let data = holes::next_data(&self.file, place(blocks.start), place(blocks.end))?;
        Ok(data.map(|at| (at - self.offset) / BLOCK))
    }

    fn forget(&self) {
        self.armed.clear(PageRange::new(PageNumber(0), self.armed.pages()), |_| ());
    }
}

impl WriteProtectTracker {
    /// For memory of this process.
    ///
    /// # Errors
    /// If a region is not made of whole pages, or a file is not mapped where it was said to be.
    pub fn new(regions: Vec<TrackedRegion>) -> io::Result<Self> {
        regions.iter().try_for_each(TrackedRegion::check_mapping)?;
        Self::with_owner(regions, Owner::ThisProcess(None))
    }

    /// For memory of another process, by addresses of that process. `uffd` was made by it, with
    /// the features `UFFD_FEATURE_WP_ASYNC`, `WP_UNPOPULATED` and, for files,
    /// `WP_HUGETLBFS_SHMEM`, and handed over. This process must be allowed to trace that one
    /// (`PTRACE_MODE_READ`), whose death, or `exec`, `collect` reports as an error.
    ///
    /// # Errors
    /// If a region is not made of whole pages, or the page map cannot be opened.
    pub fn of_process(pid: u32, uffd: OwnedFd, regions: Vec<TrackedRegion>) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Self::with_owner(regions, Owner::Another(Protection::of(uffd, pagemap)))
    }

    fn with_owner(regions: Vec<TrackedRegion>, memory_of: Owner) -> io::Result<Self> {
        regions.iter().try_for_each(TrackedRegion::check)?;
        Ok(Self { regions, memory_of, is_started: false, registered: 0 })
    }

    fn begin(&mut self) -> io::Result<()> {
        let protection = self.memory_of.protection()?;
        for region in &self.regions {
            region.register(protection)?;
            self.registered += 1;
            region.start(protection)?;
        }
        Ok(())
    }
}

impl Owner {
    fn protection(&mut self) -> io::Result<&Protection> {
        match self {
            Self::Another(protection) | Self::ThisProcess(Some(protection)) => Ok(protection),
            Self::ThisProcess(empty) => Ok(empty.insert(Protection::of_this_process()?)),
        }
    }
}

impl DirtyTracker for WriteProtectTracker {
    fn start(&mut self) -> io::Result<()> {
        if self.is_started {
            return Err(already_started());
        }
        self.is_started = true;
        self.begin().inspect_err(|_| stop_dropped(self))
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        if !self.is_started {
            return Err(not_started());
        }
        let protection = self.memory_of.protection()?;
        for region in &self.regions {
            region.collect(protection, written)?;
            protection.check_alive(region.addresses.start)?;
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        if !std::mem::take(&mut self.is_started) {
            return Ok(());
        }
        let protection = self.memory_of.protection()?;
        let registered = &self.regions[..std::mem::take(&mut self.registered)];
        let undone = registered.iter().map(|region| protection.unregister(&region.addresses));
        // Each is tried, whatever becomes of the others.
        let result = undone.fold(Ok(()), io::Result::and);
        if let Owner::ThisProcess(protection) = &mut self.memory_of {
            *protection = None;
        }
        result
    }
}

impl Drop for WriteProtectTracker {
    fn drop(&mut self) {
        stop_dropped(self);
    }
}

/// What a page table maps. Shared memory is armed in such blocks.
const BLOCK: u64 = 2 << 20;
