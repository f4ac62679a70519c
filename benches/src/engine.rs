//! The engine under measurement, as a VMM would link it: a source in one process, a
//! destination in another.

mod bandwidth;
pub mod destination;
pub mod echo;
mod footprint;
mod precopy;
mod recovery;
mod relay;
mod resident;
pub mod source;
mod stopped;

use crate::floors::anonymous;
use crate::unit::{
    BackgroundPlan, FaultPlan, Load, MemoryPlan, MovingPlan, RecoveryPlan, Residence, Unit, Wait,
};

/// How long a guest takes to move whose source is watched while it frees: it gathers what it
/// frees for a quarter of a second.
const RESIDENT_SECONDS: u64 = 3;

/// How a unit uses the engine, alike on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Guest memory.
    pub memory: MemoryPlan,
    /// Background streams.
    pub streams: u16,
    /// How the fault path waits.
    pub wait: Wait,
    /// How fast the background goes; [`Load::Idle`] sends only what is asked for.
    pub background: Load,
}

impl Setup {
    /// The setup of a unit of the engine.
    #[must_use]
    pub const fn of(unit: Unit) -> Option<Self> {
        let (memory, streams, wait, background) = match unit {
            Unit::Faults(FaultPlan { wait, load, bytes, .. })
            | Unit::Trace(FaultPlan { wait, load, bytes, .. }) => (anonymous(bytes), 1, wait, load),
            Unit::Background(BackgroundPlan { memory, streams }) => {
                (memory, streams, Wait::Blocking, Load::Saturating)
            }
            Unit::Release(memory) => (memory, 1, Wait::Blocking, Load::Saturating),
            Unit::ResidentSource(memory) => {
                (memory, 1, Wait::Blocking, Load::Limited(memory.bytes / RESIDENT_SECONDS))
            }
            Unit::Recovery(RecoveryPlan { memory, .. }) => (memory, 1, Wait::Polling, Load::Idle),
            Unit::Moving(MovingPlan { memory, .. })
            | Unit::Switchover(memory)
            | Unit::Wire(memory)
            | Unit::Footprint(memory)
            | Unit::Bandwidth(memory) => (memory, 1, Wait::Polling, Load::Saturating),
            Unit::WorkingSet(Residence { is_resident: false, bytes }) => {
                (anonymous(bytes), 1, Wait::Polling, Load::Saturating)
            }
            _ => return None,
        };
        Some(Self { memory, streams, wait, background })
    }
}
