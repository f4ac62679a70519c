//! A guest as a set of descriptors: its memory, and a sealed memfd that says where which piece
//! of it lies, in which session it is, and what its device state is.
//!
//! | name | what |
//! | --- | --- |
//! | `guest` | a sealed memfd: a line of JSON, and the bytes of the device state |
//! | `memory.0`, `memory.1`, … | the files of its memory |
//! | any other | what whoever holds it has put beside |

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use afterimage::{SessionId, StateSection};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::client::{Keeper, KeeperError, NamedFile, borrowed};
use crate::handoff::{
    GiveError, Giver, Header, MAX_STATE_BYTES, OfferedRegion, Piece, assemble, check_header,
    header_of,
};

/// The descriptor that describes the others.
const GUEST: &str = "guest";
/// What the names of memory begin with; a number follows.
const MEMORY: &str = "memory.";
/// The version of the description.
const VERSION: u32 = 1;
/// The longest description, without the device state.
const MAX_LINE: u64 = 4 << 20;

/// The first line of the descriptor `guest`.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: u32,
    session: String,
    #[serde(flatten)]
    header: Header,
}

/// A stopped guest that a keeper holds.
#[derive(Debug)]
#[non_exhaustive]
pub struct KeptGuest {
    /// The session in which it is served.
    pub session: SessionId,
    /// Who stopped it.
    pub giver: Giver,
    /// Its memory, checked: every region lies in its file.
    pub regions: Vec<OfferedRegion>,
    /// Its device state.
    pub sections: Vec<StateSection>,
}

/// Why a guest could not be stored or fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeptGuestError {
    /// The keeper.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// More than can be handed over.
    #[error(transparent)]
    TooMuch(#[from] GiveError),
    /// What is held is no guest, or one of another release.
    #[error("what the keeper holds as {guest} is no guest ({what}): remove it there")]
    NoGuest {
        /// Its name there.
        guest: String,
        /// How that shows.
        what: String,
    },
    /// The system refuses something.
    #[error("could not {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl KeptGuest {
    /// Stores a stopped guest under `name`, whole or not at all, and claims it: where its
    /// memory lies, its device state, and the session in which it is or will be served.
    /// `giver` says who stopped it.
    ///
    /// A VMM that links the engine calls this when its vCPUs are stopped and before
    /// [`Source::switch_over`](afterimage::Source::switch_over); if it dies then, a page-server
    /// with the same state file takes the guest over. A VMM that takes its guest back must
    /// [remove](Keeper::remove) it before the guest runs: what is held would be of the past.
    ///
    /// # Errors
    /// [`KeptGuestError`].
    pub fn store(
        keeper: &mut Keeper,
        name: &str,
        session: SessionId,
        giver: &str,
        pieces: &[Piece<'_>],
        sections: &[StateSection],
    ) -> Result<(), KeptGuestError> {
        let set = Self::pack(session, giver, pieces, sections)?;
        Ok(keeper.store(name, &borrowed(&set))?)
    }

    /// Claims a guest and fetches it.
    ///
    /// # Errors
    /// [`KeptGuestError`].
    pub fn fetch(keeper: &mut Keeper, name: &str) -> Result<Self, KeptGuestError> {
        keeper.claim(name)?;
        let set = keeper.fetch(name)?;
        Self::unpack(&set).map_err(|what| KeptGuestError::NoGuest { guest: name.to_owned(), what })
    }

    /// The set that a guest is.
    ///
    /// # Errors
    /// [`KeptGuestError`] if it is more than can be handed over, or the system refuses.
    pub(crate) fn pack(
        session: SessionId,
        giver: &str,
        pieces: &[Piece<'_>],
        sections: &[StateSection],
    ) -> Result<Vec<NamedFile>, KeptGuestError> {
        let (header, files) = header_of(giver, pieces, sections)?;
        let session = session.to_string();
        let description = Description { version: VERSION, session, header };
        let wrap = |source| KeptGuestError::Io { operation: "write the guest's state", source };
        let described = describe(&description, sections).map_err(wrap)?;
        let mut set = vec![NamedFile { name: GUEST.to_owned(), file: described.into() }];
        for (index, file) in files.into_iter().enumerate() {
            let file = file.try_clone_to_owned().map_err(|source| {
                let operation = "duplicate a descriptor (ulimit -n)";
                KeptGuestError::Io { operation, source }
            })?;
            set.push(NamedFile { name: format!("{MEMORY}{index}"), file });
        }
        Ok(set)
    }

    /// Puts a guest together; what is wrong with the set otherwise.
    pub(crate) fn unpack(set: &[NamedFile]) -> Result<Self, String> {
        let described = set.iter().find(|it| it.name == GUEST).ok_or("it has no description")?;
        let (Description { version, session, header }, at) = read_line(&described.file)?;
        if version != VERSION {
            let known = format!("this release knows {VERSION}");
            return Err(format!("its description has version {version}, {known}"));
        }
        check_header(&header).map_err(|error| super::line(&error))?;
        let files = (0..header.files).map(|index| {
            let name = format!("{MEMORY}{index}");
            let found = set.iter().find(|it| it.name == name);
            let file = &found.ok_or_else(|| format!("{name} is not there"))?.file;
            file.try_clone().map(File::from).map_err(|error| error.to_string())
        });
        let files = files.collect::<Result<Vec<_>, String>>()?;
        let (regions, _) = assemble(&header, &files).map_err(|error| super::line(&error))?;
        let sections = read_sections(&described.file, &header, at)?;
        let session = u128::from_str_radix(&session, 16).map_err(|_| "its session has no name")?;
        let session = SessionId(session.to_be_bytes());
        Ok(Self { session, giver: header.giver, regions, sections })
    }
}
fn describe(description: &Description, sections: &[StateSection]) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"afterimage-guest", flags)?);
    let mut line = serde_json::to_vec(description)?;
    line.push(b'\n');
    if line.len() as u64 > MAX_LINE {
        return Err(io::Error::other(format!("a description of {} bytes", line.len())));
    }
    file.write_all(&line)?;
    sections.iter().try_for_each(|section| file.write_all(&section.bytes))?;
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn read_line(file: &OwnedFd) -> Result<(Description, u64), String> {
    let file = file_of(file)?;
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let mut bytes = vec![0; size.min(MAX_LINE) as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|error| error.to_string())?;
    let end = bytes.iter().position(|it| *it == b'\n').ok_or("its description has no end")?;
    let line = serde_json::from_slice(&bytes[..end]).map_err(|error| error.to_string())?;
    Ok((line, end as u64 + 1))
}

fn read_sections(
    file: &OwnedFd,
    header: &Header,
    mut at: u64,
) -> Result<Vec<StateSection>, String> {
    let file = file_of(file)?;
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let expected: u64 = header.sections.iter().map(|section| section.length).sum();
    if expected > MAX_STATE_BYTES || at + expected != size {
        let there = size.saturating_sub(at);
        return Err(format!("{there} bytes of device state are there, not {expected}"));
    }
    let sections = header.sections.iter().map(|section| {
        let mut bytes = vec![0; section.length as usize];
        file.read_exact_at(&mut bytes, at).map_err(|error| error.to_string())?;
        at += section.length;
        Ok(StateSection { name: section.name.clone(), version: section.version, bytes })
    });
    sections.collect()
}

/// A file that nobody can change under the reader.
fn file_of(fd: &OwnedFd) -> Result<File, String> {
    let sealed = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE;
    let seals = fcntl(fd, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    if !seals.is_ok_and(|seals| seals.contains(sealed)) {
        return Err("its description is not sealed".to_owned());
    }
    Ok(fd.try_clone().map_err(|error| error.to_string())?.into())
}
