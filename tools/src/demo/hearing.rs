//! The source's events, each with the moment in which it was read.
//!
//! Invariant: a thread waits for them all the time, so that the moment is that of the event
//! and not of whoever asks for it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{CallError, Events, SourceEvent};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::error::DemoError;
use super::messages::{deadline, now_us};
use crate::control::{Desk, Hold};

/// Why a guest does not move.
pub(super) enum NotMoved {
    /// Somebody has taken it back: it is the source's again.
    TakenBack,
    Failed(DemoError),
}

impl From<DemoError> for NotMoved {
    fn from(error: DemoError) -> Self {
        Self::Failed(error)
    }
}

/// What a source says.
pub(super) struct Hearing(Receiver<(u64, SourceEvent)>);

impl Hearing {
    /// Listens until the source has gone, tells `desk`, and begins `before_run` when the guest
    /// is held.
    pub(super) fn start(
        events: Events<SourceEvent>,
        desk: Desk,
        before_run: Option<Arc<Hold>>,
    ) -> Result<Self, DemoError> {
        let (sender, heard) = crossbeam_channel::unbounded();
        thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || {
                while let Some(event) = events.next() {
                    if let (SourceEvent::Held, Some(hold)) = (&event, &before_run) {
                        hold.begin();
                    }
                    // At once: a manager acts on it.
                    desk.note(&event);
                    if sender.send((now_us(), event)).is_err() {
                        return;
                    }
                }
            })
            .map_err(|error| DemoError::failed("cannot start a thread", &error))?;
        Ok(Self(heard))
    }

    /// The next event and when it was heard; `None` if there is none by then. That the guest was
    /// taken back is an error: it ends whatever is being done.
    pub(super) fn next(
        &self,
        until: Instant,
        what: &str,
    ) -> Result<Option<(u64, SourceEvent)>, NotMoved> {
        let left = until.saturating_duration_since(Instant::now());
        match self.0.recv_timeout(left) {
            Ok((_, SourceEvent::Reclaimed)) => Err(NotMoved::TakenBack),
            Ok((_, event @ SourceEvent::PersistFailed)) => {
                let what = format!("while waiting until {what}, the engine said {event:?}");
                Err(DemoError::Failed(what).into())
            }
            Ok(heard) => {
                tracing::info!(event = ?heard.1, "source");
                Ok(Some(heard))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let what = format!("the engine ended before it happened that {what}");
                Err(DemoError::Failed(what).into())
            }
        }
    }

    /// Waits for an event; says when it was heard.
    pub(super) fn wait(
        &self,
        limit: Duration,
        what: &str,
        is_awaited: impl Fn(&SourceEvent) -> bool,
    ) -> Result<u64, NotMoved> {
        let until = deadline(limit);
        while let Some((at_us, event)) = self.next(until, what)? {
            if is_awaited(&event) {
                return Ok(at_us);
            }
        }
        Err(DemoError::Failed(format!("waited {} s until {what}", limit.as_secs())).into())
    }

    /// Why the engine has refused to go on: somebody may have taken the guest back just before.
    pub(super) fn refused(&self, limit: Duration, what: &str, error: &CallError) -> NotMoved {
        let refusal = DemoError::failed(what, error);
        let CallError::NotNow(_) = error else { return refusal.into() };
        match self.wait(limit, "it is said why", |_| false) {
            Err(NotMoved::TakenBack) => NotMoved::TakenBack,
            _ => refusal.into(),
        }
    }
}
