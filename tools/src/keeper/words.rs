//! What clients and the keeper say to each other. One packet a request and one an answer, as
//! JSON, with descriptors beside it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The version of all this.
pub(super) const VERSION: u32 = 1;
/// The most guests that are held.
pub const MAX_GUESTS: usize = 256;
/// The most descriptors of one guest.
pub const MAX_FILES_OF_GUEST: usize = 4096;
/// The most clients at a time.
pub const MAX_CLIENTS: usize = 64;
/// The most bytes in a name of a guest or a descriptor.
pub const MAX_NAME: usize = 64;

/// What a client asks. The first thing that it says is [`Hello`](Self::Hello).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request {
    /// Who it is, for people.
    Hello { version: u32, name: String },
    /// Descriptors of a set that is being put together; they come beside this.
    Put { guest: String, names: Vec<String> },
    /// The set that was put together is whole. It replaces the guest's, on which this client
    /// must have a claim if there is one, and this client has a claim on it.
    Commit { guest: String },
    /// More descriptors of a set, beside this; one of a name that is there is replaced.
    Add { guest: String, names: Vec<String> },
    /// These are let go.
    Drop { guest: String, names: Vec<String> },
    /// Nobody else shall have it while this connection lives.
    Claim { guest: String },
    /// Somebody else may claim it.
    Release { guest: String },
    /// Duplicates of its descriptors, beginning with this one, as many as a packet holds.
    Fetch { guest: String, from: usize },
    /// All of it is let go.
    Remove { guest: String },
    /// Which guests are held.
    List,
}

/// What the keeper answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(super) enum Reply {
    Done,
    /// Descriptors of these names come beside this, of so many in all.
    Files {
        names: Vec<String>,
        total: usize,
    },
    Guests {
        guests: Vec<Listed>,
    },
    Refused {
        why: Why,
        reason: String,
    },
}

/// Why the keeper refuses, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Why {
    /// No such guest is held.
    NotThere,
    /// Another client has a claim on the guest.
    Claimed,
    /// A limit is reached.
    Full,
    /// The request cannot be right.
    Wrong,
}

/// A guest that is held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Listed {
    /// Its name.
    pub guest: String,
    /// How many descriptors.
    pub files: usize,
    /// The process that stored it.
    pub stored_by: i32,
    /// How long ago that was.
    pub stored_us: u64,
    /// The process that has a claim on it, if one has.
    pub claimed_by: Option<i32>,
}

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guest, files, stored_by, stored_us, claimed_by } = self;
        let seconds = stored_us / 1_000_000;
        write!(f, "{guest}: {files} descriptors, stored by process {stored_by} {seconds} s ago, ")?;
        match claimed_by {
            Some(pid) => write!(f, "claimed by process {pid}"),
            None => f.write_str("not claimed"),
        }
    }
}

/// A refusal.
pub(super) type Refused = (Why, String);

impl From<Refused> for Reply {
    fn from((why, reason): Refused) -> Self {
        Self::Refused { why, reason }
    }
}

/// Names are for command lines and file names: letters, digits and `.`, `_`, `-`, `@`, `:`.
pub(super) fn check_name(name: &str) -> Result<(), Refused> {
    let is_plain = |it: u8| it.is_ascii_alphanumeric() || b"._-@:".contains(&it);
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_NAME).collect();
    let allowed = "letters, digits and ._-@: are allowed";
    Err((Why::Wrong, format!("{shown:?} is no name: 1 to {MAX_NAME} {allowed}")))
}
