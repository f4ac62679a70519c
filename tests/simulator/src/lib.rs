//! Both sides of a session against a made-up world, from a seed.
//!
//! The simulator runs the real state machines ([`SourceSession`], [`DestinationSession`]),
//! the real books ([`Book`], [`InFlight`]) and the real [`Planes`], in one thread, without
//! clock or I/O. Everything around them is a model, and each part stands for one of the
//! engine:
//!
//! | here | in the engine |
//! | --- | --- |
//! | `source.rs`, `release.rs` | the source's threads and sockets; its disk; which pages are freed |
//! | `destination.rs` | the destination's threads and sockets; its disk; the fault thread |
//! | `memory.rs` | `destination/pages.rs` and `pages/claim.rs`: region 0 is copied, region 1 written through an alias; planes, memory and the pages discarded in flight outlive the process, as with a keeper |
//! | `guest.rs` | vCPUs, and for each page what it must read |
//! | `network.rs` | connections: ordered, cut with loss of what is on its way, silently or not; frames of passed connections slipped into later ones |
//! | `manager.rs` | VMMs and operators; crashes of either process before or after its record is on disk, disks that fail with or without having written |
//!
//! A random step is taken at a time, and after each the invariants of the design are looked
//! at (`checks.rs`, one function each). Some hundred steps may break anything; then the
//! world is healed, and everything has to end within a bound.
//!
//! What is not modelled: the bytes of frames (the wire has its own tests), several threads
//! within a side (the planes have loom), precopy passes, the exact errors of the kernel.
//!
//! A [`Mutant`] breaks one rule of a driver, to show that the checks would see it.
//!
//! ```
//! let outcome = afterimage_simulator::run(1, None, false);
//! assert_eq!(outcome.violation, None);
//! ```
//!
//! [`SourceSession`]: afterimage_protocol::session::SourceSession
//! [`DestinationSession`]: afterimage_protocol::session::DestinationSession
//! [`Book`]: afterimage_protocol::session::Book
//! [`InFlight`]: afterimage_protocol::session::InFlight
//! [`Planes`]: afterimage_protocol::bitmap::Planes

mod checks;
mod coverage;
mod destination;
mod guest;
mod manager;
mod memory;
mod mutant;
mod network;
mod random;
mod release;
mod renew;
mod source;
mod world;

pub use checks::Violation;
pub use coverage::Coverage;
pub use mutant::Mutant;

use world::World;

/// How one run went.
#[derive(Debug)]
pub struct Outcome {
    /// What it was drawn from.
    pub seed: u64,
    /// How many steps it took.
    pub steps: u64,
    /// The first rule that did not hold.
    pub violation: Option<Violation>,
    /// How it ended: the source's ownership.
    pub ended: String,
    /// The transitions seen.
    pub coverage: Coverage,
    /// What happened, if that was asked for.
    pub trace: Vec<String>,
}

impl Outcome {
    /// The command that shows this run again.
    #[must_use]
    pub fn replay(&self, mutant: Option<Mutant>) -> String {
        let mutant = mutant.map(|mutant| format!(" --mutant {mutant}")).unwrap_or_default();
        format!("cargo run --release --bin simulate -- --seed {}{mutant}", self.seed)
    }
}

/// One run. With `traces` the outcome says everything that happened.
#[must_use]
pub fn run(seed: u64, mutant: Option<Mutant>, traces: bool) -> Outcome {
    let mut world = World::new(seed, mutant, traces);
    world.run();
    Outcome {
        seed,
        steps: world.steps,
        ended: format!("{:?}", world.source.session.record().ownership),
        violation: world.violation,
        coverage: world.coverage,
        trace: world.trace,
    }
}

/// The first seed below `limit` at which a mutant is caught.
#[must_use]
pub fn caught_at(mutant: Mutant, limit: u64) -> Option<Outcome> {
    (0..limit).map(|seed| run(seed, Some(mutant), false)).find(|run| run.violation.is_some())
}
