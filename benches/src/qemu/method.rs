//! How the memory is moved: the one part of a round that differs between QEMU's own ways
//! and any other.
//!
//! A [`Method`] says what backs the guest's RAM and carries a running guest from one QEMU
//! to another, and returns when all of it has arrived. Everything that is compared is
//! measured outside of it, in the same way for each: the blackout by QEMU's events, the
//! bytes at the network, the rest in the guest.

use std::time::Duration;

use afterimage_tools::qemu::{Deadline, Event, Qmp, QmpError, unix_now};
use serde::Serialize;
use serde_json::{Value, json};

use super::engine::{Engine, EngineStatistics};
use super::machine::{Machine, Preload, Side};
use super::scene::Scene;
use super::{Mode, PeerRam, QemuError};

/// The whole of a migration.
pub(super) const MIGRATION: Duration = Duration::from_mins(5);

pub(super) trait Method {
    /// The value of `-object` for one side's RAM of the guest, with the id `ram`.
    fn ram(&self, scene: &Scene, side: Side) -> String;

    /// What is loaded into one side's QEMU.
    fn preload(&self, scene: &Scene, side: Side) -> Option<Preload>;

    /// Moves the guest, and waits until its memory has arrived.
    fn carry(
        self: Box<Self>,
        source: &mut Machine,
        destination: &mut Machine,
    ) -> Result<Moved, QemuError>;
}

/// The method of a mode, with what it needs before both QEMUs are started.
pub(super) fn prepare(mode: Mode, scene: &Scene) -> Result<Box<dyn Method>, QemuError> {
    Ok(match mode {
        Mode::Plain => Box::new(QemuPostcopy::Plain),
        Mode::Preempt => Box::new(QemuPostcopy::Preempt),
        Mode::Afterimage => Box::new(Engine::start(scene)?),
    })
}

/// What a migration took. Instants by the host's wall clock, since 1970.
#[derive(Clone, Debug)]
pub(super) struct Moved {
    pub(super) started: Duration,
    /// The source's vCPUs stood still.
    pub(super) stopped: Duration,
    /// The destination's vCPUs ran.
    pub(super) resumed: Duration,
    /// The last page had arrived, and both sides said so.
    pub(super) finished: Duration,
    /// All that was sent.
    pub(super) bytes: u64,
    /// What of it was sent after the switch.
    pub(super) postcopy_bytes: u64,
    pub(super) own: Own,
}

/// What the one that moved the guest says of it.
#[derive(Clone, Debug)]
pub(super) enum Own {
    Qemu(QemuStatistics),
    Engine(EngineStatistics),
}

/// What QEMU itself says of a migration. What its version does not have is absent.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct QemuStatistics {
    /// Mean time from a fault of any thread to its page, in microseconds.
    pub fault_mean_us: Option<f64>,
    /// Faults by how long they took: element N from 2^N µs to twice as long.
    pub fault_distribution: Option<Vec<u64>>,
    /// Pages that the destination asked for.
    pub requests: Option<u64>,
    /// How long all vCPUs at once waited for pages, in milliseconds.
    pub blocktime_ms: Option<u64>,
    /// `downtime`, in milliseconds: it ends at the source, not where the guest resumes.
    pub downtime_ms: Option<u64>,
    /// `total-time`, in milliseconds.
    pub total_ms: Option<u64>,
    /// The source's answer to `query-migrate`, as it is.
    pub source: Value,
    /// The destination's.
    pub destination: Value,
}

impl QemuStatistics {
    fn new(source: Value, destination: Value) -> Self {
        let distribution = destination["postcopy-latency-dist"].as_array();
        Self {
            fault_mean_us: destination["postcopy-latency"].as_f64().map(|ns| ns / 1e3),
            fault_distribution: distribution
                .map(|counts| counts.iter().filter_map(Value::as_u64).collect()),
            requests: source["ram"]["postcopy-requests"].as_u64(),
            blocktime_ms: destination["postcopy-blocktime"].as_u64(),
            downtime_ms: source["downtime"].as_u64(),
            total_ms: source["total-time"].as_u64(),
            source,
            destination,
        }
    }
}

/// QEMU's own postcopy, over loopback TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QemuPostcopy {
    Plain,
    Preempt,
}

impl Method for QemuPostcopy {
    fn ram(&self, scene: &Scene, side: Side) -> String {
        match scene.peer_ram {
            PeerRam::Shared => scene.shared_ram(side),
            PeerRam::Private => scene.private_ram(),
        }
    }

    fn preload(&self, _: &Scene, _: Side) -> Option<Preload> {
        None
    }

    fn carry(
        self: Box<Self>,
        source: &mut Machine,
        destination: &mut Machine,
    ) -> Result<Moved, QemuError> {
        let (from, to) = (&mut source.qmp, &mut destination.qmp);
        for side in [&mut *from, &mut *to] {
            self.configure(side)?;
        }
        to.execute("migrate-incoming", &json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let uri = listening(to)?;

        let started = unix_now();
        from.execute("migrate", &json!({ "uri": uri }))?;
        from.execute("migrate-start-postcopy", &json!({}))?;
        let deadline = Deadline::after(MIGRATION);
        let stopped = reach(from, deadline, "STOP", |event| event.name == "STOP")?;
        let resumed = reach(to, deadline, "RESUME", |event| event.name == "RESUME")?;
        let arrived = reach(to, deadline, "end of the migration", is_complete)?;
        let sent = reach(from, deadline, "end of the migration", is_complete)?;

        let at_source = from.execute("query-migrate", &json!({}))?;
        let at_destination = to.execute("query-migrate", &json!({}))?;
        let ram = &at_source["ram"];
        let bytes = ram["transferred"].as_u64().unwrap_or_default();
        let before = ram["precopy-bytes"].as_u64().unwrap_or_default()
            + ram["downtime-bytes"].as_u64().unwrap_or_default();
        Ok(Moved {
            started,
            stopped,
            resumed,
            finished: arrived.max(sent),
            bytes,
            postcopy_bytes: bytes.saturating_sub(before),
            own: Own::Qemu(QemuStatistics::new(at_source, at_destination)),
        })
    }
}

impl QemuPostcopy {
    fn configure(self, side: &mut Qmp) -> Result<(), QemuError> {
        let mut names = vec!["events", "postcopy-ram", "postcopy-blocktime"];
        if self == Self::Preempt {
            names.push("postcopy-preempt");
        }
        side.capabilities(&names)?;
        // As fast as the machine can; 0 means so for the second, but not for the first.
        let limits = json!({ "max-bandwidth": 1_u64 << 40, "max-postcopy-bandwidth": 0 });
        Ok(side.execute("migrate-set-parameters", &limits).map(drop)?)
    }
}

/// Where a destination listens that has chosen its port itself.
fn listening(qmp: &mut Qmp) -> Result<String, QemuError> {
    let answer = qmp.execute("query-migrate", &json!({}))?;
    let address = &answer["socket-address"][0];
    match (address["host"].as_str(), address["port"].as_str()) {
        (Some(host), Some(port)) => Ok(format!("tcp:{host}:{port}")),
        _ => Err(QmpError::Answer {
            who: qmp.name().to_owned(),
            line: answer.to_string(),
            expected: "an address that it listens at".into(),
        }
        .into()),
    }
}

/// When the event happened, or why the migration ended before it.
pub(super) fn reach(
    qmp: &mut Qmp,
    deadline: Deadline,
    awaited: &str,
    wanted: impl Fn(&Event) -> bool,
) -> Result<Duration, QemuError> {
    const BROKEN: [&str; 3] = ["failed", "cancelled", "postcopy-paused"];
    let is_broken = |event: &Event| {
        event.name == "MIGRATION" && BROKEN.iter().any(|end| event.data["status"] == *end)
    };
    let event = qmp.event(awaited, deadline, |event| wanted(event) || is_broken(event))?;
    if !is_broken(&event) {
        return Ok(event.at);
    }
    let state = qmp.execute("query-migrate", &json!({}))?;
    let reason = state["error-desc"].as_str().unwrap_or("no reason given");
    Err(QmpError::Refused {
        who: qmp.name().to_owned(),
        command: format!("to go on with a migration that is {}", event.data["status"]),
        reason: reason.to_owned(),
    }
    .into())
}

fn is_complete(event: &Event) -> bool {
    event.name == "MIGRATION" && event.data["status"] == "completed"
}
