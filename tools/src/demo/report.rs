//! What the demo found out, as one JSON object and as text. docs/report.md has the keys.

mod outages;
mod page;
mod stayed;

use std::fmt::{self, Write};

use serde::Serialize;

use super::error::DemoError;
use super::messages::{Done, Latency, Setup, Stats, Stayed, Stopped};
use super::options::{Options, Role, Transport};
use super::outages::Outage;
use super::precopy::{Cause, Pass, PassesWanted};
use crate::bandwidth::Bandwidth;
use crate::guest::{GuestKind, TrackerKind, Workload};
use crate::ram::Backing;
use crate::sampling::ArrivalSample;
use crate::size::Size;
use outages::OutageReport;
use stayed::Outcome;
pub(super) use stayed::StayedReport;

/// Of all JSON that the demo writes. It grows when a key changes its meaning or goes.
pub(super) const SCHEMA_VERSION: u32 = 1;

/// A process and its part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct RoleProcess {
    pub(super) role: Role,
    pub(super) pid: u32,
}

/// What both sides have told, and what the parent saw. Times are of `CLOCK_MONOTONIC`.
#[derive(Debug, Default)]
pub(super) struct Story {
    pub(super) roles: Vec<RoleProcess>,
    pub(super) address: Option<String>,
    pub(super) passes: Vec<Pass>,
    pub(super) stopped: Option<Stopped>,
    pub(super) running_at_us: Option<u64>,
    pub(super) all_arrived_at_us: Option<u64>,
    pub(super) sha256_source: Option<String>,
    pub(super) source_exit_at_us: Option<u64>,
    pub(super) handed_over_at_us: Option<u64>,
    pub(super) page_server_exit_at_us: Option<u64>,
    pub(super) done: Option<Done>,
    /// The guest was taken back.
    pub(super) stayed: Option<Stayed>,
    /// How often the side that gets the pages was connected.
    pub(super) connections: u64,
    pub(super) stats: Stats,
    pub(super) outages: Vec<Outage>,
}

impl Story {
    /// Whether all processes have ended that had the guest's memory at the source.
    pub(super) const fn has_source_ended(&self) -> bool {
        let is_served_by_itself = self.handed_over_at_us.is_none();
        self.source_exit_at_us.is_some()
            && (is_served_by_itself || self.page_server_exit_at_us.is_some())
    }

    /// How often the connection was made again, by whichever process.
    fn recoveries(&self, setup: &Setup) -> u64 {
        if setup.page_client.is_some() {
            self.connections.saturating_sub(1)
        } else {
            self.stats.recoveries
        }
    }

    /// What had arrived when, in microseconds since the guest was stopped.
    pub(super) fn take_samples(&mut self) -> Vec<ArrivalSample> {
        let mut samples =
            self.done.as_mut().map_or_else(Vec::new, |done| std::mem::take(&mut done.samples));
        let stopped_at_us = self.stopped.as_ref().map_or(0, |stopped| stopped.at_us);
        for sample in &mut samples {
            sample.at_us = sample.at_us.saturating_sub(stopped_at_us);
        }
        samples
    }
}

/// The JSON object. Times without an end of their own begin with the stop of the guest.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema_version: u32,
    outcome: Outcome,
    pub(super) verified: bool,
    verification: String,
    #[serde(flatten)]
    asked: Asked,
    address: String,
    page_bytes: u64,
    pages_total: u64,
    pages_requested: u64,
    pages_background: u64,
    pages_precopy: u64,
    pages_zero: u64,
    pages_duplicate: u64,
    bytes_received: u64,
    state_bytes: u64,
    passes: Vec<Pass>,
    switchover_cause: Option<Cause>,
    stopped_event_us: Option<u64>,
    blackout_us: u64,
    total_us: u64,
    first_page_us: Option<u64>,
    stall_us: f64,
    background_bytes_per_s: u64,
    fault_latency_us: Latency,
    recoveries: u64,
    roles: Vec<RoleProcess>,
    source_exit_us: u64,
    #[serde(flatten)]
    handover: Option<HandoverTimes>,
    #[serde(flatten)]
    outages: Option<OutageReport>,
    guest_stop_us: u64,
    guest_rounds_before: u64,
    guest_rounds_after: u64,
    guest_operations_at_source_exit: u64,
    guest_operations_after: u64,
    sha256_source: String,
    sha256_destination: String,
    /// Where the page is, if one was wanted.
    #[serde(rename = "report", skip_serializing_if = "Option::is_none")]
    page: Option<String>,
}

/// When the guest changed hands at the source.
#[derive(Clone, Copy, Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the keys of the object end so")]
struct HandoverTimes {
    handed_over_us: u64,
    vmm_exit_us: u64,
    page_server_exit_us: u64,
}

impl HandoverTimes {
    /// `None` where nothing was handed over.
    fn of(story: &Story, stopped_at_us: u64) -> Option<Self> {
        let since_stop = |at: u64| at.saturating_sub(stopped_at_us);
        Some(Self {
            handed_over_us: since_stop(story.handed_over_at_us?),
            vmm_exit_us: since_stop(story.source_exit_at_us?),
            page_server_exit_us: since_stop(story.page_server_exit_at_us?),
        })
    }
}

/// What was asked for, and what it became on this machine.
#[derive(Debug, Serialize)]
struct Asked {
    guest: GuestKind,
    user_faults_only: bool,
    workload: Workload,
    vcpus: u32,
    backing: Backing,
    memory_bytes: u64,
    transport: Transport,
    streams: u16,
    bandwidth: Bandwidth,
    passes_wanted: PassesWanted,
    dirty_tracker: Option<TrackerKind>,
    precopy_bandwidth: Option<Bandwidth>,
    checksums: bool,
    handoff: bool,
}

/// The JSON object where there is nothing to report.
#[derive(Debug, Serialize)]
pub(super) struct Failure {
    pub(super) schema_version: u32,
    pub(super) verified: bool,
    pub(super) exit_status: u8,
    pub(super) error: String,
}

impl Report {
    /// Puts the story together; an error if a part is missing.
    pub(super) fn of(setup: &Setup, options: &Options, story: Story) -> Result<Self, DemoError> {
        let missing = |what: &str| DemoError::Failed(format!("nobody said {what}"));
        let stopped = story.stopped.clone().ok_or_else(|| missing("when the guest was stopped"))?;
        let since_stop = |at: Option<u64>, what: &str| {
            at.map(|at| at.saturating_sub(stopped.at_us)).ok_or_else(|| missing(what))
        };
        let total_us = since_stop(story.all_arrived_at_us, "when every page was there")?;
        let blackout_us = since_stop(story.running_at_us, "when the guest ran again")?;
        let source_exit_us = since_stop(story.source_exit_at_us, "when the source ended")?;
        let handover = HandoverTimes::of(&story, stopped.at_us);
        let outages = OutageReport::of(options, &story, stopped.at_us);
        let recoveries = story.recoveries(setup);
        let done = story.done.ok_or_else(|| missing("what verification found"))?;
        let sha256_source = story.sha256_source.ok_or_else(|| missing("the source's digest"))?;
        let stats = story.stats;
        let first_page_us = stats.first_page_at_us.map(|at| at.saturating_sub(stopped.at_us));
        let background_bytes = stats.pages_background * done.page_bytes;
        let background_us = total_us.saturating_sub(first_page_us.unwrap_or(0)).max(1);
        let (verified, verification) = judge(done.verified, &sha256_source, &done.sha256);
        Ok(Self {
            schema_version: SCHEMA_VERSION,
            outcome: Outcome::Moved,
            verified,
            verification,
            asked: Asked::of(setup),
            address: story.address.ok_or_else(|| missing("where the source listens"))?,
            page_bytes: done.page_bytes,
            pages_total: stats.pages_total,
            pages_requested: stats.pages_requested,
            pages_background: stats.pages_background,
            pages_precopy: stats.pages_precopy,
            pages_zero: stats.pages_zero,
            pages_duplicate: stats.pages_duplicate,
            bytes_received: stats.bytes_received,
            state_bytes: stopped.state_bytes,
            passes: story.passes,
            switchover_cause: stopped.cause,
            stopped_event_us: stopped.event_us,
            blackout_us,
            total_us,
            first_page_us,
            stall_us: stats.stall_us,
            background_bytes_per_s: background_bytes * 1_000_000 / background_us,
            fault_latency_us: stats.latency,
            recoveries,
            roles: story.roles,
            source_exit_us,
            handover,
            outages,
            guest_stop_us: since_stop(Some(done.stopped_at_us), "when the guest ended")?,
            guest_rounds_before: stopped.rounds,
            guest_rounds_after: done.rounds,
            guest_operations_at_source_exit: done.operations_at_source_exit,
            guest_operations_after: done.operations,
            sha256_source,
            sha256_destination: done.sha256,
            page: None,
        })
    }
}

impl Asked {
    fn of(setup: &Setup) -> Self {
        let precopy = setup.precopy;
        Self {
            guest: setup.guest,
            user_faults_only: setup.user_faults_only,
            workload: setup.workload,
            vcpus: setup.vcpus,
            backing: setup.backing,
            memory_bytes: setup.memory_bytes,
            transport: setup.transport,
            streams: setup.streams,
            bandwidth: setup.bandwidth,
            passes_wanted: precopy.map(|it| it.passes).unwrap_or_default(),
            dirty_tracker: precopy.map(|it| it.tracker),
            precopy_bandwidth: precopy.and_then(|it| it.bandwidth),
            checksums: setup.checksums,
            handoff: setup.handoff.is_some(),
        }
    }
}

/// Whether everything is right, and in words.
fn judge(verified: Result<String, String>, source: &str, destination: &str) -> (bool, String) {
    match verified {
        Ok(_) if source != destination => {
            (false, "the part that nobody writes has another SHA-256 at the destination".to_owned())
        }
        Ok(what) => (true, what),
        Err(what) => (false, what),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.title())?;
        for Row { name, value, what } in self.rows() {
            writeln!(f, "  {name:<10} {value:>11}  {what}")?;
        }
        if let Some(path) = &self.page {
            writeln!(f, "\nPictures of it are in {path}.")?;
        }
        Ok(())
    }
}

/// A line of the report as text.
struct Row {
    name: &'static str,
    value: String,
    what: String,
}

impl Report {
    fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut row = |name, value: String, what: &str| {
            rows.push(Row { name, value, what: what.to_owned() });
        };
        if let Some(cause) = self.switchover_cause {
            row("precopy", count(self.passes.len(), "pass"), &self.precopy(cause));
        }
        row("blackout", time(self.blackout_us as f64), self.blackout());
        if let Some(handover) = &self.handover {
            row("VMM's end", time(handover.vmm_exit_us as f64), &self.end_of_the_vmm(handover));
        }
        let total = time(self.total_us as f64);
        row("all memory", total, "from the stop of the vCPUs until every page was there");
        row("pages", self.pages_total.to_string(), &self.shares());
        row("faults", self.fault_latency_us.count.to_string(), &self.faults());
        row("background", format!("{}/s", Size(self.background_bytes_per_s)), &self.traffic());
        if let Some(outages) = &self.outages {
            for (name, value, what) in outages.rows() {
                row(name, value, &what);
            }
        }
        let rounds = self.guest_rounds_after - self.guest_rounds_before;
        row("guest", format!("{rounds} rounds"), &self.rounds());
        let verdict = if self.verified { "yes" } else { "NO" };
        // Two lines, so that none is longer than a terminal is wide.
        let (pages, increments) =
            self.verification.rsplit_once(", ").unwrap_or((&self.verification, ""));
        row("verified", verdict.to_owned(), pages);
        if !increments.is_empty() {
            row("", String::new(), increments);
        }
        let short = |digest: &str| digest.chars().take(8).collect::<String>();
        let what = format!("{} at the source; of what nobody writes", short(&self.sha256_source));
        row("SHA-256", short(&self.sha256_destination), &what);
        rows
    }

    /// What verification said.
    pub(super) fn verification(&self) -> &str {
        &self.verification
    }

    fn title(&self) -> String {
        let kind = match (self.asked.guest, self.asked.user_faults_only) {
            (GuestKind::Kvm, _) => "KVM",
            (GuestKind::Threads, false) => "threads",
            (GuestKind::Threads, true) => "threads, user-mode faults",
        };
        format!(
            "A running guest of {} moved over {} ({kind}, {} vCPU{}, {}).",
            Size(self.asked.memory_bytes),
            self.address,
            self.asked.vcpus,
            plural(self.asked.vcpus.into()),
            name_of(self.asked.workload),
        )
    }

    /// What the passes did, and why they ended.
    fn precopy(&self, cause: Cause) -> String {
        let sent = self.passes.iter().map(|pass| pass.bytes_sent).sum();
        let micros: u64 = self.passes.iter().map(|pass| pass.time_us).sum();
        format!("{} in {}, until {}", Size(sent), time(micros as f64), cause.words())
    }

    const fn blackout(&self) -> &'static str {
        if self.handover.is_some() {
            "in which no vCPU ran anywhere; hand-over and VMM's end included"
        } else {
            "in which no vCPU ran anywhere"
        }
    }

    fn end_of_the_vmm(&self, handover: &HandoverTimes) -> String {
        let handed_over = time(handover.handed_over_us as f64);
        let first_page = self.first_page_us.map_or_else(
            || "no page was sent at all".to_owned(),
            |at| format!("the first page came at {}", time(at as f64)),
        );
        format!("killed after the hand-over ({handed_over}); {first_page}")
    }

    fn shares(&self) -> String {
        let share = |pages: u64| pages as f64 * 100.0 / self.pages_total.max(1) as f64;
        let precopy = match self.switchover_cause {
            Some(_) => format!("{:.1} % in precopy, ", share(self.pages_precopy)),
            None => String::new(),
        };
        format!(
            "{:.1} % by fault, {:.1} % in background, {}{:.1} % zero; {} came twice",
            share(self.pages_requested),
            share(self.pages_background),
            precopy,
            share(self.pages_zero),
            self.pages_duplicate
        )
    }

    fn faults(&self) -> String {
        let latency = &self.fault_latency_us;
        if latency.count == 0 {
            return "every page was there before a vCPU touched it".to_owned();
        }
        format!(
            "half in {}, 99 % in {}, all in {}; {} altogether",
            time(latency.p50),
            time(latency.p99),
            time(latency.max),
            time(self.stall_us)
        )
    }

    fn traffic(&self) -> String {
        format!(
            "over {} stream{}; {} of pages received in all",
            self.asked.streams,
            plural(self.asked.streams.into()),
            Size(self.bytes_received)
        )
    }

    fn rounds(&self) -> String {
        format!(
            "and {} before the move; it ran on when the {} had ended",
            self.guest_rounds_before,
            if self.handover.is_some() { "page server" } else { "source's process" }
        )
    }
}

/// A count of what has a plural in "es".
fn count(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "es" })
}

const fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn name_of(workload: Workload) -> String {
    clap::ValueEnum::to_possible_value(&workload)
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Microseconds as people read them.
pub(super) fn time(micros: f64) -> String {
    let (value, unit) = if micros < 1000.0 {
        (micros, "µs")
    } else if micros < 1_000_000.0 {
        (micros / 1000.0, "ms")
    } else {
        (micros / 1_000_000.0, "s")
    };
    let digits = if unit == "µs" || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn different_digests_are_not_verified() {
        assert!(judge(Ok("fine".into()), "ab", "ab").0);
        assert!(!judge(Ok("fine".into()), "ab", "ac").0);
        assert_eq!(judge(Err("page 3".into()), "ab", "ab"), (false, "page 3".into()));
    }

    #[test]
    fn times_have_the_unit_that_fits() {
        for (micros, text) in [
            (0.0, "0 µs"),
            (61.4, "61 µs"),
            (3120.0, "3.12 ms"),
            (45_600.0, "45.6 ms"),
            (2.5e6, "2.50 s"),
        ] {
            assert_eq!(time(micros), text);
        }
    }
}
