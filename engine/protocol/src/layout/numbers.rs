//! Addresses, page numbers and page sizes, each a type of its own.

use std::fmt;

/// An address as the guest sees it (guest physical).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddress(pub u64);

/// An address in the process that runs the guest, where the memory is registered with
/// userfaultfd. It need not be mapped in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegisteredAddress(pub u64);

/// An address in this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalAddress(pub u64);

/// The number of a page in a [`GuestLayout`](super::GuestLayout), over all its regions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

/// Consecutive page numbers. They may cross from one region into the next.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// The first page.
    pub start: PageNumber,
    /// How many pages.
    pub count: u64,
}

impl PageRange {
    /// `count` pages from `start`.
    #[must_use]
    pub const fn new(start: PageNumber, count: u64) -> Self {
        Self { start, count }
    }

    /// One page.
    #[must_use]
    pub const fn one(page: PageNumber) -> Self {
        Self::new(page, 1)
    }

    /// The page after the last, or `None` where the numbers overflow.
    #[must_use]
    pub const fn end(&self) -> Option<PageNumber> {
        match self.start.0.checked_add(self.count) {
            Some(end) => Some(PageNumber(end)),
            None => None,
        }
    }

    /// Whether there is no page in it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `page` is in it.
    #[must_use]
    pub const fn contains(&self, page: PageNumber) -> bool {
        page.0 >= self.start.0 && page.0 - self.start.0 < self.count
    }

    /// Its pages, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageNumber> + use<> {
        (self.start.0..self.start.0.saturating_add(self.count)).map(PageNumber)
    }
}

impl fmt::Debug for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start.0, self.start.0.saturating_add(self.count))
    }
}

/// A page size in bytes: a power of two from 4 KiB to 1 GiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u8);

impl PageSize {
    /// 4 KiB.
    pub const KIB_4: Self = Self(12);
    /// 2 MiB.
    pub const MIB_2: Self = Self(21);
    /// 1 GiB.
    pub const GIB_1: Self = Self(30);

    /// The page size of `bytes` bytes, if it is one.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 4096 && bytes <= 1 << 30 {
            Some(Self(bytes.trailing_zeros() as u8))
        } else {
            None
        }
    }

    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The power of two.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..20 => write!(f, "{} KiB", self.bytes() >> 10),
            20..30 => write!(f, "{} MiB", self.bytes() >> 20),
            _ => write!(f, "{} GiB", self.bytes() >> 30),
        }
    }
}

macro_rules! hexadecimal {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
hexadecimal!(GuestAddress, RegisteredAddress, LocalAddress);

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
