//! Ctrl-C: the run ends where it is, so that what it made (namespaces, sockets, huge pages) is
//! taken down.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT and SIGTERM are only noted. Processes that are started get them as
/// usual, and end.
pub fn note_signals() {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler stores to an atomic and does nothing else.
        if let Err(error) = unsafe { sigaction(signal, &action) } {
            tracing::warn!(%error, %signal, "cannot be noted");
        }
    }
}

/// Whether one has come.
#[must_use]
pub fn has_come() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
