//! How it ended, in the state file, and what a process does that is started after the end.
//!
//! Invariant: nothing stays at the keeper that nobody needs, and the last word reaches a VMM that
//! is still there, whichever process says it.

use std::time::{Duration, Instant};

use afterimage::DestinationStateFile;

use super::door::{Door, News};
use super::guest::Served;
use super::options::Options;
use super::report::Outcome;
use crate::attachment::{Arrival, Word};
use crate::handoff::framing;
use crate::keeper::Place;
use crate::page_server::listen_privately;
use crate::page_server::progress::Progress;
use crate::page_server::wait::Waiter;

/// In the state file: how it ended.
const ENDED: &str = "ended";
/// In the state file: the VMM has heard so, or has had its time.
const TOLD: &str = "told";
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
        Outcome::Abandoned | Outcome::Failed | Outcome::Withdrawn => return,
    };
    note(state, ENDED, how, say);
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
            let was_told = state.is_some_and(|state| state.noted(TOLD).is_some());
            if outcome == Outcome::Finished && !was_told {
                say_it_again(options, &served, waiter, progress);
            }
            leave(state, place.as_mut(), progress);
        }
        Err(failure) => progress.say(&format!("warning: {failure}")),
    }
}

/// The process before this one may have died before its VMM heard the last word.
fn say_it_again(options: &Options, served: &Served, waiter: &mut Waiter, progress: &Progress) {
    let door = Door::new(waiter.waker());
    let opened = listen_privately(&options.attach, "--attach").map_err(|error| error.to_string());
    if let Err(error) = opened.and_then(|it| door.open(it).map_err(|error| error.to_string())) {
        return progress.say(&format!("warning: the VMM cannot be told so: {error}"));
    }
    let until = Instant::now() + FAREWELL;
    while Instant::now() < until {
        while let Ok(news) = door.news.try_recv() {
            if let News::Arrived(Arrival::Return { socket, .. }) = news
                && served.is_the_vmm(&socket)
            {
                let words = [Word::Attached, Word::AllArrived, Word::Finished];
                if words.iter().all(|word| framing::send(&socket, word).is_ok()) {
                    return;
                }
            }
        }
        let left = until.saturating_duration_since(Instant::now());
        // A signal ends it.
        if !matches!(waiter.wait(left), Ok(0)) {
            return;
        }
    }
}
