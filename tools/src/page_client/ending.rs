//! The end, which the VMM and a driver are to hear of: they may be on their way back.

use std::time::Instant;

use super::farewell::FAREWELL;
use super::party::Party;
use super::report::Outcome;
use super::serving::DriverNeed;
use crate::attachment::{DrivenBy, Word};
use crate::page_server::progress::Progress;

pub(super) struct Ending {
    pub(super) outcome: Outcome,
    last_word: Word,
    until: Instant,
    vmm: Knows,
    driver: Knows,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knows {
    NotYet,
    /// It does, or it need not.
    Settled,
}

impl Ending {
    pub(super) fn new(outcome: Outcome, last_word: Word, driven_by: DrivenBy) -> Self {
        let driver = match driven_by {
            DrivenBy::Vmm => Knows::Settled,
            DrivenBy::Driver => Knows::NotYet,
        };
        let until = Instant::now() + FAREWELL;
        Self { outcome, last_word, until, vmm: Knows::NotYet, driver }
    }

    /// Whether nobody needs to be waited for.
    pub(super) fn is_known(&self) -> bool {
        (self.vmm, self.driver) == (Knows::Settled, Knows::Settled)
    }

    pub(super) fn tell_vmm(&mut self, vmm: &mut Party, progress: &Progress) {
        if self.vmm == Knows::Settled {
            return;
        }
        if vmm.tell(&self.last_word, progress) {
            self.vmm = Knows::Settled;
        } else if self.is_late() {
            progress.say("the VMM has not come back, and was not told that this is the end");
            self.vmm = Knows::Settled;
        }
    }

    /// Until a driver has heard that the guest may run, it stands still, and nobody else would
    /// start it.
    pub(super) fn tell_driver(&mut self, driver: &mut Party, need: DriverNeed, say: &Progress) {
        if self.driver == Knows::Settled {
            return;
        }
        let may_be_away = match self.outcome {
            Outcome::Finished => need == DriverNeed::Over,
            _ => self.is_late(),
        };
        if driver.tell(&self.last_word, say) || may_be_away {
            self.driver = Knows::Settled;
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }
}
