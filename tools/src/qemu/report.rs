//! The object that `--json` prints; its fields are described in docs/report.md.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::demo::precopy::{Cause, Pass};
use crate::page_server::Failure;
use crate::page_server::PageCounts;
use crate::page_server::happened::{EventReport, Happened};

/// Grows when a field changes its meaning or goes.
const SCHEMA_VERSION: u32 = 1;

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// The guest is at the destination, with all of its memory.
    Finished,
    /// It was not moved, and is at the source as it was before.
    NotMoved,
    /// It was not moved, and is stopped at the source.
    NotResumed,
    /// A signal ended this before the end.
    Stopped,
    /// Something else failed.
    Failed,
}

impl Outcome {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::NotMoved => "not_moved",
            Self::NotResumed => "not_resumed",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    const fn exit(self) -> u8 {
        match self {
            Self::Finished => 0,
            Self::Failed => 1,
            Self::NotMoved => 3,
            Self::Stopped => 4,
            Self::NotResumed => 5,
        }
    }
}

/// What was measured. What a side does not see is absent.
#[derive(Debug, Default, Serialize)]
pub(super) struct Times {
    /// Nobody ran the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) blackout_us: Option<u64>,
    /// Until the source's vCPUs stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stop_us: Option<u64>,
    /// Until its device state was saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) save_us: Option<u64>,
    /// Until the destination had loaded it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) load_us: Option<u64>,
    /// Bytes of device state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) state_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Role {
    role: &'static str,
    pid: i64,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    tool: &'static str,
    version: &'static str,
    command: &'static str,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    roles: Vec<Role>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    passes: Vec<Pass>,
    #[serde(skip_serializing_if = "Option::is_none")]
    switchover_cause: Option<Cause>,
    #[serde(flatten)]
    times: Times,
    #[serde(flatten)]
    pages: Option<PageCounts>,
    total_us: u64,
    events: Vec<EventReport>,
    #[serde(skip)]
    exit: u8,
}

impl Report {
    pub(super) fn failed(command: &'static str, failure: &Failure) -> Self {
        let mut report = Journal::new(command).close(Outcome::Failed, Some(failure), None);
        report.exit = failure.exit;
        report
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("text and numbers are always JSON")
    }

    pub(super) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit)
    }

    pub(super) const fn outcome(&self) -> Outcome {
        self.outcome
    }
}

/// What happens, for the report.
#[derive(Debug)]
pub(super) struct Journal {
    command: &'static str,
    session: Option<String>,
    roles: Vec<Role>,
    pub(super) passes: Vec<Pass>,
    /// Why the guest was stopped when it was, where passes came before.
    pub(super) cause: Option<Cause>,
    pub(super) times: Times,
    happened: Happened,
}

impl Journal {
    pub(super) fn new(command: &'static str) -> Self {
        let own = Role { role: "afterimage_qemu", pid: i64::from(std::process::id()) };
        Self {
            command,
            session: None,
            roles: vec![own],
            passes: Vec::new(),
            cause: None,
            times: Times::default(),
            happened: Happened::new(),
        }
    }

    pub(super) fn qemu(&mut self, role: &'static str, pid: Option<i32>) {
        self.roles.extend(pid.map(|pid| Role { role, pid: i64::from(pid) }));
    }

    pub(super) fn begin(&mut self, session: String) {
        self.session = Some(session);
    }

    pub(super) fn note(&mut self, event: &'static str) {
        self.happened.note(event, None);
    }

    pub(super) fn close(
        self,
        outcome: Outcome,
        failure: Option<&Failure>,
        pages: Option<PageCounts>,
    ) -> Report {
        Report {
            schema_version: SCHEMA_VERSION,
            tool: "afterimage-qemu",
            version: env!("CARGO_PKG_VERSION"),
            command: self.command,
            outcome,
            error: failure.map(ToString::to_string),
            session: self.session,
            roles: self.roles,
            passes: self.passes,
            switchover_cause: self.cause,
            times: self.times,
            pages,
            total_us: self.happened.elapsed_us(),
            events: self.happened.into_events(),
            exit: outcome.exit(),
        }
    }
}

/// A time as reports have it.
pub(super) fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}
