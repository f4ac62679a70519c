//! Processes that would drive a guest which has not come yet, and the one that drives it.
//!
//! Invariant: one process at a time drives a guest, and who is no longer to is told so.

use std::os::unix::net::UnixStream;

use super::guest::Served;
use super::party::Party;
use crate::attachment::{DrivenBy, Word};
use crate::handoff::framing;
use crate::page_server::progress::Progress;

/// That wait at a time.
const MAX_WAITING: usize = 16;

/// Those that have come before any guest.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    drivers: Vec<(String, UnixStream)>,
}

impl Waiting {
    /// Lets a driver wait, in the place of one that waits for the same guest.
    pub(super) fn add(&mut self, name: String, socket: UnixStream, progress: &Progress) {
        let before = self.drivers.iter().position(|(it, _)| *it == name);
        if let Some(at) = before {
            let (_, replaced) = self.drivers.remove(at);
            refuse(&replaced, replaced_reason());
        } else if self.drivers.len() == MAX_WAITING {
            let (_, oldest) = self.drivers.remove(0);
            refuse(&oldest, format!("more than {MAX_WAITING} drivers wait for a guest here"));
        } else {
            progress.say(&format!("a driver waits for the memory of the guest {name:?}"));
        }
        self.drivers.push((name, socket));
    }

    /// The one that drives this guest; the others are told that it has come.
    pub(super) fn choose(self, served: &Served, progress: &Progress) -> Option<UnixStream> {
        let mut chosen = None;
        for (name, socket) in self.drivers {
            match refusal(served, &name) {
                None => chosen = Some(socket),
                Some(reason) => turn_away(&socket, reason, progress),
            }
        }
        chosen
    }
}

/// Why whoever would drive the guest `name` does not drive this one.
pub(super) fn refusal(served: &Served, name: &str) -> Option<String> {
    let ours = &served.name;
    if ours != name {
        return Some(format!("this page-client serves the guest {ours:?}, not {name:?}"));
    }
    (served.driven_by == DrivenBy::Vmm).then(|| {
        format!("the guest {ours:?} is driven by its own VMM, which did not say \"driven\": true")
    })
}

pub(super) fn turn_away(socket: &UnixStream, reason: String, progress: &Progress) {
    progress.say(&format!("a driver was turned away: {reason}"));
    refuse(socket, reason);
}

/// Another process has taken the place of the driver.
pub(super) fn replace(driver: &mut Party, progress: &Progress) {
    // It would come back, in the place of the one that has taken its own.
    driver.tell(&Word::Refused { reason: replaced_reason() }, progress);
}

fn replaced_reason() -> String {
    "another process drives this guest now".to_owned()
}

fn refuse(socket: &UnixStream, reason: String) {
    // It may have gone.
    let _ = framing::send(socket, &Word::Refused { reason });
}
