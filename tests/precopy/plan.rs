//! What a seeded run does, all of it decided by the number of the seed.

use std::collections::BTreeSet;

use afterimage::Passes;
use afterimage_tools::guest::{GuestKind, TrackerKind, Workload};
use afterimage_tools::ram::Backing;

/// `SplitMix64`.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// Less than `end`.
    pub(crate) const fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn choice<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// Of any order of magnitude below 2^`bits`.
    pub(crate) const fn magnitude(&mut self, bits: u64) -> u64 {
        let most = 1 << self.below(bits);
        most + self.below(most)
    }
}

/// When the source stops its guest, or takes it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Stopped when the engine says so.
    Due,
    /// Stopped after so many operations of the guest.
    After(u64),
    /// The same, and taken back meanwhile by another thread: after so many operations, or so
    /// many looks once it was stopped.
    Reclaimed { stop_after: u64, reclaim_after: u64, looks: u64 },
}

impl Ending {
    pub(crate) const fn at_random(random: &mut Random) -> Self {
        match random.below(4) {
            0 => Self::Due,
            1 => Self::After(random.magnitude(20)),
            _ => Self::Reclaimed {
                stop_after: random.magnitude(20),
                reclaim_after: random.magnitude(21),
                looks: random.magnitude(14),
            },
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) kind: GuestKind,
    pub(crate) tracker: TrackerKind,
    pub(crate) backing: Backing,
    pub(crate) passes: Option<Passes>,
    pub(crate) vcpus: u32,
    pub(crate) streams: u16,
    pub(crate) workload: Workload,
    pub(crate) checksums: bool,
    /// Whether the guest is held at the source until the engine asks.
    pub(crate) holds: bool,
    /// MiB a second before the switchover.
    pub(crate) rate: Option<u64>,
    pub(crate) worked: f64,
    pub(crate) zero: f64,
    pub(crate) first: Ending,
    pub(crate) random: Random,
}

impl Plan {
    pub(crate) fn of(kind: GuestKind, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let passes = [None, Some(Passes::Count(1)), Some(Passes::Count(3))];
        let trackers: &[_] = match kind {
            GuestKind::Kvm => &[TrackerKind::Log, TrackerKind::Ring, TrackerKind::Pagemap],
            GuestKind::Threads => &[TrackerKind::Pagemap, TrackerKind::Bitmap],
        };
        let passes = [&passes[..], &[Some(Passes::Automatic)]].concat();
        Self {
            seed,
            kind,
            tracker: random.choice(trackers),
            backing: random.choice(&[Backing::Anonymous, Backing::Memfd, Backing::Hugetlb]),
            passes: random.choice(&passes),
            vcpus: random.choice(&[1, 2, 4]),
            streams: random.choice(&[1, 4]),
            workload: random.choice(&[
                Workload::Pattern,
                Workload::Sequential,
                Workload::Random,
                Workload::HotSet,
                Workload::ReadMostly,
                Workload::Mixed,
            ]),
            checksums: random.below(4) == 0,
            holds: random.below(4) == 0,
            rate: random.choice(&[None, None, Some(32), Some(256)]),
            worked: random.choice(&[0.1, 0.5, 1.0]),
            zero: random.choice(&[0.0, 0.5]),
            first: Ending::at_random(&mut random),
            random,
        }
    }

    /// What it is like in each respect that is to be combined with every other.
    fn traits(&self) -> [String; 6] {
        let ending = match self.first {
            Ending::Due => "due",
            Ending::After(_) => "instant",
            Ending::Reclaimed { .. } => "cancel",
        };
        [
            self.tracker.to_string(),
            format!("{:?}", self.backing),
            format!("{:?}", self.passes),
            format!("{} vCPUs", self.vcpus),
            format!("{} streams", self.streams),
            ending.to_owned(),
        ]
    }
}

#[test]
fn the_runs_of_a_test_combine_everything_with_everything() {
    for (kind, choices) in
        [(GuestKind::Kvm, [3, 3, 4, 3, 2, 3]), (GuestKind::Threads, [2, 3, 4, 3, 2, 3])]
    {
        let mut pairs = BTreeSet::new();
        for seed in 0..super::RUNS {
            let traits = Plan::of(kind, seed).traits();
            for (one, first) in traits.iter().enumerate() {
                pairs
                    .extend(traits[one + 1..].iter().map(|second| (first.clone(), second.clone())));
            }
        }
        let of = |index: usize| choices[index + 1..].iter().sum::<usize>() * choices[index];
        assert_eq!(pairs.len(), (0..choices.len()).map(of).sum::<usize>(), "{pairs:?}");
    }
}
