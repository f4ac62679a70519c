//! The log of a command: lines of `tracing` on the standard error, each with the session's id
//! as soon as it is known.

use std::fmt;
use std::io::{IsTerminal, stderr};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// The log is the process's, and so is this.
static SESSION: OnceLock<String> = OnceLock::new();

/// Starts logging, at `level` where the environment says nothing else.
pub(crate) fn start(level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .with_timer(TimeAndSession)
        .init();
}

/// Every line from now on names this session. A command has one in its life.
pub(crate) fn set_session(id: &str) {
    // The same one, when its source comes back.
    let _ = SESSION.set(id.to_owned());
}

/// In the place of a time, because that comes first in every line, whichever thread writes it;
/// a span would have to be entered on each of the engine's threads.
struct TimeAndSession;

impl FormatTime for TimeAndSession {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        SystemTime.format_time(writer)?;
        SESSION.get().map_or(Ok(()), |session| write!(writer, " session={session}"))
    }
}
