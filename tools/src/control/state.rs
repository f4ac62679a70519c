//! The state of a session, as it is told.

use std::time::{Instant, SystemTime};

use serde::Serialize;
use serde_json::{Map, Value};

use super::controlled::{Counts, Parameters};
use super::{Identity, SCHEMA_VERSION};

/// How far a migration is. Grows but where a destination comes anew before the guest was given
/// away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// There is no session yet.
    Preparing,
    /// The peer was never attached.
    Connecting,
    /// A snapshot is served; no guest moves.
    Serving,
    /// The peer is there, and the guest at the source.
    Attached,
    /// The guest's vCPUs are stopped at the source.
    Stopped,
    /// The destination has the device state, and restores it.
    Restoring,
    /// The destination has restored the guest.
    Ready,
    /// The guest is given away; whether it runs is not known here.
    Given,
    /// The guest runs at the destination.
    Running,
    /// The guest runs at the destination, and every page is there.
    AllArrived,
    /// The session is over, and everything is at the destination.
    Finished,
    /// The guest is the source's again.
    Reclaimed,
    /// The guest does not run at this destination.
    NotHere,
}

/// The connection to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// There is none; one is waited for or made.
    Down,
    /// It is there.
    Up,
    /// There is none until `recover`.
    Paused,
}

impl Phase {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Connecting => "connecting",
            Self::Serving => "serving",
            Self::Attached => "attached",
            Self::Stopped => "stopped",
            Self::Restoring => "restoring",
            Self::Ready => "ready",
            Self::Given => "given",
            Self::Running => "running",
            Self::AllArrived => "all_arrived",
            Self::Finished => "finished",
            Self::Reclaimed => "reclaimed",
            Self::NotHere => "not_here",
        }
    }
}

/// What went wrong last.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Trouble {
    pub(super) event: &'static str,
    pub(super) at_us: u64,
    #[serde(flatten)]
    pub(super) fields: Map<String, Value>,
}

/// What events change.
#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) session: Option<String>,
    pub(super) memory_bytes: u64,
    pub(super) phase: Phase,
    /// A destination has every page.
    pub(super) has_all: bool,
    pub(super) link: Link,
    /// What the migration is held before.
    pub(super) hold: Option<&'static str>,
    pub(super) trouble: Option<Trouble>,
    /// Counts events.
    pub(super) sequence: u64,
}

impl State {
    pub(super) const fn new() -> Self {
        Self {
            session: None,
            memory_bytes: 0,
            phase: Phase::Preparing,
            has_all: false,
            link: Link::Down,
            hold: None,
            trouble: None,
            sequence: 0,
        }
    }

    /// The guest stands still at the source, however far its move had come.
    pub(super) fn was_refused(&mut self) {
        if self.phase <= Phase::Given {
            self.phase = self.phase.min(Phase::Stopped);
        }
    }

    /// It is so far at least.
    pub(super) fn reach(&mut self, phase: Phase) {
        self.phase = self.phase.max(phase);
        // That it has every page is a phase of a guest that runs.
        if self.phase == Phase::Running && self.has_all {
            self.phase = Phase::AllArrived;
        }
    }
}

/// The state and the counts of one moment.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub(crate) identity: Identity,
    pub(super) state: State,
    pub(crate) counts: Option<Counts>,
    pub(crate) parameters: Parameters,
    pub(super) now: Now,
}

impl Image {
    pub(crate) fn session(&self) -> Option<&str> {
        self.state.session.as_deref()
    }

    pub(crate) const fn phase(&self) -> Phase {
        self.state.phase
    }

    pub(crate) const fn link(&self) -> Link {
        self.state.link
    }

    pub(crate) const fn memory_bytes(&self) -> u64 {
        self.state.memory_bytes
    }

    pub(crate) const fn at_us(&self) -> u64 {
        self.now.at_us
    }

    pub(super) fn to_json(&self) -> Value {
        let told = Told {
            schema_version: SCHEMA_VERSION,
            tool: self.identity.tool,
            version: env!("CARGO_PKG_VERSION"),
            role: self.identity.role,
            session: self.session(),
            phase: self.state.phase,
            link: self.state.link,
            hold: self.state.hold,
            sequence: self.state.sequence,
            memory_bytes: self.state.memory_bytes,
            parameters: &self.parameters,
            counts: self.counts.as_ref().map(Counts::to_json),
            trouble: self.state.trouble.as_ref(),
            now: self.now,
        };
        serde_json::to_value(told).expect("text and numbers are always JSON")
    }
}

#[derive(Serialize)]
struct Told<'a> {
    schema_version: u32,
    tool: &'static str,
    version: &'static str,
    role: &'static str,
    session: Option<&'a str>,
    phase: Phase,
    link: Link,
    hold: Option<&'static str>,
    sequence: u64,
    memory_bytes: u64,
    parameters: &'a Parameters,
    counts: Option<Value>,
    trouble: Option<&'a Trouble>,
    #[serde(flatten)]
    now: Now,
}

/// A moment, by the clock of this process and by that on the wall.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Now {
    pub(super) at_us: u64,
    pub(super) unix_us: u64,
}

impl Now {
    pub(super) fn since(begun: Instant) -> Self {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { at_us: begun.elapsed().as_micros() as u64, unix_us: unix.as_micros() as u64 }
    }
}
