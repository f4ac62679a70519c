//! The session thread's part in freeing pages: comparing who attaches, and the thread that
//! frees, which lasts as long as a connection, or until the ledger's disk lets it go.
//!
//! Invariant: nobody waits for that disk. While the thread of an earlier connection does, there
//! is no other.

use super::super::release::releaser::{Arrived, Releaser};
use super::{Driver, Input};
use crate::threads::{self, ThreadRole};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::LostPages;
use afterimage_protocol::wire::Epoch;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Pages are being freed.
pub(super) struct Releasing {
    epoch: Epoch,
    arrived: Arrived,
    thread: JoinHandle<()>,
}

/// How long a source that is dropped waits for a thread that should end at once, and how often
/// it looks.
const END_TIME: Duration = Duration::from_secs(1);
const END_LOOK: Duration = Duration::from_millis(1);

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
        self.end_retired_releasing();
        let (Some(serving), Some(released), None, None) =
            (&self.serving, &self.shared.released, &self.releasing, &self.retired_releasing)
        else {
            return;
        };
        let arrived = Arrived::everything(self.memory.layout().page_count());
        let work = Releaser::new(Arc::clone(serving), Arc::clone(released), arrived.clone());
        let (epoch, driver) = (serving.epoch, self.outlet.clone());
        let body = move || {
            work.run();
            driver.send(Input::ReleaseEnded(epoch));
        };
        match threads::spawn(&self.options.threads, ThreadRole::Release, 0, body) {
            Ok(thread) => self.releasing = Some(Releasing { epoch, arrived, thread }),
            Err(error) => tracing::error!(%error, "no thread to free pages: none is freed"),
        }
    }

    /// The thread of an earlier connection is at its end.
    pub(super) fn release_ended(&mut self, epoch: Epoch) {
        if let Some(ended) = self.retired_releasing.take_if(|it| it.epoch == epoch) {
            threads::join(ended.thread);
            if self.may_release {
                self.start_releasing();
            }
        }
    }

    fn end_retired_releasing(&mut self) {
        if let Some(ended) = self.retired_releasing.take_if(|it| it.thread.is_finished()) {
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
        let since = Instant::now();
        self.end_retired_releasing();
        while self.retired_releasing.is_some() && since.elapsed() < END_TIME {
            std::thread::sleep(END_LOOK);
            self.end_retired_releasing();
        }
        if self.retired_releasing.take().is_some() {
            tracing::warn!("the release ledger's disk does not answer: its thread is left behind");
        }
    }
}
