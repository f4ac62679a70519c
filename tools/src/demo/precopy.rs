//! Precopy in the demo: how it is asked for, and what is told of it.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use afterimage::{PassReport, Passes, SwitchoverCause};
use serde::{Deserialize, Serialize};

use super::report::time;
use crate::bandwidth::Bandwidth;
use crate::guest::TrackerKind;
use crate::size::Size;

/// When the guest is to be stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) enum PassesWanted {
    /// At once: no memory is sent before.
    #[default]
    None,
    /// After so many passes.
    Count(NonZeroU32),
    /// When another pass would not help.
    Automatic,
    /// When what is left fits into the downtime.
    Converged,
}

impl PassesWanted {
    /// In the engine's terms, if there are to be any.
    pub(crate) const fn passes(self) -> Option<Passes> {
        match self {
            Self::None => None,
            Self::Count(count) => Some(Passes::Count(count.get())),
            Self::Automatic => Some(Passes::Automatic),
            Self::Converged => Some(Passes::Converged),
        }
    }
}

impl FromStr for PassesWanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => return Ok(Self::Automatic),
            "converged" => return Ok(Self::Converged),
            _ => {}
        }
        let count: u32 =
            text.parse().map_err(|_| "must be a number of passes, auto or converged".to_owned())?;
        Ok(NonZeroU32::new(count).map_or(Self::None, Self::Count))
    }
}

impl fmt::Display for PassesWanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("0"),
            Self::Count(count) => count.fmt(f),
            Self::Automatic => f.write_str("auto"),
            Self::Converged => f.write_str("converged"),
        }
    }
}

impl TryFrom<String> for PassesWanted {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PassesWanted> for String {
    fn from(wanted: PassesWanted) -> Self {
        wanted.to_string()
    }
}

/// What the source must know of it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct PrecopySetup {
    pub(super) passes: PassesWanted,
    pub(super) tracker: TrackerKind,
    /// How fast passes leave; as everything else if it is not said.
    pub(super) bandwidth: Option<Bandwidth>,
}

/// A pass that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pass {
    pub(crate) number: u32,
    pub(crate) bytes_sent: u64,
    pub(crate) time_us: u64,
    pub(crate) pages_written: u64,
}

impl Pass {
    pub(crate) fn of(report: &PassReport) -> Self {
        Self {
            number: report.number,
            bytes_sent: report.bytes_sent,
            time_us: report.time.as_micros() as u64,
            pages_written: report.pages_written,
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "pass {} has sent {} in {}; {} pages were written meanwhile",
            self.number,
            Size(self.bytes_sent),
            time(self.time_us as f64),
            self.pages_written
        )
    }
}

/// Why the guest was stopped when it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cause {
    Converged,
    NotShrinking,
    PassesDone,
    TimeIsUp,
    NoPrecopy,
    /// One that this program does not know.
    Other,
}

impl Cause {
    pub(crate) const fn of(cause: SwitchoverCause) -> Self {
        match cause {
            SwitchoverCause::Converged => Self::Converged,
            SwitchoverCause::NotShrinking => Self::NotShrinking,
            SwitchoverCause::PassesDone => Self::PassesDone,
            SwitchoverCause::TimeIsUp => Self::TimeIsUp,
            SwitchoverCause::NoPrecopy => Self::NoPrecopy,
            _ => Self::Other,
        }
    }

    /// In words, after "until".
    pub(crate) const fn words(self) -> &'static str {
        match self {
            Self::Converged => "what was left fitted into the downtime",
            Self::NotShrinking => "the guest wrote as fast as pages left",
            Self::PassesDone => "all passes asked for were done",
            Self::TimeIsUp => "they had gone on for the longest time",
            Self::NoPrecopy => "it turned out that there can be none here",
            Self::Other => "the engine said so",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_are_read_and_written_again() {
        for text in ["0", "1", "30", "auto", "converged"] {
            let wanted: PassesWanted = text.parse().unwrap();
            assert_eq!(wanted.to_string(), text);
            assert_eq!(wanted.passes().is_none(), text == "0");
        }
        for text in ["", "-1", "Auto", "1.5", "many"] {
            assert!(text.parse::<PassesWanted>().unwrap_err().contains("auto or converged"));
        }
    }
}
