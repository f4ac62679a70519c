//! QEMU, as it is talked to from outside.

mod line;
mod qmp;

use std::io;
use std::time::Duration;

pub use line::{Deadline, Lines, Speaker, unix_now};
pub use qmp::{Event, Qmp};

/// Why a QEMU, or its guest, has not said what it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// A system call of this side failed.
    #[error("cannot {operation}")]
    Io {
        /// What was tried, and with what.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A QEMU ended before its time.
    #[error("{who} ended: {said}")]
    Ended {
        /// Which one.
        who: String,
        /// The end of what it printed.
        said: String,
    },
    /// Something did not come in time.
    #[error("{who}: no {awaited} after {} s; it printed: {said}", limit.as_secs())]
    Late {
        /// Who should have said it.
        who: String,
        /// What was waited for.
        awaited: String,
        /// For how long.
        limit: Duration,
        /// The end of what QEMU printed.
        said: String,
    },
    /// QEMU refused a command.
    #[error("{who} refused {command}: {reason}")]
    Refused {
        /// Which one.
        who: String,
        /// The command of QMP.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// An answer that was not understood.
    #[error("{who} said {line:?}, which is not {expected}")]
    Answer {
        /// Who said it.
        who: String,
        /// What it said.
        line: String,
        /// What it should have been.
        expected: String,
    },
}
