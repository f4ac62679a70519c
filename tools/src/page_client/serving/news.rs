//! What comes from the VMM and from a driver, and what they hear when they connect.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::super::adapter::{HangUp, NoArrival};
use super::super::door::News;
use super::super::drivers;
use super::super::report::Outcome;
use super::{DEATH_SHOWS, DriverNeed, Serving};
use crate::attachment::{Arrival, Word};
use crate::control::Happening;
use crate::processes;

impl Serving {
    pub(super) fn take_news(&mut self, news: News) -> Option<Outcome> {
        match news {
            News::Arrived(Arrival::Return { name, socket })
                if name == self.served.name && self.served.is_the_vmm(&socket) =>
            {
                self.greet(socket);
            }
            News::Arrived(Arrival::Return { name, socket }) => {
                self.refuse(&socket, &name);
            }
            News::Arrived(Arrival::Drive { name, socket }) => {
                match drivers::refusal(&self.served, &name) {
                    None => self.greet_driver(socket),
                    Some(reason) => drivers::turn_away(&socket, reason, &self.progress),
                }
            }
            News::Arrived(Arrival::Offer(offer)) if self.served.is_offered_again(&offer) => {
                self.greet(offer.socket);
            }
            News::Arrived(Arrival::Offer(offer)) => self.refuse(&offer.socket, &offer.name),
            News::Turned(NoArrival::Stranger(line)) => self.progress.say(&line),
            News::Turned(NoArrival::Unservable { socket, reason }) => {
                self.progress.say(&reason);
                self.adapter.refuse(&socket, &reason, &self.progress);
            }
            News::Said(number, word) if self.vmm.is(number) => return self.hear_vmm(&word),
            News::Said(number, word) if self.driver.is(number) => return self.hear_driver(&word),
            News::HungUp(number) if self.vmm.is(number) => {
                self.vmm.hang_up();
                self.mark("vmm_hung_up");
                if self.manner.hang_up == HangUp::IsTheEnd {
                    return Some(self.hung_up_for_good());
                }
            }
            News::HungUp(number) if self.driver.is(number) => {
                self.driver.hang_up();
                self.mark("driver_hung_up");
            }
            News::Said(..) | News::HungUp(_) => {}
            News::Died if self.ending.is_some() => {
                self.note(
                    "vmm_died",
                    "the process that ran the guest has ended, after the session",
                );
                return self.ending.take().map(|ending| ending.outcome);
            }
            News::Died if self.manner.hang_up == HangUp::IsTheEnd => {
                return Some(self.died("the VM has ended"));
            }
            News::Died => {
                let line = if self.runs {
                    "the process that ran the guest has ended; without release the source can be \
                     fenced, and goes on from the switchover"
                } else {
                    "the process that was to run the guest has ended before it did"
                };
                return Some(self.died(line));
            }
        }
        None
    }

    fn died(&mut self, line: &str) -> Outcome {
        self.note("vmm_died", line);
        self.desk.note(Happening::new("vmm_died"));
        self.manner.death
    }

    /// A VMM that keeps its connection as long as it lives has ended it.
    fn hung_up_for_good(&mut self) -> Outcome {
        if self.has_all || processes::has_ended(self.served.vmm.as_fd(), DEATH_SHOWS) {
            return self.died("the VM has ended");
        }
        let line = "the VM has hung up, which it does only when it ends, and lives";
        self.note("failed", line);
        self.journal.failed(line);
        Outcome::Failed
    }

    fn refuse(&self, socket: &UnixStream, name: &str) {
        let reason = format!(
            "this page-client serves the guest {:?}, not {name:?}: start another",
            self.served.name
        );
        self.progress.say(&format!("a VMM was turned away: {reason}"));
        self.adapter.refuse(socket, &reason, &self.progress);
    }

    fn mark(&mut self, event: &'static str) {
        self.journal.note(event);
        self.desk.note(Happening::new(event));
    }

    /// Takes a connection of the guest's VMM in the place of any before, and says again what
    /// it may have missed.
    pub(in super::super) fn greet(&mut self, socket: UnixStream) {
        self.connections += 1;
        self.vmm.take(socket, self.connections, &self.door, &self.progress);
        self.mark("vmm_attached");
        self.vmm.tell(&Word::Attached, &self.progress);
        if !self.is_driven() {
            self.tell_state();
        }
        for word in self.said() {
            self.vmm.tell(&word, &self.progress);
        }
    }

    /// The same for a process that drives it.
    pub(in super::super) fn greet_driver(&mut self, socket: UnixStream) {
        drivers::replace(&mut self.driver, &self.progress);
        self.connections += 1;
        self.driver.take(socket, self.connections, &self.door, &self.progress);
        self.mark("driver_attached");
        if self.need == DriverNeed::Said {
            self.need = DriverNeed::Unsaid;
        }
        self.release();
        self.driver.tell(&Word::Attached, &self.progress);
        self.tell_state();
        for word in self.said() {
            let is_heard = self.driver.tell(&word, &self.progress);
            self.expect_driver(&word, is_heard);
        }
    }

    /// What was said so far, of what still holds.
    fn said(&self) -> Vec<Word> {
        let not_here = self.not_here.clone().map(|reason| Word::NotHere { reason });
        let run = self.runs.then_some(Word::Run);
        let all_arrived = self.has_all.then_some(Word::AllArrived);
        [run, all_arrived, not_here].into_iter().flatten().collect()
    }

    fn hear_vmm(&mut self, word: &Word) -> Option<Outcome> {
        match word {
            Word::Ready if !self.is_driven() => self.take_ready("vmm_ready"),
            Word::Withdrawn if !self.runs => {
                let line = "the VMM has failed to attach, and given its guest up before it ran; \
                            started again, page-client takes another";
                return Some(self.withdrawn(line));
            }
            other => tracing::warn!(?other, "the VMM says this out of turn"),
        }
        None
    }

    fn hear_driver(&mut self, word: &Word) -> Option<Outcome> {
        match word {
            Word::Ready => self.take_ready("driver_ready"),
            Word::Withdrawn if !self.runs => {
                let reason = "its driver has given it up before it ran";
                self.vmm.tell(&Word::NotHere { reason: reason.to_owned() }, &self.progress);
                let line = format!("{reason}; started again, page-client takes another guest");
                return Some(self.withdrawn(&line));
            }
            other => tracing::warn!(?other, "the driver says this out of turn"),
        }
        None
    }

    /// The guest is restored. Said before the state has come again, it is said again with it.
    pub(super) fn take_ready(&mut self, event: &'static str) {
        if let Err(error) = self.destination.ready() {
            tracing::info!(%error, event, "ready too early");
        } else {
            self.journal.note(event);
        }
    }

    fn withdrawn(&mut self, line: &str) -> Outcome {
        self.note("withdrawn", line);
        if self.is_driven() {
            let reason = "the guest was given up before it ran".to_owned();
            self.driver.tell(&Word::NotHere { reason }, &self.progress);
        }
        Outcome::Withdrawn
    }
}
