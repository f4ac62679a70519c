//! Taking over from a process that was killed at any instant.
//!
//! What it has left behind, and what becomes of it:
//!
//! - discards that were read and perhaps not noted: noted now, because whoever discarded has
//!   gone on;
//! - a page of a file that was claimed: half of it may be written, so it is emptied before it
//!   is free, or complete and zero if it was discarded meanwhile;
//! - a page that was claimed where pages are copied: free; if its copy was made and not
//!   noted, the next copy finds it there, and it is complete;
//! - a page that is complete and was not shown: its fault is answered from the planes;
//! - early copies: complete if memory was settled, and forgotten if not, because the source says
//!   anew what counts; in files they stay where they are;
//! - faults that were read: forgotten. Whoever waits in one is woken before anything is read,
//!   and faults again.
//!
//! Each step can be done again, so that a successor may be killed in the middle too.

use super::fault::moved;
use super::hold::{Place, pass};
use super::{PageNumber, PageRange, Pages};
use crate::sys::messages::Message;
use std::io;

impl Pages {
    /// Before any thread is started, and after the process before this one has ended.
    pub(super) fn take_over(&self) -> io::Result<()> {
        self.replay()?;
        pass(Place::Replayed);
        // First: a page may count that its writer has not given back.
        self.take_over_early()?;
        self.forget_claims();
        // Where a writer has emptied a discarded page, made it complete, and not said so.
        let mut gate = self.discarding();
        for page in gate.pages() {
            if self.planes.is_complete(page) {
                gate.remove(page);
            }
        }
        Ok(())
    }

    fn replay(&self) -> io::Result<()> {
        let mut gate = self.discarding();
        for message in self.messages.left_behind() {
            match message {
                Message::Gone { start, end } => drop(self.gone(start, end, &mut gate)),
                Message::Moved { from, to, length } => return Err(moved(from, to, length)),
                // Faults come again, and a child's descriptor was closed with its reader.
                Message::Fault { .. } | Message::Forked(_) | Message::Unknown(_) => {}
            }
        }
        self.messages.wipe_all();
        Ok(())
    }

    fn forget_claims(&self) {
        let all = PageRange::new(PageNumber(0), self.planes.pages());
        let mut claimed = Vec::new();
        self.planes.claimed_in(all, |run| claimed.push(run));
        for run in claimed.into_iter().flat_map(|run| self.layout().split(run)) {
            match self.file_of(&run) {
                Some(file) => self.give_back_file_pages(run.pages, file),
                None => self.planes.give_back(run.pages),
            }
        }
    }
}
