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
//! | `source/passes.rs` | the tracker of what the guest writes; what is told as stale, and when a pass ends |
//! | `destination.rs` | the destination's threads and sockets; its disk; its VMM |
//! | `destination/handler.rs` | the fault thread; a handler that dies and is succeeded |
//! | `destination/passes.rs`, `memory/early.rs` | early copies, and `pages/early.rs` |
//! | `memory.rs` | `destination/pages.rs` and `pages/claim.rs`: region 0 is copied, region 1 written through an alias; what outlives a handler, as with a keeper |
//! | `guest.rs` | vCPUs, and for each page what it must read |
//! | `network.rs` | connections: ordered, cut, dead in one direction, late, stuck, parted; frames and hellos of passed connections that come again |
//! | `slots.rs`, `renew.rs` | both sides' data channels: made, accepted, given up, replaced |
//! | `watch.rs`, `patience.rs` | what both hosts watch on a clock |
//! | `manager.rs` | VMMs and operators |
//! | `trouble.rs` | crashes of each party before or after its record is on disk, processes that are stopped or paused, disks that are full or lie |
//!
//! A random step is taken at a time, and after each the invariants of the design are looked
//! at (`checks.rs`, one function each). Some hundred steps may break anything; then the
//! world is healed, and everything has to end within a bound. A [`Kill`] instead ends one
//! party at one step of a run in which nothing else goes wrong: done at every step, no step
//! is left out by chance.
//!
//! What is not modelled: the bytes of frames (the wire has its own tests), several threads
//! within a side (the planes have loom), the exact errors of the kernel.
//!
//! A [`Mutant`] breaks one rule of a driver, to show that the checks would see it.
//!
//! ```
//! use afterimage_simulator::Setup;
//!
//! assert_eq!(Setup::new(1).run().violation, None);
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
mod patience;
mod plan;
mod random;
mod release;
mod renew;
mod slots;
mod source;
mod sweep;
mod trouble;
mod watch;
mod world;

pub use checks::Violation;
pub use coverage::Coverage;
pub use mutant::Mutant;
pub use sweep::{Summary, all_caught, available_jobs, caught_at, every_step, sweep};
pub use trouble::{Kill, Party};

use world::World;

/// Whether a run says everything that happens in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tracing {
    /// Only how it went.
    #[default]
    Off,
    /// Everything.
    On,
}

/// What decides a run: two runs of one setup are the same.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    seed: u64,
    mutant: Option<Mutant>,
    kill: Option<Kill>,
    is_calm: bool,
    tracing: Tracing,
}

impl Setup {
    /// The run drawn from a seed, in which anything may go wrong.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, mutant: None, kill: None, is_calm: false, tracing: Tracing::Off }
    }

    /// A rule is broken.
    #[must_use]
    pub const fn with_mutant(self, mutant: Mutant) -> Self {
        Self { mutant: Some(mutant), ..self }
    }

    /// Nothing goes wrong but this.
    #[must_use]
    pub const fn with_kill(self, kill: Kill) -> Self {
        Self { kill: Some(kill), is_calm: true, ..self }
    }

    /// Nothing goes wrong.
    #[must_use]
    pub const fn calm(self) -> Self {
        Self { is_calm: true, ..self }
    }

    /// Whether the outcome says everything that happened.
    #[must_use]
    pub const fn traced(self, tracing: Tracing) -> Self {
        Self { tracing, ..self }
    }

    /// Who can be killed in this run. A VMM whose guest runs is spared where its source frees
    /// pages.
    #[must_use]
    pub fn mortals(self) -> Vec<Party> {
        let plan = World::new(&self).plan;
        let dies = |party: &Party| *party != Party::Vmm || plan.may_lose_memory;
        Party::ALL.into_iter().filter(dies).collect()
    }

    /// Carries the run out, in this thread, to its end or to the first rule that does not
    /// hold.
    #[must_use]
    pub fn run(self) -> Outcome {
        let mut world = World::new(&self);
        world.run();
        Outcome {
            setup: self,
            steps: world.steps,
            ended: format!("{:?}", world.source.session.record().ownership),
            violation: world.violation,
            coverage: world.coverage,
            trace: world.trace,
        }
    }
}

/// How one run went.
#[derive(Debug)]
pub struct Outcome {
    setup: Setup,
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
    /// The seed that it was drawn from.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.setup.seed
    }

    /// The command that shows this run again.
    #[must_use]
    pub fn replay(&self) -> String {
        let Setup { seed, mutant, kill, .. } = self.setup;
        let kill = kill.map(|kill| format!(" --kill {kill}")).unwrap_or_default();
        let mutant = mutant.map(|mutant| format!(" --mutant {mutant}")).unwrap_or_default();
        format!("cargo run --release --bin simulate -- --seed {seed}{kill}{mutant}")
    }
}
