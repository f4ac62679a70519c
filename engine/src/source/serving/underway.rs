//! What one channel has under way, and since when nothing of it has been acknowledged.

use crate::sys::words::LazyWords;
use afterimage_protocol::layout::PageRange;
use afterimage_protocol::session::{Book, InFlight};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What one channel has under way, shared with the driver, which settles and requeues it.
#[derive(Clone, Debug, Default)]
pub(in crate::source) struct Underway(Arc<Mutex<Sent>>);

#[derive(Debug, Default)]
struct Sent {
    in_flight: InFlight,
    /// Since when something has been under way and nothing of it was acknowledged.
    since: Option<Instant>,
    /// The longest pause before an acknowledgement since this was asked for last.
    pause: Option<Duration>,
}

impl Underway {
    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages are about to be sent.
    pub(in crate::source) fn push(&self, pages: PageRange) {
        let mut sent = self.lock();
        if sent.in_flight.is_empty() {
            // What left before has been acknowledged, perhaps before it was said to have left.
            sent.since = None;
        }
        sent.in_flight.push(pages);
    }

    /// What has been pushed leaves now. Reading it may have taken a while.
    pub(in crate::source) fn leaves(&self) {
        self.lock().since.get_or_insert_with(Instant::now);
    }

    pub(in crate::source) fn is_full(&self) -> bool {
        self.lock().in_flight.is_full()
    }

    pub(in crate::source) fn settle(&self, book: &Book<LazyWords>) {
        let mut sent = self.lock();
        let before = sent.in_flight.first();
        sent.in_flight.settle(book);
        let present = sent.in_flight.first();
        if present == before {
            return;
        }
        let since = sent.since.take();
        sent.pause = sent.pause.max(since.map(|since| since.elapsed()));
        if present.is_some() && since.is_some() {
            sent.since = Some(Instant::now());
        }
    }

    pub(in crate::source) fn requeue(&self, book: &Book<LazyWords>) {
        self.lock().in_flight.requeue(book);
    }

    /// Since when nothing of what is under way has been acknowledged.
    pub(in crate::source) fn waits_since(&self) -> Option<Instant> {
        let sent = self.lock();
        sent.since.filter(|_| !sent.in_flight.is_empty())
    }

    /// How long the longest wait for an acknowledgement was since this was asked last; `None`
    /// if there was none.
    pub(in crate::source) fn take_pause(&self) -> Option<Duration> {
        self.lock().pause.take()
    }
}
