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

use super::Pages;
use super::fault::moved;
use super::hold::{Place, pass};
use crate::sys::holes;
use crate::sys::messages::Message;
use afterimage_protocol::layout::GuestAddress;
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

    /// What a handler that was killed has left: what was settled is complete, and what was not
    /// is forgotten, though it still lies in files.
    fn take_over_early(&self) -> io::Result<()> {
        self.promote(self.all());
        self.leave_early();
        if self.early.has_old() { self.find_old() } else { Ok(()) }
    }

    /// Notes where something lies in pages of files that are not complete.
    fn find_old(&self) -> io::Result<()> {
        for (region, file) in self.layout().regions().iter().zip(&self.memory.files) {
            let Some(file) = file else { continue };
            let (mut at, end) = (file.offset, file.offset + region.length);
            while let Some(data) = holes::next_extent(&file.file, at, end)? {
                let start = GuestAddress(region.guest_address.0 + (data.start - file.offset));
                for run in self.layout().pages_touching_guest(start, data.end - data.start) {
                    self.planes.incomplete_in(run.pages, |open| self.early.note_there(open));
                }
                at = data.end;
            }
        }
        Ok(())
    }

    fn forget_claims(&self) {
        let mut claimed = Vec::new();
        self.planes.claimed_in(self.all(), |run| claimed.push(run));
        for run in claimed.into_iter().flat_map(|run| self.layout().split(run)) {
            match self.file_of(&run) {
                Some(file) => self.give_back_file_pages(run.pages, file),
                None => self.planes.give_back(run.pages),
            }
        }
    }
}
