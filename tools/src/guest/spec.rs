//! What a guest does, and where in its RAM: the layout that all kinds of guest share.
//!
//! RAM begins with [`SYSTEM_BYTES`] for the guest's own needs: page tables, code, a
//! control page for each vCPU. All 4 KiB pages after it are numbered from 0. The
//! first of them are *worked* by the vCPUs, the rest keeps what it had at first.
//!
//! A worked page consists of eight lanes of 64 bytes, one for each vCPU: a byte for
//! [`Workload::Pattern`], then at offset 8 a counter for the others; at offset 2048
//! of a tag, which is a hash of the page's number; and of constant content after it.
//!
//! Invariant: the layout depends on the spec alone, so both sides of a move agree.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::ram::{GuestAddress, GuestRam, HIGH_RAM_START, PAGE_BYTES};

/// Bytes at the bottom of RAM that belong to the guest itself: one huge page.
pub const SYSTEM_BYTES: u64 = 2 << 20;

/// As many vCPUs as a page has lanes.
pub const MAX_VCPUS: u32 = 8;

/// Where in a page its tag lies.
pub(crate) const TAG_OFFSET: u64 = 2048;
/// Where in a lane its counter lies.
pub(crate) const COUNTER_OFFSET: u64 = 8;
/// Bytes of a lane.
pub(crate) const LANE_BYTES: u64 = 64;
/// Odd, so that multiplying by it keeps numbers distinct.
const TAG_MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The control pages of the vCPUs: parameters that the guest's code reads, and
/// counters that it writes. Offsets are those of 64-bit words, in bytes.
pub(crate) mod control {
    use crate::ram::{GuestAddress, PAGE_BYTES};

    /// The control page of vCPU 0; the others follow.
    const FIRST_PAGE: u64 = 0x19_0000;

    /// Number of the vCPU.
    pub(crate) const VCPU: u64 = 0x08;
    /// Number of the workload.
    pub(crate) const WORKLOAD: u64 = 0x10;
    /// How many pages are worked.
    pub(crate) const WORKED_PAGES: u64 = 0x18;
    /// Guest address of page 0.
    pub(crate) const FIRST_ADDRESS: u64 = 0x20;
    /// How many pages lie below the MMIO hole.
    pub(crate) const LOW_PAGES: u64 = 0x28;
    /// What is added to addresses of pages above the hole.
    pub(crate) const HOLE_BYTES: u64 = 0x30;
    /// Operations between two reports.
    pub(crate) const REPORT_EVERY: u64 = 0x38;
    /// What the vCPU's random numbers begin with; not 0.
    pub(crate) const SEED: u64 = 0x40;
    /// Where the doorbell is.
    pub(crate) const DOORBELL: u64 = 0x48;
    /// How many pages are hot.
    pub(crate) const HOT_PAGES: u64 = 0x50;
    /// Pages from one hot page to the next.
    pub(crate) const HOT_STRIDE: u64 = 0x58;
    /// Multiplier of the tag hash.
    pub(crate) const TAG_MULTIPLIER: u64 = 0x60;
    /// Steps of computation in an operation of the mixed workload.
    pub(crate) const COMPUTE_STEPS: u64 = 0x68;
    /// Counters incremented so far.
    pub(crate) const WRITES: u64 = 0x80;
    /// Wrong tags seen so far.
    pub(crate) const ERRORS: u64 = 0x88;

    /// Address of a word in a vCPU's control page.
    pub(crate) const fn address(vcpu: u32, offset: u64) -> GuestAddress {
        GuestAddress(FIRST_PAGE + vcpu as u64 * PAGE_BYTES + offset)
    }
}

/// The page in which the VMM, and no vCPU, counts what it has heard of each vCPU on KVM: a word
/// with the number of its reports. A write that is lost once is missing for ever.
pub(crate) mod mailbox {
    use crate::ram::{GuestAddress, PAGE_BYTES};

    /// Behind the control pages.
    pub(crate) const PAGE: GuestAddress =
        GuestAddress(super::control::address(super::MAX_VCPUS, 0).0);
    const _: () = assert!(PAGE.0 + PAGE_BYTES <= super::SYSTEM_BYTES);

    /// Address of a vCPU's word.
    pub(crate) fn address(vcpu: u32) -> GuestAddress {
        GuestAddress(PAGE.0 + u64::from(vcpu) * 8)
    }
}

/// What the vCPUs do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Each vCPU increments its byte of one page after the other, round after round,
    /// so that a page that is missing, old or misplaced shows at any stop.
    #[default]
    Pattern,
    /// Each vCPU increments its counter of one page after the other.
    Sequential,
    /// The same, of a random page.
    Random,
    /// The same; 15 of 16 go to a sixteenth of the pages.
    HotSet,
    /// Checks the tag of a random page; one of 32 increments a counter as well.
    ReadMostly,
    /// Computes for a while, then checks a random page and increments its counter.
    Mixed,
}

impl Workload {
    /// The number by which guest code knows it.
    pub(crate) fn number(self) -> u64 {
        match self {
            Self::Pattern => 0,
            Self::Sequential => 1,
            Self::Random => 2,
            Self::HotSet => 3,
            Self::ReadMostly => 4,
            Self::Mixed => 5,
        }
    }
}

/// Why a guest cannot be specified so.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// Too few or too many vCPUs.
    #[error("{0} vCPUs: must be 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// RAM that has room for the guest's own needs only, or more than page tables map.
    #[error("{0} bytes of guest RAM: must be 4 MiB to 256 GiB")]
    Ram(u64),
    /// A state of a guest whose RAM was of another size.
    #[error("guest RAM has {found} pages to work in, the guest was built with {expected}")]
    Geometry {
        /// Pages that the guest knows.
        expected: u64,
        /// Pages that there are.
        found: u64,
    },
}

/// Where the numbered pages lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// How many pages there are after the system area.
    pub pages: u64,
    /// How many of them lie below the MMIO hole.
    pub low_pages: u64,
}

impl Geometry {
    /// The geometry of `ram`.
    #[must_use]
    pub fn of(ram: &GuestRam) -> Self {
        let pages_in = |bytes: u64| bytes.saturating_sub(SYSTEM_BYTES) / PAGE_BYTES;
        Self { pages: pages_in(ram.bytes()), low_pages: pages_in(ram.regions()[0].length()) }
    }

    /// Guest address of a numbered page.
    #[must_use]
    pub fn address(&self, page: u64) -> GuestAddress {
        let linear = SYSTEM_BYTES + page * PAGE_BYTES;
        if page < self.low_pages {
            GuestAddress(linear)
        } else {
            GuestAddress(linear + self.hole_bytes())
        }
    }

    /// What the MMIO hole adds to the addresses of pages above it.
    pub(crate) fn hole_bytes(&self) -> u64 {
        HIGH_RAM_START - (SYSTEM_BYTES + self.low_pages * PAGE_BYTES)
    }
}

/// What a guest does and in which pages. The same on both sides of a move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    workload: Workload,
    vcpus: u32,
    seed: u64,
    geometry: Geometry,
    worked_pages: u64,
    zero_fraction: f64,
    report_every: u64,
}

impl GuestSpec {
    /// A guest of `vcpus` vCPUs that works in all of `ram`, which has no zero pages.
    ///
    /// # Errors
    /// If the number of vCPUs or the size of RAM is out of bounds.
    pub fn new(ram: &GuestRam, workload: Workload, vcpus: u32) -> Result<Self, SpecError> {
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(SpecError::Vcpus(vcpus));
        }
        let geometry = Geometry::of(ram);
        if geometry.low_pages == 0 || ram.bytes() > 256 << 30 {
            return Err(SpecError::Ram(ram.bytes()));
        }
        Ok(Self {
            workload,
            vcpus,
            seed: 1,
            geometry,
            worked_pages: geometry.pages,
            zero_fraction: 0.0,
            report_every: 4096,
        })
    }

    /// Sets what all content and all random choices derive from.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Restricts the workload to this part of the pages (0 to 1, at least one page).
    #[must_use]
    pub fn with_worked_fraction(mut self, fraction: f64) -> Self {
        self.worked_pages = part_of(self.geometry.pages, fraction).max(1);
        self
    }

    /// Leaves this part (0 to 1) of the pages that are not worked entirely zero, and
    /// the second half of as many of those that are.
    #[must_use]
    pub fn with_zero_fraction(mut self, fraction: f64) -> Self {
        self.zero_fraction = fraction.clamp(0.0, 1.0);
        self
    }

    /// Sets after how many operations a vCPU on KVM reports, which costs an exit;
    /// threads, whose reports cost nothing, do so more often.
    #[must_use]
    pub fn with_report_every(mut self, operations: u64) -> Self {
        self.report_every = operations.max(1);
        self
    }

    /// What the vCPUs do.
    #[must_use]
    pub fn workload(&self) -> Workload {
        self.workload
    }

    /// How many vCPUs there are.
    #[must_use]
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// Where the pages lie.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// How many pages, from page 0 on, the vCPUs write to.
    #[must_use]
    pub fn worked_pages(&self) -> u64 {
        self.worked_pages
    }

    /// After how many operations a vCPU on KVM reports.
    pub(crate) fn report_every(&self) -> u64 {
        self.report_every
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn zero_fraction(&self) -> f64 {
        self.zero_fraction
    }

    /// Checks that a guest with this spec can live in `ram`.
    pub(crate) fn check(&self, ram: &GuestRam) -> Result<(), SpecError> {
        let found = Geometry::of(ram);
        if found != self.geometry {
            return Err(SpecError::Geometry { expected: self.geometry.pages, found: found.pages });
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(SpecError::Vcpus(self.vcpus));
        }
        if !(1..=found.pages).contains(&self.worked_pages) || self.report_every == 0 {
            return Err(SpecError::Ram(ram.bytes()));
        }
        Ok(())
    }

    /// What vCPU `vcpu` finds in its control page, by offset.
    pub(crate) fn control_words(&self, vcpu: u32) -> [(u64, u64); 13] {
        [
            (control::VCPU, u64::from(vcpu)),
            (control::WORKLOAD, self.workload.number()),
            (control::WORKED_PAGES, self.worked_pages),
            (control::FIRST_ADDRESS, SYSTEM_BYTES),
            (control::LOW_PAGES, self.geometry.low_pages),
            (control::HOLE_BYTES, self.geometry.hole_bytes()),
            (control::REPORT_EVERY, self.report_every),
            (control::SEED, self.vcpu_seed(vcpu)),
            (control::DOORBELL, crate::microvm::DOORBELL),
            (control::HOT_PAGES, self.hot_pages()),
            (control::HOT_STRIDE, HOT_STRIDE),
            (control::TAG_MULTIPLIER, TAG_MULTIPLIER),
            (control::COMPUTE_STEPS, COMPUTE_STEPS),
        ]
    }

    pub(crate) fn hot_pages(&self) -> u64 {
        (self.worked_pages / HOT_STRIDE).max(1)
    }

    /// What the random numbers of a vCPU begin with: never 0, where xorshift stays.
    pub(crate) fn vcpu_seed(&self, vcpu: u32) -> u64 {
        mix(self.seed ^ (u64::from(vcpu) << 32)) | 1
    }
}

/// Every this many pages one is hot.
pub(crate) const HOT_STRIDE: u64 = 16;
/// Steps of xorshift in an operation of the mixed workload.
pub(crate) const COMPUTE_STEPS: u64 = 256;

/// The tag of a page: a hash of its number that guest code can compute too.
pub(crate) fn tag_of(page: u64) -> u64 {
    let product = (page + 1).wrapping_mul(TAG_MULTIPLIER);
    product ^ (product >> 29)
}

/// A well mixed function of 64 bits (the finaliser of splitmix64).
pub(crate) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// One step of xorshift64, as guest code does it.
pub(crate) fn xorshift(state: u64) -> u64 {
    let state = state ^ (state << 13);
    let state = state ^ (state >> 7);
    state ^ (state << 17)
}

/// A page below `pages` chosen by the high bits of a random number.
pub(crate) fn choose(random: u64, pages: u64) -> u64 {
    ((u128::from(random) * u128::from(pages)) >> 64) as u64
}

#[expect(clippy::cast_sign_loss, reason = "the fraction is clamped to 0 to 1")]
fn part_of(pages: u64, fraction: f64) -> u64 {
    (pages as f64 * fraction.clamp(0.0, 1.0)) as u64
}
