//! What QEMU leaves out of the device state, and how it is asked to: the one place that knows
//! the capability's name and what it does in which version.
//!
//! It is marked as experimental (`x-`) and may be renamed or change; everything else here asks
//! this module.

use serde_json::{Value, json};

use super::machine::{Backend, Kind, Version};
use super::{Qmp, QmpError};
use crate::page_server::Failure;

/// Its names, the newest first, should it lose its prefix.
const NAMES: [&str; 2] = ["ignore-shared", "x-ignore-shared"];
/// From here on only memory with a file that has a name is left out (`RAM_NAMED_FILE`).
const NAMED_FILES_ONLY: Version = Version { major: 8, minor: 1 };
/// Events about migrations.
const EVENTS: &str = "events";
/// Disks are taken over when the guest runs, not when its state is loaded.
const LATE_DISKS: &str = "late-block-activate";

/// The capabilities of one QEMU that a migration needs.
#[derive(Clone, Debug)]
pub(super) struct Capabilities {
    /// What is switched on for it, and how it was before.
    before: Vec<(String, bool)>,
}

/// Which side a QEMU is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Capabilities {
    /// Looks whether this QEMU has them.
    pub(super) fn probe(qmp: &mut Qmp, side: Side) -> Result<Self, Failure> {
        let all = qmp.execute("query-migrate-capabilities", &json!({})).map_err(failure)?;
        let state = |name: &str| {
            let all = all.as_array().map(Vec::as_slice).unwrap_or_default();
            let found = all.iter().find(|it| it["capability"] == name);
            found.and_then(|it| it["state"].as_bool())
        };
        let Some(name) = NAMES.into_iter().find(|name| state(name).is_some()) else {
            return Err(Failure::new(format!(
                "{} has no capability {}, with which memory is left out of the device state: use \
                 QEMU 4.0 or newer",
                qmp.name(),
                NAMES[1]
            )));
        };
        let late = (side == Side::Destination).then_some(LATE_DISKS);
        let wanted = [Some(name), Some(EVENTS), late].into_iter().flatten();
        let before = wanted.filter_map(|name| Some((name.to_owned(), state(name)?)));
        Ok(Self { before: before.collect() })
    }

    /// Switches them on.
    pub(super) fn switch_on(&self, qmp: &mut Qmp) -> Result<(), QmpError> {
        set(qmp, self.before.iter().map(|(name, _)| (name.as_str(), true)))
    }

    /// What they were before.
    pub(super) fn before(&self) -> &[(String, bool)] {
        &self.before
    }

    /// What they were before a process before this one has switched them on.
    pub(super) fn were(&mut self, before: Vec<(String, bool)>) {
        self.before = before;
    }

    /// As they were before.
    pub(super) fn restore(&self, qmp: &mut Qmp) -> Result<(), QmpError> {
        set(qmp, self.before.iter().map(|(name, was)| (name.as_str(), *was)))
    }
}

fn set<'a>(qmp: &mut Qmp, all: impl Iterator<Item = (&'a str, bool)>) -> Result<(), QmpError> {
    let all: Vec<Value> =
        all.map(|(name, state)| json!({ "capability": name, "state": state })).collect();
    qmp.execute("migrate-set-capabilities", &json!({ "capabilities": all })).map(drop)
}

fn failure(error: QmpError) -> Failure {
    Failure::of("ask for QEMU's capabilities")(error)
}

/// Why the memory of a backend would not be left out of the device state, if that is so.
pub(super) fn why_not_left_out(version: Version, backend: &Backend) -> Option<String> {
    let id = &backend.id;
    if !backend.share {
        return Some(format!(
            "{id} is private memory, which no other process can serve: give the machine \
             -object memory-backend-file,id={id},share=on,mem-path=/dev/shm/NAME,size={} and \
             -machine memory-backend={id}",
            crate::size::Size(backend.size)
        ));
    }
    match backend.kind {
        Kind::Memfd | Kind::Other if version >= NAMED_FILES_ONLY => Some(format!(
            "{id} is no file with a name, and QEMU {version} would put all of it into the device \
             state: use memory-backend-file on /dev/shm or hugetlbfs"
        )),
        Kind::File | Kind::Memfd => None,
        Kind::Other => Some(format!(
            "{id} is memory of a kind that is not known here: use memory-backend-file or \
             memory-backend-memfd"
        )),
    }
}
