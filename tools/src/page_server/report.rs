//! The object that `--json` prints; its fields are described in docs/page-server.md.

use std::process::ExitCode;

use afterimage::SourceStats;
use serde::Serialize;

use super::failure::Failure;
use super::happened::{EventReport, Happened};
use crate::handoff::Giver;

/// Grows when a field changes its meaning or goes.
pub(super) const SCHEMA_VERSION: u32 = 1;

/// Whom memory is served to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    Migration,
    Snapshot,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// Nobody lacks a page.
    Finished,
    /// Stopped before the guest was given away.
    Stopped,
    /// Stopped by a second signal while pages were missing.
    Abandoned,
    /// The guest is this side's again.
    Fenced,
    /// Something failed.
    Failed,
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    tool: &'static str,
    version: &'static str,
    mode: Mode,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    session: Option<String>,
    roles: [Role; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    handoff: Option<HandoffReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_at: Option<String>,
    #[serde(flatten)]
    pages: Counts,
    total_us: u64,
    events: Vec<EventReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destinations: Vec<DestinationReport>,
    #[serde(skip)]
    exit: u8,
}

#[derive(Debug, Serialize)]
struct Role {
    role: &'static str,
    pid: u32,
}

#[derive(Debug, Serialize)]
struct HandoffReport {
    giver: String,
    giver_pid: i32,
    state_sections: usize,
    state_bytes: u64,
    warnings: Vec<String>,
}

/// One destination of a snapshot.
#[derive(Debug, Serialize)]
pub(super) struct DestinationReport {
    pub(super) incarnation: String,
    /// `connected`, `away` or `done`.
    pub(super) state: &'static str,
    #[serde(flatten)]
    pub(super) pages: Counts,
}

/// What was sent, in the contract's words.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Counts {
    pub(crate) pages_total: u64,
    pub(crate) pages_missing: u64,
    pages_requested: u64,
    pages_background: u64,
    pages_zero: u64,
    pages_unreadable: u64,
    pages_released: u64,
    frames_stale: u64,
    recoveries: u64,
}

impl Counts {
    /// `pages` are in the memory; the destination's may be larger.
    pub(crate) fn of(stats: &SourceStats, pages: u64) -> Self {
        let total = if stats.pages_total == 0 { pages } else { stats.pages_total };
        Self {
            pages_total: total,
            pages_missing: total - stats.pages_acknowledged.min(total),
            pages_requested: stats.pages_requested,
            pages_background: stats.pages_background,
            pages_zero: stats.pages_zero,
            pages_unreadable: stats.pages_unreadable,
            pages_released: stats.pages_released,
            frames_stale: stats.frames_stale,
            recoveries: stats.recoveries,
        }
    }

    /// Of several destinations together.
    pub(crate) fn sum(all: impl Iterator<Item = Self>) -> Self {
        all.fold(Self::default(), |sum, it| Self {
            pages_total: sum.pages_total + it.pages_total,
            pages_missing: sum.pages_missing + it.pages_missing,
            pages_requested: sum.pages_requested + it.pages_requested,
            pages_background: sum.pages_background + it.pages_background,
            pages_zero: sum.pages_zero + it.pages_zero,
            pages_unreadable: sum.pages_unreadable + it.pages_unreadable,
            pages_released: sum.pages_released + it.pages_released,
            frames_stale: sum.frames_stale + it.frames_stale,
            recoveries: sum.recoveries + it.recoveries,
        })
    }
}

impl Outcome {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Abandoned => "abandoned",
            Self::Fenced => "fenced",
            Self::Failed => "failed",
        }
    }
}

impl Report {
    pub(super) const fn outcome(&self) -> Outcome {
        self.outcome
    }

    pub(super) fn failed(mode: Mode, failure: &Failure) -> Self {
        let mut report = Journal::new(mode).close(Outcome::Failed, Counts::default(), Vec::new());
        report.error = Some(failure.to_string());
        report.exit = failure.exit;
        report
    }

    pub(super) fn is_finished(&self) -> bool {
        self.outcome == Outcome::Finished
    }

    pub(super) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("text and numbers are always JSON")
    }

    pub(super) fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.exit)
    }
}

/// What happens, noted for the report.
#[derive(Debug)]
pub(super) struct Journal {
    mode: Mode,
    session: Option<String>,
    handoff: Option<HandoffReport>,
    guest_at: Option<String>,
    happened: Happened,
    /// Counts of the memory served.
    pub(super) pages: u64,
}

impl Journal {
    pub(super) fn new(mode: Mode) -> Self {
        Self {
            mode,
            session: None,
            handoff: None,
            guest_at: None,
            happened: Happened::new(),
            pages: 0,
        }
    }

    /// A session is there, over so many pages.
    pub(super) fn begin(&mut self, session: &str, pages: u64) {
        self.session = Some(session.to_owned());
        self.pages = pages;
    }

    pub(super) fn handed_over(
        &mut self,
        giver: &Giver,
        sections: &[afterimage::StateSection],
        warnings: Vec<String>,
    ) {
        self.handoff = Some(HandoffReport {
            giver: giver.name.clone(),
            giver_pid: giver.pid,
            state_sections: sections.len(),
            state_bytes: sections.iter().map(|section| section.bytes.len() as u64).sum(),
            warnings,
        });
        self.note("handed_over", None);
    }

    /// Where the guest is that is this side's again.
    pub(super) fn guest_at(&mut self, place: String) {
        self.guest_at = Some(place);
    }

    pub(super) fn note(&mut self, event: &'static str, destination: Option<String>) {
        self.happened.note(event, destination);
    }

    /// Stopped before there was anything to serve.
    pub(super) fn stopped(self) -> Report {
        self.close(Outcome::Stopped, Counts::default(), Vec::new())
    }

    pub(super) fn close(
        self,
        outcome: Outcome,
        pages: Counts,
        destinations: Vec<DestinationReport>,
    ) -> Report {
        let exit = match outcome {
            Outcome::Finished | Outcome::Fenced => 0,
            Outcome::Failed => 1,
            Outcome::Stopped => 3,
            Outcome::Abandoned => 4,
        };
        Report {
            schema_version: SCHEMA_VERSION,
            tool: "page-server",
            version: env!("CARGO_PKG_VERSION"),
            mode: self.mode,
            outcome,
            error: None,
            session: self.session,
            roles: [Role { role: "source", pid: std::process::id() }],
            handoff: self.handoff,
            guest_at: self.guest_at,
            pages,
            total_us: self.happened.elapsed_us(),
            events: self.happened.into_events(),
            destinations,
            exit,
        }
    }
}
