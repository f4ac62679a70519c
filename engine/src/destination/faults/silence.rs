//! Answers that do not come: asked for again, and if nothing at all comes of the request
//! channel it is given up, while the session goes on.

use super::{FaultThread, RETRY_AFTER};
use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl FaultThread {
    /// Something is asked for on the line.
    pub(super) fn waits_for_answer(&mut self) {
        if let Some(line) = &mut self.line {
            line.waits_since.get_or_insert_with(Instant::now);
        }
    }

    /// Something is going to be asked for: if nothing else is, whatever was waited for before
    /// has come in another way.
    pub(super) fn waits_for_nothing_else(&mut self) {
        if let Some(line) = &mut self.line
            && self.asked.is_empty()
        {
            line.waits_since = None;
        }
    }

    /// Something has been received on the line.
    pub(super) fn has_heard(&mut self) {
        let waits = !self.asked.is_empty();
        if let Some(line) = &mut self.line
            && let Some(since) = line.waits_since.take()
        {
            self.patience.rewarded(since.elapsed());
            line.waits_since = waits.then(Instant::now);
        }
    }

    /// When the line is to be given up, if nothing comes.
    pub(super) fn gives_up_at(&self) -> Option<Instant> {
        // Before that the source may be waiting for its own switchover.
        if self.asked.is_empty() || !self.arrived.is_running() {
            return None;
        }
        Some(self.line.as_ref()?.waits_since? + self.patience.lasts())
    }

    /// Gives the line up if nothing at all has come for too long, though something was asked
    /// for. Its successor is asked for all of it.
    /// `true` if there may be more to read.
    pub(super) fn give_up_if_silent(&mut self) -> bool {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        if !is_due(self.gives_up_at()) {
            return false;
        }
        // What lies in the socket counts: this thread may have been kept from its work.
        let may_be_more = self.take_answers();
        let planes = self.arrived.pages.planes();
        // Nor does it count what arrived in background.
        self.asked.retain(|page, _| !planes.is_complete(*page));
        let oldest = self.asked.values().map(|asked| asked.first).min();
        if let Some(line) = &mut self.line {
            line.waits_since = line.waits_since.zip(oldest).map(|(since, first)| since.max(first));
        }
        if is_due(self.gives_up_at()) {
            self.patience.exhausted();
            self.lose_line(&io::Error::new(io::ErrorKind::TimedOut, "the source does not answer"));
        }
        may_be_more
    }

    /// Whether there is something to do from time to time.
    pub(super) fn has_to_retry(&self) -> bool {
        !(self.asked.is_empty() && self.short_of_room.is_empty() && self.roomless.is_empty())
    }

    /// Asks again for what was asked for a while ago.
    pub(super) fn retry_if_due(&mut self) {
        if !self.has_to_retry() {
            return;
        }
        let now = Instant::now();
        if now < self.next_retry {
            return;
        }
        self.next_retry = now + RETRY_AFTER;
        self.again.append(&mut self.short_of_room);
        if !self.outgoing.is_empty() {
            // The source has not taken what it was asked already.
            return;
        }
        let planes = self.arrived.pages.planes();
        // A page that arrived in background while it was asked for.
        self.asked.retain(|page, _| !planes.is_complete(*page));
        self.roomless.retain(|page| !planes.is_complete(page));
        self.look_for_room(now);
        let late: Vec<_> = self
            .asked
            .iter()
            .filter(|(_, asked)| now.duration_since(asked.last) >= RETRY_AFTER)
            .map(|(page, _)| *page)
            .collect();
        for page in late {
            if let Some(asked) = self.asked.get_mut(&page) {
                asked.last = now;
            }
            self.arrived.counters.retried.fetch_add(1, Ordering::Relaxed);
            self.push_request(page);
        }
        self.flush();
    }
}
