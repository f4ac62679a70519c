//! A guest that cannot run here goes back to its source.
//!
//! Invariant: once it may have been given to this side, this process does not end before the source
//! knows, unless it is told to, or a successor can say so.

use super::super::farewell;
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
        // A process before this one may have known why.
        let outcome = self.record.as_ref().and_then(farewell::refused_as);
        self.end_refused(outcome.unwrap_or(Outcome::NotHere), reason);
        if self.record.as_ref().is_some_and(farewell::source_knew) {
            self.source_knows();
        }
    }

    /// The source has it back, and need not be told again, also by a successor.
    pub(super) fn source_knows(&mut self) {
        let Some(ending) = &mut self.ending else { return };
        ending.source_knows();
        farewell::note_source_knows(self.record.as_ref(), &self.progress);
        self.note("given_back", "the source has the guest back");
    }

    /// Ends once the source knows that it has the guest back: nobody else would run it.
    fn end_refused(&mut self, outcome: Outcome, reason: &str) {
        let last_word = Word::NotHere { reason: reason.to_owned() };
        farewell::note_refusal(self.record.as_ref(), outcome, &self.progress);
        self.ending = Some(Ending::refused(outcome, last_word, self.served.driven_by));
        self.state = None;
        // No driver is needed for that.
        self.release();
    }

    /// The guest will not run here. `None` if its VMM or driver is heard further: until the source
    /// has it back, or because it is on record that it runs.
    pub(super) fn give_up(&mut self, outcome: Outcome, reason: &str) -> Option<Outcome> {
        self.take_events();
        if self.ending.is_some() {
            return None;
        }
        if self.runs {
            return self.is_too_late();
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
        self.take_events();
        if self.runs {
            return self.is_too_late();
        }
        if self.ending.is_some() {
            return None;
        }
        tracing::info!(%error, "nothing is given back");
        Some(outcome)
    }

    fn is_too_late(&self) -> Option<Outcome> {
        self.progress.say("too late: it is on record that the guest runs here");
        None
    }

    fn take_events(&mut self) {
        while let Some(event) = self.events.try_next() {
            self.take_event(event);
        }
    }

    /// The guest was refused, and stands still until the source hears of it.
    pub(super) fn signalled_at_the_end(&mut self, ending: (Outcome, bool)) -> Option<Outcome> {
        let (outcome, is_known) = ending;
        if is_known {
            return Some(outcome);
        }
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
