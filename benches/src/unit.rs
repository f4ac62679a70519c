//! What can be measured: each unit is one transfer, one loop of faults or one fill.
//!
//! A unit says all that both measuring processes must know. Whoever plans a run names units;
//! [`crate::worker`] carries them out.

use std::fmt;
use std::time::Duration;

use afterimage_tools::ram::Backing;
use afterimage_tools::size::Size;
use serde::{Deserialize, Serialize};

use crate::floors;
use crate::memory::PAGE;

/// One measurement, made once in each round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Floor 1: 16 bytes to the source, 4 KiB back.
    PingPong(Wait),
    /// Floor 2: a fault, answered from memory of the same process.
    LocalFault(Wait),
    /// Floor 3, `L`: event, request, answer, COPY, wake; nothing else.
    RemoteFault(FaultPlan),
    /// Floor 4: a stream of so many bytes into memory that nobody registered.
    Stream(Into, u64),
    /// Floor 5: placing pages whose content is there.
    Fill(Mechanism),
    /// Floor 6: receiving and placing so many bytes, without any book-keeping.
    Place(Mechanism, u64),
    /// The engine: a guest's faults.
    Faults(FaultPlan),
    /// The same watched, to be drawn: the watching costs a little.
    Trace(FaultPlan),
    /// The engine: all memory by background.
    Background(BackgroundPlan),
    /// The same by one stream, and the source frees what has arrived.
    Release(MemoryPlan),
    /// The same, and what is still there at the source is watched: that costs a little.
    ResidentSource(MemoryPlan),
    /// The engine: a link that is cut and comes back, while a guest waits for a page.
    Recovery(RecoveryPlan),
    /// The engine: a guest that works at the source, is moved, and works on at the destination.
    Moving(MovingPlan),
    /// The engine: limits of background, by what a relay counts.
    Bandwidth(MemoryPlan),
    /// The engine: from the stop at the source until the guest may run.
    Switchover(MemoryPlan),
    /// The engine: what both sides need beside guest RAM.
    Footprint(MemoryPlan),
    /// The engine: what travels, counted by a relay in between.
    Wire(MemoryPlan),
    /// A guest at work in a part of its memory.
    WorkingSet(Residence),
}

/// How a thread waits on the fault path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wait {
    /// In the kernel, at once.
    Blocking,
    /// Looking again and again for [`POLLING`], then in the kernel.
    Polling,
}

/// How long [`Wait::Polling`] polls, in the engine as in the floors.
pub const POLLING: Duration = Duration::from_micros(50);

impl Wait {
    /// The engine's option.
    #[must_use]
    pub const fn polling(self) -> Duration {
        match self {
            Self::Blocking => Duration::ZERO,
            Self::Polling => POLLING,
        }
    }
}

/// What else is under way while faults are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// Nothing.
    Idle,
    /// One background stream, as fast as it goes.
    Saturating,
    /// One background stream of so many bytes a second.
    Limited(u64),
}

/// What the faulting thread does between two faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Think {
    /// Nothing: the scheduler favours a thread that mostly sleeps.
    BackToBack,
    /// It computes, so that there are about 500 faults a second.
    Computing,
}

impl Think {
    /// How long it computes.
    #[must_use]
    pub const fn time(self) -> Duration {
        match self {
            Self::BackToBack => Duration::ZERO,
            Self::Computing => Duration::from_millis(2),
        }
    }
}

/// A loop of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FaultPlan {
    /// How the fault path waits.
    pub wait: Wait,
    /// What else is under way.
    pub load: Load,
    /// What the faulting thread does in between.
    pub think: Think,
    /// Guest memory. Idle, every page of it is faulted; under load the faults end with the
    /// background.
    pub bytes: u64,
}

/// Where a plain stream goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Into {
    /// Into the same buffer again and again.
    Reused,
    /// Into memory that nobody has touched.
    Fresh,
}

/// How pages come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mechanism {
    /// `UFFDIO_COPY` to anonymous memory.
    Copy,
    /// `UFFDIO_ZEROPAGE` to anonymous memory.
    ZeroPage,
    /// `UFFDIO_MOVE` of anonymous memory that is there.
    Move,
    /// `UFFDIO_CONTINUE` of a memfd, written through an alias.
    ContinueMemfd,
    /// The same on huge pages.
    ContinueHugetlb,
}

impl Mechanism {
    /// The memory that it fills.
    #[must_use]
    pub const fn backing(self) -> Backing {
        match self {
            Self::Copy | Self::ZeroPage | Self::Move => Backing::Anonymous,
            Self::ContinueMemfd => Backing::Memfd,
            Self::ContinueHugetlb => Backing::Hugetlb,
        }
    }
}

/// How content lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// In every page.
    Dense,
    /// In every second page by chance; the others are there, and zero.
    HalfZero,
    /// In the first quarter; the rest was never touched.
    OnePiece,
    /// In every fourth page; the others were never touched.
    Scattered,
    /// In the first 16 MiB; the rest was never touched.
    Sparse,
    /// Nowhere; nothing was ever touched.
    Empty,
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// What it is made of.
    pub backing: Backing,
    /// How large it is.
    pub bytes: u64,
    /// Where there is content.
    pub shape: Shape,
}

/// A transfer by background alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BackgroundPlan {
    /// What is moved.
    pub memory: MemoryPlan,
    /// Over so many streams.
    pub streams: u16,
}

/// A guest that is moved while it works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MovingPlan {
    /// Guest memory.
    pub memory: MemoryPlan,
    /// What is sent before it stops.
    pub precopy: Precopied,
}

/// What is sent while a guest still runs at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precopied {
    /// Nothing: postcopy alone.
    Nothing,
    /// All of it, once.
    OnePass,
    /// Half of it: the guest stops while the first pass is under way.
    HalfAPass,
}

/// A link that is cut while a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RecoveryPlan {
    /// Guest memory.
    pub memory: MemoryPlan,
    /// How long the link is away.
    pub outage: Outage,
}

/// How long a link is away, each time it is cut in a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outage {
    /// About 100 ms.
    Short,
    /// About two seconds: pauses between attempts have grown.
    Long,
}

impl Outage {
    /// One for each cut; they differ, so that attempts to connect are met at any moment between
    /// two of them.
    pub fn times(self) -> impl Iterator<Item = Duration> {
        let (first_ms, step_ms, cuts) = match self {
            Self::Short => (60, 11, 8),
            Self::Long => (1500, 430, 3),
        };
        (0..cuts).map(move |cut| Duration::from_millis(first_ms + cut * step_ms))
    }
}

/// Where the pages of a working set are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Residence {
    /// Here from the start, or still at the source.
    pub is_resident: bool,
    /// All guest memory; the guest works in [`WORKING_SET`] of it.
    pub bytes: u64,
}

/// The part of its memory that a guest works in.
pub const WORKING_SET: u64 = 64 << 20;

/// What small floors fill.
const FLOOR_BYTES: u64 = 64 << 20;

/// Content that the machine has room for twice.
const MOST_MOVED: u64 = 6 << 30;

impl Unit {
    /// Whether its source frees its memory.
    #[must_use]
    pub const fn releases(&self) -> bool {
        matches!(self, Self::Release(_) | Self::ResidentSource(_))
    }

    /// Whether its source's memory is of no use afterwards.
    #[must_use]
    pub const fn uses_up_memory(&self) -> bool {
        self.releases() || matches!(self, Self::Moving(_))
    }

    /// Whether it needs a source.
    #[must_use]
    pub const fn has_source(&self) -> bool {
        !matches!(
            self,
            Self::LocalFault(_)
                | Self::Fill(_)
                | Self::WorkingSet(Residence { is_resident: true, .. })
        )
    }

    /// Bytes of ordinary pages that its destination fills, about.
    #[must_use]
    pub fn destination_bytes(&self) -> u64 {
        let memory = match self {
            Self::Faults(plan) | Self::Trace(plan) => return plan.bytes,
            // The faulted memory, and where its load goes.
            Self::RemoteFault(plan) => return 2 * plan.bytes,
            Self::WorkingSet(plan) => return plan.bytes,
            Self::PingPong(_) | Self::LocalFault(_) | Self::Fill(_) => return FLOOR_BYTES,
            Self::Background(plan) => plan.memory,
            Self::Recovery(plan) => plan.memory,
            Self::Moving(plan) => plan.memory,
            Self::Switchover(memory)
            | Self::Bandwidth(memory)
            | Self::Footprint(memory)
            | Self::Wire(memory)
            | Self::ResidentSource(memory)
            | Self::Release(memory) => *memory,
            Self::Stream(_, bytes) => return *bytes,
            Self::Place(mechanism, bytes) => {
                let backing = mechanism.backing();
                MemoryPlan { backing, bytes: *bytes, shape: Shape::Dense }
            }
        };
        if memory.backing == Backing::Hugetlb || self.is_given_up() {
            return 0;
        }
        memory.content_pages() * PAGE
    }

    /// Guest memory on huge pages that its source keeps.
    #[must_use]
    pub fn huge_memory(&self) -> Option<MemoryPlan> {
        let memory = match self {
            Self::Background(plan) => Some(plan.memory),
            Self::Moving(plan) => Some(plan.memory),
            Self::Switchover(memory)
            | Self::Bandwidth(memory)
            | Self::Footprint(memory)
            | Self::Wire(memory)
            | Self::ResidentSource(memory)
            | Self::Release(memory) => Some(*memory),
            _ => floors::source_plan(*self),
        };
        memory.filter(|memory| memory.backing == Backing::Hugetlb)
    }

    /// Whether it ends before all memory has arrived, because there is no room for it twice;
    /// the destination's process ends with it.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        match self {
            Self::Switchover(memory) => memory.content_pages() * PAGE > MOST_MOVED,
            _ => false,
        }
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PingPong(wait) => write!(f, "floor 1: ping-pong, {wait}"),
            Self::LocalFault(wait) => write!(f, "floor 2: local fault, {wait}"),
            Self::RemoteFault(plan) => write!(f, "floor 3: L, {plan}"),
            Self::Stream(Into::Reused, _) => write!(f, "floor 4: stream into reused memory"),
            Self::Stream(Into::Fresh, _) => write!(f, "floor 4: stream into fresh memory"),
            Self::Fill(mechanism) => write!(f, "floor 5: fill by {mechanism}"),
            Self::Place(mechanism, _) => write!(f, "floor 6: receive and fill by {mechanism}"),
            Self::Faults(plan) => write!(f, "faults, {plan}"),
            Self::Trace(plan) => write!(f, "trace of faults, {plan}"),
            Self::Background(BackgroundPlan { memory, streams }) => {
                write!(f, "background, {memory}, streams {streams}")
            }
            Self::Release(memory) => write!(f, "background with release, {memory}, streams 1"),
            Self::ResidentSource(memory) => {
                write!(f, "what is left at the source with release, {memory}")
            }
            Self::Recovery(RecoveryPlan { memory, outage }) => {
                write!(f, "recovery after {outage}, {memory}")
            }
            Self::Moving(MovingPlan { memory, precopy }) => {
                write!(f, "a guest at work moves, {memory}, {precopy}")
            }
            Self::Bandwidth(memory) => write!(f, "limits of background, {memory}"),
            Self::Switchover(memory) => write!(f, "switchover, {memory}"),
            Self::Footprint(memory) => write!(f, "footprint, {memory}"),
            Self::Wire(memory) => write!(f, "wire, {memory}"),
            Self::WorkingSet(Residence { is_resident: true, bytes }) => {
                write!(f, "working set of {}, resident", Size(*bytes))
            }
            Self::WorkingSet(Residence { is_resident: false, bytes }) => {
                write!(f, "working set of {}, postcopy", Size(*bytes))
            }
        }
    }
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, ", self.wait)?;
        match self.load {
            Load::Idle => write!(f, "idle")?,
            Load::Saturating => write!(f, "under load")?,
            Load::Limited(rate) => write!(f, "at {}/s", Size(rate))?,
        }
        match self.think {
            Think::BackToBack => write!(f, ", back to back"),
            Think::Computing => write!(f, ", 500 a second"),
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backing = match self.backing {
            Backing::Anonymous => "anonymous",
            Backing::Memfd => "memfd",
            Backing::Hugetlb => "hugetlb",
        };
        let shape = match self.shape {
            Shape::Dense => "dense",
            Shape::HalfZero => "half zero",
            Shape::OnePiece => "sparse in one piece",
            Shape::Scattered => "sparse by page",
            Shape::Sparse => "sparse",
            Shape::Empty => "empty",
        };
        write!(f, "{} {backing}, {shape}", Size(self.bytes))
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Short => "100 ms without a link",
            Self::Long => "2 s without a link",
        })
    }
}

impl fmt::Display for Precopied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "postcopy alone",
            Self::OnePass => "after one pass",
            Self::HalfAPass => "in mid-pass",
        })
    }
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocking => "blocking",
            Self::Polling => "polling",
        })
    }
}

impl fmt::Display for Mechanism {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Copy => "COPY",
            Self::ZeroPage => "ZEROPAGE",
            Self::Move => "MOVE",
            Self::ContinueMemfd => "CONTINUE (memfd)",
            Self::ContinueHugetlb => "CONTINUE (hugetlb)",
        })
    }
}
