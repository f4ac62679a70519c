//! How fast a source sends what nobody has asked for.
//!
//! All background streams of a source ask one [`Pace`] before each batch that they take. One
//! of those that wait sleeps until the next piece may leave and wakes the next when it goes;
//! the others sleep until they are woken. Pages are taken only when they may leave, so that a
//! stream that waits keeps none from a request.

mod bucket;

use bucket::Bucket;
use std::num::NonZeroU64;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The rate of the background. Requests are answered at once whatever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Background {
    /// As fast as it goes.
    #[default]
    Unlimited,
    /// At most so much, evenly, all streams of one destination together. Counted are pages
    /// with content and the headers of frames: runs of zero pages cost next to nothing.
    ///
    /// Streams take 1 ms worth at once, at most 256 KiB and at least one page. What could not
    /// leave in time is made up for, but not after 25 ms: over a second at most 2.5 % and one
    /// such piece more leaves than the rate says.
    Limited {
        /// Bytes a second.
        bytes_per_second: NonZeroU64,
    },
    /// Nothing leaves that the destination did not ask for. A guest that does not touch every
    /// page never has them all: a migration then ends only after a change to another rate.
    OnRequest,
}

/// How much leaves at once, in time: a fault whose core is busy with a piece waits for it.
const PIECE: Duration = Duration::from_millis(1);
/// No piece is planned smaller.
const LEAST_PIECE_BYTES: u64 = 4096;

/// The rate of one source, which all of its background streams share, in all epochs.
#[derive(Debug)]
pub(crate) struct Pace {
    state: Mutex<State>,
    /// A piece may leave, the rate is another, or it is time to stop.
    changed: Condvar,
    /// What the bucket's time counts from.
    since: Instant,
}

#[derive(Debug)]
struct State {
    background: Background,
    /// Of a limited rate.
    bucket: Option<Bucket>,
    /// How often the rate was set.
    changes: u64,
    /// Whether some stream sleeps until the bucket allows the next piece.
    is_watched: bool,
}

/// That a piece may leave.
#[derive(Debug)]
pub(super) struct Permit {
    /// How much it should be at most; no less than a page goes, however small this is.
    pub(super) bytes: u64,
    /// Which rate it is from.
    of: u64,
}

impl Default for Pace {
    fn default() -> Self {
        let background = Background::Unlimited;
        let state = State { background, bucket: None, changes: 0, is_watched: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), since: Instant::now() }
    }
}

impl Pace {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.since.elapsed()
    }

    /// Another rate, from now on.
    pub(crate) fn set(&self, background: Background) {
        let mut state = self.lock();
        state.bucket = match background {
            Background::Limited { bytes_per_second } => Some(match state.bucket {
                None => Bucket::new(bytes_per_second, self.now()),
                Some(mut bucket) => {
                    bucket.change(bytes_per_second, self.now());
                    bucket
                }
            }),
            Background::Unlimited | Background::OnRequest => None,
        };
        state.background = background;
        state.changes += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// Everybody who waits shall look whether it is time to stop, which is so by now.
    pub(super) fn wake(&self) {
        // Whoever has looked before, and does not sleep yet, holds the lock.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits until a piece of at most `most` bytes may leave. `None` when `is_over` says so,
    /// which [`wake`](Self::wake) makes it look at, or `has_ended` does, which it asks each
    /// `look_after`.
    pub(super) fn permit(
        &self,
        most: u64,
        look_after: Duration,
        is_over: impl Fn() -> bool,
        has_ended: impl Fn() -> bool,
    ) -> Option<Permit> {
        let mut state = self.lock();
        let permit = loop {
            if is_over() {
                break None;
            }
            let due_in = match state.ask(self.now(), most) {
                Answer::Go(permit) => break Some(permit),
                Answer::Wait(due_in) => due_in,
            };
            let watch = due_in.filter(|_| !state.is_watched);
            state.is_watched |= watch.is_some();
            let sleep = watch.map_or(look_after, |due_in| due_in.min(look_after));
            let (locked, waited) =
                self.changed.wait_timeout(state, sleep).unwrap_or_else(PoisonError::into_inner);
            state = locked;
            state.is_watched &= watch.is_none();
            if waited.timed_out() && sleep == look_after && has_ended() {
                break None;
            }
        };
        if state.bucket.is_some() && !state.is_watched {
            // Somebody else has to watch now, if anybody waits.
            self.changed.notify_one();
        }
        permit
    }

    /// So many bytes leave by a permit.
    pub(super) fn leaves(&self, permit: &Permit, bytes: u64) {
        let mut state = self.lock();
        // What was permitted before the rate was changed belongs to the old one.
        if permit.of != state.changes {
            return;
        }
        let Some(bucket) = &mut state.bucket else { return };
        bucket.correct(permit.bytes, bytes);
        if bucket.wait(self.now()).is_zero() {
            self.changed.notify_one();
        }
    }
}

enum Answer {
    Go(Permit),
    /// So long, or until something changes.
    Wait(Option<Duration>),
}

impl State {
    fn ask(&mut self, now: Duration, most: u64) -> Answer {
        let permit = |bytes| Answer::Go(Permit { bytes, of: self.changes });
        match (self.background, &mut self.bucket) {
            (Background::OnRequest, _) => Answer::Wait(None),
            (Background::Limited { bytes_per_second }, Some(bucket)) => {
                let due_in = bucket.wait(now);
                if !due_in.is_zero() {
                    return Answer::Wait(Some(due_in));
                }
                let bytes = piece(bytes_per_second).min(most);
                bucket.take(now, bytes);
                permit(bytes)
            }
            (Background::Unlimited | Background::Limited { .. }, _) => permit(most),
        }
    }
}

/// Bytes of a piece at a rate.
fn piece(bytes_per_second: NonZeroU64) -> u64 {
    let bytes = bytes_per_second.get() / (1000 / PIECE.as_millis() as u64);
    (bytes / LEAST_PIECE_BYTES * LEAST_PIECE_BYTES).max(LEAST_PIECE_BYTES)
}

#[cfg(test)]
mod tests;
