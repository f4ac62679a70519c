//! Guests that do verifiable work in their RAM and can be stopped, moved and resumed.
//!
//! Responsible for what a guest does ([`Workload`]), for what its RAM must therefore
//! hold ([`init_ram`], [`verify`]) and for running it on plain threads
//! ([`ThreadsGuest`]); [`crate::microvm`] runs the same on KVM. Moving the memory is
//! left to others.
//!
//! Invariant: between stop and restore a guest is its RAM and its [`MachineState`],
//! nothing else; and neither building a guest from a state nor asking for its
//! progress touches its RAM.

mod content;
mod progress;
mod spec;
mod state;
mod threads;
mod tracking;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use afterimage::dirty::DirtyTracker;

pub use content::{
    PatternError, PatternReport, VerifyError, VerifyReport, digest, init_ram, verify,
    verify_pattern,
};
pub use progress::Progress;
pub use spec::{Geometry, GuestSpec, MAX_VCPUS, SYSTEM_BYTES, SpecError, Workload};
pub(crate) use spec::{control, mailbox, tag_of};
pub(crate) use state::Sections;
pub use state::{GuestKind, MachineState, StateError, VcpuProgress};
pub use threads::ThreadsGuest;
pub(crate) use threads::install_control_pages;
pub use tracking::TrackerKind;
pub(crate) use tracking::tracked_regions;

use crate::ram::GuestRam;

/// Why a guest could not be built, started, stopped or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// The specification does not fit the RAM.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The machine state is damaged, of another version or of another kind of guest.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM refused something.
    #[error("KVM: cannot {operation}")]
    Kvm {
        /// What was being done.
        operation: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start the thread of vCPU {vcpu}")]
    Thread {
        /// Which vCPU.
        vcpu: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// This machine's CPU or KVM cannot run a guest that was built elsewhere.
    #[error("this machine cannot run the guest: {0}")]
    Incompatible(String),
    /// The guest has failed and its state cannot be moved.
    #[error("the guest failed: {0}")]
    Failed(String),
    /// What the guest writes cannot be tracked in this way.
    #[error("what the guest writes cannot be tracked by {tracker}")]
    Untracked {
        /// In which way.
        tracker: TrackerKind,
        /// Why not, and what to use instead.
        source: io::Error,
    },
    /// Start of a running guest, or stop of a stopped one.
    #[error("the guest is {0} already")]
    Already(&'static str),
}

/// A guest with its vCPUs: stopped when built, and whenever [`Guest::stop`] returned.
///
/// Dropping a running guest stops it, and waits as long as `stop` would.
pub trait Guest: Send + Debug {
    /// Lets all vCPUs run.
    ///
    /// # Errors
    /// If it runs already, or a thread cannot be started.
    fn start(&mut self) -> Result<(), GuestError>;

    /// Stops all vCPUs: when this returns, nobody writes RAM any more.
    ///
    /// Running vCPUs stop within microseconds. A vCPU that waits for a page stops
    /// only once the page has arrived: until then this **blocks**.
    ///
    /// # Errors
    /// If it does not run, or a vCPU failed.
    fn halt(&mut self) -> Result<(), GuestError>;

    /// All state of the stopped vCPUs that is not in RAM.
    ///
    /// # Errors
    /// If it runs, a vCPU failed, or its state cannot be read.
    fn save(&self) -> Result<MachineState, GuestError>;

    /// [`halt`](Self::halt) and [`save`](Self::save).
    ///
    /// # Errors
    /// Theirs.
    fn stop(&mut self) -> Result<MachineState, GuestError> {
        self.halt()?;
        self.save()
    }

    /// What tells which pages the guest writes; one at a time. It tells nothing before it is
    /// started.
    ///
    /// # Errors
    /// [`GuestError::Untracked`], or [`GuestError::Already`] where the guest must be
    /// stopped when this is first asked for.
    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError>;

    /// What the guest does.
    fn spec(&self) -> &GuestSpec;

    /// The RAM that it works in.
    fn ram(&self) -> &Arc<GuestRam>;

    /// Progress as the vCPUs report it, without touching guest RAM.
    fn progress(&self) -> &Arc<Progress>;

    /// Operations done by all vCPUs since the guest was first built: as last reported,
    /// and exact once it has stopped.
    fn operations(&self) -> u64 {
        self.progress().operations()
    }

    /// Completed passes over the worked pages: for each vCPU its operations divided by
    /// their number, summed up. What a random workload does is counted alike.
    fn rounds(&self) -> u64 {
        self.progress().rounds()
    }

    /// The first thing that went wrong in the guest: a wrong page that it noticed, a
    /// memory error, a crash.
    fn failure(&self) -> Option<String> {
        self.progress().failure()
    }

    /// Waits until [`Self::operations`] reaches `target`, something fails, or `limit`
    /// has passed; says whether the target was reached.
    fn wait_for_operations(&self, target: u64, limit: Duration) -> bool {
        self.progress().wait_for_operations(target, limit)
    }
}
