//! The source's side: the guest is stopped, its device state goes, and its memory is served until
//! the destination has all of it.
//!
//! Invariant: the guest goes on here only after the engine has said that it is this side's again,
//! and is stopped only while a destination is there to take it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage::{
    Checksums, Endpoint, Events, Listener, Plaintext, Source, SourceEvent, SourceMemory,
    SourceOptions as EngineOptions,
};
use serde_json::json;

use super::companion::{Companion, News};
use super::machine::{Machine, Vcpus};
use super::options::SourceOptions;
use super::past::{Past, Record};
use super::receive::{Ended, Heard};
use super::report::{Journal, Outcome, Report, micros};
use super::state::{self, Description};
use super::{Deadline, QmpError, precopy, ram, unix_now};
use crate::control::{Desk, GoingBack, Phase, SourceControl, Switching};
use crate::demo::precopy::{Cause, Pass};
use crate::page_server::failure::check_connect;
use crate::page_server::memory::{self, Access};
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;
use crate::page_server::{Failure, PageCounts};

/// How long QEMU may take to stop its vCPUs, and to flush its disks.
const STOP: Duration = Duration::from_secs(30);
/// How long a destination that has everything, and may not know it, is waited for.
const FAREWELL: Duration = Duration::from_secs(10);
/// How long it can come back to hear so, if its connection was lost at the end.
const GRACE: Duration = Duration::from_millis(1200);
/// How long the destination's side may take to end when the session has.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// Between looks while the destination is to be ready.
const LOOK: Duration = Duration::from_millis(50);

/// What the source's side is made of.
pub(super) struct Parts {
    pub(super) waiter: Waiter,
    pub(super) progress: Progress,
    pub(super) journal: Journal,
    pub(super) desk: Desk,
    pub(super) record: Record,
    pub(super) machine: Machine,
    /// Where one process is both sides.
    pub(super) companion: Option<Companion>,
}

/// What a wait has brought.
struct Turn {
    events: Vec<SourceEvent>,
    news: Vec<News>,
    signals: usize,
}

/// Where the guest is, as far as this side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Here, and nothing was done to it.
    Here,
    /// Here, and stopped; given up at this instant, if the destination is not ready before.
    Stopped(Instant),
    /// Here, stopped, and being taken back.
    ComingBack,
    /// The destination's.
    Gone,
}

/// When the guest is to be stopped, once everybody is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Now,
    AfterPasses,
}

struct Sending {
    parts: Parts,
    source: Arc<Source>,
    events: Events<SourceEvent>,
    ready_within: Duration,
    pages: u64,
    at: At,
    /// What they were when the guest was stopped, or are.
    vcpus: Vcpus,
    due: Due,
    is_attached: bool,
    /// The destination's side has checked all it can; told by a companion alone.
    is_armed: bool,
    /// By the host's clock, when the vCPUs stood still.
    stopped: Option<Duration>,
    /// Why the guest was not moved.
    reason: Option<Failure>,
    signals: usize,
    /// A destination that has everything is waited for until then.
    farewell: Option<Instant>,
    has_unreadable: bool,
}

/// Gives the guest away, or goes on with that.
pub(super) fn run(options: &SourceOptions, mut parts: Parts) -> Result<Report, Failure> {
    let past = parts.record.past();
    let vcpus = match past {
        Past::Open | Past::Over => parts.machine.check_can_leave()?,
        Past::TakenBack(vcpus) => return Ok(resume_only(parts, vcpus)),
        Past::Interrupted(vcpus) => vcpus,
        Past::Given | Past::Complete => {
            check_stands_still(&mut parts.machine)?;
            Vcpus::Run
        }
        Past::Finished | Past::Fenced => return Ok(over(parts, past, options)),
    };
    let memory = memory_of(options, &parts.machine)?;
    let pages = memory.layout().page_count();
    let bytes = memory.layout().bytes();
    let mut engine = engine_options(options);
    // Only a guest that still runs here.
    if matches!(past, Past::Open | Past::Over) {
        engine.precopy = precopy::begin(options, &parts.machine, memory.layout())?;
    }
    let due = if engine.precopy.is_some() { Due::AfterPasses } else { Due::Now };
    parts.record.begin(memory.layout(), &mut engine)?;
    let endpoint = endpoint(options, &parts.progress)?;
    let (source, events) =
        Source::start(memory, endpoint, engine).map_err(Failure::of("start serving"))?;
    let source = Arc::new(source);
    let session = source.session().to_string();
    parts.desk.name(&session);
    parts.journal.begin(session);
    let phase = if past == Past::Given { Phase::Given } else { Phase::Connecting };
    parts.desk.begin(phase, bytes, Arc::new(controlled(options, &source, pages)));
    let mut sending = Sending {
        is_armed: parts.companion.is_none(),
        parts,
        source,
        events,
        ready_within: options.ready_within,
        pages,
        at: At::Here,
        vcpus,
        due,
        is_attached: false,
        stopped: None,
        reason: None,
        signals: 0,
        farewell: None,
        has_unreadable: false,
    };
    sending.go_on_from(past)?;
    let outcome = sending.until_the_end()?;
    Ok(sending.close(outcome, options))
}

impl Sending {
    /// Does again what a process before this one may have died in.
    fn go_on_from(&mut self, past: Past) -> Result<(), Failure> {
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

    fn until_the_end(&mut self) -> Result<Outcome, Failure> {
        self.parts.waiter.watch(&self.events).map_err(Failure::of("wait for the session"))?;
        loop {
            let Turn { events, news, signals } = self.turn()?;
            for event in events {
                if let Some(outcome) = self.take_event(&event) {
                    return Ok(outcome);
                }
            }
            for news in news {
                if let Some(outcome) = self.take_news(news) {
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
        self.vcpus = machine.check_can_leave()?;
        state::prepare_to_save(machine)?;
        self.parts.record.note_stop(self.vcpus)?;
        self.at = At::Stopped(Instant::now() + self.ready_within);
        let begun = Instant::now();
        let stopped = stop(&mut self.parts.machine, self.vcpus)?;
        self.stopped = Some(stopped);
        self.parts.journal.times.stop_us = Some(micros(begun.elapsed()));
        self.source.stopped().map_err(Failure::of("say that the guest is stopped"))?;
        let saving = Instant::now();
        let bytes = state::save(&mut self.parts.machine)?;
        self.parts.journal.times.save_us = Some(micros(saving.elapsed()));
        self.parts.journal.times.state_bytes = Some(bytes.len() as u64);
        let facts = self.parts.machine.facts.clone();
        let description = Description { facts, vcpus_before: self.vcpus };
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
            // It was given away at this very moment, and an event says so.
            Err(error) => self.say(&format!("it cannot be taken back: {error}")),
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
            SourceEvent::PassEnded(report) => {
                let pass = Pass::of(report);
                self.note("pass_ended", &pass.to_string());
                self.parts.journal.passes.push(pass);
            }
            SourceEvent::SwitchoverDue(cause) => {
                let cause = Cause::of(*cause);
                self.due = Due::Now;
                self.parts.journal.cause = Some(cause);
                self.note("switchover_due", &format!("passes are over: {}", cause.words()));
            }
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

    /// The outcome, if what the destination's side says ends it.
    fn take_news(&mut self, news: News) -> Option<Outcome> {
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
                At::Gone => self.say(&failure.to_string()),
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
            At::ComingBack if self.signals > 1 => {
                self.say("a second signal: the guest is stopped here, and was not given away");
                return Some(Outcome::NotResumed);
            }
            At::ComingBack => {}
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

    /// The guest is this side's again: it goes on as it was.
    fn resume(&mut self) -> Outcome {
        let reason = self.reason.take();
        let reason = reason.unwrap_or_else(|| Failure::new("taken back at the control socket"));
        let outcome = resume(&mut self.parts, self.vcpus, reason.to_string().as_str());
        self.reason = Some(reason);
        outcome
    }

    fn note(&mut self, event: &'static str, line: &str) {
        self.parts.journal.note(event);
        self.say(line);
    }

    fn say(&self, line: &str) {
        self.parts.progress.say(line);
    }

    fn close(mut self, outcome: Outcome, options: &SourceOptions) -> Report {
        let (mut outcome, is_finished) = (outcome, outcome == Outcome::Finished);
        if is_finished && let Some(failure) = self.hear_out() {
            self.say(&failure.to_string());
            (outcome, self.reason) = (Outcome::Failed, Some(failure));
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

fn stop(machine: &mut Machine, vcpus: Vcpus) -> Result<Duration, QmpError> {
    machine.qmp.forget_events();
    machine.qmp.execute("stop", &json!({}))?;
    if vcpus == Vcpus::Stopped {
        return Ok(unix_now());
    }
    let stopped = machine.qmp.event("STOP", Deadline::after(STOP), |event| event.name == "STOP");
    Ok(stopped?.at)
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
fn resume_only(mut parts: Parts, vcpus: Vcpus) -> Report {
    let why = "a process before this one had taken it back";
    let outcome = resume(&mut parts, vcpus, why);
    if let Some(session) = parts.record.session() {
        parts.journal.begin(session);
    }
    parts.journal.close(outcome, Some(&Failure::new(why)), None)
}

/// A session that was over before this process was started.
fn over(mut parts: Parts, past: Past, options: &SourceOptions) -> Report {
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

/// Whose guest is elsewhere must not run it.
fn check_stands_still(machine: &mut Machine) -> Result<(), Failure> {
    let status = machine.status()?;
    if status == "running" {
        return Err(Failure::new(format!(
            "the guest runs in {}, although it was given to the destination: somebody has said cont \
             there; stop it at once, it may run twice",
            machine.qmp.name()
        )));
    }
    Ok(())
}

fn memory_of(options: &SourceOptions, machine: &Machine) -> Result<Arc<SourceMemory>, Failure> {
    let pieces = ram::pieces(machine, &options.memory)?;
    let placed = memory::place(&pieces, options.hole)?;
    Ok(Arc::new(memory::map(&placed, Access::Read)?))
}

fn plaintext(options: &SourceOptions) -> Plaintext {
    if options.insecure_plaintext { Plaintext::Anywhere } else { Plaintext::LoopbackOnly }
}

fn endpoint(options: &SourceOptions, progress: &Progress) -> Result<Endpoint, Failure> {
    let plaintext = plaintext(options);
    match (&options.listen, &options.connect) {
        (Some(address), _) => {
            let listener = Listener::bind(address, plaintext)
                .map_err(|error| Failure::listen(address, &error))?;
            progress.listening(listener.address());
            Ok(Endpoint::Listen(listener))
        }
        (None, Some(address)) => {
            check_connect(address, plaintext)?;
            progress.say(&format!("connecting to {address}"));
            Ok(Endpoint::Connect(address.clone()))
        }
        (None, None) => Err(Failure::usage("give --listen or --connect")),
    }
}

fn engine_options(options: &SourceOptions) -> EngineOptions {
    let mut engine = EngineOptions::default();
    engine.streams = options.streams;
    engine.background = options.bandwidth.into();
    engine.precopy_background = options.precopy_bandwidth.map(Into::into);
    engine.checksums = if options.checksums { Checksums::On } else { Checksums::Off };
    engine.plaintext = plaintext(options);
    engine
}

fn controlled(options: &SourceOptions, source: &Arc<Source>, pages: u64) -> SourceControl {
    SourceControl {
        source: Arc::clone(source),
        pages,
        plaintext: plaintext(options),
        streams: options.streams,
        bandwidth: Mutex::new(options.bandwidth),
        going_back: GoingBack::Possible,
        switching: Switching::Vmm,
        before_run: None,
    }
}
