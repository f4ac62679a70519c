//! What the source's side remembers across its death: who has the guest, in a state file, and
//! what was done to the guest for it.
//!
//! Invariant: that the guest was stopped for the migration is on record before it is stopped, so
//! that whoever comes after knows that it has to go on, and where.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use afterimage::{GuestLayout, SourceOptions, SourceOwnership, SourceStateFile, StateSection};
use serde::{Deserialize, Serialize};

use super::machine::Vcpus;
use super::state::Settings;
use crate::page_server::Failure;
use crate::page_server::failure::chain;

/// The guest is stopped for the migration; the value says whether it ran before.
const STOPPED: &str = "stopped";
/// How QEMU was set before, as JSON.
const SETTINGS: &str = "qemu";
/// It was taken back and goes on here.
const RESUMED: &str = "resumed";
/// The destination was told that the session is over; as page-server notes it.
const BYE: &str = "bye";
const YES: &str = "yes";
const RAN: &str = "ran";
const PAUSED: &str = "paused";

/// What the processes before this one have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// The guest was not stopped yet, or there was none before.
    Open,
    /// It was stopped, and not given away.
    Interrupted(Vcpus),
    /// It is the destination's.
    Given,
    /// It is, with all of its memory, but may not know it.
    Complete,
    /// The same, and it was told so.
    Finished,
    /// It was taken back, and may not run yet.
    TakenBack(Vcpus),
    /// It was taken back, and goes on: another attempt is another session.
    Over,
    /// The destination was declared dead.
    Fenced,
}

/// Device state, as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    session: String,
    sections: Vec<KeptSection>,
}

#[derive(Serialize, Deserialize)]
struct KeptSection {
    name: String,
    version: u32,
    length: usize,
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(bytes)
}

/// The state file, if there is one.
#[derive(Debug)]
pub(super) struct Record(Option<SourceStateFile>);

impl Record {
    pub(super) fn open(path: Option<&Path>) -> Result<Self, Failure> {
        let file = path.map(SourceStateFile::open).transpose();
        file.map(Self).map_err(|error| Failure::new(chain(&error)))
    }

    pub(super) fn past(&self) -> Past {
        let Some((file, record)) = self.0.as_ref().and_then(|file| Some((file, file.record()?)))
        else {
            return Past::Open;
        };
        let before = self.before();
        match record.ownership {
            SourceOwnership::Owner => before.map_or(Past::Open, Past::Interrupted),
            SourceOwnership::Given => Past::Given,
            SourceOwnership::Finished if file.noted(BYE).is_some() => Past::Finished,
            SourceOwnership::Finished => Past::Complete,
            SourceOwnership::Fenced => Past::Fenced,
            SourceOwnership::Reclaimed => match before {
                Some(before) if file.noted(RESUMED).is_none() => Past::TakenBack(before),
                _ => Past::Over,
            },
        }
    }

    /// What the vCPUs were before the guest was stopped for this session, if it was.
    pub(super) fn before(&self) -> Option<Vcpus> {
        match self.0.as_ref()?.noted(STOPPED)?.as_str() {
            PAUSED => Some(Vcpus::Stopped),
            _ => Some(Vcpus::Run),
        }
    }

    /// Begins or continues the session.
    pub(super) fn begin(
        &self,
        layout: &GuestLayout,
        options: &mut SourceOptions,
    ) -> Result<(), Failure> {
        let Some(file) = &self.0 else { return Ok(()) };
        let fresh = SourceStateFile::fresh();
        let record = match self.past() {
            Past::Over => file.begin_anew(layout, fresh),
            _ => file.begin(layout, fresh),
        };
        options.record = record.map_err(|error| Failure::new(chain(&error)))?;
        options.ledger = file.ledger();
        Ok(())
    }

    /// The guest is about to be stopped, and QEMU prepared for that.
    pub(super) fn note_stop(&self, before: Vcpus, settings: &Settings) -> Result<(), Failure> {
        let settings = serde_json::to_string(settings);
        self.note(SETTINGS, &settings.expect("text and numbers are always JSON"))?;
        let before = if before == Vcpus::Run { RAN } else { PAUSED };
        self.note(STOPPED, before)
    }

    /// How QEMU was set before the guest was stopped for this session, if it was.
    pub(super) fn settings(&self) -> Option<Settings> {
        serde_json::from_str(&self.0.as_ref()?.noted(SETTINGS)?).ok()
    }

    /// It goes on here.
    pub(super) fn note_resumed(&self) -> Result<(), Failure> {
        self.note(RESUMED, YES)
    }

    /// The destination knows that it has everything.
    pub(super) fn note_bye(&self) -> Result<(), Failure> {
        self.note(BYE, YES)
    }

    pub(super) const fn is_kept(&self) -> bool {
        self.0.is_some()
    }

    /// Keeps device state for whoever comes after: QEMU does not save it twice. A process that is
    /// killed loses nothing of it, and a power failure takes the guest's memory too, so that
    /// nothing waits for a disk here, while the guest stands still.
    pub(super) fn keep_state(&self, sections: &[StateSection]) -> Result<(), Failure> {
        let Some(path) = self.state_path() else { return Ok(()) };
        let new = path.with_extension("new");
        let written = write(&new, &self.kept(sections)).and_then(|()| fs::rename(&new, &path));
        written.map_err(Failure::of("keep device state beside the state file"))
    }

    /// What was kept; nothing if there is nothing of this session.
    pub(super) fn kept_state(&self) -> Vec<StateSection> {
        let found = self.state_path().and_then(|path| fs::read(path).ok());
        found.and_then(|bytes| self.unpack(&bytes)).unwrap_or_default()
    }

    /// The session is over.
    pub(super) fn forget_state(&self) {
        if let Some(path) = self.state_path() {
            // It may never have come so far.
            let _ = fs::remove_file(path);
        }
    }

    fn state_path(&self) -> Option<PathBuf> {
        let mut name = self.0.as_ref()?.path().into_os_string();
        name.push(".device");
        Some(name.into())
    }

    /// A line of JSON, and the bytes of the sections after it.
    fn kept(&self, sections: &[StateSection]) -> Vec<u8> {
        let session = self.session().unwrap_or_default();
        let sections_of = sections.iter().map(|section| KeptSection {
            name: section.name.clone(),
            version: section.version,
            length: section.bytes.len(),
        });
        let kept = Kept { session, sections: sections_of.collect() };
        let mut bytes = serde_json::to_vec(&kept).expect("text and numbers are always JSON");
        bytes.push(b'\n');
        for section in sections {
            bytes.extend(&section.bytes);
        }
        bytes
    }

    fn unpack(&self, bytes: &[u8]) -> Option<Vec<StateSection>> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let kept: Kept = serde_json::from_slice(&bytes[..end]).ok()?;
        let mut rest = &bytes[end + 1..];
        let sections = kept.sections.into_iter().map(|KeptSection { name, version, length }| {
            let (bytes, after) = rest.split_at_checked(length)?;
            rest = after;
            Some(StateSection { name, version, bytes: bytes.to_vec() })
        });
        let sections = sections.collect::<Option<Vec<_>>>()?;
        (Some(kept.session) == self.session()).then_some(sections)
    }

    /// The session's id, if there is one on record.
    pub(super) fn session(&self) -> Option<String> {
        Some(self.0.as_ref()?.record()?.session.to_string())
    }

    pub(super) fn path(&self) -> String {
        self.0.as_ref().map_or_else(String::new, |file| file.path().display().to_string())
    }

    fn note(&self, key: &str, value: &str) -> Result<(), Failure> {
        let Some(file) = &self.0 else { return Ok(()) };
        file.note(key, value).map_err(|error| Failure::new(chain(&error)))
    }
}
