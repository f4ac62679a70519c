//! The object that `--json` prints; its fields are described in docs/page-client.md.

use std::process::ExitCode;

use afterimage::DestinationStats;
use serde::Serialize;

use super::Failure;
use crate::page_server::happened::{EventReport, Happened};

/// Grows when a field changes its meaning or goes.
const SCHEMA_VERSION: u32 = 1;

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Every page is in place, and nobody lacks anything.
    Finished,
    /// The guest does not run here.
    NotHere,
    /// Its VMM has given it up before it ran.
    Withdrawn,
    /// Stopped by a second signal while pages were missing.
    Abandoned,
    /// The process that ran the guest has ended.
    VmmDied,
    /// The VM has ended, which is no failure.
    VmEnded,
    /// Something failed.
    Failed,
}

impl Outcome {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::NotHere => "not_here",
            Self::Withdrawn => "withdrawn",
            Self::Abandoned => "abandoned",
            Self::VmmDied => "vmm_died",
            Self::VmEnded => "vm_ended",
            Self::Failed => "failed",
        }
    }

    const fn exit(self) -> u8 {
        match self {
            Self::Finished | Self::VmEnded => 0,
            Self::Failed => 1,
            Self::NotHere | Self::Withdrawn => 3,
            Self::Abandoned => 4,
            Self::VmmDied => 5,
        }
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    tool: &'static str,
    version: &'static str,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    roles: Vec<Role>,
    taken_over: bool,
    #[serde(flatten)]
    work: Option<Work>,
    total_us: u64,
    events: Vec<EventReport>,
    #[serde(skip)]
    exit: u8,
}

#[derive(Clone, Debug, Serialize)]
struct Role {
    role: &'static str,
    pid: i32,
}

/// What this process has done; a process before it may have done the rest.
#[derive(Debug, Serialize)]
pub(crate) struct Work {
    pages_total: u64,
    pages_complete: u64,
    pages_requested: u64,
    pages_background: u64,
    pages_precopy: u64,
    pages_zero: u64,
    pages_discarded: u64,
    pages_duplicate: u64,
    bytes_received: u64,
    recoveries: u64,
    fault_latency_us: Latency,
}

#[derive(Debug, Serialize)]
struct Latency {
    count: u64,
    mean: f64,
    p50: f64,
    p99: f64,
    p999: f64,
    max: f64,
    buckets: Vec<u64>,
}

impl Work {
    pub(crate) fn of(stats: &DestinationStats) -> Self {
        let latency = &stats.fault_latency;
        let micros = |time: std::time::Duration| time.as_nanos() as f64 / 1e3;
        Self {
            pages_total: stats.pages_total,
            pages_complete: stats.pages_complete,
            pages_requested: stats.pages_requested,
            pages_background: stats.pages_background,
            pages_precopy: stats.pages_precopy,
            pages_zero: stats.pages_zero,
            pages_discarded: stats.pages_discarded,
            pages_duplicate: stats.pages_duplicate,
            bytes_received: stats.bytes_received,
            recoveries: stats.recoveries,
            fault_latency_us: Latency {
                count: latency.count,
                mean: micros(latency.mean),
                p50: micros(latency.p50),
                p99: micros(latency.p99),
                p999: micros(latency.p999),
                max: micros(latency.max),
                buckets: latency.buckets.clone(),
            },
        }
    }
}

impl Report {
    fn new(outcome: Outcome, journal: Journal, stats: Option<&DestinationStats>) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            tool: "page-client",
            version: env!("CARGO_PKG_VERSION"),
            outcome,
            error: journal.error.filter(|_| outcome == Outcome::Failed),
            session: journal.session,
            roles: journal.roles,
            taken_over: journal.taken_over,
            work: stats.map(Work::of),
            total_us: journal.happened.elapsed_us(),
            events: journal.happened.into_events(),
            exit: outcome.exit(),
        }
    }

    pub(super) fn failed(failure: &Failure) -> Self {
        let mut report = Self::new(Outcome::Failed, Journal::new(), None);
        (report.error, report.exit) = (Some(failure.to_string()), failure.exit);
        report
    }

    pub(super) const fn outcome(&self) -> Outcome {
        self.outcome
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("text and numbers are always JSON")
    }

    pub(super) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit)
    }
}

/// What happens, for the report.
#[derive(Debug)]
pub(super) struct Journal {
    session: Option<String>,
    error: Option<String>,
    roles: Vec<Role>,
    taken_over: bool,
    happened: Happened,
}

impl Journal {
    pub(super) fn new() -> Self {
        let own = Role { role: "page_client", pid: std::process::id() as i32 };
        Self {
            session: None,
            error: None,
            roles: vec![own],
            taken_over: false,
            happened: Happened::new(),
        }
    }

    /// Whose memory is served.
    pub(super) fn serves(&mut self, vmm: i32, taken_over: bool) {
        self.roles.push(Role { role: "vmm", pid: vmm });
        self.taken_over = taken_over;
    }

    pub(super) fn attached(&mut self, session: &str) {
        self.session = Some(session.to_owned());
    }

    /// What it fails of, if it does; the first counts.
    pub(super) fn failed(&mut self, reason: &str) {
        self.error.get_or_insert_with(|| reason.to_owned());
    }

    pub(super) fn note(&mut self, event: &'static str) {
        self.happened.note(event, None);
    }

    pub(super) fn close(self, outcome: Outcome, stats: Option<&DestinationStats>) -> Report {
        Report::new(outcome, self, stats)
    }
}
