//! What a side must be able to do so that it can be driven from a control socket.

use afterimage::{Agreed, DestinationStats, Endpoint, Incarnation, SourceStats};
use serde::Serialize;
use serde_json::{Value, json};

use super::words::{Change, Recovery, Refusal, Verb};
use crate::bandwidth::Bandwidth;
use crate::page_client::Work;
use crate::page_server::PageCounts;

/// A side of a migration that can be driven.
///
/// One method a verb. Those that a role does not have are left as they are here: they are refused
/// with [`reason_against`](Self::reason_against). Verbs are called on a thread on which they may
/// wait for the session, one after the other; [`counts`](Self::counts) and
/// [`parameters`](Self::parameters) must not wait.
pub trait Controlled: Send + Sync + 'static {
    /// What has been counted so far.
    fn counts(&self) -> Counts;

    /// The parameters that this migration has now.
    fn parameters(&self) -> Parameters;

    /// What both sides have agreed on, once they were connected; nothing for a snapshot.
    fn agreed(&self) -> Option<Agreed> {
        None
    }

    /// Why this verb is never possible on this side, if it is so.
    fn reason_against(&self, verb: Verb) -> Option<String>;

    /// Connects and begins.
    ///
    /// # Errors
    /// [`Refusal`].
    fn start(&self) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Start)))
    }

    /// Stops the vCPUs and switches over now.
    ///
    /// # Errors
    /// [`Refusal`].
    fn switch_over(&self) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Switchover)))
    }

    /// Goes on from a hold.
    ///
    /// # Errors
    /// [`Refusal`].
    fn go_on(&self) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Continue)))
    }

    /// Hangs up until [`recover`](Self::recover).
    ///
    /// # Errors
    /// [`Refusal`].
    fn pause(&self) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Pause)))
    }

    /// Where to [`recover`](Self::recover), made or checked; `None` at the same place.
    ///
    /// # Errors
    /// [`Refusal`].
    fn endpoint(&self, _at: &Recovery) -> Result<Option<Endpoint>, Refusal> {
        Err(refusal(self.reason_against(Verb::Recover)))
    }

    /// Goes on after a pause. Events of the session wait for it.
    ///
    /// # Errors
    /// [`Refusal`].
    fn recover(&self, _at: Option<Endpoint>) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Recover)))
    }

    /// Takes the guest back.
    ///
    /// # Errors
    /// [`Refusal`].
    fn cancel(&self) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Cancel)))
    }

    /// Declares the destination dead, and takes the guest back.
    ///
    /// # Errors
    /// [`Refusal`].
    fn fence(&self) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Fence)))
    }

    /// Changes parameters of this migration. Events of the session wait for it.
    ///
    /// # Errors
    /// [`Refusal`].
    fn set(&self, _change: &Change) -> Result<(), Refusal> {
        Err(refusal(self.reason_against(Verb::Set)))
    }
}

fn refusal(reason: Option<String>) -> Refusal {
    Refusal::not_now(reason.unwrap_or_else(|| "not on this side".to_owned()))
}

/// Parameters of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// What may leave in a second that nobody has asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// Background streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub streams: Option<u16>,
}

/// What a side has counted.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Counts {
    /// A source; with how many pages its memory has, while no destination has told its own.
    Source(SourceStats, u64),
    /// A destination.
    Destination(Box<DestinationStats>),
    /// A snapshot, by destination; with how many pages it has.
    Snapshot(Vec<(Incarnation, SourceStats)>, u64),
}

impl Counts {
    /// Pages of the guest, and how many of them the destination has.
    #[must_use]
    pub fn pages(&self) -> (u64, u64) {
        match self {
            Self::Destination(stats) => (stats.pages_total, stats.pages_complete),
            Self::Source(..) | Self::Snapshot(..) => {
                let sum = self.sent();
                (sum.pages_total, sum.pages_total - sum.pages_missing)
            }
        }
    }

    /// What a source has sent, to all destinations together.
    fn sent(&self) -> PageCounts {
        match self {
            Self::Source(stats, pages) => PageCounts::of(stats, *pages),
            Self::Snapshot(all, pages) => {
                PageCounts::sum(all.iter().map(|(_, stats)| PageCounts::of(stats, *pages)))
            }
            Self::Destination(_) => PageCounts::default(),
        }
    }

    /// In the words of docs/report.md.
    pub(super) fn to_json(&self) -> Value {
        let (total, present) = self.pages();
        let mut told = match self {
            Self::Destination(stats) => json!(Work::of(stats)),
            Self::Source(..) | Self::Snapshot(..) => json!(self.sent()),
        };
        told["pages_missing"] = json!(total - present.min(total));
        if let Self::Snapshot(all, _) = self {
            told["destinations"] = json!(all.len());
        }
        told
    }
}
