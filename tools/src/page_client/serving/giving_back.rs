//! A guest that cannot run here goes back to its source.
//!
//! Invariant: once it may have been given to this side, this process does not end before the source
//! knows, unless it is told to, or a successor can say so.

use super::super::report::Outcome;
use super::{AtSource, Ending, Serving};
use crate::attachment::Word;

impl Serving {
    /// It is on record that the guest does not run here; the source is still to hear so.
    pub(super) fn refused(&mut self) {
        if self.ending.is_some() {
            return;
        }
        let reason = "it goes on at its source";
        self.note("not_here", &format!("the guest does not run here: {reason}"));
        self.end_refused(Outcome::NotHere, reason);
    }

    /// Ends once the source knows that it has the guest back: nobody else would run it.
    fn end_refused(&mut self, outcome: Outcome, reason: &str) {
        let last_word = Word::NotHere { reason: reason.to_owned() };
        self.ending = Some(Ending::refused(outcome, last_word, self.served.driven_by));
        // No driver is needed for that.
        self.release();
    }

    /// The guest will not run here. `None` if its VMM or driver is heard further: until the source
    /// has it back, or because it is on record that it runs.
    pub(super) fn give_up(&mut self, outcome: Outcome, reason: &str) -> Option<Outcome> {
        if self.ending.is_some() {
            return None;
        }
        if self.at_source == AtSource::Runs {
            return Some(outcome);
        }
        let Err(error) = self.destination.refuse() else {
            self.progress.say("giving the guest back to its source");
            self.end_refused(outcome, reason);
            return None;
        };
        // Whatever keeps it from being refused was told before.
        while let Some(event) = self.events.try_next() {
            self.take_event(event);
        }
        if self.runs {
            self.progress.say("too late: it is on record that the guest runs here");
        }
        if self.runs || self.ending.is_some() {
            return None;
        }
        tracing::info!(%error, "nothing is given back");
        Some(outcome)
    }

    /// The guest was refused, and stands still until the source hears of it.
    pub(super) fn signalled_at_the_end(&mut self) -> Option<Outcome> {
        let rest = if self.record.is_some() && self.place.is_some() {
            "started again, page-client tells it"
        } else {
            "without --state and --keeper nobody tells it, and it has to be fenced there"
        };
        let ends = self.signals > 1;
        let what = if ends { "a second signal: stopping;" } else { "not stopping yet:" };
        self.note(
            "signal",
            &format!("{what} the source does not know that it has the guest back; {rest}"),
        );
        ends.then_some(Outcome::Abandoned)
    }
}
