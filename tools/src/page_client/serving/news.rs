//! What comes from the VMM and from a driver, and what they hear when they connect.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::super::adapter::{HangUp, NoArrival, Restoring};
use super::super::door::News;
use super::super::drivers;
use super::super::farewell;
use super::super::report::Outcome;
use super::{DEATH_SHOWS, DriverNeed, Ending, Serving};
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
                if self.runs {
                    // Nobody else would start the guest.
                    self.expect_driver(false);
                }
            }
            News::Said(..) | News::HungUp(_) => {}
            News::Died if self.ending.as_ref().is_some_and(Ending::waits_for_source) => {
                self.mark("vmm_died");
                self.ends_without_vmm();
            }
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
            News::Died => return self.vmm_died(),
        }
        None
    }

    /// Its memory is lost. The guest is not, if it has not run here.
    fn vmm_died(&mut self) -> Option<Outcome> {
        let reason = "the process that was to run the guest has ended before it did";
        if !self.runs {
            self.note("vmm_died", reason);
            self.desk.note(Happening::new("vmm_died"));
            let outcome = self.give_up(self.manner.death, reason);
            self.ends_without_vmm();
            if !self.runs {
                return outcome;
            }
        }
        let line = "the process that ran the guest has ended; without release the source can be \
                    fenced, and goes on from the switchover";
        Some(self.died(line))
    }

    /// Nobody waits for a VMM that has ended; a driver is told, if it is there.
    fn ends_without_vmm(&mut self) {
        let is_driven = self.is_driven();
        let Some(ending) = &mut self.ending else { return };
        if is_driven {
            ending.tell_driver(&mut self.driver, self.need, &self.progress);
        }
        ending.vmm_died();
    }

    fn died(&mut self, line: &str) -> Outcome {
        self.note("vmm_died", line);
        self.desk.note(Happening::new("vmm_died"));
        self.leave_snapshot();
        self.manner.death
    }

    /// Whoever has the snapshot need not wait for this VM.
    pub(super) fn leave_snapshot(&self) {
        if self.manner.restoring != Restoring::IsNotOurs {
            return;
        }
        // Where it is no snapshot, it may be given back yet.
        if let Err(error) = self.destination.leave().or_else(|_| self.destination.refuse()) {
            tracing::info!(%error, "the server is not told");
        }
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
            self.expect_driver(is_heard);
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
                let outcome = self.withdrawn(line, line);
                if let Some(ending) = &mut self.ending {
                    ending.vmm_knows();
                }
                return outcome;
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
                let line = format!("{reason}; started again, page-client takes another guest");
                let outcome = self.withdrawn(reason, &line);
                if let Some(ending) = &mut self.ending {
                    // It may have hung up by now.
                    ending.tell_driver(&mut self.driver, self.need, &self.progress);
                    ending.driver_knows();
                }
                return outcome;
            }
            Word::Started if self.runs => {
                if self.need != DriverNeed::Over {
                    self.need = DriverNeed::Over;
                    self.mark("driver_started");
                    farewell::note_start(self.record.as_ref(), &self.progress);
                }
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

    fn withdrawn(&mut self, reason: &str, line: &str) -> Option<Outcome> {
        self.note("withdrawn", line);
        let outcome = self.give_up(Outcome::Withdrawn, reason);
        if outcome.is_some() && self.is_driven() {
            let word = Word::NotHere { reason: reason.to_owned() };
            self.vmm.tell(&word, &self.progress);
            self.driver.tell(&word, &self.progress);
        }
        outcome
    }
}
