//! The session thread's part in freeing pages: comparing who attaches, and the thread that
//! frees, which lasts as long as a connection, or until the ledger's disk lets it go.
//!
//! Invariant: nobody waits for that disk. While the thread of an earlier connection does, there
//! is no other.

use super::super::release::releaser::{Arrived, Releaser};
use super::{Driver, Input};
use crate::inbox::Outlet;
use crate::threads::{self, ThreadRole};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::LostPages;
use afterimage_protocol::wire::Epoch;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Pages are being freed.
pub(super) struct Releasing {
    epoch: Epoch,
    arrived: Arrived,
    thread: JoinHandle<()>,
}

/// Tells the session thread that a thread is at its end, also where it panics.
struct TellAtEnd {
    epoch: Epoch,
    driver: Outlet<Input>,
}

impl Drop for TellAtEnd {
    fn drop(&mut self) {
        self.driver.send(Input::ReleaseEnded(self.epoch));
    }
}

/// How long a source that is dropped waits for a thread that should end at once.
const END_TIME: Duration = Duration::from_secs(1);

impl Driver {
    /// The destination's planes are in the book: has it all that was freed here?
    pub(super) fn compare_released(&mut self) {
        let served = self.session.served();
        let lost = match (&self.shared.released, self.shared.book()) {
            (Some(released), Some(book)) => released.lost(self.memory.layout(), served, &book),
            // Nobody knows what was freed, so all of it may be lost.
            _ => Some(LostPages { first: PageNumber(0), count: served.page_count() }),
        };
        self.session.compared(lost, self.link.now());
    }

    /// Pages may be freed until the connection ends; from now, or as soon as an earlier thread
    /// has ended.
    pub(super) fn start_releasing(&mut self) {
        self.may_release = true;
        let (Some(serving), Some(released), None, None) =
            (&self.serving, &self.shared.released, &self.releasing, &self.retired_releasing)
        else {
            return;
        };
        let arrived = Arrived::everything(self.memory.layout().page_count());
        let work = Releaser::new(Arc::clone(serving), Arc::clone(released), arrived.clone());
        let epoch = serving.epoch;
        let end = TellAtEnd { epoch, driver: self.outlet.clone() };
        let body = move || {
            work.run();
            drop(end);
        };
        match threads::spawn(&self.options.threads, ThreadRole::Release, 0, body) {
            Ok(thread) => self.releasing = Some(Releasing { epoch, arrived, thread }),
            Err(error) => tracing::error!(%error, "no thread to free pages: none is freed"),
        }
    }

    /// A thread is at its end: that of an earlier connection, or of this one if it panicked.
    pub(super) fn release_ended(&mut self, epoch: Epoch) {
        let is_it = |it: &mut Releasing| it.epoch == epoch;
        if let Some(ended) = self.retired_releasing.take_if(is_it) {
            threads::join(ended.thread);
            if self.may_release {
                self.start_releasing();
            }
        } else if let Some(ended) = self.releasing.take_if(is_it) {
            threads::join(ended.thread);
        }
    }

    /// Pages have been acknowledged, which the book says already.
    pub(super) fn note_arrived(&self, runs: &[PageRange]) {
        if let (Some(releasing), Some(serving)) = (&self.releasing, &self.serving) {
            for run in runs {
                releasing.arrived.add(serving, *run);
            }
        }
    }

    /// The connection is closing, and its serving closed: after this nothing is freed. The
    /// thread may be waiting for a disk, and is not waited for.
    pub(super) fn stop_releasing(&mut self) {
        self.may_release = false;
        if let Some(releasing) = self.releasing.take() {
            self.retired_releasing = Some(releasing);
        }
    }

    /// The source is at its end. Its thread ends at once, or when the disk lets it, and touches
    /// no memory of the guest in either case.
    pub(super) fn leave_releasing(&mut self) {
        // Nothing but news and the end of its time ends the wait.
        self.link.pause();
        let end = self.link.now() + END_TIME;
        loop {
            while let Some(input) = self.next_input() {
                if let Input::ReleaseEnded(epoch) = input {
                    self.release_ended(epoch);
                }
            }
            if self.retired_releasing.is_none() {
                return;
            }
            if self.link.now() >= end {
                break;
            }
            if let Err(error) = self.link.wait(Some(end)) {
                tracing::error!(%error, "the source's session thread cannot wait for its end");
                break;
            }
        }
        tracing::warn!("the release ledger's disk does not answer: its thread is left behind");
    }
}
