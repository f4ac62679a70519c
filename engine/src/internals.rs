//! For the benches of this repository only: what they measure by itself and the public API
//! does not show. Anything here may change or go at any time.

use crate::destination::DestinationMemory;
use crate::sys::fill::{self, Fill};
use crate::sys::mapping::{self, RawRun};
use afterimage_protocol::layout::RegisteredAddress;

/// Whether all bytes are zero.
///
/// # Panics
/// If they are not whole words, aligned.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    assert!((bytes.as_ptr() as usize).is_multiple_of(8) && bytes.len().is_multiple_of(8));
    let run = RawRun { start: bytes.as_ptr().cast_mut(), length: bytes.len() };
    // SAFETY: borrowed, so readable; aligned, as just checked; it is only read.
    unsafe { mapping::is_zero(run) }
}

/// Places pages in registered memory of one region, past the planes: every page once.
#[derive(Debug)]
pub struct Installer {
    memory: DestinationMemory,
}

impl Installer {
    /// For memory of one region. It is unregistered when the installer is dropped.
    ///
    /// # Panics
    /// If it has several regions.
    #[must_use]
    pub fn new(memory: DestinationMemory) -> Self {
        assert_eq!(memory.layout.regions().len(), 1, "memory of one region");
        Self { memory }
    }

    /// Copies `content` to an offset in the region.
    ///
    /// # Panics
    /// Where not all of it is placed.
    pub fn copy(&self, offset: u64, content: &[u8]) {
        self.fill(Fill::Copy(content), offset, content.len() as u64);
    }

    /// Places zeros.
    ///
    /// # Panics
    /// Where not all are placed.
    pub fn zero(&self, offset: u64, length: u64) {
        self.fill(Fill::Zero, offset, length);
    }

    /// Writes `content` through the alias of the region's file, as a background stream does,
    /// and shows it.
    ///
    /// # Panics
    /// Where the region has no file, or not all is placed.
    pub fn write_and_continue(&self, offset: u64, content: &[u8]) {
        let file = self.memory.files[0].as_ref().expect("a region with a file");
        let length = content.len() as u64;
        file.alias.populate(offset, length).expect("pages of the file");
        // SAFETY: in the alias, as `run` checks; pages that are not shown yet are nobody
        // else's.
        unsafe { file.alias.run(offset, length).write(content) };
        self.fill(Fill::Continue, offset, length);
    }

    fn fill(&self, fill: Fill<'_>, offset: u64, length: u64) {
        let region = &self.memory.layout.regions()[0];
        let start = RegisteredAddress(region.registered.unwrap_or_default().0 + offset);
        let filled =
            fill::run(self.memory.uffd(), fill, start, length, region.page_size.bytes(), None);
        assert_eq!(filled.installed, length, "{filled:?}");
    }
}

impl Drop for Installer {
    fn drop(&mut self) {
        self.memory.unregister();
    }
}
