//! The end, which the VMM, a driver and the source are to hear of: they may be on their way back.
//!
//! Invariant: a process that ends by itself leaves no guest that nobody would run. It waits for a
//! driver that has not started the guest, and for a source that does not know yet that it has the
//! guest back.

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
    /// The connection on which a driver has heard the last word.
    driver_told: Option<u64>,
    source: Knows,
    is_refusal: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knows {
    NotYet,
    /// It does, or it need not.
    Settled,
}

impl Ending {
    /// The session is over.
    pub(super) fn new(outcome: Outcome, last_word: Word, driven_by: DrivenBy) -> Self {
        let driver = match driven_by {
            DrivenBy::Vmm => Knows::Settled,
            DrivenBy::Driver => Knows::NotYet,
        };
        Self {
            outcome,
            last_word,
            until: Instant::now() + FAREWELL,
            vmm: Knows::NotYet,
            driver,
            driver_told: None,
            source: Knows::Settled,
            is_refusal: false,
        }
    }

    /// The same, and the source is still to hear that it has the guest back.
    pub(super) fn refused(outcome: Outcome, last_word: Word, driven_by: DrivenBy) -> Self {
        let (source, is_refusal) = (Knows::NotYet, true);
        Self { source, is_refusal, ..Self::new(outcome, last_word, driven_by) }
    }

    /// Of a guest that was refused: the outcome, and whether the source knows.
    pub(super) fn refusal(&self) -> Option<(Outcome, bool)> {
        self.is_refusal.then_some((self.outcome, self.source == Knows::Settled))
    }

    /// The VMM has said so itself.
    pub(super) fn vmm_knows(&mut self) {
        self.vmm = Knows::Settled;
    }

    /// The driver has said so itself.
    pub(super) fn driver_knows(&mut self) {
        self.driver = Knows::Settled;
    }

    /// Whether nobody needs to be waited for.
    pub(super) fn is_known(&self) -> bool {
        [self.vmm, self.driver, self.source] == [Knows::Settled; 3]
    }

    /// Whether the source is waited for.
    pub(super) fn waits_for_source(&self) -> bool {
        self.source == Knows::NotYet
    }

    pub(super) fn source_knows(&mut self) {
        self.source = Knows::Settled;
    }

    /// The VMM has ended, and with it what a driver could do.
    pub(super) fn vmm_died(&mut self) {
        (self.vmm, self.driver) = (Knows::Settled, Knows::Settled);
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

    /// Until a driver has started the guest, it stands still, and nobody else would start it.
    pub(super) fn tell_driver(&mut self, driver: &mut Party, need: DriverNeed, say: &Progress) {
        if self.driver == Knows::Settled {
            return;
        }
        let connection = Some(driver.number());
        if self.driver_told != connection && driver.tell(&self.last_word, say) {
            self.driver_told = connection;
        }
        let is_settled = match self.outcome {
            Outcome::Finished => need == DriverNeed::Over,
            _ => self.driver_told == connection || self.is_late(),
        };
        if is_settled {
            self.driver = Knows::Settled;
        }
    }

    fn is_late(&self) -> bool {
        Instant::now() >= self.until
    }
}
