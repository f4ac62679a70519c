//! The end: the guest is the destination's, or goes on here.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Parts;
use super::sending::{At, Sending};
use crate::page_server::{Failure, PageCounts};
use crate::qemu::QmpError;
use crate::qemu::companion::News;
use crate::qemu::machine::{Machine, Vcpus};
use crate::qemu::options::SourceOptions;
use crate::qemu::past::Past;
use crate::qemu::report::{Outcome, Report};
use crate::qemu::state;

/// How long a destination can come back to hear how it ended, if its connection was lost at the
/// end.
const GRACE: Duration = Duration::from_millis(1200);
/// How long the destination's side may take to end when the session has.
const LAST_WORDS: Duration = Duration::from_secs(30);

impl Sending {
    /// The guest is this side's again: it goes on as it was.
    pub(super) fn resume(&mut self) -> Outcome {
        let reason = self.reason.take();
        let reason = reason.unwrap_or_else(|| Failure::new("taken back at the control socket"));
        let outcome = match self.before {
            Some(before) => resume(&mut self.parts, before, &reason.to_string()),
            // Others may have stopped it meanwhile, or moved it: it is not for this side to run.
            None => {
                self.say(&format!(
                    "the guest was not moved, and nothing was done to it here: {reason}"
                ));
                Outcome::NotMoved
            }
        };
        self.reason = Some(reason);
        outcome
    }

    pub(super) fn close(mut self, outcome: Outcome, options: &SourceOptions) -> Report {
        let (mut outcome, is_finished) = (outcome, outcome == Outcome::Finished);
        if is_finished && let Some(failure) = self.hear_out() {
            self.say(&failure.to_string());
            (outcome, self.reason) = (Outcome::Failed, Some(failure));
        }
        // What the destination's side says of it is better than that it has refused.
        if self.at == At::Refused
            && let Some(failure) = self.hear_out()
        {
            self.say(&failure.to_string());
            self.reason = Some(failure);
        }
        // Whoever is on the way back is to hear how it ended.
        let is_away = !self.is_attached && self.reason.is_some();
        if (is_finished && self.parts.record.is_kept()) || is_away {
            self.linger();
        }
        let Self { mut parts, source, pages, reason, .. } = self;
        let counts = PageCounts::of(&source.stats(), pages);
        parts.desk.detach();
        // Waits until the destination has heard that it is over.
        drop(source);
        drop(parts.companion.take());
        if is_finished {
            if let Err(error) = parts.record.note_bye() {
                parts.progress.say(&format!("warning: {error}"));
            }
            end_source(&mut parts, options);
        }
        if is_finished || outcome == Outcome::NotMoved {
            parts.record.forget_state();
        }
        let reason = reason.filter(|_| outcome != Outcome::Finished);
        parts.journal.close(outcome, reason.as_ref(), Some(counts))
    }

    /// Waits until the destination's side has ended too, where this process is both: it may have
    /// to let the guest run yet. Returns what has kept it from that.
    fn hear_out(&mut self) -> Option<Failure> {
        let until = Instant::now() + LAST_WORDS;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.parts.companion.as_ref()?.news.recv_timeout(left) {
                Ok(News::Ended(Err(failure))) => return Some(failure),
                Ok(News::Ended(Ok(_))) | Err(_) => return None,
                Ok(news) => drop(self.take_news(news)),
            }
        }
    }

    /// Stays for a destination that comes back. A signal ends it.
    fn linger(&mut self) {
        let until = Instant::now() + GRACE;
        while Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            if self.parts.waiter.wait(left).is_ok_and(|signals| signals > 0) {
                return;
            }
            while let Some(event) = self.events.try_next() {
                self.parts.desk.note(&event);
            }
        }
    }
}

/// Lets the guest go on here, as it was.
fn resume(parts: &mut Parts, vcpus: Vcpus, why: &str) -> Outcome {
    match go_on(&mut parts.machine, vcpus) {
        Ok(()) => {
            if let Err(error) = parts.record.note_resumed() {
                parts.progress.say(&format!("warning: {error}"));
            }
            let how = if vcpus == Vcpus::Run { "runs on" } else { "is as it was" };
            parts.progress.say(&format!("the guest was not moved and {how} here: {why}"));
            Outcome::NotMoved
        }
        Err(error) => {
            let error = Failure::from(error);
            parts.progress.say(&format!(
                "the guest was not moved, and does not go on here ({error}): it is this side's; \
                 say cont at its monitor"
            ));
            Outcome::NotResumed
        }
    }
}

fn go_on(machine: &mut Machine, vcpus: Vcpus) -> Result<(), QmpError> {
    state::undo_saving(machine)?;
    if vcpus == Vcpus::Run && machine.status()? != "running" {
        machine.qmp.execute("cont", &json!({}))?;
    }
    Ok(())
}

/// A process before this one took the guest back, and has died since.
pub(super) fn resume_only(mut parts: Parts, vcpus: Vcpus) -> Report {
    let why = "a process before this one had taken it back";
    let outcome = resume(&mut parts, vcpus, why);
    if let Some(session) = parts.record.session() {
        parts.journal.begin(session);
    }
    parts.journal.close(outcome, Some(&Failure::new(why)), None)
}

/// A session that was over before this process was started.
pub(super) fn over(mut parts: Parts, past: Past, options: &SourceOptions) -> Report {
    let (session, path) = (parts.record.session().unwrap_or_default(), parts.record.path());
    if past == Past::Fenced {
        let failure = Failure::new(format!(
            "session {session} was fenced: the guest is this side's, as of the switchover; say cont \
             at its monitor, and give another --state than {path} to move it again"
        ));
        parts.progress.say(&failure.to_string());
        return parts.journal.close(Outcome::NotResumed, Some(&failure), None);
    }
    parts.progress.say(&format!(
        "session {session} is finished: the destination has everything, and there is nothing to \
         do; for another guest give another --state than {path}"
    ));
    parts.journal.begin(session);
    end_source(&mut parts, options);
    parts.journal.close(Outcome::Finished, None, None)
}

fn end_source(parts: &mut Parts, options: &SourceOptions) {
    if !options.quit_source {
        return;
    }
    match parts.machine.qmp.execute("quit", &json!({})) {
        // Its end may come before its answer.
        Ok(_) | Err(QmpError::Ended { .. }) => {
            parts.progress.say("the source's QEMU was told to quit");
        }
        Err(error) => parts.progress.say(&format!("warning: {}", Failure::from(error))),
    }
}
