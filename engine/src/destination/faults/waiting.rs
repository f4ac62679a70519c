//! What waits for an event to be read: while one is unread nothing can be placed, and this
//! thread is the one that reads.

use super::FaultThread;
use afterimage_protocol::layout::PageNumber;

/// A copy that could not be placed.
pub(super) struct Held {
    pub(super) page: PageNumber,
    pub(super) content: Vec<u8>,
}

impl FaultThread {
    pub(super) const fn waits_for_events(&self) -> bool {
        !self.held.is_empty() || !self.again.is_empty() || !self.poisoned.is_empty()
    }

    /// Places copies that were held back, and lets pages fail that the source cannot read.
    pub(super) fn try_again(&mut self) {
        for Held { page, content } in std::mem::take(&mut self.held) {
            if let Err(error) = self.place(page, &content) {
                self.lose_line(&error);
            }
        }
        for pages in std::mem::take(&mut self.poisoned) {
            match self.arrived.pages.poison(pages) {
                Ok(true) => {
                    for page in pages.iter() {
                        self.asked.remove(&page);
                    }
                    self.arrived.acknowledge_complete(pages);
                }
                Ok(false) => self.poisoned.push(pages),
                // They wait, as they do where the VMM has not declared anything.
                Err(error) => drop(self.arrived.failed(error)),
            }
        }
    }
}
