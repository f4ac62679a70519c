//! The destination's side: device state goes into the QEMU that waits for it, and the guest runs
//! when page-client says that this is on record.
//!
//! Invariant: `cont` is said only after page-client has said `run`, and `stop` as soon as it says
//! that the guest must not run here any more. All that has to be remembered is remembered there and
//! in QEMU, so this process may be killed and started again at any moment.

use std::time::{Duration, Instant};

use afterimage::Address;
use serde_json::json;

use super::machine::{Facts, Machine, Taking, Vcpus};
use super::options::DestinationOptions;
use super::state::{self, Door};
use super::{Deadline, QmpError};
use crate::attachment::{AttachmentEvent, Driver};
use crate::page_server::Failure;
use crate::page_server::failure::chain;

/// Between looks at whether somebody wants this to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long QEMU may take to say that its guest runs.
const RESUME: Duration = Duration::from_secs(30);

/// What the destination tells whoever started it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Everything is checked, and the memory is served: the source may stop its guest, if it is
    /// such a one.
    Armed(Facts),
    /// Device state is there, so many bytes.
    State(usize),
    /// It was loaded in this time.
    Loaded(Duration),
    /// The guest may run.
    Run,
    /// It does, by the host's clock, since 1970; `None` if it had been paused and stays so.
    Resumed(Option<Duration>),
    AllArrived,
    Line(String),
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// The guest is here, with all of its memory, and the source knows it.
    Finished,
    /// The guest does not run here, and why.
    NotHere(String),
    /// Somebody wanted it.
    Stopped,
}

/// What the destination needs of whoever started it.
pub(super) trait Observer {
    fn hear(&mut self, heard: Heard);
    /// Whether this is to end; asked several times a second.
    fn is_stopped(&mut self) -> Result<bool, Failure>;
}

/// Takes a guest, and returns when all of it is here. Started again after its death it goes on.
pub(super) fn run(
    qmp: &Address,
    options: &DestinationOptions,
    observer: &mut dyn Observer,
) -> Result<Ended, Failure> {
    let Address::Unix(attach) = &options.attach else {
        return Err(Failure::usage(format!(
            "--attach {} is no Unix socket: give that of page-client --attach",
            options.attach
        )));
    };
    let mut machine = Machine::connect(qmp, super::capability::Side::Destination)?;
    let taking = machine.check_can_take()?;
    let driver =
        Driver::connect(attach, &options.guest).map_err(|error| Failure::new(chain(&error)))?;
    let vcpus = Vcpus::Run;
    let receiving =
        Receiving { machine, driver, taking, door: None, vcpus, is_lost: false, observer };
    receiving.until_the_end()
}

struct Receiving<'a> {
    machine: Machine,
    driver: Driver,
    taking: Taking,
    /// Opened before the guest is stopped.
    door: Option<Door>,
    /// What they were at the source when the guest was stopped.
    vcpus: Vcpus,
    /// page-client is gone.
    is_lost: bool,
    observer: &'a mut dyn Observer,
}

impl Receiving<'_> {
    fn until_the_end(mut self) -> Result<Ended, Failure> {
        loop {
            if self.observer.is_stopped()? {
                return Ok(Ended::Stopped);
            }
            let Some(event) = self.driver.next(LOOK) else {
                self.check_lives()?;
                continue;
            };
            match event {
                AttachmentEvent::Attached => {
                    if self.taking == Taking::Waits {
                        self.door = Some(Door::open(&mut self.machine)?);
                    }
                    let facts = self.machine.facts.clone();
                    self.observer.hear(Heard::Armed(facts));
                }
                AttachmentEvent::State(sections) => {
                    if let Some(ended) = self.restore(&sections)? {
                        return Ok(ended);
                    }
                }
                AttachmentEvent::Run => self.resume()?,
                AttachmentEvent::AllArrived => self.observer.hear(Heard::AllArrived),
                AttachmentEvent::Finished => return Ok(Ended::Finished),
                AttachmentEvent::NotHere(reason) => {
                    self.stop();
                    return Ok(Ended::NotHere(reason));
                }
                AttachmentEvent::Refused(reason) => return Err(Failure::new(reason)),
                AttachmentEvent::Lost => {
                    self.is_lost = true;
                    let line = "page-client is gone; whoever touches a missing page waits for \
                                page-client to be started again";
                    self.observer.hear(Heard::Line(line.to_owned()));
                }
                AttachmentEvent::Back => {
                    self.is_lost = false;
                    self.observer.hear(Heard::Line("page-client is there again".to_owned()));
                }
                AttachmentEvent::Failed(reason) => self.observer.hear(Heard::Line(reason)),
            }
        }
    }

    /// page-client ends with the QEMU that it serves, and nobody would come back.
    fn check_lives(&mut self) -> Result<(), Failure> {
        if !self.is_lost {
            return Ok(());
        }
        match self.machine.status() {
            Err(error @ QmpError::Ended { .. }) => Err(error.into()),
            // It may be busy.
            _ => Ok(()),
        }
    }

    /// Loads device state, unless a process before this one has.
    fn restore(&mut self, sections: &[afterimage::StateSection]) -> Result<Option<Ended>, Failure> {
        let loaded = self.load(sections);
        match loaded {
            Ok(None) => self.driver.ready(),
            // Whoever waits for its pages is let go, and the source need not wait.
            Ok(Some(_)) | Err(_) => self.driver.withdraw(),
        }
        loaded
    }

    fn load(&mut self, sections: &[afterimage::StateSection]) -> Result<Option<Ended>, Failure> {
        let (description, bytes) = state::unpack(sections)?;
        if let Some(why) = self.machine.facts.why_not(&description.facts) {
            return Err(Failure::new(why));
        }
        self.vcpus = description.vcpus_before;
        self.observer.hear(Heard::State(bytes.len()));
        if self.taking != Taking::Waits {
            return Ok(None);
        }
        let begun = Instant::now();
        let (mut ended, mut is_lost) = (None, self.is_lost);
        let door = self.door.take().map_or_else(|| Door::open(&mut self.machine), Ok)?;
        let Self { machine, driver, observer, .. } = self;
        let loaded = state::load(machine, door, bytes, &mut || {
            if observer.is_stopped()? {
                ended = Some(Ended::Stopped);
            }
            match driver.next(Duration::ZERO) {
                Some(AttachmentEvent::NotHere(reason)) => ended = Some(Ended::NotHere(reason)),
                Some(AttachmentEvent::Lost) => is_lost = true,
                Some(AttachmentEvent::Back) => is_lost = false,
                // Another process drives it now: nothing follows.
                Some(AttachmentEvent::Refused(reason)) => return Err(Failure::new(reason)),
                _ => {}
            }
            if ended.is_some() { Err(Failure::new("it was given up")) } else { Ok(()) }
        });
        self.is_lost = is_lost;
        if ended.is_some() {
            // page-client may see the end of QEMU first, and does not know why.
            if let Err(error @ QmpError::Ended { .. }) = self.machine.status() {
                return Err(state::not_loaded(error));
            }
            return Ok(ended);
        }
        loaded?;
        self.taking = Taking::Loaded;
        self.observer.hear(Heard::Loaded(begun.elapsed()));
        Ok(None)
    }

    /// The guest may run from now on: lets it.
    fn resume(&mut self) -> Result<(), Failure> {
        self.observer.hear(Heard::Run);
        if self.vcpus == Vcpus::Stopped {
            self.driver.started();
            self.observer.hear(Heard::Resumed(None));
            return Ok(());
        }
        if self.taking == Taking::Runs {
            self.driver.started();
            return Ok(());
        }
        let at = self.cont().map_err(|error| {
            let error = Failure::from(error);
            Failure::new(format!(
                "the guest is this side's and does not run yet ({error}): see to it, and start \
                 afterimage-qemu receive again"
            ))
        })?;
        self.taking = Taking::Runs;
        self.driver.started();
        self.observer.hear(Heard::Resumed(Some(at)));
        Ok(())
    }

    /// Stops a guest that runs here and must not any more: its source may run it already.
    fn stop(&mut self) {
        let is_running = self.machine.status().map(|status| status == "running");
        let stopped = match is_running {
            Ok(false) | Err(QmpError::Ended { .. }) => return,
            Ok(true) => self.machine.qmp.execute("stop", &json!({})).map(drop),
            Err(error) => Err(error),
        };
        self.observer.hear(Heard::Line(match stopped {
            Ok(()) => "the guest ran here until now, and must not: it was stopped".to_owned(),
            Err(error) => format!(
                "the guest must not run here any more, and whether it stands still is not known \
                 ({}): end this QEMU at once, or it may run twice",
                Failure::from(error)
            ),
        }));
    }

    fn cont(&mut self) -> Result<Duration, QmpError> {
        let qmp = &mut self.machine.qmp;
        qmp.forget_events();
        qmp.execute("cont", &json!({}))?;
        let resumed = qmp.event("RESUME", Deadline::after(RESUME), |event| event.name == "RESUME");
        Ok(resumed?.at)
    }
}
