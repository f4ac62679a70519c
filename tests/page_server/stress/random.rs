//! Random numbers that come again with the same seed.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// `SplitMix64`.
pub(super) struct Random(u64);

impl Random {
    /// From `AFTERIMAGE_SEED`, or a new seed; says which, past the capture of the harness.
    pub(super) fn seeded(test: &str) -> Self {
        let seed = std::env::var("AFTERIMAGE_SEED").ok().map_or_else(
            || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
            |text| text.parse().expect("AFTERIMAGE_SEED is a number"),
        );
        let _ = writeln!(std::io::stderr(), "{test}: AFTERIMAGE_SEED={seed}");
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(super) fn fork(&mut self) -> Self {
        Self(self.next())
    }
}
