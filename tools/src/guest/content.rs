//! What guest RAM holds at first, and what it must hold after any stop.
//!
//! Invariant: [`verify`] accounts for every byte after the system area. Each has one
//! value that it may have, given the seed and the progress of the vCPUs, except the
//! counters of single pages in random workloads, whose sum is checked.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;

use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;

use super::spec::{COUNTER_OFFSET, LANE_BYTES, TAG_OFFSET, mix};
use super::{GuestKind, GuestSpec, MachineState, VcpuProgress, Workload, control, mailbox, tag_of};
use crate::ram::{GuestAddress, GuestRam, PAGE_BYTES};

type Page = [u64; 512];

const LANE_WORDS: usize = (LANE_BYTES / 8) as usize;
const COUNTER_WORD: usize = (COUNTER_OFFSET / 8) as usize;
const TAG_WORD: usize = (TAG_OFFSET / 8) as usize;

/// A byte of the pattern that does not fit the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {page}, lane {lane}: expected {expected}, found {found}")]
pub struct PatternError {
    /// The first page that is wrong.
    pub page: u64,
    /// The lane: the vCPU that owns the byte.
    pub lane: u32,
    /// The value that it should have.
    pub expected: u8,
    /// The value that it has.
    pub found: u8,
}

/// What [`verify_pattern`] saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PatternReport {
    /// Pages checked.
    pub pages: u64,
    /// Lanes checked in each.
    pub lanes: u32,
}

/// What is wrong in guest RAM.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The pattern is broken.
    #[error("the pattern is broken at {0}")]
    Pattern(#[from] PatternError),
    /// A page does not carry the hash of its number.
    #[error("page {page}: its tag should be {expected:#018x}, is {found:#018x}")]
    Tag {
        /// The page.
        page: u64,
        /// Its tag.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// Content that nobody writes has changed.
    #[error("page {page}, byte {offset}: should be {expected:#018x}, is {found:#018x}")]
    Content {
        /// The page.
        page: u64,
        /// Where in it, in bytes.
        offset: usize,
        /// The word that was there at first.
        expected: u64,
        /// The word that is there now.
        found: u64,
    },
    /// The counters of a lane do not add up to what its vCPU has counted.
    #[error("the counters of lane {lane} add up to {found}, its vCPU counted {expected}")]
    Total {
        /// The lane.
        lane: u32,
        /// What the vCPU counted.
        expected: u64,
        /// The sum.
        found: u64,
    },
    /// The VMM's count of a vCPU's reports, in RAM, is not that of its operations.
    #[error("the VMM has counted {found} reports of vCPU {vcpu}, it has made {expected}")]
    Mailbox {
        /// The vCPU.
        vcpu: u32,
        /// How many it has made.
        expected: u64,
        /// How many are counted.
        found: u64,
    },
    /// The guest itself read wrong tags.
    #[error("vCPU {vcpu} read {count} wrong tags")]
    Seen {
        /// The vCPU.
        vcpu: u32,
        /// How often.
        count: u64,
    },
}

/// What [`verify`] checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Pages checked: all after the system area.
    pub pages: u64,
    /// How many of them the vCPUs work in.
    pub worked_pages: u64,
    /// How many are entirely zero.
    pub zero_pages: u64,
    /// Increments accounted for.
    pub increments: u64,
}

impl fmt::Display for VerifyReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} pages verified ({} worked, {} zero), {} increments accounted for",
            self.pages, self.worked_pages, self.zero_pages, self.increments
        )
    }
}

/// Fills fresh `ram`, all zero, with what a guest of this spec begins with. Pages
/// that are to be zero are not touched.
pub fn init_ram(ram: &GuestRam, spec: &GuestSpec) {
    for page in 0..spec.geometry().pages {
        let words = initial_page(spec, page);
        if words.iter().any(|word| *word != 0) {
            ram.write_page(spec.geometry().address(page), &words);
        }
    }
}

/// SHA-256 of some numbered pages, for instance of those from
/// [`GuestSpec::worked_pages`] on, which nobody writes. On shared memory this, as
/// [`verify`], allocates the holes that it reads.
#[must_use]
pub fn digest(ram: &GuestRam, spec: &GuestSpec, pages: Range<u64>) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for page in pages {
        let words = ram.read_page(spec.geometry().address(page));
        hasher.update(words.as_bytes());
    }
    hasher.finalize().into()
}

/// Checks the pattern by RAM alone: along the worked pages the byte of each vCPU
/// equals the one before it, but for at most one step down by one.
///
/// # Errors
/// The first page at which it does not.
pub fn verify_pattern(ram: &GuestRam, spec: &GuestSpec) -> Result<PatternReport, PatternError> {
    for lane in 0..spec.vcpus() {
        let byte_of = |page| {
            let address = spec.geometry().address(page);
            let offset = u64::from(lane) * LANE_BYTES;
            ram.byte(GuestAddress(address.0 + offset)).load(Ordering::Relaxed)
        };
        let mut expected: u8 = byte_of(0);
        let mut stepped = false;
        for page in 1..spec.worked_pages() {
            let found = byte_of(page);
            if found == expected {
                continue;
            }
            if stepped || found != expected.wrapping_sub(1) {
                return Err(PatternError { page, lane, expected, found });
            }
            stepped = true;
            expected = found;
        }
    }
    Ok(PatternReport { pages: spec.worked_pages(), lanes: spec.vcpus() })
}

/// Checks every byte of a stopped guest's RAM after the system area.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(ram: &GuestRam, state: &MachineState) -> Result<VerifyReport, VerifyError> {
    let spec = state.spec();
    let mut sums = vec![0u64; spec.vcpus() as usize];
    let mut zero_pages = 0;
    for page in 0..spec.geometry().pages {
        let found = ram.read_page(spec.geometry().address(page));
        let mut expected = initial_page(spec, page);
        if page < spec.worked_pages() {
            if found[TAG_WORD] != expected[TAG_WORD] {
                return Err(VerifyError::Tag {
                    page,
                    expected: expected[TAG_WORD],
                    found: found[TAG_WORD],
                });
            }
            expect_lanes(state, page, &found, &mut expected, &mut sums)?;
        }
        zero_pages += u64::from(found == [0; 512]);
        if let Some(word) = (0..512).find(|word| found[*word] != expected[*word]) {
            return Err(VerifyError::Content {
                page,
                offset: word * 8,
                expected: expected[word],
                found: found[word],
            });
        }
    }
    verify_totals(ram, state, &sums)?;
    Ok(VerifyReport {
        pages: spec.geometry().pages,
        worked_pages: spec.worked_pages(),
        zero_pages,
        increments: sums.iter().sum(),
    })
}

/// Checks the pattern bytes of a page against progress; adds up its counters. What
/// is accepted so is put in `expected`.
fn expect_lanes(
    state: &MachineState,
    page: u64,
    found: &Page,
    expected: &mut Page,
    sums: &mut [u64],
) -> Result<(), PatternError> {
    let spec = state.spec();
    for (lane, vcpu) in state.progress().iter().enumerate() {
        let first = lane * LANE_WORDS;
        if spec.workload() == Workload::Pattern {
            let increments = increments_of(*vcpu, page, spec.worked_pages());
            let value = increments as u8;
            let in_page = found[first] as u8;
            if in_page != value {
                return Err(PatternError {
                    page,
                    lane: lane as u32,
                    expected: value,
                    found: in_page,
                });
            }
            expected[first] = value.into();
            sums[lane] += increments;
        } else {
            let counter = found[first + COUNTER_WORD];
            expected[first + COUNTER_WORD] = counter;
            sums[lane] = sums[lane].wrapping_add(counter);
        }
    }
    Ok(())
}

/// How often a vCPU that goes through all pages in turn has incremented this one.
fn increments_of(vcpu: VcpuProgress, page: u64, pages: u64) -> u64 {
    let done = vcpu.operations + u64::from(vcpu.in_flight);
    done / pages + u64::from(page < done % pages)
}

fn verify_totals(ram: &GuestRam, state: &MachineState, sums: &[u64]) -> Result<(), VerifyError> {
    let spec = state.spec();
    for (lane, (vcpu, found)) in state.progress().iter().zip(sums).enumerate() {
        let lane = lane as u32;
        let load = |offset| ram.word(control::address(lane, offset)).load(Ordering::Relaxed);
        let count = load(control::ERRORS);
        if count != 0 {
            return Err(VerifyError::Seen { vcpu: lane, count });
        }
        let expected = load(control::WRITES) + u64::from(vcpu.in_flight);
        if spec.workload() != Workload::Pattern && *found != expected {
            return Err(VerifyError::Total { lane, expected, found: *found });
        }
        if state.kind() == GuestKind::Kvm {
            verify_reports(ram, spec, lane, vcpu.operations)?;
        }
    }
    Ok(())
}

/// Checks what the VMM has counted of a vCPU's reports.
fn verify_reports(
    ram: &GuestRam,
    spec: &GuestSpec,
    vcpu: u32,
    operations: u64,
) -> Result<(), VerifyError> {
    let found = ram.word(mailbox::address(vcpu)).load(Ordering::Relaxed);
    let expected = operations / spec.report_every();
    // It may have been stopped when it was about to report.
    let is_on_its_way = operations.is_multiple_of(spec.report_every()) && found + 1 == expected;
    if found == expected || is_on_its_way {
        return Ok(());
    }
    Err(VerifyError::Mailbox { vcpu, expected, found })
}

/// What a page holds at first: content or zeros where nobody works; else a tag, and
/// content or zeros after it.
fn initial_page(spec: &GuestSpec, page: u64) -> Page {
    let mut words = [0; 512];
    let from = if page < spec.worked_pages() {
        words[TAG_WORD] = tag_of(page);
        TAG_WORD + 1
    } else {
        0
    };
    let seed = mix(spec.seed() ^ mix(page));
    // 2^-53 of the 53 high bits: a number from 0 to 1 that f64 holds exactly.
    let chance = (mix(seed) >> 11) as f64 * (-53f64).exp2();
    if chance >= spec.zero_fraction() {
        let mut value = seed;
        for word in &mut words[from..] {
            value = value.wrapping_add(seed | 1);
            *word = value ^ (value >> 32).wrapping_mul(0x94d0_49bb_1331_11eb);
        }
    }
    words
}

const _: () = assert!(PAGE_BYTES == size_of::<Page>() as u64);
