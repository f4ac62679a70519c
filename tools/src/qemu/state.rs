//! Device state out of one QEMU and into another, by a pipe whose end QEMU is given.
//!
//! A descriptor (`getfd`) works in every version; `file:` does not exist in old ones, and `exec:`
//! may be forbidden by QEMU's sandbox.
//!
//! Invariant: device state is complete when QEMU says so; that the pipe has ended says nothing.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage::StateSection;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::machine::{Facts, Machine, Vcpus, is_active};
use super::{Deadline, Event, QmpError};
use crate::page_server::Failure;

/// What QEMU calls the descriptor.
const NAME: &str = "afterimage";
/// The sections of a session.
const DESCRIPTION: (&str, u32) = ("qemu-description", 1);
const STATE: (&str, u32) = ("qemu", 1);
/// The most device state: with all memory left out it is some hundred KiB to a few MiB.
const MOST_BYTES: usize = 1 << 30;
/// A pipe of this size, where the system allows it, so that fewer wake-ups fill the time.
const PIPE_BYTES: i32 = 1 << 20;
/// How long QEMU may take to find that only little is left to save while the guest runs. Then it
/// is told to stop it.
const CONVERGENCE: Duration = Duration::from_secs(1);
/// How long it may take to stop its vCPUs, and to flush its disks.
const STOP: Duration = Duration::from_secs(30);
/// How long QEMU may take to go on saving.
const SILENCE: Duration = Duration::from_secs(30);
/// As fast as the machine can; QEMU has no word for that.
const BANDWIDTH: u64 = 1 << 40;
/// Between looks at what else happens while QEMU loads.
const SLICE: Duration = Duration::from_millis(100);

/// What the destination must know before it loads anything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Description {
    #[serde(flatten)]
    pub(super) facts: Facts,
    /// Whether the guest ran when it was stopped for this.
    pub(super) vcpus_before: Vcpus,
}

/// Device state and what it is of, as sections of a session.
pub(super) fn pack(description: &Description, bytes: Vec<u8>) -> Vec<StateSection> {
    let described = serde_json::to_vec(description).expect("text and numbers are always JSON");
    let section = |(name, version): (&str, u32), bytes| StateSection {
        name: name.to_owned(),
        version,
        bytes,
    };
    vec![section(DESCRIPTION, described), section(STATE, bytes)]
}

/// The same, at the other side.
pub(super) fn unpack(sections: &[StateSection]) -> Result<(Description, Vec<u8>), Failure> {
    let take = |(name, version): (&str, u32)| {
        let found = sections.iter().find(|it| it.name == name);
        match found {
            Some(section) if section.version == version => Ok(section.bytes.clone()),
            Some(section) => Err(Failure::new(format!(
                "the device state has section {name} of version {}, and this is version {version}: \
                 use matching releases of afterimage-qemu",
                section.version
            ))),
            None => Err(Failure::new(format!(
                "the device state has no section {name}: it comes from something else than \
                 afterimage-qemu; use that at the source too"
            ))),
        }
    };
    let described = take(DESCRIPTION)?;
    let description = serde_json::from_slice(&described)
        .map_err(Failure::of("understand the description of the source's QEMU"))?;
    Ok((description, take(STATE)?))
}

/// A pipe; which of its ends QEMU gets is the caller's affair.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
    // A smaller one does as well.
    let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES));
    Ok((read, write))
}

/// Everything that can be done before the guest is stopped.
pub(super) fn prepare_to_save(machine: &mut Machine) -> Result<(), QmpError> {
    machine.capabilities.switch_on(&mut machine.qmp)?;
    set_bandwidth(machine, BANDWIDTH)
}

/// What is changed in QEMU for the migration, as it was before.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Settings {
    capabilities: Vec<(String, bool)>,
    bandwidth: Option<u64>,
}

impl Settings {
    /// Remembers it, for [`undo_saving`].
    pub(super) fn learn(machine: &mut Machine) -> Result<Self, QmpError> {
        let parameters = machine.qmp.execute("query-migrate-parameters", &json!({}))?;
        machine.bandwidth_before = parameters["max-bandwidth"].as_u64();
        let capabilities = machine.capabilities.before().to_vec();
        Ok(Self { capabilities, bandwidth: machine.bandwidth_before })
    }

    /// Remembers what a process before this one has learnt.
    pub(super) fn were(self, machine: &mut Machine) {
        machine.capabilities.were(self.capabilities);
        machine.bandwidth_before = self.bandwidth;
    }
}

fn set_bandwidth(machine: &mut Machine, limit: u64) -> Result<(), QmpError> {
    let limits = json!({ "max-bandwidth": limit });
    machine.qmp.execute("migrate-set-parameters", &limits).map(drop)
}

/// Device state that is being saved.
///
/// QEMU stops the guest itself, when nothing is left to do but to save what changes as long as
/// it runs: what it prepares takes time that grows with its memory, and memory that is no
/// guest RAM (a graphics card's) goes before the stop.
pub(super) struct Saving {
    reader: JoinHandle<io::Result<Vec<u8>>>,
    is_complete: bool,
}

impl Saving {
    /// Begins to. The guest runs on, and stops at any moment from now on.
    pub(super) fn begin(machine: &mut Machine) -> Result<Self, Failure> {
        machine.qmp.forget_events();
        let (read, write) = pipe().map_err(Failure::of("make a pipe for device state"))?;
        let qmp = &mut machine.qmp;
        qmp.execute_with("getfd", &json!({ "fdname": NAME }), write.as_fd())?;
        drop(write);
        // It ends with QEMU's side of the pipe.
        let reader = move || read_all(File::from(read));
        let reader = thread::Builder::new().name("state".to_owned()).spawn(reader);
        let reader = reader.map_err(Failure::of("start a thread"))?;
        qmp.execute("migrate", &json!({ "uri": format!("fd:{NAME}") }))?;
        Ok(Self { reader, is_complete: false })
    }

    /// Waits until a guest that ran stands still; when that was, by QEMU's clock.
    pub(super) fn until_stopped(&mut self, machine: &mut Machine) -> Result<Duration, Failure> {
        match self.stopped_by(machine, Deadline::after(CONVERGENCE)) {
            // It writes to memory that goes with the device state faster than that goes.
            Err(Unstopped::Late) => machine.qmp.execute("stop", &json!({})).map(drop)?,
            other => return other.map_err(Failure::from),
        }
        self.stopped_by(machine, Deadline::after(STOP)).map_err(Failure::from)
    }

    fn stopped_by(
        &mut self,
        machine: &mut Machine,
        deadline: Deadline,
    ) -> Result<Duration, Unstopped> {
        loop {
            let event = machine.qmp.event("stop of the guest", deadline, |event| {
                event.name == "STOP" || event.name == "MIGRATION"
            })?;
            // Somebody may have paused it just before.
            if event.name == "STOP" || self.take(machine, &event)? {
                return Ok(event.at);
            }
        }
    }

    /// Waits for all of it.
    pub(super) fn finish(mut self, machine: &mut Machine) -> Result<Vec<u8>, Failure> {
        while !self.is_complete {
            let deadline = Deadline::after(SILENCE);
            let event = machine
                .qmp
                .event("end of the migration", deadline, |event| event.name == "MIGRATION")?;
            self.take(machine, &event)?;
        }
        let bytes = self.reader.join().expect("reading does not panic");
        bytes.map_err(Failure::of("take device state from the source's QEMU"))
    }

    /// Whether this is the end.
    fn take(&mut self, machine: &mut Machine, event: &Event) -> Result<bool, Failure> {
        match event.data["status"].as_str() {
            Some("completed") => self.is_complete = true,
            Some("failed" | "cancelled") => {
                // One that has ended because of it cannot be asked.
                let why = machine.migration().ok();
                let why = why.and_then(|it| it["error-desc"].as_str().map(str::to_owned));
                return Err(Failure::new(format!(
                    "{} could not save the device state: {}",
                    machine.qmp.name(),
                    why.unwrap_or_else(|| "it says why on its standard error".to_owned())
                )));
            }
            _ => {}
        }
        Ok(self.is_complete)
    }
}

/// Why a guest does not stand still.
enum Unstopped {
    Late,
    Failed(Failure),
}

impl From<QmpError> for Unstopped {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Late { .. } => Self::Late,
            error => Self::Failed(error.into()),
        }
    }
}

impl From<Failure> for Unstopped {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Unstopped> for Failure {
    fn from(reason: Unstopped) -> Self {
        match reason {
            Unstopped::Late => Self::new(format!(
                "the source's QEMU has not stopped its guest within {} s: a disk may not answer",
                STOP.as_secs()
            )),
            Unstopped::Failed(failure) => failure,
        }
    }
}

fn read_all(mut pipe: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        wait_readable(&pipe)?;
        let had = bytes.len();
        bytes.resize(had + (PIPE_BYTES as usize), 0);
        let got = match pipe.read(&mut bytes[had..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Ok(0) => {
                bytes.truncate(had);
                return Ok(bytes);
            }
            other => other?,
        };
        bytes.truncate(had + got);
        if bytes.len() > MOST_BYTES {
            let what = "more than 1 GiB of it: guest memory is not left out";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    }
}

fn wait_readable(pipe: &File) -> io::Result<()> {
    let until = Instant::now() + SILENCE;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut waited = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut waited, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Puts QEMU in a state in which its guest can go on: nothing is being saved, and what was
/// switched on is off.
pub(super) fn undo_saving(machine: &mut Machine) -> Result<(), QmpError> {
    let migration = machine.migration()?;
    if is_active(&migration) {
        machine.qmp.execute("migrate_cancel", &json!({}))?;
        let deadline = Deadline::after(SILENCE);
        let is_over = |status: &str| matches!(status, "completed" | "failed" | "cancelled");
        // It may have ended before the events were switched on, or between the two questions.
        while is_active(&machine.migration()?) {
            machine.qmp.event("end of the migration", deadline, |event| {
                event.data["status"].as_str().is_some_and(is_over)
            })?;
        }
    }
    machine.capabilities.restore(&mut machine.qmp)?;
    match machine.bandwidth_before.take() {
        Some(before) => set_bandwidth(machine, before),
        None => Ok(()),
    }
}

/// Loads device state into a QEMU that waits for it. `look` is called again and again
/// meanwhile, because QEMU may wait for pages of the guest, and ends it by an error.
pub(super) fn load(
    machine: &mut Machine,
    door: Door,
    bytes: Vec<u8>,
    look: &mut dyn FnMut() -> Result<(), Failure>,
) -> Result<(), Failure> {
    door.feed(machine, bytes)?;
    loop {
        look()?;
        let event = machine.qmp.event("end of the migration", Deadline::after(SLICE), |event| {
            event.name == "MIGRATION"
        });
        let status = match event {
            Err(QmpError::Late { .. }) => continue,
            other => other.map_err(not_loaded)?.data["status"].clone(),
        };
        match status.as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                return Err(Failure::new(format!(
                    "{} could not load the device state: its standard error says why; both sides \
                     must have the same devices",
                    machine.qmp.name()
                )));
            }
            _ => {}
        }
    }
}

/// Where a QEMU that waits for device state reads it.
pub(super) struct Door(OwnedFd);

impl Door {
    /// Everything that can be done before there is any.
    pub(super) fn open(machine: &mut Machine) -> Result<Self, Failure> {
        machine.capabilities.switch_on(&mut machine.qmp).map_err(not_loaded)?;
        let (read, write) = pipe().map_err(Failure::of("make a pipe for device state"))?;
        let named = json!({ "fdname": NAME });
        machine.qmp.execute_with("getfd", &named, read.as_fd()).map_err(not_loaded)?;
        Ok(Self(write))
    }

    /// Lets QEMU begin.
    fn feed(self, machine: &mut Machine, bytes: Vec<u8>) -> Result<(), Failure> {
        // QEMU reads at its own pace. If it ends, so does this; why, it says itself.
        let writer = move || File::from(self.0).write_all(&bytes);
        let writer = thread::Builder::new().name("state".to_owned()).spawn(writer);
        writer.map(drop).map_err(Failure::of("start a thread"))?;
        machine.qmp.forget_events();
        let from = json!({ "uri": format!("fd:{NAME}") });
        machine.qmp.execute("migrate-incoming", &from).map(drop).map_err(not_loaded)
    }
}

/// QEMU ends if it cannot load what it is given.
pub(super) fn not_loaded(error: QmpError) -> Failure {
    match error {
        QmpError::Ended { who, .. } => Failure::new(format!(
            "{who} ended while it was loading the device state: its standard error says why; both \
             sides must have the same devices"
        )),
        error => Failure::from(error),
    }
}
