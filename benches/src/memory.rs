//! Guest memory with content that can be verified, on both sides alike.
//!
//! Invariant: every byte of a page follows from its number and the plan, so a destination
//! needs nothing from the source to verify what it got.

use std::sync::atomic::{AtomicU64, Ordering};

use afterimage_tools::ram::{Backing, GuestRam};

use crate::error::{BenchError, Doing};
use crate::sys::{self, PageMap};
use crate::unit::{MemoryPlan, Shape};

/// Bytes in a page as content is counted.
pub const PAGE: u64 = 4096;
const WORDS: usize = (PAGE / 8) as usize;
/// The content of [`Shape::Sparse`].
const SPARSE_CONTENT: u64 = 16 << 20;
/// The most pages without content that are read to verify that they have none.
const MOST_HOLES: u64 = 16_384;
/// Added from word to word, so that no two words of a page are equal.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Guest memory of this process.
#[derive(Debug)]
pub struct Memory {
    ram: GuestRam,
    plan: MemoryPlan,
}

impl Memory {
    /// Memory with content, as a source has it.
    ///
    /// # Errors
    /// If the machine has not so much of it.
    pub fn filled(plan: MemoryPlan) -> Result<Self, BenchError> {
        let memory = Self::empty(plan)?;
        // Huge pages would make content of what is to stay untouched.
        let is_whole = matches!(plan.shape, Shape::Dense | Shape::HalfZero);
        if plan.backing == Backing::Anonymous {
            for region in memory.ram.regions() {
                sys::advise_huge(region.host_base().as_ptr(), region.length(), is_whole);
            }
        }
        memory.fill();
        Ok(memory)
    }

    /// Writes the content that the plan says.
    pub fn fill(&self) {
        let is_whole = matches!(self.plan.shape, Shape::Dense | Shape::HalfZero);
        // What has no content and is to stay untouched is not even looked at.
        for page in 0..self.plan.content_end() {
            if is_whole || self.plan.content(page).is_some() {
                let content = page_content(&self.plan, page);
                for (word, value) in self.words(page).iter().zip(content) {
                    word.store(value, Ordering::Relaxed);
                }
            }
        }
    }

    /// Memory that nobody has touched.
    ///
    /// # Errors
    /// As [`Self::filled`].
    pub fn empty(plan: MemoryPlan) -> Result<Self, BenchError> {
        let ram = GuestRam::allocate(plan.bytes, plan.backing);
        let ram = ram.map_err(|error| match BenchError::failed("guest memory", &error) {
            BenchError::Failed(text) => BenchError::Lacking(text),
            other => other,
        })?;
        Ok(Self { ram, plan })
    }

    /// The memory itself.
    #[must_use]
    pub const fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// What it is.
    #[must_use]
    pub const fn plan(&self) -> MemoryPlan {
        self.plan
    }

    /// Where a page is mapped.
    ///
    /// # Panics
    /// If there is no such page.
    #[must_use]
    pub fn address(&self, page: u64) -> *mut u8 {
        let mut offset = page * PAGE;
        for region in self.ram.regions() {
            if offset < region.length() {
                // SAFETY: inside the region.
                return unsafe { region.host_base().as_ptr().add(offset as usize) };
            }
            offset -= region.length();
        }
        panic!("page {page} is not in {} bytes", self.plan.bytes);
    }

    /// The first word of a page.
    #[must_use]
    pub fn word(&self, page: u64) -> &AtomicU64 {
        &self.words(page)[0]
    }

    fn words(&self, page: u64) -> &[AtomicU64; WORDS] {
        // SAFETY: a whole page of a live mapping; atomics allow others to write.
        unsafe { &*self.address(page).cast() }
    }

    /// Reads every page that has content, and enough of the others.
    ///
    /// # Errors
    /// [`BenchError::Wrong`] with the first page that is not what it must be.
    pub fn verify(&self) -> Result<(), BenchError> {
        self.verify_except(|_| 0)
    }

    /// The same, where a guest has added `added(page)` to the first word of each page.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn verify_except(&self, added: impl Fn(u64) -> u64) -> Result<(), BenchError> {
        let is_whole = matches!(self.plan.shape, Shape::Dense | Shape::HalfZero);
        for page in 0..self.plan.content_end() {
            if is_whole || self.plan.content(page).is_some() {
                self.verify_page(page, added(page))?;
            }
        }
        let pages = self.plan.bytes / PAGE;
        let stride = (pages / MOST_HOLES).max(1) | 1;
        let holes = (0..pages).step_by(stride as usize);
        for page in holes.filter(|page| self.plan.content(*page).is_none()) {
            self.verify_page(page, added(page))?;
        }
        Ok(())
    }

    /// Reads every page that is mapped; the others may be missing.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn verify_present(&self) -> Result<(), BenchError> {
        let map = PageMap::open().doing("/proc/self/pagemap")?;
        for page in 0..self.plan.content_end() {
            if map.is_present(self.address(page) as u64) {
                self.verify_page(page, 0)?;
            }
        }
        Ok(())
    }

    /// Reads one page, to whose first word a guest has added `added`.
    ///
    /// # Errors
    /// As [`Self::verify`].
    pub fn verify_page(&self, page: u64, added: u64) -> Result<(), BenchError> {
        let (first, step) = self.plan.content(page).map_or((0, 0), |first| (first, STEP));
        let mut expected = first;
        for (index, word) in self.words(page).iter().enumerate() {
            let found = word.load(Ordering::Relaxed);
            let offset = if index == 0 { added } else { 0 };
            if found != expected.wrapping_add(offset) {
                return Err(BenchError::Wrong(format!(
                    "page {page}, word {index} of {}: {found:#018x} instead of {:#018x}",
                    self.plan,
                    expected.wrapping_add(offset),
                )));
            }
            expected = expected.wrapping_add(step);
        }
        Ok(())
    }
}

/// The words of a page.
#[must_use]
pub fn page_content(plan: &MemoryPlan, page: u64) -> [u64; WORDS] {
    let (first, step) = plan.content(page).map_or((0, 0), |first| (first, STEP));
    std::array::from_fn(|index| first.wrapping_add(step.wrapping_mul(index as u64)))
}

impl MemoryPlan {
    /// The first word of a page, if it has content. Never zero then.
    #[must_use]
    pub fn content(&self, page: u64) -> Option<u64> {
        let word = mix(page) | 1;
        let has_content = match self.shape {
            Shape::Dense => true,
            Shape::HalfZero => mix(page) >> 63 == 1,
            Shape::OnePiece | Shape::Sparse => page < self.content_end(),
            Shape::Scattered => page.is_multiple_of(4),
            Shape::Empty => false,
        };
        has_content.then_some(word)
    }

    /// Pages up to the last that may have content.
    #[must_use]
    pub fn content_end(&self) -> u64 {
        let bytes = match self.shape {
            Shape::Dense | Shape::HalfZero | Shape::Scattered => self.bytes,
            Shape::OnePiece => self.bytes / 4,
            Shape::Sparse => self.bytes.min(SPARSE_CONTENT),
            Shape::Empty => 0,
        };
        bytes / PAGE
    }

    /// How many pages have content.
    #[must_use]
    pub fn content_pages(&self) -> u64 {
        match self.shape {
            Shape::HalfZero | Shape::Scattered => {
                (0..self.content_end()).filter(|page| self.content(*page).is_some()).count() as u64
            }
            _ => self.content_end(),
        }
    }
}

/// Page numbers in an order that looks like chance and is the same every time.
#[must_use]
pub fn shuffled(pages: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    order.sort_by_cached_key(|page| mix(page ^ 0x5bd1_e995));
    order
}

/// A well-mixed number for each number (the finaliser of `SplitMix64`).
#[must_use]
pub const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The bytes of guest memory, to be sent from where they lie.
///
/// # Safety
/// Nobody writes them meanwhile.
///
/// # Errors
/// If the range is not inside one region.
pub unsafe fn bytes(memory: &Memory, offset: u64, length: usize) -> Result<&[u8], BenchError> {
    let region = &memory.ram.regions()[0];
    if offset + length as u64 > region.length() {
        return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput)).doing("a request");
    }
    // SAFETY: inside a live mapping; that nobody writes is the caller's promise.
    Ok(unsafe {
        std::slice::from_raw_parts(region.host_base().as_ptr().add(offset as usize), length)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(shape: Shape) -> MemoryPlan {
        MemoryPlan { backing: Backing::Anonymous, bytes: 8 << 20, shape }
    }

    #[test]
    fn what_was_filled_is_verified_and_one_wrong_word_is_found() {
        for shape in [Shape::Dense, Shape::HalfZero, Shape::OnePiece, Shape::Scattered] {
            let memory = Memory::filled(plan(shape)).unwrap();
            memory.verify().unwrap();
            memory.words(4)[511].fetch_add(1, Ordering::Relaxed);
            let error = memory.verify().unwrap_err();
            assert!(error.to_string().contains("page 4, word 511"), "{error}");
        }
    }

    #[test]
    fn memory_without_content_is_wrong() {
        let memory = Memory::empty(plan(Shape::Dense)).unwrap();
        assert!(matches!(memory.verify(), Err(BenchError::Wrong(_))));
    }

    #[test]
    fn additions_of_a_guest_are_accounted_for() {
        let memory = Memory::filled(plan(Shape::Dense)).unwrap();
        memory.words(7)[0].fetch_add(3, Ordering::Relaxed);
        memory.verify_except(|page| if page == 7 { 3 } else { 0 }).unwrap();
        assert!(memory.verify().is_err());
    }

    #[test]
    fn every_page_is_there_once_in_a_shuffled_order() {
        let mut order = shuffled(1000);
        assert_ne!(order[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }
}
