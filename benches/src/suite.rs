//! Which units a run measures, and which rows come of them.
//!
//! A row is a figure with a reach: worked out in each round from units of the same round, so
//! that what the machine did meanwhile cancels out.

pub mod rows;
pub mod sweeps;

use std::collections::BTreeMap;

use afterimage_tools::ram::Backing;

use crate::figures::Figures;
use crate::floors::anonymous;
use crate::unit::{
    BackgroundPlan, FaultPlan, Into, Load, Mechanism, MemoryPlan, MovingPlan, Precopied, Residence,
    Shape, Think, Unit, Wait,
};

/// What connects both sides of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Over {
    /// What the user chose.
    Chosen,
    /// A link of 1 Gbit/s.
    Gigabit,
}

/// A unit and what it goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Step {
    /// What is measured.
    pub unit: Unit,
    /// Over what.
    pub over: Over,
}

impl From<Unit> for Step {
    fn from(unit: Unit) -> Self {
        Self { unit, over: Over::Chosen }
    }
}

/// All figures of one round.
pub type Round = BTreeMap<Step, Figures>;

/// Whether more is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The value must not exceed the reach.
    Lower,
    /// The value must not be less than the reach.
    Higher,
}

/// What a row comes to in one round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value {
    /// What was measured.
    pub value: f64,
    /// What it is to reach; `None` where nothing is asked.
    pub reach: Option<f64>,
}

type WorkOut = Box<dyn Fn(&Round) -> Option<Value>>;

/// A row of the table.
pub struct Row {
    /// Its name, as in the JSON.
    pub name: &'static str,
    /// What it says, for people.
    pub what: &'static str,
    /// Which way is better.
    pub better: Better,
    /// What it is worked out from.
    pub steps: Vec<Step>,
    /// The working out.
    pub work_out: WorkOut,
}

impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Row").field("name", &self.name).finish_non_exhaustive()
    }
}

/// How large a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Guest memory of transfers and of faults under load.
    pub guest: u64,
    /// Guest memory of faults with computing in between, of which there are fewer a second.
    pub busy_guest: u64,
    /// Guest memory on huge pages.
    pub huge_guest: u64,
    /// Guest memory of idle faults: every page is one.
    pub idle_guest: u64,
}

impl Sizes {
    /// For figures that are to be kept.
    pub const FULL: Self =
        Self { guest: 1 << 30, busy_guest: 2 << 30, huge_guest: 512 << 20, idle_guest: 32 << 20 };
    /// For a look.
    pub const QUICK: Self =
        Self { guest: 512 << 20, busy_guest: 1 << 30, huge_guest: 256 << 20, idle_guest: 16 << 20 };

    /// With a guest of another size, and the others in proportion.
    #[must_use]
    pub const fn with_guest(self, guest: u64) -> Self {
        let idle_guest = if guest < self.idle_guest { guest } else { self.idle_guest };
        Self { guest, busy_guest: 2 * guest, huge_guest: guest / 2, idle_guest }
    }
}

/// The units of a run of one size.
#[derive(Clone, Copy, Debug)]
pub struct Units {
    sizes: Sizes,
}

impl Units {
    /// Of this size.
    #[must_use]
    pub const fn new(sizes: Sizes) -> Self {
        Self { sizes }
    }

    /// Faults without load.
    #[must_use]
    pub const fn idle(&self, wait: Wait) -> FaultPlan {
        let bytes = self.sizes.idle_guest;
        FaultPlan { wait, load: Load::Idle, think: Think::BackToBack, bytes }
    }

    /// Faults under a saturating load, as the engine waits by default.
    #[must_use]
    pub const fn loaded(&self, think: Think) -> FaultPlan {
        let bytes = match think {
            Think::BackToBack => self.sizes.guest,
            Think::Computing => self.sizes.busy_guest,
        };
        FaultPlan { wait: Wait::Polling, load: Load::Saturating, think, bytes }
    }

    /// All of a dense guest by one stream.
    #[must_use]
    pub const fn dense(&self, backing: Backing) -> Unit {
        self.background(backing, Shape::Dense, 1)
    }

    /// The same where the source frees what has arrived.
    #[must_use]
    pub const fn release(&self, backing: Backing) -> Unit {
        let (bytes, shape) = (self.sizes.guest, Shape::Dense);
        Unit::Release(MemoryPlan { backing, bytes, shape })
    }

    /// The same watched.
    #[must_use]
    pub const fn resident_source(&self, backing: Backing) -> Unit {
        let (bytes, shape) = (self.sizes.guest, Shape::Dense);
        Unit::ResidentSource(MemoryPlan { backing, bytes, shape })
    }

    /// A guest at work, moved.
    #[must_use]
    pub const fn moving(&self, backing: Backing, precopy: Precopied) -> Unit {
        let memory = MemoryPlan { backing, bytes: self.sizes.guest, shape: Shape::Dense };
        Unit::Moving(MovingPlan { memory, precopy })
    }

    /// Limits of background.
    #[must_use]
    pub const fn bandwidth(&self) -> Unit {
        Unit::Bandwidth(anonymous(self.at_most(MOST_LIMITED)))
    }

    /// Faults beside a background that is limited, or without any; every page is a fault then.
    #[must_use]
    pub const fn limited(&self, load: Load) -> FaultPlan {
        let bytes = self.at_most(LIMITED_FAULTS);
        FaultPlan { wait: Wait::Polling, load, think: Think::BackToBack, bytes }
    }

    const fn at_most(&self, bytes: u64) -> u64 {
        if self.sizes.guest < bytes { self.sizes.guest } else { bytes }
    }

    /// All of a guest by streams.
    #[must_use]
    pub const fn background(&self, backing: Backing, shape: Shape, streams: u16) -> Unit {
        let bytes = match backing {
            Backing::Hugetlb => self.sizes.huge_guest,
            _ => self.sizes.guest,
        };
        Unit::Background(BackgroundPlan { memory: MemoryPlan { backing, bytes, shape }, streams })
    }

    /// A dense guest with as much content as a sparse one.
    #[must_use]
    pub const fn as_much_content(&self) -> Unit {
        let memory = anonymous(self.sizes.guest / 4);
        Unit::Background(BackgroundPlan { memory, streams: 1 })
    }

    /// Floor 6.
    #[must_use]
    pub const fn place(&self, mechanism: Mechanism) -> Unit {
        let bytes = match mechanism {
            Mechanism::ContinueHugetlb => self.sizes.huge_guest,
            _ => self.sizes.guest,
        };
        Unit::Place(mechanism, bytes)
    }

    /// Floor 4.
    #[must_use]
    pub const fn stream(&self, into: Into) -> Unit {
        Unit::Stream(into, self.sizes.guest)
    }

    /// A guest at work.
    #[must_use]
    pub const fn working_set(&self, is_resident: bool) -> Unit {
        Unit::WorkingSet(Residence { is_resident, bytes: self.sizes.guest })
    }

    /// Every floor of the table.
    #[must_use]
    pub fn floors(&self) -> Vec<Step> {
        let mut units = Vec::new();
        for wait in [Wait::Blocking, Wait::Polling] {
            units.push(Unit::PingPong(wait));
            units.push(Unit::LocalFault(wait));
            units.push(Unit::RemoteFault(self.idle(wait)));
        }
        units.extend([Into::Reused, Into::Fresh].map(|into| self.stream(into)));
        units.extend(FILLS.map(Unit::Fill));
        units.extend(PLACES.map(|mechanism| self.place(mechanism)));
        units.into_iter().map(Step::from).collect()
    }
}

/// Guest memory of which limits of background are a part each second: of larger ones the relay
/// that counts would be the limit.
const MOST_LIMITED: u64 = 512 << 20;
/// Guest memory of faults beside a limited background: 32,768 faults if there is none.
const LIMITED_FAULTS: u64 = 128 << 20;

const FILLS: [Mechanism; 5] = [
    Mechanism::Copy,
    Mechanism::ZeroPage,
    Mechanism::Move,
    Mechanism::ContinueMemfd,
    Mechanism::ContinueHugetlb,
];
const PLACES: [Mechanism; 3] =
    [Mechanism::Copy, Mechanism::ContinueMemfd, Mechanism::ContinueHugetlb];

/// A guest of 1 GiB with content everywhere.
pub const DENSE_GIB: MemoryPlan = anonymous(1 << 30);
/// A guest of 1 TiB with almost none.
pub const SPARSE_TIB: MemoryPlan = sparse(1 << 40);

/// A guest of 1 GiB with almost no content.
pub const SPARSE_GIB: MemoryPlan = sparse(1 << 30);
/// A guest of 64 GiB with almost no content.
pub const SPARSE_64_GIB: MemoryPlan = sparse(64 << 30);

/// Anonymous memory with almost no content.
#[must_use]
pub const fn sparse(bytes: u64) -> MemoryPlan {
    MemoryPlan { backing: Backing::Anonymous, bytes, shape: Shape::Sparse }
}
