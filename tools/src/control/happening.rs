//! What happens to a session, as it is told to subscribers, and what it changes in the state.

use afterimage::{DestinationEvent, Incarnation, SourceEvent, SwitchoverCause};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::controlled::Parameters;
use super::state::{Link, Now, Phase, State, Trouble};

/// Something that has happened.
#[derive(Clone, Debug)]
pub struct Happening {
    event: &'static str,
    fields: Map<String, Value>,
    effect: Effect,
}

/// What it changes.
#[derive(Clone, Copy, Debug)]
enum Effect {
    Stopped,
    None,
    /// The peer is attached.
    Attached,
    Link(Link),
    /// No longer paused; a connection may be there already.
    Recovering,
    /// So far, at least.
    Phase(Phase),
    /// Every page is there, which may be so before the guest runs.
    AllArrived,
    /// It is held before something, or not any more.
    Hold(Option<&'static str>),
    /// Something went wrong.
    Trouble,
    /// The same: the destination has refused the guest, which is the source's again.
    Refused,
}

impl Happening {
    /// One that changes nothing in the state.
    #[must_use]
    pub fn new(event: &'static str) -> Self {
        Self { event, fields: Map::new(), effect: Effect::None }
    }

    /// With a field.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Serialize) -> Self {
        self.fields.insert(name.to_owned(), json!(value));
        self
    }

    const fn effect(mut self, effect: Effect) -> Self {
        self.effect = effect;
        self
    }

    /// It was said in words what went wrong.
    fn trouble(event: &'static str, message: &str) -> Self {
        Self::new(event).with("message", message).effect(Effect::Trouble)
    }

    /// A session has begun.
    #[must_use]
    pub(super) fn begun(phase: Phase) -> Self {
        Self::new("begun").effect(Effect::Phase(phase))
    }

    /// The process ends.
    #[must_use]
    pub(super) fn closing(outcome: &str) -> Self {
        Self::new("closing").with("outcome", outcome)
    }

    /// The migration is held before this, until somebody lets it go on.
    #[must_use]
    pub fn held(before: &'static str) -> Self {
        Self::new("held").with("hold", before).effect(Effect::Hold(Some(before)))
    }

    /// It goes on.
    #[must_use]
    pub fn released() -> Self {
        Self::new("released").effect(Effect::Hold(None))
    }

    /// Parameters have changed.
    #[must_use]
    pub(super) fn parameters(parameters: &Parameters) -> Self {
        Self::new("parameters").with("parameters", parameters)
    }

    /// A pause was ended.
    #[must_use]
    pub(super) fn recovering() -> Self {
        Self::new("recovering").effect(Effect::Recovering)
    }

    /// What happened to one destination of a snapshot; the state has only counts of them.
    #[must_use]
    pub fn of_snapshot(destination: Incarnation, event: &SourceEvent) -> Self {
        let happening = Self::from(event).effect(Effect::None);
        happening.with("destination", destination.to_string())
    }

    /// Changes the state, and returns the event as an object.
    pub(super) fn apply(self, state: &mut State, now: Now) -> Value {
        state.sequence += 1;
        match self.effect {
            Effect::Attached => {
                state.link = Link::Up;
                // Before the guest is given away another destination may come.
                if state.phase < Phase::Given && state.phase != Phase::Stopped {
                    state.phase = Phase::Attached;
                }
            }
            // A guest that was stopped before anybody came is no phase of its move.
            Effect::Stopped if state.phase == Phase::Attached => state.phase = Phase::Stopped,
            Effect::Link(link) => state.link = link,
            Effect::Recovering if state.link == Link::Paused => state.link = Link::Down,
            Effect::Hold(before) => state.hold = before,
            Effect::None | Effect::Recovering | Effect::Stopped => {}
            Effect::AllArrived => {
                state.has_all = true;
                state.reach(state.phase);
            }
            Effect::Phase(phase) => {
                state.reach(phase);
                if phase >= Phase::Given {
                    state.hold = None;
                }
            }
            Effect::Trouble | Effect::Refused => {
                if matches!(self.effect, Effect::Refused) {
                    state.was_refused();
                }
                let (event, at_us, fields) = (self.event, now.at_us, self.fields.clone());
                state.trouble = Some(Trouble { event, at_us, fields });
            }
        }
        let mut told = Map::new();
        told.insert("event".to_owned(), json!(self.event));
        told.insert("sequence".to_owned(), json!(state.sequence));
        told.insert("at_us".to_owned(), json!(now.at_us));
        told.insert("unix_us".to_owned(), json!(now.unix_us));
        told.insert("session".to_owned(), json!(state.session));
        told.insert("phase".to_owned(), json!(state.phase));
        told.insert("link".to_owned(), json!(state.link));
        told.extend(self.fields);
        Value::Object(told)
    }
}

/// The word for why it is time to stop the guest.
#[must_use]
pub(crate) fn cause_name(cause: SwitchoverCause) -> &'static str {
    match cause {
        SwitchoverCause::Converged => "converged",
        SwitchoverCause::NotShrinking => "not_shrinking",
        SwitchoverCause::PassesDone => "passes_done",
        SwitchoverCause::TimeIsUp => "time_is_up",
        SwitchoverCause::NoPrecopy => "no_precopy",
        // Newer than this program.
        _ => "other",
    }
}

impl From<&SourceEvent> for Happening {
    fn from(event: &SourceEvent) -> Self {
        match event {
            SourceEvent::Attached(destination) => Self::new("attached")
                .with("destination", destination.to_string())
                .effect(Effect::Attached),
            SourceEvent::Disconnected => Self::new("disconnected").effect(Effect::Link(Link::Down)),
            SourceEvent::Paused => Self::new("paused").effect(Effect::Link(Link::Paused)),
            SourceEvent::PassEnded(pass) => Self::new("pass_ended")
                .with("pass", pass.number)
                .with("bytes_sent", pass.bytes_sent)
                .with("time_us", pass.time.as_micros() as u64)
                .with("pages_written", pass.pages_written)
                .with("bytes_written", pass.bytes_written),
            SourceEvent::SwitchoverDue(cause) => {
                Self::new("switchover_due").with("cause", cause_name(*cause))
            }
            SourceEvent::Stopped => Self::new("stopped").effect(Effect::Stopped),
            SourceEvent::Held => Self::held("before_run"),
            SourceEvent::Ready => Self::new("ready").effect(Effect::Phase(Phase::Ready)),
            SourceEvent::Given => Self::new("given").effect(Effect::Phase(Phase::Given)),
            SourceEvent::Running => Self::new("running").effect(Effect::Phase(Phase::Running)),
            SourceEvent::Reclaimed => {
                Self::new("reclaimed").effect(Effect::Phase(Phase::Reclaimed))
            }
            SourceEvent::Refused => {
                Self::trouble("refused", "the destination will not run the guest: see what it says")
                    .effect(Effect::Refused)
            }
            SourceEvent::ReclaimDenied => {
                Self::new("reclaim_denied").effect(Effect::Phase(Phase::Running))
            }
            SourceEvent::Left => Self::new("left"),
            SourceEvent::Finished => Self::new("finished").effect(Effect::Phase(Phase::Finished)),
            SourceEvent::PersistFailed => Self::trouble(
                "persist_failed",
                "the state file could not be written; what needed it did not happen, and is tried \
                 again",
            ),
            SourceEvent::Lost { first, count } => Self::trouble(
                "lost",
                "the destination lacks pages that were freed here, and is refused: bring back the \
                 memory that the guest ran in",
            )
            .with("first_page", first.0)
            .with("pages", count),
            // Newer than this program.
            other => Self::new("other").with("message", format!("{other:?}")),
        }
    }
}

impl From<&DestinationEvent> for Happening {
    fn from(event: &DestinationEvent) -> Self {
        let not_here = |event: &'static str, message: &str| {
            Self::new(event).with("message", message).effect(Effect::Phase(Phase::NotHere))
        };
        match event {
            DestinationEvent::Attached(session) => {
                Self::new("attached").with("session", session.to_string()).effect(Effect::Attached)
            }
            DestinationEvent::Disconnected => {
                Self::new("disconnected").effect(Effect::Link(Link::Down))
            }
            DestinationEvent::Paused => Self::new("paused").effect(Effect::Link(Link::Paused)),
            DestinationEvent::SourceStopped => Self::new("source_stopped").effect(Effect::Stopped),
            DestinationEvent::Section(it) => Self::new("section")
                .with("name", &it.name)
                .with("version", it.version)
                .with("bytes", it.bytes.len()),
            DestinationEvent::StateRestarted => Self::new("state_restarted"),
            DestinationEvent::State(sections) => {
                // Its content is the guest's.
                let sections = sections.iter().map(
                    |it| json!({"name": it.name, "version": it.version, "bytes": it.bytes.len()}),
                );
                Self::new("state")
                    .with("sections", sections.collect::<Vec<_>>())
                    .effect(Effect::Phase(Phase::Restoring))
            }
            DestinationEvent::Run => Self::new("run").effect(Effect::Phase(Phase::Running)),
            DestinationEvent::Refused => not_here("refused", "the guest goes back to its source"),
            DestinationEvent::Fenced => not_here("fenced", "an operator has fenced this side"),
            DestinationEvent::Ended(reason) => not_here("ended", reason),
            DestinationEvent::TurnedAway(reason) => Self::trouble("turned_away", reason),
            DestinationEvent::AllArrived => Self::new("all_arrived").effect(Effect::AllArrived),
            DestinationEvent::Finished => {
                Self::new("finished").effect(Effect::Phase(Phase::Finished))
            }
            DestinationEvent::Unreadable { first_page, pages } => Self::trouble(
                "unreadable",
                "the source cannot read pages; whoever touches one waits",
            )
            .with("first_page", first_page)
            .with("pages", pages),
            DestinationEvent::Failed(reason) => Self::trouble("failed", reason),
            DestinationEvent::PersistFailed => Self::trouble(
                "persist_failed",
                "who owns the guest could not be recorded; it does not run here, and it is tried \
                 again",
            ),
            DestinationEvent::Abandoned => {
                Self::trouble("abandoned", "whoever touches a missing page waits for ever")
            }
            // Newer than this program.
            other => Self::new("other").with("message", format!("{other:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn apply(state: &mut State, event: &SourceEvent) -> Value {
        Happening::from(event).apply(state, Now::since(Instant::now()))
    }

    #[test]
    fn a_link_that_comes_back_takes_nothing_away() {
        let mut state = State::new();
        let name = Incarnation([7; 16]);
        for event in [SourceEvent::Attached(name), SourceEvent::Ready, SourceEvent::Attached(name)]
        {
            apply(&mut state, &event);
        }
        assert_eq!(state.phase, Phase::Attached, "a destination may begin anew before it has run");
        for event in [SourceEvent::Running, SourceEvent::Disconnected, SourceEvent::Attached(name)]
        {
            apply(&mut state, &event);
        }
        assert_eq!((state.phase, state.link), (Phase::Running, Link::Up));
        assert_eq!(state.sequence, 6);
    }

    #[test]
    fn a_guest_that_has_every_page_and_does_not_run_yet_is_still_restored() {
        let mut state = State::new();
        let mut hear = |event: &DestinationEvent| {
            Happening::from(event).apply(&mut state, Now::since(Instant::now()));
            state.phase
        };
        assert_eq!(hear(&DestinationEvent::State(Vec::new())), Phase::Restoring);
        assert_eq!(hear(&DestinationEvent::AllArrived), Phase::Restoring, "it is held");
        assert_eq!(hear(&DestinationEvent::Run), Phase::AllArrived);
        let mut state = State::new();
        for event in [DestinationEvent::Run, DestinationEvent::AllArrived] {
            Happening::from(&event).apply(&mut state, Now::since(Instant::now()));
        }
        assert_eq!(state.phase, Phase::AllArrived);
    }

    #[test]
    fn a_guest_that_was_refused_is_the_sources_again_and_may_be_given_to_another() {
        let mut state = State::new();
        let mut hear = |event: &SourceEvent| {
            apply(&mut state, event);
            (state.phase, state.trouble.is_some())
        };
        let name = Incarnation([7; 16]);
        for event in [SourceEvent::Attached(name), SourceEvent::Ready, SourceEvent::Given] {
            hear(&event);
        }
        assert_eq!(hear(&SourceEvent::Refused), (Phase::Stopped, true));
        hear(&SourceEvent::Attached(Incarnation([8; 16])));
        assert_eq!(hear(&SourceEvent::Given).0, Phase::Given);
        assert_eq!(hear(&SourceEvent::Refused).0, Phase::Stopped);
        assert_eq!(hear(&SourceEvent::Reclaimed).0, Phase::Reclaimed);
    }

    #[test]
    fn recovering_does_not_hide_a_connection_that_is_there() {
        let mut state = State::new();
        apply(&mut state, &SourceEvent::Paused);
        assert_eq!(state.link, Link::Paused);
        Happening::recovering().apply(&mut state, Now::since(Instant::now()));
        assert_eq!(state.link, Link::Down);
        apply(&mut state, &SourceEvent::Attached(Incarnation([1; 16])));
        Happening::recovering().apply(&mut state, Now::since(Instant::now()));
        assert_eq!(state.link, Link::Up);
    }

    #[test]
    fn device_state_is_told_by_its_size() {
        let bytes = vec![1, 2, 3];
        let section = afterimage::StateSection { name: "vcpus".to_owned(), version: 1, bytes };
        let mut state = State::new();
        let told = Happening::from(&DestinationEvent::State(vec![section]));
        let told = told.apply(&mut state, Now::since(Instant::now()));
        assert_eq!(told["sections"], json!([{"name": "vcpus", "version": 1, "bytes": 3}]));
        assert_eq!(told["phase"], "restoring");
    }
}
