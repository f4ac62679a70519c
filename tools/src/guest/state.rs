//! All state of a stopped guest that is not in its RAM, and its form as bytes.
//!
//! The form: a magic, a version, the length of the body, the body, its SHA-256.
//! The body is a list of sections, each with a name, a version of its own and bytes.
//! Integers are little-endian. Invariant: bytes that were cut, altered or written by
//! another version give an error that says so, never a different guest.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::GuestSpec;

const MAGIC: [u8; 8] = *b"AFTSTATE";
const VERSION: u32 = 1;
const GUEST_SECTION: &str = "guest";
const GUEST_VERSION: u32 = 1;

/// What runs a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// Virtual CPUs of KVM: [`crate::microvm::KvmGuest`].
    Kvm,
    /// Threads of the process: [`super::ThreadsGuest`].
    Threads,
}

/// Why machine state could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The bytes do not begin like machine state.
    #[error("not machine state: the first bytes are not {:?}", MAGIC.escape_ascii().to_string())]
    Magic,
    /// Written by another version of this program.
    #[error("machine state of version {found}, this program reads version {VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// The bytes end too early.
    #[error("machine state is cut off: {needed} bytes are needed for {what}, {left} are left")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// How many bytes it needs.
        needed: u64,
        /// How many there are.
        left: u64,
    },
    /// The checksum does not match.
    #[error("machine state is damaged: its SHA-256 does not match")]
    Checksum,
    /// A section is not there.
    #[error("machine state has no section {name:?}")]
    Missing {
        /// The section.
        name: String,
    },
    /// A section was written by another version.
    #[error("section {name:?} of machine state has version {found}, this program reads {known}")]
    SectionVersion {
        /// The section.
        name: String,
        /// The version found.
        found: u32,
        /// The version known.
        known: u32,
    },
    /// A section does not hold what it should.
    #[error("section {name:?} of machine state cannot be used: {reason}")]
    Content {
        /// The section.
        name: String,
        /// Why.
        reason: String,
    },
    /// The state of another kind of guest.
    #[error("machine state of a guest of kind {found:?} cannot be restored as {expected:?}")]
    Kind {
        /// What it was to be restored as.
        expected: GuestKind,
        /// What it is.
        found: GuestKind,
    },
}

/// How far a vCPU had come when it was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuProgress {
    /// Operations completed.
    pub operations: u64,
    /// Whether it was stopped between an increment and the counting of it.
    pub in_flight: bool,
}

/// All state of a stopped guest that is not in its RAM.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineState {
    header: Header,
    sections: Sections,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Header {
    kind: GuestKind,
    spec: GuestSpec,
    progress: Vec<VcpuProgress>,
}

impl MachineState {
    pub(crate) fn new(
        kind: GuestKind,
        spec: GuestSpec,
        progress: Vec<VcpuProgress>,
        sections: Sections,
    ) -> Self {
        let header = Header { kind, spec, progress };
        Self { header, sections }
    }

    /// What ran the guest.
    #[must_use]
    pub fn kind(&self) -> GuestKind {
        self.header.kind
    }

    /// What the guest does.
    #[must_use]
    pub fn spec(&self) -> &GuestSpec {
        &self.header.spec
    }

    /// How far each vCPU had come.
    #[must_use]
    pub fn progress(&self) -> &[VcpuProgress] {
        &self.header.progress
    }

    /// Operations of all vCPUs at the stop, exactly.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.progress().iter().map(|vcpu| vcpu.operations).sum()
    }

    /// The state as bytes, to be sent or stored.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut all = Sections::default();
        all.put_json(GUEST_SECTION, GUEST_VERSION, &self.header);
        all.list.extend(self.sections.list.iter().cloned());
        let body = all.encode();
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(&body);
        bytes.extend(Sha256::digest(&body));
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// If the bytes are cut, damaged, or of another version.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader(bytes);
        if reader.take(8, "the magic")? != MAGIC {
            return Err(StateError::Magic);
        }
        let found = reader.u32("the version")?;
        if found != VERSION {
            return Err(StateError::Version { found });
        }
        let length = u64::from_le_bytes(reader.array("the length")?);
        let body = reader.take(length, "the body")?;
        if reader.take(32, "the checksum")? != Sha256::digest(body).as_slice() {
            return Err(StateError::Checksum);
        }
        let mut sections = Sections::decode(body)?;
        let header: Header = sections.json(GUEST_SECTION, GUEST_VERSION)?;
        if header.progress.len() != header.spec.vcpus() as usize {
            return Err(StateError::Content {
                name: GUEST_SECTION.into(),
                reason: "the numbers of vCPUs differ".into(),
            });
        }
        sections.list.retain(|section| section.name != GUEST_SECTION);
        Ok(Self { header, sections })
    }

    pub(crate) fn sections(&self) -> &Sections {
        &self.sections
    }

    pub(crate) fn expect_kind(&self, expected: GuestKind) -> Result<(), StateError> {
        let found = self.kind();
        if found == expected { Ok(()) } else { Err(StateError::Kind { expected, found }) }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Section {
    name: String,
    version: u32,
    bytes: Vec<u8>,
}

/// Named, versioned pieces of state.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Sections {
    list: Vec<Section>,
}

impl Sections {
    pub(crate) fn put(&mut self, name: &str, version: u32, bytes: Vec<u8>) {
        let name = name.to_owned();
        self.list.push(Section { name, version, bytes });
    }

    pub(crate) fn put_json<T: Serialize>(&mut self, name: &str, version: u32, value: &T) {
        // Only structs of numbers, strings and lists of them come here: they have no
        // map with odd keys and no serialiser of their own, so this cannot fail.
        let bytes = serde_json::to_vec(value).expect("plain data serialises");
        self.put(name, version, bytes);
    }

    /// The bytes of a section of exactly this version.
    pub(crate) fn get(&self, name: &str, known: u32) -> Result<&[u8], StateError> {
        let section = self.list.iter().find(|section| section.name == name);
        let section = section.ok_or_else(|| StateError::Missing { name: name.into() })?;
        if section.version != known {
            return Err(StateError::SectionVersion {
                name: name.into(),
                found: section.version,
                known,
            });
        }
        Ok(&section.bytes)
    }

    pub(crate) fn json<T: DeserializeOwned>(
        &self,
        name: &str,
        known: u32,
    ) -> Result<T, StateError> {
        serde_json::from_slice(self.get(name, known)?)
            .map_err(|error| StateError::Content { name: name.into(), reason: error.to_string() })
    }

    fn encode(&self) -> Vec<u8> {
        let mut body = (self.list.len() as u32).to_le_bytes().to_vec();
        for section in &self.list {
            body.extend((section.name.len() as u32).to_le_bytes());
            body.extend(section.name.as_bytes());
            body.extend(section.version.to_le_bytes());
            body.extend((section.bytes.len() as u32).to_le_bytes());
            body.extend(&section.bytes);
        }
        body
    }

    fn decode(body: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader(body);
        let count = reader.u32("the number of sections")?;
        let mut sections = Self::default();
        for _ in 0..count {
            let length = reader.u32("the length of a section's name")?;
            let name = reader.take(length.into(), "a section's name")?;
            let name = String::from_utf8_lossy(name).into_owned();
            let version = reader.u32("a section's version")?;
            let length = reader.u32("the length of a section")?;
            let bytes = reader.take(length.into(), "a section")?.to_vec();
            sections.list.push(Section { name, version, bytes });
        }
        Ok(sections)
    }
}

/// Reads from the front of bytes; a length is checked before anything is allocated.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, needed: u64, what: &'static str) -> Result<&'a [u8], StateError> {
        let left = self.0.len() as u64;
        if needed > left {
            return Err(StateError::Truncated { what, needed, left });
        }
        let (taken, rest) = self.0.split_at(needed as usize);
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], StateError> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes.try_into().expect("`take` returned N bytes"))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, StateError> {
        self.array(what).map(u32::from_le_bytes)
    }
}

#[cfg(test)]
impl MachineState {
    /// The state without one of its sections.
    pub(crate) fn without(mut self, name: &str) -> Self {
        self.sections.list.retain(|section| section.name != name);
        self
    }

    /// The state with all but a bit more than the first half of a section cut off.
    pub(crate) fn with_half_of(mut self, name: &str) -> Self {
        for section in &mut self.sections.list {
            if section.name == name {
                section.bytes.truncate(section.bytes.len() / 2 + 1);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Workload;
    use crate::ram::{Backing, GuestRam};

    fn state() -> MachineState {
        let ram = GuestRam::allocate(4 << 20, Backing::Anonymous).unwrap();
        let spec = GuestSpec::new(&ram, Workload::Mixed, 2).unwrap();
        let progress = |operations| VcpuProgress { operations, in_flight: operations == 5 };
        let mut sections = Sections::default();
        sections.put("vcpu0/thing", 3, vec![1, 2, 3]);
        MachineState::new(GuestKind::Threads, spec, vec![progress(5), progress(6)], sections)
    }

    #[test]
    fn state_survives_the_way_through_bytes() {
        let state = state();
        assert_eq!(MachineState::from_bytes(&state.to_bytes()).unwrap(), state);
    }

    #[test]
    fn state_cut_anywhere_is_refused() {
        let bytes = state().to_bytes();
        for length in 0..bytes.len() {
            let error = MachineState::from_bytes(&bytes[..length]).unwrap_err();
            assert!(matches!(error, StateError::Truncated { .. }), "{error}");
        }
    }

    #[test]
    fn a_changed_bit_is_noticed() {
        let bytes = state().to_bytes();
        for index in (20..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            let error = MachineState::from_bytes(&changed).unwrap_err();
            assert!(matches!(error, StateError::Checksum), "{error}");
        }
    }

    #[test]
    fn other_versions_are_named() {
        let mut bytes = state().to_bytes();
        bytes[8] = 9;
        let error = MachineState::from_bytes(&bytes).unwrap_err().to_string();
        assert_eq!(error, "machine state of version 9, this program reads version 1");
        let error = state().sections.get("vcpu0/thing", 4).unwrap_err();
        assert!(matches!(error, StateError::SectionVersion { found: 3, known: 4, .. }));
        let error = state().sections.get("vcpu1/thing", 4).unwrap_err();
        assert!(matches!(error, StateError::Missing { .. }));
    }
}
