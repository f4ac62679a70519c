//! Random numbers that come again with the same seed.

use std::io::Write;

/// `SplitMix64`.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From `AFTERIMAGE_SEED`, or a new seed; says which.
    pub fn seeded(test: &str) -> Self {
        let seed = std::env::var("AFTERIMAGE_SEED").ok().map_or_else(
            || {
                let now = std::time::SystemTime::now();
                now.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64
            },
            |text| text.parse().expect("AFTERIMAGE_SEED is a number"),
        );
        let _ = writeln!(std::io::stderr(), "{test}: AFTERIMAGE_SEED={seed}");
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }
}

pub fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
