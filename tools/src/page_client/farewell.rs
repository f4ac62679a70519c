//! How it ended, in the state file, and what a process does that is started after the end.
//!
//! Invariant: nothing stays at the keeper that nobody needs, and the last word reaches a VMM that
//! is still there, whichever process says it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::{DestinationOwnership, DestinationStateFile};

use super::Failure;
use super::adapter::Native;
use super::door::{Door, News};
use super::drivers;
use super::guest::Served;
use super::options::Options;
use super::party::Party;
use super::report::Outcome;
use crate::attachment::{Arrival, DrivenBy, Word};
use crate::handoff::framing;
use crate::keeper::Place;
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;

/// In the state file: how it ended.
const ENDED: &str = "ended";
/// In the state file: the VMM has heard so, or has had its time.
const TOLD: &str = "told";
/// In the state file: a driver has started the guest.
const STARTED: &str = "started";
/// In the state file: why the guest was refused here, as the outcome.
const REFUSED: &str = "refused";
/// In the state file: the source knows that it has the guest back.
const GIVEN_BACK: &str = "given_back";
/// How long a VMM may be away when it is to hear the last word.
pub(super) const FAREWELL: Duration = Duration::from_secs(30);

/// How it ended, if it did.
pub(super) fn ended_as(state: &DestinationStateFile) -> Option<Outcome> {
    match state.noted(ENDED)?.as_str() {
        "not_here" => Some(Outcome::NotHere),
        "vmm_died" => Some(Outcome::VmmDied),
        _ => Some(Outcome::Finished),
    }
}

/// Records how it ended, before anybody is told.
pub(super) fn note_end(state: Option<&DestinationStateFile>, outcome: Outcome, say: &Progress) {
    let how = match outcome {
        Outcome::Finished => "finished",
        Outcome::NotHere => "not_here",
        Outcome::VmmDied => "vmm_died",
        // A successor goes on, or begins with another.
        Outcome::Abandoned | Outcome::Failed | Outcome::Withdrawn | Outcome::VmEnded => return,
    };
    note(state, ENDED, how, say);
}

/// Records why the guest is refused.
pub(super) fn note_refusal(state: Option<&DestinationStateFile>, why: Outcome, say: &Progress) {
    if state.is_some_and(|state| state.noted(REFUSED).is_none()) {
        note(state, REFUSED, why.name(), say);
    }
}

/// Why it was, if that is known.
pub(super) fn refused_as(state: &DestinationStateFile) -> Option<Outcome> {
    let why = state.noted(REFUSED)?;
    [Outcome::Withdrawn, Outcome::VmmDied].into_iter().find(|outcome| outcome.name() == why)
}

/// Records that the source knows that it has the guest back.
pub(super) fn note_source_knows(state: Option<&DestinationStateFile>, say: &Progress) {
    if !state.is_some_and(source_knew) {
        note(state, GIVEN_BACK, "yes", say);
    }
}

/// Whether it did already.
pub(super) fn source_knew(state: &DestinationStateFile) -> bool {
    state.noted(GIVEN_BACK).is_some()
}

/// Whether the guest was refused here, and its source knows: another may begin.
pub(super) fn is_given_back(state: &DestinationStateFile) -> bool {
    let is_refused = state.record().is_some_and(|it| it.ownership == DestinationOwnership::Refused);
    is_refused && state.noted(TOLD).is_some()
}

/// Whether a driver has said that it has started the guest.
pub(super) fn was_started(state: &DestinationStateFile) -> bool {
    state.noted(STARTED).is_some()
}

/// Records that one has said so.
pub(super) fn note_start(state: Option<&DestinationStateFile>, say: &Progress) {
    note(state, STARTED, "yes", say);
}

/// Everybody knows: leaves nothing behind that nobody needs.
pub(super) fn leave(
    state: Option<&DestinationStateFile>,
    place: Option<&mut Place>,
    progress: &Progress,
) {
    note(state, TOLD, "yes", progress);
    if let Some(place) = place {
        place.remove(|line| progress.say(line));
    }
}

fn note(state: Option<&DestinationStateFile>, key: &str, value: &str, progress: &Progress) {
    if let Some(Err(error)) = state.map(|state| state.note(key, value)) {
        progress.say(&format!("warning: the end could not be recorded: {error}"));
    }
}

/// In a process that is started after the end: does what is left to be done.
pub(super) fn after_the_end(
    outcome: Outcome,
    options: &Options,
    state: Option<&DestinationStateFile>,
    mut place: Option<Place>,
    waiter: &mut Waiter,
    progress: &Progress,
) {
    let how = match outcome {
        Outcome::Finished => "every page is in place, and the source knows it",
        Outcome::VmmDied => "the process that ran the guest has ended",
        _ => "the guest does not run here",
    };
    progress.say(&format!(
        "nothing is left to do for this guest: {how}; for another guest give another --state"
    ));
    let kept = place.as_mut().map(super::fetch).transpose();
    match kept.map(Option::flatten) {
        Ok(None) => {}
        Ok(Some(served)) => {
            let last_words = match outcome {
                // It may have missed any of these.
                Outcome::Finished => vec![Word::Run, Word::AllArrived, Word::Finished],
                Outcome::NotHere => vec![Word::NotHere { reason: how.to_owned() }],
                _ => Vec::new(),
            };
            let was_told = state.is_some_and(|state| state.noted(TOLD).is_some());
            let is_started = state.is_some_and(was_started);
            let is_driver_owed = served.driven_by == DrivenBy::Driver && !is_started;
            let mut owed = Owed::new(true, is_driver_owed);
            if !was_told && !last_words.is_empty() {
                owed.say_it_again(options, &served, &last_words, waiter, progress);
            }
            if outcome == Outcome::Finished && is_driver_owed && !owed.driver {
                note_start(state, progress);
            }
            if owed.driver && outcome == Outcome::Finished {
                progress.say(
                    "nobody has started the guest: start the process that drives it, and \
                     page-client once more",
                );
                return;
            }
            leave(state, place.as_mut(), progress);
        }
        Err(failure) => progress.say(&format!("warning: {failure}")),
    }
}

/// Who may not have heard the last words, because the process before this one has died.
struct Owed {
    vmm: bool,
    /// It has not said that it has started the guest.
    driver: bool,
    /// The driver that is connected.
    party: Party,
    connections: u64,
}

impl Owed {
    fn new(vmm: bool, driver: bool) -> Self {
        let party = Party::new("the driver", Arc::new(Native));
        Self { vmm, driver, party, connections: 0 }
    }

    /// Says them to whoever comes back, for a while.
    fn say_it_again(
        &mut self,
        options: &Options,
        served: &Served,
        last_words: &[Word],
        waiter: &mut Waiter,
        progress: &Progress,
    ) {
        let door = Door::new(waiter.waker());
        let opened = super::entrance(options).and_then(|(_, listener, adapter)| {
            let opened =
                door.open(listener, adapter).and_then(|()| door.watch(served.vmm.try_clone()?));
            opened.map_err(Failure::of("start a thread"))
        });
        if let Err(failure) = opened {
            return progress.say(&format!("warning: the VMM cannot be told so: {failure}"));
        }
        progress.say("waiting for the VMM, which may not have heard so");
        let until = Instant::now() + FAREWELL;
        while self.vmm || self.driver {
            let left = until.saturating_duration_since(Instant::now());
            match door.news.try_recv() {
                Ok(News::Died) => (self.vmm, self.driver) = (false, false),
                Ok(news) => self.answer(news, served, last_words, &door, progress),
                Err(_) if left.is_zero() => {
                    return progress.say("whoever may not have heard so has not come back");
                }
                // A signal ends it.
                Err(_) if !matches!(waiter.wait(left), Ok(0)) => return,
                Err(_) => {}
            }
        }
    }

    fn answer(
        &mut self,
        news: News,
        served: &Served,
        last_words: &[Word],
        door: &Door,
        progress: &Progress,
    ) {
        let all = [&[Word::Attached], last_words].concat();
        match news {
            News::Arrived(Arrival::Return { socket, .. }) if served.is_the_vmm(&socket) => {
                self.vmm &= !all.iter().all(|word| framing::send(&socket, word).is_ok());
            }
            News::Arrived(Arrival::Drive { name, socket }) => {
                if let Some(reason) = drivers::refusal(served, &name) {
                    return drivers::turn_away(&socket, reason, progress);
                }
                drivers::replace(&mut self.party, progress);
                self.connections += 1;
                self.party.take(socket, self.connections, door, progress);
                for word in &all {
                    self.party.tell(word, progress);
                }
                // Nothing is to be done for a guest that is not here.
                self.driver &= last_words.contains(&Word::Finished);
            }
            News::Said(number, Word::Started) if self.party.is(number) => self.driver = false,
            _ => {}
        }
    }
}
