//! Units beyond the rows, for pictures and for whoever wants to know more: streams, kinds of
//! memory, shapes, sizes of RAM, rates of background.

use afterimage_tools::ram::Backing;

use super::{Step, Units, sparse};
use crate::floors::anonymous;
use crate::unit::{FaultPlan, Load, Shape, Think, Unit, Wait};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Numbers of streams that are compared.
pub const STREAMS: [u16; 4] = [1, 2, 4, 8];
/// Kinds of memory that are compared.
pub const BACKINGS: [Backing; 3] = [Backing::Anonymous, Backing::Memfd, Backing::Hugetlb];
/// Shapes that are compared.
pub const SHAPES: [Shape; 4] = [Shape::Dense, Shape::HalfZero, Shape::OnePiece, Shape::Scattered];
/// Sizes of RAM of which the switchover is compared, dense and sparse.
pub const RAM: [u64; 3] = [GIB, 4 * GIB, 16 * GIB];
/// The largest of them, only sparse.
pub const LARGEST_RAM: u64 = 1024 * GIB;
/// Rates of background, in bytes a second.
pub const RATES: [u64; 4] = [64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB];

/// Background by streams: dense memory of each kind.
#[must_use]
pub fn streams(units: &Units) -> Vec<Step> {
    let each = |backing| STREAMS.map(|count| units.background(backing, Shape::Dense, count).into());
    BACKINGS.into_iter().flat_map(each).collect()
}

/// Background by kind and shape, over one stream.
#[must_use]
pub fn shapes(units: &Units) -> Vec<Step> {
    let each = |backing| SHAPES.map(|shape| units.background(backing, shape, 1).into());
    BACKINGS.into_iter().flat_map(each).collect()
}

/// The switchover by size of RAM.
#[must_use]
pub fn switchover() -> Vec<Step> {
    let dense = RAM.map(|bytes| Unit::Switchover(anonymous(bytes)).into());
    let sparse_sizes = RAM.into_iter().chain([LARGEST_RAM]);
    let sparse = sparse_sizes.map(|bytes| Unit::Switchover(sparse(bytes)).into());
    dense.into_iter().chain(sparse).collect()
}

/// A loop of faults beside background of a rate that lasts for about a second.
#[must_use]
pub const fn at_rate(rate: u64, think: Think) -> FaultPlan {
    FaultPlan { wait: Wait::Polling, load: Load::Limited(rate), think, bytes: rate }
}

/// Faults by rate of background, the engine's and L's.
#[must_use]
pub fn rates() -> Vec<Step> {
    let mut steps = Vec::new();
    for rate in RATES {
        for think in [Think::BackToBack, Think::Computing] {
            let plan = at_rate(rate, think);
            steps.push(Unit::Faults(plan).into());
            steps.push(Unit::RemoteFault(plan).into());
        }
    }
    steps
}

/// All of them.
#[must_use]
pub fn all(units: &Units) -> Vec<Step> {
    [streams(units), shapes(units), switchover(), rates()].concat()
}
