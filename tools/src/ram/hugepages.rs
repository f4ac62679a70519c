//! Reserves 2 MiB huge pages of the machine through `vm.nr_hugepages`.
//!
//! Invariant: what a reservation added to the machine's count it takes away on drop,
//! so that the count is left as it was found.

use std::sync::{Mutex, PoisonError};
use std::{fs, io};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages";

/// One reservation of this process at a time reads and writes the count.
static COUNT_LOCK: Mutex<()> = Mutex::new(());

/// Why huge pages could not be reserved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HugePagesError {
    /// The machine has no 2 MiB huge pages or does not let their number be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Their number may not be changed by this process.
    #[error("{missing} huge pages are missing and {COUNT} cannot be raised: run as root")]
    Raise {
        /// How many pages are missing.
        missing: u64,
        /// Why.
        source: io::Error,
    },
    /// Memory is too small or too fragmented.
    #[error("{wanted} huge pages are needed, the machine could free only {available}")]
    Insufficient {
        /// How many were asked for.
        wanted: u64,
        /// How many there would be.
        available: u64,
    },
}

/// Huge pages added to the machine's pool for as long as this lives.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
}

impl HugePages {
    /// Makes sure that `pages` huge pages are free, raising the machine's number if
    /// need be. Drop it only after the memory on them has been unmapped.
    ///
    /// # Errors
    /// If the number cannot be read or raised, or memory does not suffice.
    pub fn reserve(pages: u64) -> Result<Self, HugePagesError> {
        let guard = COUNT_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = pages.saturating_sub(free()?);
        if missing == 0 {
            return Ok(Self { added: 0 });
        }
        let before = read(COUNT)?;
        fs::write(COUNT, (before + missing).to_string())
            .map_err(|source| HugePagesError::Raise { missing, source })?;
        // The kernel adds as many as it can and reports no error for the rest.
        let reserved = Self { added: read(COUNT)?.saturating_sub(before) };
        let available = free()?;
        if available < pages {
            drop(guard); // `reserved` is dropped on return and takes the lock itself.
            return Err(HugePagesError::Insufficient { wanted: pages, available });
        }
        Ok(reserved)
    }

    /// How many huge pages are free and not promised to a mapping.
    ///
    /// # Errors
    /// If the machine does not say.
    pub fn available() -> Result<u64, HugePagesError> {
        free()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.added == 0 {
            return;
        }
        let _guard = COUNT_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(now) = read(COUNT) {
            let count = now.saturating_sub(self.added).to_string();
            if let Err(error) = fs::write(COUNT, count) {
                tracing::warn!(%error, "{COUNT} could not be lowered again");
            }
        }
    }
}

/// Huge pages that are free and not promised to a mapping.
pub(super) fn free() -> Result<u64, HugePagesError> {
    Ok(read(FREE)?.saturating_sub(read(RESERVED)?))
}

fn read(path: &'static str) -> Result<u64, HugePagesError> {
    let text = fs::read_to_string(path);
    text.and_then(|text| text.trim().parse().map_err(io::Error::other))
        .map_err(|source| HugePagesError::Read { path, source })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::require;

    /// Held by the tests of this crate that change the number of huge pages.
    pub(in crate::ram) static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn the_number_of_huge_pages_is_raised_and_lowered_again() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pages) = require::hugetlb(free().unwrap_or(0) + 8) else {
            return;
        };
        assert!(pages.added >= 8, "{pages:?}");
        let added = pages.added;
        let raised = read(COUNT).unwrap();
        drop(pages);
        assert_eq!(read(COUNT).unwrap(), raised - added);
    }
}
