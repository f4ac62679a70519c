//! The engine under measurement, as a VMM would link it: a source in one process, a
//! destination in another.

pub mod destination;
mod footprint;
mod relay;
pub mod source;

use crate::unit::{BackgroundPlan, FaultPlan, Load, MemoryPlan, Residence, Unit, Wait};

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
        let background = |memory, streams| Self {
            memory,
            streams,
            wait: Wait::Blocking,
            background: Load::Saturating,
        };
        Some(match unit {
            Unit::Faults(FaultPlan { wait, load, bytes, .. }) => {
                Self { wait, background: load, ..background(crate::floors::anonymous(bytes), 1) }
            }
            Unit::Background(BackgroundPlan { memory, streams }) => background(memory, streams),
            Unit::Switchover(memory) | Unit::Wire(memory) | Unit::Footprint(memory) => {
                Self { wait: Wait::Polling, ..background(memory, 1) }
            }
            Unit::WorkingSet(Residence { is_resident: false, bytes }) => {
                let memory = crate::floors::anonymous(bytes);
                Self { wait: Wait::Polling, ..background(memory, 1) }
            }
            _ => return None,
        })
    }
}
