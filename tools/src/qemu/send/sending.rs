//! A guest that leaves: what happens, and what is done about it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Parts;
use crate::demo::precopy::{Cause, Pass};
use crate::page_server::Failure;
use crate::qemu::companion::News;
use crate::qemu::machine::Vcpus;
use crate::qemu::past::Past;
use crate::qemu::receive::{Ended, Heard};
use crate::qemu::report::{Outcome, micros};
use crate::qemu::state::{self, Description, Saving, Settings};
use crate::qemu::unix_now;
use afterimage::{Events, Source, SourceEvent};

/// How long a destination that has everything, and may not know it, is waited for.
const FAREWELL: Duration = Duration::from_secs(10);
/// Before a guest that could not be taken back is asked for again.
const AGAIN: Duration = Duration::from_secs(1);
/// Between looks while the destination is to be ready.
const LOOK: Duration = Duration::from_millis(50);

/// What a wait has brought.
struct Turn {
    events: Vec<SourceEvent>,
    news: Vec<News>,
    signals: usize,
}

/// Where the guest is, as far as this side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// Here, and nothing was done to it.
    Here,
    /// Here, and stopped; given up at this instant, if the destination is not ready before.
    Stopped(Instant),
    /// Here, stopped, and being taken back.
    ComingBack,
    /// Here, and coming back because the destination does not want it.
    Refused,
    /// The destination's.
    Gone,
}

/// When the guest is to be stopped, once everybody is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    Now,
    AfterPasses,
}

/// A guest, on its way.
pub(super) struct Sending {
    pub(super) parts: Parts,
    pub(super) source: Arc<Source>,
    pub(super) events: Events<SourceEvent>,
    pub(super) ready_within: Duration,
    pub(super) pages: u64,
    pub(super) at: At,
    /// What the vCPUs were before this side began to stop them; `None` as long as it has not.
    pub(super) before: Option<Vcpus>,
    pub(super) due: Due,
    pub(super) is_attached: bool,
    /// The destination's side has checked all it can; told by a companion alone.
    pub(super) is_armed: bool,
    /// By the host's clock, when the vCPUs stood still.
    pub(super) stopped: Option<Duration>,
    /// Why the guest was not moved.
    pub(super) reason: Option<Failure>,
    pub(super) signals: usize,
    /// A destination that has everything is waited for until then.
    pub(super) farewell: Option<Instant>,
    pub(super) has_unreadable: bool,
}

impl Sending {
    /// Does again what a process before this one may have died in.
    pub(super) fn go_on_from(&mut self, past: Past) -> Result<(), Failure> {
        match past {
            Past::Interrupted(_) => {
                self.take_back(Failure::new(
                    "a process before this one has died before the guest was given away",
                ));
            }
            Past::Given => {
                self.at = At::Gone;
                self.say("going on: the guest was given to the destination");
                // A destination that lost everything before it ran needs it again.
                let kept = self.parts.record.kept_state();
                self.source.switch_over(kept).map_err(Failure::of("switch over"))?;
            }
            Past::Complete => {
                self.at = At::Gone;
                self.farewell = Some(Instant::now() + FAREWELL);
                self.say("going on: the destination has everything, and may not know it");
            }
            _ => self.say("waiting for the destination; the guest runs on meanwhile"),
        }
        Ok(())
    }

    pub(super) fn until_the_end(&mut self) -> Result<Outcome, Failure> {
        self.parts.waiter.watch(&self.events).map_err(Failure::of("wait for the session"))?;
        loop {
            let Turn { events, news, signals } = self.turn()?;
            // First: after the last event nobody would look at them.
            for news in news {
                if let Some(outcome) = self.take_news(news) {
                    return Ok(outcome);
                }
            }
            for event in events {
                if let Some(outcome) = self.take_event(&event) {
                    return Ok(outcome);
                }
            }
            if signals > 0
                && let Some(outcome) = self.signalled(signals)
            {
                return Ok(outcome);
            }
            if self.farewell.is_some_and(|end| end <= Instant::now()) {
                self.say("the destination has everything, and has not come back");
                return Ok(Outcome::Finished);
            }
            match self.at {
                At::Here if self.is_due() => self.switch_over(),
                At::Stopped(until) if until <= Instant::now() => {
                    self.take_back(Failure::new(format!(
                        "the destination was not ready within {} s: see what afterimage-qemu \
                         receive, page-client and QEMU say there, or allow more by --ready-within",
                        self.ready_within.as_secs_f64()
                    )));
                }
                _ => {}
            }
        }
    }

    /// Waits for something to happen, and shows how far things are.
    fn turn(&mut self) -> Result<Turn, Failure> {
        let stats = self.source.stats();
        let parts = &mut self.parts;
        if self.at == At::Gone {
            parts.progress.update(stats.pages_acknowledged, stats.pages_total);
        }
        if stats.pages_unreadable > 0 && !std::mem::replace(&mut self.has_unreadable, true) {
            parts.progress.say(
                "some pages cannot be read here (was the memory file cut short?); whoever touches \
                 one at the destination waits, and the migration cannot finish",
            );
        }
        let most = if matches!(self.at, At::Stopped(_)) { LOOK } else { parts.progress.interval() };
        let signals = parts.waiter.wait(most).map_err(Failure::of("wait for the session"))?;
        let events = std::iter::from_fn(|| self.events.try_next()).collect();
        let news = parts.companion.as_ref().map(|it| it.news.try_iter().collect());
        Ok(Turn { events, news: news.unwrap_or_default(), signals })
    }

    /// Whether the guest is to be stopped now.
    fn is_due(&self) -> bool {
        self.due == Due::Now && self.is_attached && self.is_armed && self.reason.is_none()
    }

    fn switch_over(&mut self) {
        if let Err(failure) = self.stop_and_save() {
            self.take_back(failure);
        }
    }

    fn stop_and_save(&mut self) -> Result<(), Failure> {
        let machine = &mut self.parts.machine;
        // It may have been paused, or ended, since it was looked at.
        let before = machine.check_can_leave()?;
        self.before = Some(before);
        self.parts.record.note_stop(before, &Settings::learn(machine)?)?;
        state::prepare_to_save(machine)?;
        let begun = Instant::now();
        self.at = At::Stopped(begun + self.ready_within);
        let mut saving = Saving::begin(machine)?;
        self.stopped = Some(match before {
            Vcpus::Run => saving.until_stopped(machine)?,
            Vcpus::Stopped => unix_now(),
        });
        // It has not stood still before.
        self.at = At::Stopped(Instant::now() + self.ready_within);
        self.parts.journal.times.stop_us = Some(micros(begun.elapsed()));
        self.source.stopped().map_err(Failure::of("say that the guest is stopped"))?;
        let stopped = Instant::now();
        let bytes = saving.finish(&mut self.parts.machine)?;
        self.parts.journal.times.save_us = Some(micros(stopped.elapsed()));
        self.parts.journal.times.state_bytes = Some(bytes.len() as u64);
        let facts = self.parts.machine.facts.clone();
        let description = Description { facts, vcpus_before: before };
        let sections = state::pack(&description, bytes);
        self.parts.record.keep_state(&sections)?;
        self.source.switch_over(sections).map_err(Failure::of("switch over"))
    }

    /// Asks for the guest, which was not given away as far as this side knows.
    fn take_back(&mut self, reason: Failure) {
        self.say(&format!("taking the guest back: {reason}"));
        self.reason = Some(reason);
        match self.source.reclaim() {
            Ok(()) => self.at = At::ComingBack,
            // It was given away at this very moment, and an event says so; or it is asked for again.
            Err(error) => {
                if let At::Stopped(until) = &mut self.at {
                    *until = Instant::now() + AGAIN;
                }
                self.say(&format!("it cannot be taken back: {error}"));
            }
        }
    }

    /// The outcome, if this event is the last.
    fn take_event(&mut self, event: &SourceEvent) -> Option<Outcome> {
        self.parts.desk.note(event);
        match event {
            SourceEvent::Attached(_) => {
                self.is_attached = true;
                self.note("attached", "page-client is attached");
            }
            SourceEvent::Disconnected => {
                self.is_attached = false;
                self.note("disconnected", "page-client is away; waiting for it to come back");
            }
            SourceEvent::Paused => {
                self.note("paused", "paused at the control socket; recover goes on");
            }
            SourceEvent::PassEnded(report) => self.pass_ended(Pass::of(report)),
            SourceEvent::SwitchoverDue(cause) => self.passes_over(Cause::of(*cause)),
            SourceEvent::Ready => self.parts.journal.note("ready"),
            SourceEvent::Given => {
                (self.at, self.reason) = (At::Gone, None);
                self.note("given", "the guest is given to the destination");
            }
            SourceEvent::Running => {
                self.at = At::Gone;
                // A companion knows better.
                if self.parts.companion.is_none() {
                    self.measure_blackout(unix_now());
                }
                self.note("running", "the guest runs at the destination");
            }
            SourceEvent::Finished => {
                self.note("finished", "every page has arrived; the guest is the destination's");
                return Some(Outcome::Finished);
            }
            SourceEvent::Refused => {
                self.at = At::Refused;
                self.note("refused", "the destination will not run the guest");
                self.reason.get_or_insert_with(|| {
                    Failure::new(
                        "the destination has refused it: see what page-client and afterimage-qemu \
                         receive say there",
                    )
                });
            }
            SourceEvent::Reclaimed => {
                self.parts.journal.note("reclaimed");
                return Some(self.resume());
            }
            SourceEvent::ReclaimDenied => {
                self.at = At::Gone;
                self.note("reclaim_denied", "the destination runs the guest and keeps it");
            }
            SourceEvent::PersistFailed => self.note(
                "persist_failed",
                "warning: the state file could not be written; what needed it did not happen, and \
                 is tried again with the next connection",
            ),
            _ => {}
        }
        None
    }

    fn pass_ended(&mut self, pass: Pass) {
        self.note("pass_ended", &pass.to_string());
        self.parts.journal.passes.push(pass);
    }

    fn passes_over(&mut self, cause: Cause) {
        self.due = Due::Now;
        self.parts.journal.cause = Some(cause);
        self.note("switchover_due", &format!("passes are over: {}", cause.words()));
    }

    /// The outcome, if what the destination's side says ends it.
    pub(super) fn take_news(&mut self, news: News) -> Option<Outcome> {
        match news {
            News::Heard(Heard::Armed(facts)) => match facts.why_not(&self.parts.machine.facts) {
                None => {
                    self.is_armed = true;
                    self.note("armed", "the destination's QEMU and its memory are ready");
                }
                Some(why) if self.at == At::Here => self.take_back(Failure::new(why)),
                Some(why) => self.say(&why),
            },
            News::Heard(Heard::State(_) | Heard::Run | Heard::AllArrived)
            | News::Ended(Ok(Ended::Finished | Ended::Stopped)) => {}
            News::Heard(Heard::Loaded(time)) => {
                self.parts.journal.times.load_us = Some(micros(time));
            }
            News::Heard(Heard::Resumed(at)) => self.measure_blackout(at.unwrap_or_else(unix_now)),
            News::Heard(Heard::Line(line)) => self.say(&line),
            News::Ended(Ok(Ended::NotHere(reason))) => {
                if matches!(self.at, At::Here | At::Stopped(_)) {
                    self.take_back(Failure::new(format!("the destination gave it up: {reason}")));
                }
            }
            News::Ended(Err(failure)) => match self.at {
                At::Here | At::Stopped(_) => self.take_back(failure),
                At::ComingBack => {}
                At::Refused => self.reason = Some(failure),
                At::Gone => {
                    self.say(&failure.to_string());
                    // If the destination gives it back, this is why.
                    self.reason.get_or_insert(failure);
                }
            },
        }
        None
    }

    fn measure_blackout(&mut self, resumed: Duration) {
        let Some(stopped) = self.stopped else { return };
        let blackout = resumed.saturating_sub(stopped);
        self.parts.journal.times.blackout_us = Some(micros(blackout));
        let shown = blackout.as_secs_f64() * 1e3;
        self.say(&format!("the guest stood still for {shown:.1} ms"));
    }

    fn signalled(&mut self, came: usize) -> Option<Outcome> {
        self.signals += came;
        self.parts.journal.note("signal");
        match self.at {
            At::Here if self.parts.record.is_kept() => {
                self.say("stopped: the guest runs on here; the same command line goes on");
                return Some(Outcome::NotMoved);
            }
            At::Here | At::Stopped(_) => self.take_back(Failure::new("stopped by a signal")),
            At::ComingBack | At::Refused if self.signals > 1 => {
                self.say("a second signal: the guest is stopped here, and coming back");
                return Some(Outcome::NotResumed);
            }
            At::ComingBack | At::Refused => {}
            At::Gone if self.signals > 1 || self.farewell.is_some() => {
                self.say(&format!("a second signal: stopped; {}", self.what_goes_on()));
                return Some(Outcome::Stopped);
            }
            At::Gone => {
                let stats = self.source.stats();
                let missing = stats.pages_total.saturating_sub(stats.pages_acknowledged);
                let rest = self.what_goes_on();
                self.say(&format!(
                    "not stopping: the guest is at the destination, and {missing} of its {} pages \
                     are missing there; a second signal stops this process; {rest}",
                    stats.pages_total
                ));
            }
        }
        None
    }

    fn what_goes_on(&self) -> &'static str {
        if self.parts.record.is_kept() {
            "the destination waits, and the same command line goes on"
        } else {
            "without --state nobody can go on, and what is missing is lost"
        }
    }

    fn note(&mut self, event: &'static str, line: &str) {
        self.parts.journal.note(event);
        self.say(line);
    }

    pub(super) fn say(&self, line: &str) {
        self.parts.progress.say(line);
    }
}
