//! What the demo found out where its guest was taken back: it is at the source, as if nothing had
//! happened.

use std::fmt;

use serde::Serialize;

use super::{Asked, RoleProcess, SCHEMA_VERSION, Story, time};
use crate::demo::messages::{Setup, Stayed};
use crate::demo::precopy::Pass;
use crate::size::Size;

/// Where the guest is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Outcome {
    /// At the destination.
    Moved,
    /// At the source, which has taken it back.
    Stayed,
}

/// The JSON object.
#[derive(Debug, Serialize)]
pub(in crate::demo) struct StayedReport {
    schema_version: u32,
    outcome: Outcome,
    pub(in crate::demo) verified: bool,
    pub(in crate::demo) verification: String,
    #[serde(flatten)]
    asked: Asked,
    passes: Vec<Pass>,
    blackout_us: Option<u64>,
    guest_rounds_before: u64,
    guest_rounds_after: u64,
    roles: Vec<RoleProcess>,
    sha256_source: String,
}

impl StayedReport {
    /// The story of a guest that stayed.
    pub(in crate::demo) fn of(setup: &Setup, stayed: Stayed, story: Story) -> Self {
        let verified = stayed.verified.is_ok();
        Self {
            schema_version: SCHEMA_VERSION,
            outcome: Outcome::Stayed,
            verified,
            verification: stayed.verified.unwrap_or_else(|what| what),
            asked: Asked::of(setup),
            passes: story.passes,
            blackout_us: stayed.blackout_us,
            guest_rounds_before: stayed.rounds_before,
            guest_rounds_after: stayed.rounds,
            roles: story.roles,
            sha256_source: stayed.sha256,
        }
    }
}

impl fmt::Display for StayedReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = Size(self.asked.memory_bytes);
        writeln!(f, "A running guest of {memory} was taken back, and stayed at the source.\n")?;
        let mut row =
            |name: &str, value: String, what: &str| writeln!(f, "  {name:<10} {value:>11}  {what}");
        match self.blackout_us {
            Some(micros) => row("blackout", time(micros as f64), "in which no vCPU ran anywhere")?,
            None => row("blackout", "none".to_owned(), "it was never stopped")?,
        }
        let rounds = self.guest_rounds_after - self.guest_rounds_before;
        let before = format!("since, and {} before", self.guest_rounds_before);
        row("guest", format!("{rounds} rounds"), &before)?;
        let verdict = if self.verified { "yes" } else { "NO" };
        row("verified", verdict.to_owned(), &self.verification)
    }
}
