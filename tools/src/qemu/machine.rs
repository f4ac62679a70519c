//! One QEMU that somebody else has started: what it is, and whether its guest can be moved.
//!
//! Invariant: nothing here changes the guest. Whatever stands against a migration is found
//! before the guest is stopped.

use std::fmt;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use afterimage::Address;
use nix::sys::socket::{getsockopt, sockopt};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::capability::{Capabilities, Side, why_not_left_out};
use super::{Deadline, Lines, Qmp, QmpError, Speaker, ram};
use crate::page_server::Failure;
use crate::page_server::failure::chain;

/// How long a monitor may take to greet.
const GREETING: Duration = Duration::from_secs(10);

/// A QEMU's version, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Version {
    pub(super) major: u64,
    pub(super) minor: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What is behind guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Memfd,
    Other,
}

/// A piece of guest RAM.
#[derive(Clone, Debug)]
pub(super) struct Backend {
    pub(super) id: String,
    pub(super) size: u64,
    pub(super) share: bool,
    pub(super) kind: Kind,
    /// The file, or the directory of one without a name.
    pub(super) path: Option<PathBuf>,
}

/// What both sides must have alike; it travels with the device state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) qemu: Version,
    pub(super) machine: String,
    pub(super) vcpus: usize,
    /// Bytes of each piece of guest RAM, in the order of their names.
    pub(super) ram: Vec<u64>,
}

pub(super) struct Machine {
    pub(super) qmp: Qmp,
    /// Of the process, if it listens at its monitor itself.
    pub(super) pid: Option<i32>,
    pub(super) facts: Facts,
    pub(super) backends: Vec<Backend>,
    pub(super) capabilities: Capabilities,
    /// Bytes a second of its migrations, as they were before one of ours.
    pub(super) bandwidth_before: Option<u64>,
}

impl Machine {
    /// Connects, and looks at everything that must be right whatever the guest does.
    pub(super) fn connect(address: &Address, side: Side) -> Result<Self, Failure> {
        let name = match side {
            Side::Source => "the source's QEMU",
            Side::Destination => "the destination's QEMU",
        };
        let Address::Unix(path) = address else {
            return Err(Failure::usage(format!(
                "{address} is no Unix socket, and descriptors travel by no other: give {name} \
                 -qmp unix:PATH,server=on,wait=off"
            )));
        };
        let stream = UnixStream::connect(path).map_err(|error| {
            Failure::new(format!(
                "could not connect to {name} at {address}: {error}; start it with \
                 -qmp {address},server=on,wait=off"
            ))
        })?;
        let pid = getsockopt(&stream.as_fd(), sockopt::PeerCredentials).ok().map(|it| it.pid());
        let lines = Lines::new(stream, Speaker { name: name.to_owned(), log: None });
        let mut qmp = Qmp::greet(lines, Deadline::after(GREETING)).map_err(|error| match error {
            QmpError::Late { .. } => Failure::new(format!(
                "{name} at {address} does not greet: its monitor serves one client at a time; give \
                 it another -qmp for this one"
            )),
            error => Failure::from(error),
        })?;
        let (facts, backends) = look(&mut qmp)?;
        let capabilities = Capabilities::probe(&mut qmp, side)?;
        let pid = pid.filter(|pid| *pid > 0);
        if let Some(pid) = pid {
            ram::check_order(name, pid, &backends)?;
        }
        let mut machine = Self { qmp, pid, facts, backends, capabilities, bandwidth_before: None };
        machine.check_memory()?;
        machine.check_devices()?;
        Ok(machine)
    }

    /// In QEMU's word: `running`, `paused`, `inmigrate`, …
    pub(super) fn status(&mut self) -> Result<String, QmpError> {
        let answer = self.qmp.execute("query-status", &json!({}))?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// What it has migrated so far: `completed`, `failed`, …
    pub(super) fn migration(&mut self) -> Result<Value, QmpError> {
        self.qmp.execute("query-migrate", &json!({}))
    }

    /// All RAM must be in files that are shared.
    fn check_memory(&mut self) -> Result<(), Failure> {
        let name = self.qmp.name().to_owned();
        for backend in &self.backends {
            if let Some(why) = why_not_left_out(self.facts.qemu, backend) {
                return Err(Failure::new(format!("{name}: guest RAM {why}")));
            }
        }
        let summary = self.qmp.execute("query-memory-size-summary", &json!({}))?;
        let bytes = |part: &str| summary[part].as_u64().unwrap_or_default();
        let (all, here) = (bytes("base-memory") + bytes("plugged-memory"), self.facts.ram_bytes());
        if all > here {
            return Err(Failure::new(format!(
                "{name} has {all} bytes of guest RAM, and only {here} of them in memory backends: \
                 give the machine -object memory-backend-file,id=ram,share=on,… and \
                 -machine memory-backend=ram"
            )));
        }
        Ok(())
    }

    /// Devices that reach guest memory past QEMU's mapping would read pages that have not come.
    fn check_devices(&mut self) -> Result<(), Failure> {
        let name = self.qmp.name().to_owned();
        let refuse = |what: &str| {
            Err(Failure::new(format!(
                "{name} has {what}, which reaches guest memory past QEMU: it would not wait for \
                 pages that have not come; remove it, or move the guest another way"
            )))
        };
        for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
            let all = self.qmp.execute("qom-list", &json!({ "path": path }))?;
            for device in all.as_array().into_iter().flatten() {
                let kind = device["type"].as_str().unwrap_or_default();
                let kind = kind.trim_start_matches("child<").trim_end_matches('>');
                if ["vhost-user", "vfio-", "vhost-vdpa"].iter().any(|it| kind.starts_with(it)) {
                    return refuse(&format!("a device {kind}"));
                }
            }
        }
        let command = json!({ "command-line": "info network" });
        let networks = self.qmp.execute("human-monitor-command", &command)?;
        let networks = networks.as_str().unwrap_or_default();
        match ["type=vhost-user", "type=vhost-vdpa"].iter().find(|it| networks.contains(**it)) {
            Some(kind) => refuse(&format!("a network of {kind}")),
            None => Ok(()),
        }
    }

    /// The source's guest must be able to leave. Returns whether it runs.
    pub(super) fn check_can_leave(&mut self) -> Result<Vcpus, Failure> {
        let name = self.qmp.name().to_owned();
        let migration = self.migration()?;
        if let Some(reasons) = migration["blocked-reasons"].as_array().filter(|it| !it.is_empty()) {
            let reasons: Vec<_> = reasons.iter().filter_map(Value::as_str).collect();
            let reasons = reasons.join("; ");
            return Err(Failure::new(format!("{name} cannot be migrated: {reasons}")));
        }
        if is_active(&migration) {
            return Err(Failure::new(format!(
                "{name} is migrating already: wait for its end, or say migrate_cancel there"
            )));
        }
        match self.status()?.as_str() {
            "running" => Ok(Vcpus::Run),
            "paused" => Ok(Vcpus::Stopped),
            "postmigrate" => Err(Failure::new(format!(
                "the guest of {name} was migrated away before: only if it runs nowhere else, say \
                 cont there, and try again"
            ))),
            other => Err(Failure::new(format!(
                "the guest of {name} is neither running nor paused, but {other}: it can be moved \
                 when it is"
            ))),
        }
    }

    /// The destination's QEMU must wait for a guest, or have taken it from a process before this
    /// one.
    pub(super) fn check_can_take(&mut self) -> Result<Taking, Failure> {
        let status = self.status()?;
        let migration = self.migration()?;
        let is_loaded = migration["status"] == "completed";
        match status.as_str() {
            "inmigrate" if is_active(&migration) => Err(Failure::new(format!(
                "{} is loading a guest already: it was started without -incoming defer, or another \
                 process loads it; start it again",
                self.qmp.name()
            ))),
            "inmigrate" => Ok(Taking::Waits),
            "paused" | "prelaunch" if is_loaded => Ok(Taking::Loaded),
            "running" if is_loaded => Ok(Taking::Runs),
            other => Err(Failure::new(format!(
                "{} does not wait for a guest, it is {other}: start it with -S -incoming defer",
                self.qmp.name()
            ))),
        }
    }
}

/// Whether vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Vcpus {
    Run,
    Stopped,
}

/// How far a destination's QEMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taking {
    Waits,
    Loaded,
    Runs,
}

/// Whether QEMU itself is in the middle of a migration.
pub(super) fn is_active(migration: &Value) -> bool {
    const ENDED: [&str; 4] = ["none", "completed", "failed", "cancelled"];
    migration["status"].as_str().is_some_and(|status| !ENDED.contains(&status))
}

impl Facts {
    pub(super) fn ram_bytes(&self) -> u64 {
        self.ram.iter().sum()
    }

    /// Why a guest of `from` cannot go on here, if that is so.
    pub(super) fn why_not(&self, from: &Self) -> Option<String> {
        if self.machine != from.machine {
            return Some(format!(
                "the source's machine is {} and the destination's {}: start both with the same \
                 versioned -machine",
                from.machine, self.machine
            ));
        }
        if self.qemu < from.qemu {
            return Some(format!(
                "the source is QEMU {} and the destination {}, which is older: use the same or a \
                 newer one",
                from.qemu, self.qemu
            ));
        }
        if self.ram != from.ram {
            return Some(format!(
                "the source has guest RAM of {:?} bytes and the destination {:?}: give both the \
                 same -m and memory backends",
                from.ram, self.ram
            ));
        }
        if self.vcpus != from.vcpus {
            return Some(format!(
                "the source has {} vCPUs and the destination {}: give both the same -smp",
                from.vcpus, self.vcpus
            ));
        }
        None
    }
}

fn look(qmp: &mut Qmp) -> Result<(Facts, Vec<Backend>), QmpError> {
    let version = qmp.execute("query-version", &json!({}))?;
    let part = |part: &str| version["qemu"][part].as_u64().unwrap_or_default();
    let qemu = Version { major: part("major"), minor: part("minor") };
    let machine = get(qmp, "/machine", "type")?.unwrap_or_default();
    let vcpus = qmp.execute("query-cpus-fast", &json!({}))?.as_array().map_or(0, Vec::len);
    let backends = backends(qmp)?;
    let ram = backends.iter().map(|it| it.size).collect();
    Ok((Facts { qemu, machine, vcpus, ram }, backends))
}

/// All memory backends, by name.
fn backends(qmp: &mut Qmp) -> Result<Vec<Backend>, QmpError> {
    let objects = qmp.execute("qom-list", &json!({ "path": "/objects" }))?;
    let kind = |id: &str| {
        let all = objects.as_array().map(Vec::as_slice).unwrap_or_default();
        match all.iter().find(|it| it["name"] == id).and_then(|it| it["type"].as_str()) {
            Some("child<memory-backend-file>") => Kind::File,
            Some("child<memory-backend-memfd>") => Kind::Memfd,
            _ => Kind::Other,
        }
    };
    let mut found = Vec::new();
    for device in qmp.execute("query-memdev", &json!({}))?.as_array().into_iter().flatten() {
        let id = device["id"].as_str().unwrap_or_default().to_owned();
        let kind = kind(&id);
        let path = match kind {
            Kind::File => get(qmp, &format!("/objects/{id}"), "mem-path")?.map(PathBuf::from),
            _ => None,
        };
        let size = device["size"].as_u64().unwrap_or_default();
        let share = device["share"].as_bool().unwrap_or_default();
        found.push(Backend { id, size, share, kind, path });
    }
    found.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(found)
}

/// A property, if it is text.
fn get(qmp: &mut Qmp, path: &str, property: &str) -> Result<Option<String>, QmpError> {
    let value = qmp.execute("qom-get", &json!({ "path": path, "property": property }))?;
    Ok(value.as_str().map(str::to_owned))
}

/// A refusal or a silence of QEMU ends the command.
impl From<QmpError> for Failure {
    fn from(error: QmpError) -> Self {
        Self::new(chain(&error))
    }
}
