//! What can be wrong with a state file, and what to do about it.

use super::text::LayoutDigest;
use std::io;
use std::path::{Path, PathBuf};

/// Why a state file cannot be used, or a record not be made durable. In the latter case the
/// one before is still there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateFileError {
    /// Another process has it.
    #[error(
        "the state file {} is in use by {}: the session goes on there; stop that process first, \
         or give another state file",
        path.display(), holder(*pid)
    )]
    InUse {
        /// Which file.
        path: PathBuf,
        /// That process, if it could say so.
        pid: Option<u32>,
    },
    /// The system refuses something.
    #[error("could not {operation} the state file {}{}", path.display(), remedy(source))]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something else.
    #[error("{} is no state file of Afterimage: give the path of one, or of a file that is not \
             there yet", path.display())]
    Stranger {
        /// Which file.
        path: PathBuf,
    },
    /// Another version of the form.
    #[error(
        "the state file {} has form {theirs}, this release knows form 1: continue the session \
         with the release that wrote it",
        path.display()
    )]
    Version {
        /// Which file.
        path: PathBuf,
        /// The form that it says it has.
        theirs: String,
    },
    /// Cut short, damaged, or edited.
    #[error(
        "the state file {} is damaged ({what}): restore it from a copy; only if no other host has \
         or gets this guest, remove it to begin a new session",
        path.display()
    )]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// How that shows.
        what: String,
    },
    /// The other side's.
    #[error(
        "the state file {} is that of a {theirs}, and this is a {ours}: give this side's own",
        path.display()
    )]
    Side {
        /// Which file.
        path: PathBuf,
        /// Whose it is.
        theirs: String,
        /// Who wants it.
        ours: &'static str,
    },
    /// Something that must be understood, and is not.
    #[error(
        "the state file {} says {key}, which this release does not understand and may not \
         overlook: continue the session with the release that wrote it",
        path.display()
    )]
    Unknown {
        /// Which file.
        path: PathBuf,
        /// What it says.
        key: String,
    },
    /// Another guest's memory.
    #[error(
        "the state file {} is of memory with {there}, and here are {here}: give this guest's own \
         state file, or the memory that it was begun with",
        path.display()
    )]
    Layout {
        /// Which file.
        path: PathBuf,
        /// The layout that it is of.
        there: LayoutDigest,
        /// The layout of the memory that was given.
        here: LayoutDigest,
    },
    /// Nothing is recorded.
    #[error("the state file {} records no session: give the one that the session was begun with",
            path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A session that cannot be fenced.
    #[error("the session of the state file {} cannot be fenced: {why}", path.display())]
    Fence {
        /// Which file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
}

impl StateFileError {
    /// For a ledger, with the cause in the same line.
    pub(super) fn into_io(self) -> io::Error {
        match &self {
            Self::Io { source, .. } => io::Error::new(source.kind(), format!("{self}: {source}")),
            _ => io::Error::other(self),
        }
    }
}

/// What is wrong with the text of a file, whichever file it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    Stranger,
    Version(String),
    Damaged(String),
    Side { theirs: String, ours: &'static str },
    Unknown(String),
}

impl Wrong {
    pub(super) fn at(self, path: &Path) -> StateFileError {
        let path = path.to_owned();
        match self {
            Self::Stranger => StateFileError::Stranger { path },
            Self::Version(theirs) => StateFileError::Version { path, theirs },
            Self::Damaged(what) => StateFileError::Damaged { path, what },
            Self::Side { theirs, ours } => StateFileError::Side { path, theirs, ours },
            Self::Unknown(key) => StateFileError::Unknown { path, key },
        }
    }
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (make room there; the record before is kept, and this is tried again)"
        }
        io::ErrorKind::NotFound => " (make its directory first)",
        io::ErrorKind::PermissionDenied => " (this user must be able to write in its directory)",
        io::ErrorKind::ReadOnlyFilesystem => " (give a path on a file system that can be written)",
        _ => "",
    }
}
