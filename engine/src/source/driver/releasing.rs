//! The session thread's part in freeing pages: comparing who attaches, and the thread that
//! frees, which lasts as long as a connection.

use super::super::release::releaser::{Arrived, Releaser};
use super::Driver;
use crate::threads::{self, ThreadRole};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::LostPages;
use std::sync::Arc;
use std::thread::JoinHandle;

/// Pages are being freed.
pub(super) struct Releasing {
    arrived: Arrived,
    thread: JoinHandle<()>,
}

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

    /// Pages may be freed until the connection ends.
    pub(super) fn start_releasing(&mut self) {
        let (Some(serving), Some(released)) = (&self.serving, &self.shared.released) else {
            return;
        };
        let arrived = Arrived::everything(self.memory.layout().page_count());
        let work = Releaser::new(Arc::clone(serving), Arc::clone(released), arrived.clone());
        match threads::spawn(&self.options.threads, ThreadRole::Release, 0, || work.run()) {
            Ok(thread) => self.releasing = Some(Releasing { arrived, thread }),
            Err(error) => tracing::error!(%error, "no thread to free pages: none is freed"),
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

    /// The connection is closing: after this nothing more is noted or freed.
    pub(super) fn stop_releasing(&mut self) {
        if let Some(releasing) = self.releasing.take() {
            threads::join(releasing.thread);
        }
    }
}
