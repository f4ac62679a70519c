//! What can go wrong in the demo, and the exit status that says so.

use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The exit status of the program. The numbers are promised in `--help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// The guest moved and every page was verified.
    Verified = 0,
    /// The guest moved or stayed, but its memory is not what it should be.
    Wrong = 1,
    /// The command line is wrong. clap ends with it as well.
    Usage = 2,
    /// The machine lacks something; nothing was moved.
    Lacking = 3,
    /// The move failed or took too long, or its page could not be written.
    Failed = 4,
    /// The guest was taken back, and every page of it was verified at the source.
    Stayed = 5,
}

/// Why there is nothing to verify: one line that says what, where and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DemoError {
    /// The command line asks for what cannot be together.
    Usage(String),
    /// The machine lacks something.
    Lacking(String),
    /// The move failed.
    Failed(String),
}

impl DemoError {
    /// A failure with all of its causes.
    pub(super) fn failed(what: &str, error: &dyn Error) -> Self {
        Self::Failed(format!("{what}: {}", one_line(error)))
    }

    /// Something missing, with all causes.
    pub(super) fn lacking(what: &str, error: &dyn Error) -> Self {
        Self::Lacking(format!("{what}: {}", one_line(error)))
    }

    /// The same, said of somebody.
    #[must_use]
    pub(super) fn of(self, who: &str) -> Self {
        match self {
            Self::Usage(what) => Self::Usage(format!("{who}: {what}")),
            Self::Lacking(what) => Self::Lacking(format!("{who}: {what}")),
            Self::Failed(what) => Self::Failed(format!("{who}: {what}")),
        }
    }

    pub(super) fn status(&self) -> Status {
        match self {
            Self::Usage(_) => Status::Usage,
            Self::Lacking(_) => Status::Lacking,
            Self::Failed(_) => Status::Failed,
        }
    }
}

impl fmt::Display for DemoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Usage(what) | Self::Lacking(what) | Self::Failed(what)) = self;
        f.write_str(what)
    }
}

impl Error for DemoError {}

/// An error and its causes in one line.
pub(super) fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some errors repeat what their source says.
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}
