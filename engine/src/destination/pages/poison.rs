//! Pages that the source cannot read, where the VMM handles memory that fails.

use super::{InstallError, Pages};
use crate::sys::fill::{Fill, Stopped};
use afterimage_protocol::layout::PageRange;

impl Pages {
    /// Makes pages fail for whoever touches them (SIGBUS), and complete, but for those that
    /// somebody else brings. `false` if an event must be read first; try again then.
    pub(crate) fn poison(&self, pages: PageRange) -> Result<bool, InstallError> {
        for run in self.layout().split(pages) {
            self.promote(run.pages);
            let mut mine = Vec::new();
            let gate = self.installing();
            self.planes.claim(run.pages, |won| mine.push(won));
            for (index, &won) in mine.iter().enumerate() {
                let part = self.run_of(won);
                let filled = self.fill(Fill::Poison, &part);
                if let Some(stopped) = filled.stopped {
                    // Nothing was written: what is left is as free as it was. What was
                    // poisoned is found so by the next attempt.
                    mine[index..].iter().for_each(|rest| self.planes.give_back(*rest));
                    drop(gate);
                    self.wake(&run);
                    return match stopped {
                        Stopped::EventPending => Ok(false),
                        other => Err(self.install_error(&part, filled.reached(), other)),
                    };
                }
                self.mark_complete(won, &self.counters.poisoned, |_| ());
            }
            drop(gate);
            self.wake(&run);
        }
        Ok(true)
    }
}
