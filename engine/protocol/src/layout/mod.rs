//! Guest memory as both sides see it: regions, and one page numbering over all of them.
//!
//! A [`GuestLayout`] is checked once, when it is made; afterwards every page number below
//! [`GuestLayout::page_count`] belongs to exactly one region, and no run handed out by
//! [`GuestLayout::split`] crosses a region's border, even where two regions touch in host
//! memory. What lies behind the addresses is left to the engine.

mod error;
mod numbers;

pub use error::{LayoutError, LayoutMismatch, RegionField};
pub use numbers::{GuestAddress, LocalAddress, PageNumber, PageRange, PageSize, RegisteredAddress};

/// What kind of memory backs a region; it decides how a page can be put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory.
    Anonymous = 1,
    /// A memfd, a file on tmpfs, or any other shared memory with a page cache.
    Shared = 2,
    /// hugetlbfs; pages are whole huge pages.
    Hugetlb = 3,
    /// Memory of another process that was handed over as a userfaultfd alone: it can be
    /// filled by copying, and nothing else is known about it.
    Opaque = 4,
}

/// One contiguous piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Region {
    /// Where the guest sees it.
    pub guest_address: GuestAddress,
    /// Its length in bytes.
    pub length: u64,
    /// The size in which pages are tracked and moved: that of the host page behind it.
    pub page_size: PageSize,
    /// What kind of memory it is.
    pub backing: Backing,
    /// Where the process that runs the guest has mapped it; faults carry this address.
    /// `None` at a source, where nothing is registered.
    pub registered: Option<RegisteredAddress>,
    /// Where this process has mapped it, if it has.
    pub local: Option<LocalAddress>,
}

impl Region {
    /// A region with no addresses in any process yet.
    #[must_use]
    pub const fn new(
        guest_address: GuestAddress,
        length: u64,
        page_size: PageSize,
        backing: Backing,
    ) -> Self {
        Self { guest_address, length, page_size, backing, registered: None, local: None }
    }

    /// The same region, registered at `address` in the process that runs the guest.
    #[must_use]
    pub const fn registered_at(mut self, address: RegisteredAddress) -> Self {
        self.registered = Some(address);
        self
    }

    /// The same region, mapped at `address` in this process.
    #[must_use]
    pub const fn local_at(mut self, address: LocalAddress) -> Self {
        self.local = Some(address);
        self
    }

    /// How many pages it has.
    #[must_use]
    pub const fn page_count(&self) -> u64 {
        self.length >> self.page_size.shift()
    }
}

/// A run of pages inside one region: what [`GuestLayout::split`] cuts a range into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionRun {
    /// Index of the region in [`GuestLayout::regions`].
    pub region: usize,
    /// The pages, by their number in the whole layout.
    pub pages: PageRange,
    /// Offset of the first byte in the region.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// All memory of one guest, its pages numbered from 0 in the order of guest addresses.
///
/// ```
/// use afterimage_protocol::layout::{Backing, GuestAddress, GuestLayout, PageSize, Region};
///
/// let low = Region::new(GuestAddress(0), 3 << 30, PageSize::KIB_4, Backing::Shared);
/// let high = Region::new(GuestAddress(4 << 30), 1 << 30, PageSize::KIB_4, Backing::Shared);
/// let layout = GuestLayout::new(vec![high, low])?;
/// assert_eq!(layout.page_count(), 1 << 20);
/// # Ok::<(), afterimage_protocol::layout::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestLayout {
    regions: Vec<Region>,
    /// First page number of each region, and the total behind the last.
    first_pages: Vec<u64>,
    /// Region indices in the order of registered addresses.
    by_registered: Vec<usize>,
}

impl GuestLayout {
    /// Checks the regions and numbers their pages. The order given does not matter.
    ///
    /// # Errors
    /// [`LayoutError`] names the region and the value that is wrong: no region at all, a
    /// zero length, an address or length that is no multiple of the page size, an end
    /// beyond 2⁶⁴, or two regions that overlap in any of the three address spaces.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        for region in &regions {
            error::check_region(region)?;
        }
        regions.sort_by_key(|region| region.guest_address);
        for field in [RegionField::Guest, RegionField::Registered, RegionField::Local] {
            error::check_overlap(&regions, field)?;
        }
        let mut first_pages = Vec::with_capacity(regions.len() + 1);
        let mut total = 0_u64;
        for region in &regions {
            first_pages.push(total);
            // Regions do not overlap, so their pages together fit the address space.
            total += region.page_count();
        }
        first_pages.push(total);
        let mut by_registered: Vec<usize> =
            (0..regions.len()).filter(|&index| regions[index].registered.is_some()).collect();
        by_registered.sort_by_key(|&index| regions[index].registered);
        Ok(Self { regions, first_pages, by_registered })
    }

    /// The regions, in the order of guest addresses.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// How many pages there are; page numbers are below this.
    #[must_use]
    pub fn page_count(&self) -> u64 {
        self.first_pages.last().copied().unwrap_or(0)
    }

    /// All memory in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.length).sum()
    }

    /// Every page.
    #[must_use]
    pub fn all_pages(&self) -> PageRange {
        PageRange::new(PageNumber(0), self.page_count())
    }

    /// The pages of one region.
    #[must_use]
    pub fn pages_of(&self, region: usize) -> PageRange {
        let first = self.first_pages[region];
        PageRange::new(PageNumber(first), self.first_pages[region + 1] - first)
    }

    /// The index of the region that holds `page`, if the layout has such a page.
    #[must_use]
    pub fn region_of(&self, page: PageNumber) -> Option<usize> {
        if page.0 >= self.page_count() {
            return None;
        }
        Some(self.first_pages.partition_point(|&first| first <= page.0) - 1)
    }

    /// Whether every page of `range` exists.
    #[must_use]
    pub fn contains(&self, range: PageRange) -> bool {
        range.end().is_some_and(|end| end.0 <= self.page_count())
    }

    /// The page at a registered address, as a fault reports it.
    #[must_use]
    pub fn page_at_registered(&self, address: RegisteredAddress) -> Option<PageNumber> {
        let after = self
            .by_registered
            .partition_point(|&index| self.regions[index].registered <= Some(address));
        let index = *self.by_registered.get(after.checked_sub(1)?)?;
        let region = &self.regions[index];
        self.page_at(index, address.0 - region.registered?.0)
    }

    /// The page at a guest address.
    #[must_use]
    pub fn page_at_guest(&self, address: GuestAddress) -> Option<PageNumber> {
        let after = self.regions.partition_point(|region| region.guest_address <= address);
        let index = after.checked_sub(1)?;
        self.page_at(index, address.0 - self.regions[index].guest_address.0)
    }

    fn page_at(&self, region: usize, offset: u64) -> Option<PageNumber> {
        let found = &self.regions[region];
        (offset < found.length)
            .then(|| PageNumber(self.first_pages[region] + (offset >> found.page_size.shift())))
    }

    /// The pages that lie wholly in `length` bytes from a registered address; a range that
    /// spans several regions gives several runs.
    pub fn pages_at_registered(
        &self,
        address: RegisteredAddress,
        length: u64,
    ) -> impl Iterator<Item = RegionRun> + '_ {
        let end = address.0.saturating_add(length);
        self.by_registered.iter().filter_map(move |&index| {
            let region = &self.regions[index];
            let start = region.registered?.0;
            self.whole_pages(index, address.0.max(start) - start, end.saturating_sub(start))
        })
    }

    /// The same for guest addresses.
    pub fn pages_at_guest(
        &self,
        address: GuestAddress,
        length: u64,
    ) -> impl Iterator<Item = RegionRun> + '_ {
        let end = address.0.saturating_add(length);
        self.regions.iter().enumerate().filter_map(move |(index, region)| {
            let start = region.guest_address.0;
            self.whole_pages(index, address.0.max(start) - start, end.saturating_sub(start))
        })
    }

    /// All pages of which any byte lies in `length` bytes from a guest address.
    pub fn pages_touching_guest(
        &self,
        address: GuestAddress,
        length: u64,
    ) -> impl Iterator<Item = RegionRun> + '_ {
        let end = address.0.saturating_add(length);
        self.regions.iter().enumerate().filter_map(move |(index, region)| {
            let start = region.guest_address.0;
            let bytes = region.page_size.bytes();
            let from = (address.0.max(start) - start) / bytes * bytes;
            let to = end.saturating_sub(start).min(region.length).next_multiple_of(bytes);
            self.whole_pages(index, from, to)
        })
    }

    /// The run of whole pages between byte offsets `from..to` of a region.
    fn whole_pages(&self, index: usize, from: u64, to: u64) -> Option<RegionRun> {
        let region = &self.regions[index];
        let shift = region.page_size.shift();
        let first = from.div_ceil(region.page_size.bytes());
        let end = to.min(region.length) >> shift;
        let start = PageNumber(self.first_pages[index] + first);
        (first < end).then(|| self.run(index, PageRange::new(start, end - first)))
    }

    /// A CRC-32C of the addresses, lengths and page sizes of the regions, in the order of
    /// addresses: tells one guest's memory from another's by mistake, not by intent. The same in
    /// every release, so that it can be kept in files.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.regions.iter().fold(0, |crc, region| {
            let numbers = [region.guest_address.0, region.length, region.page_size.bytes()];
            numbers.iter().fold(crc, |crc, it| crc32c::crc32c_append(crc, &it.to_le_bytes()))
        })
    }

    /// Cuts a range of pages at the borders of regions. Pages that do not exist are left
    /// out; callers check a peer's range with [`GuestLayout::contains`] first.
    pub fn split(&self, range: PageRange) -> impl Iterator<Item = RegionRun> + '_ {
        let end = range.start.0.saturating_add(range.count).min(self.page_count());
        let mut next = range.start.0;
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let region = self.region_of(PageNumber(next))?;
            let stop = end.min(self.first_pages[region + 1]);
            let pages = PageRange::new(PageNumber(next), stop - next);
            next = stop;
            Some(self.run(region, pages))
        })
    }

    fn run(&self, region: usize, pages: PageRange) -> RegionRun {
        let shift = self.regions[region].page_size.shift();
        RegionRun {
            region,
            pages,
            offset: (pages.start.0 - self.first_pages[region]) << shift,
            length: pages.count << shift,
        }
    }

    /// The size of the page's host page.
    ///
    /// # Panics
    /// If the layout has no such page.
    #[must_use]
    pub fn page_size_of(&self, page: PageNumber) -> PageSize {
        let region = self.region_of(page).expect("a page of this layout");
        self.regions[region].page_size
    }

    /// The layout in which a source with layout `self` serves a destination: its own
    /// addresses and backings, the destination's page sizes. In which pieces memory moves
    /// is the destination's affair, because it has to put whole host pages in place; a
    /// source can read it in any.
    ///
    /// # Errors
    /// [`LayoutMismatch`] names the first region that differs in address or length, with
    /// both values.
    pub fn serving(&self, destination: &Self) -> Result<Self, LayoutMismatch> {
        error::compare(&self.regions, &destination.regions)?;
        let mut served = destination.clone();
        for (region, own) in served.regions.iter_mut().zip(&self.regions) {
            *region = Region { page_size: region.page_size, ..*own };
        }
        served.by_registered.clone_from(&self.by_registered);
        Ok(served)
    }
}

#[cfg(test)]
mod tests;
