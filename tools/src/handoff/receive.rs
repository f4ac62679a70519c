//! The side that serves the guest from then on.

use super::{
    Giver, Header, HeaderRegion, MAX_FILES, MAX_REGIONS, MAX_SECTIONS, MAX_STATE_BYTES, Piece,
    VERSION, Word, framing,
};
use afterimage::{GuestAddress, StateSection};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the giver may be silent.
const PATIENCE: Duration = Duration::from_secs(10);
/// Regions begin and end on pages.
const PAGE: u64 = 4096;

/// A guest that is offered and not yet taken. Dropped, it stays the giver's.
#[derive(Debug)]
pub struct Offer {
    /// Its memory, checked: every region lies in its file.
    pub regions: Vec<OfferedRegion>,
    /// Its device state.
    pub sections: Vec<StateSection>,
    /// Who offers it.
    pub giver: Giver,
    /// What is not as safe as it could be, a line each.
    pub warnings: Vec<String>,
    pub(super) socket: UnixStream,
    /// Its memory, each file once.
    pub(super) files: Vec<File>,
    pub(super) placed: Vec<HeaderRegion>,
}

/// A region of an offered guest.
#[derive(Debug)]
pub struct OfferedRegion {
    /// Where it begins in guest physical memory.
    pub guest_address: GuestAddress,
    /// Its length in bytes.
    pub length: u64,
    /// Its file; a duplicate of its own.
    pub file: OwnedFd,
    /// Where in the file it begins.
    pub offset: u64,
}

/// A guest that was taken.
#[derive(Debug)]
pub struct Handover {
    /// Its device state.
    pub sections: Vec<StateSection>,
    /// Who gave it; its process may have ended.
    pub giver: Giver,
}

/// Why no guest was received. It is still the giver's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// What came is no hand-over.
    #[error("what connected is no VMM that hands a guest over")]
    Stranger,
    /// Another version of the protocol.
    #[error(
        "the giver speaks version {theirs} of the hand-over, this is {VERSION}: use matching releases"
    )]
    Version {
        /// The giver's.
        theirs: u32,
    },
    /// The offer cannot be right.
    #[error("{0}")]
    Wrong(String),
    /// The connection failed, or the giver was silent for too long.
    #[error("could not {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Receives an offer on a fresh connection. On an error the giver has been told why.
///
/// Blocks; a giver that is silent for 10 s is given up.
///
/// # Errors
/// [`ReceiveError`].
pub fn receive(socket: UnixStream) -> Result<Offer, ReceiveError> {
    let limits = socket
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| socket.set_write_timeout(Some(PATIENCE)));
    limits.map_err(io_error("limit the time of the hand-over"))?;
    match read(&socket) {
        Ok(read) => {
            let Read { regions, sections, giver, warnings, files, placed } = read;
            Ok(Offer { regions, sections, giver, warnings, socket, files, placed })
        }
        Err(error) => {
            refuse(&socket, &describe(&error));
            Err(error)
        }
    }
}

impl Offer {
    /// Its memory as it was offered, each file once.
    pub(crate) fn pieces(&self) -> Vec<Piece<'_>> {
        let pieces = self.placed.iter().map(|region| Piece {
            guest_address: GuestAddress(region.guest_address),
            length: region.length,
            // Checked when it was read.
            file: self.files[region.file].as_fd(),
            offset: region.offset,
        });
        pieces.collect()
    }

    /// The connection to the giver.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Turns the offer down, with a reason for the giver's operator.
    pub fn refuse(self, reason: &str) {
        refuse(&self.socket, reason);
    }

    /// Takes the guest. `session` is told to the giver.
    ///
    /// From the moment this returns a guest, this process alone has it. On an error it is
    /// still the giver's.
    ///
    /// # Errors
    /// [`ReceiveError`] if the giver has changed its mind.
    pub fn take(self, session: &str) -> Result<Handover, ReceiveError> {
        self.take_and_keep(session, |_| Ok(()))
    }

    /// The same, but calls `keep` when the guest is given and before that is acknowledged. It
    /// may put the socket where it outlives this process: whoever finds it there
    /// [says](say_taken) that the guest was taken, and has it. If `keep` fails, with a reason,
    /// the guest is still the giver's; it must have undone everything then.
    pub(crate) fn take_and_keep(
        self,
        session: &str,
        keep: impl FnOnce(&Self) -> Result<(), String>,
    ) -> Result<Handover, ReceiveError> {
        let wrap = io_error("tell the giver that its guest can be taken");
        framing::send(&self.socket, &Word::Ready).map_err(wrap)?;
        let wrap = io_error("hear that the guest is given");
        match framing::receive(&self.socket).map_err(wrap)? {
            Word::Given => {}
            other => {
                let reason = format!("the giver says {other:?} where it should give");
                refuse(&self.socket, &reason);
                return Err(ReceiveError::Wrong(reason));
            }
        }
        if let Err(reason) = keep(&self) {
            refuse(&self.socket, &reason);
            return Err(ReceiveError::Wrong(reason));
        }
        say_taken(&self.socket, session)?;
        Ok(Handover { sections: self.sections, giver: self.giver })
    }
}

/// Tells the giver that its guest was taken, perhaps once more.
pub(crate) fn say_taken(socket: &UnixStream, session: &str) -> Result<(), ReceiveError> {
    match framing::send(socket, &Word::Taken { session: session.to_owned() }) {
        Ok(()) => Ok(()),
        // It has given, and it is gone: it cannot run what it gave.
        Err(error) if is_gone(&error) => Ok(()),
        Err(source) => {
            let operation = "tell the giver that its guest was taken";
            Err(ReceiveError::Io { operation, source })
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn io_error(operation: &'static str) -> impl FnOnce(io::Error) -> ReceiveError {
    move |source| ReceiveError::Io { operation, source }
}

fn refuse(socket: &UnixStream, reason: &str) {
    // A giver that has gone need not be told.
    let _ = framing::send(socket, &Word::Refused { reason: reason.to_owned() });
}

fn describe(error: &ReceiveError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// An offer that was read, without its socket.
struct Read {
    regions: Vec<OfferedRegion>,
    sections: Vec<StateSection>,
    giver: Giver,
    warnings: Vec<String>,
    files: Vec<File>,
    placed: Vec<HeaderRegion>,
}

fn read(socket: &UnixStream) -> Result<Read, ReceiveError> {
    let start = framing::receive_bytes(socket, 12).map_err(io_error("hear a giver"))?;
    let (magic, version) = start.split_at(framing::MAGIC.len());
    if magic != framing::MAGIC {
        return Err(ReceiveError::Stranger);
    }
    let theirs = u32::from_le_bytes(version.try_into().expect("four bytes are left"));
    if theirs != VERSION {
        return Err(ReceiveError::Version { theirs });
    }
    let header: Header = framing::receive(socket).map_err(io_error("read the offer"))?;
    check(&header)?;
    let files = framing::receive_files(socket, header.files)
        .map_err(io_error("receive the guest's memory"))?;
    let files: Vec<File> = files.into_iter().map(File::from).collect();
    let (regions, warnings) = assemble(&header, &files)?;
    let mut sections = Vec::new();
    for section in header.sections {
        let bytes = framing::receive_bytes(socket, section.length)
            .map_err(io_error("receive the device state"))?;
        sections.push(StateSection { name: section.name, version: section.version, bytes });
    }
    let pid = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials)
        .map_or(0, |peer| peer.pid());
    let giver = Giver { pid, ..header.giver };
    Ok(Read { regions, sections, giver, warnings, files, placed: header.regions })
}

/// What can be checked before anything is allocated for it.
pub(crate) fn check(header: &Header) -> Result<(), ReceiveError> {
    let wrong = |why: String| Err(ReceiveError::Wrong(why));
    let bytes = header.sections.iter().try_fold(0_u64, |sum, it| sum.checked_add(it.length));
    for (what, have, most) in [
        ("files", header.files as u64, MAX_FILES as u64),
        ("regions", header.regions.len() as u64, MAX_REGIONS as u64),
        ("sections of device state", header.sections.len() as u64, MAX_SECTIONS as u64),
        ("bytes of device state", bytes.unwrap_or(u64::MAX), MAX_STATE_BYTES),
    ] {
        if have > most {
            return wrong(format!("{have} {what} are offered, at most {most} are taken"));
        }
    }
    if header.regions.is_empty() {
        return wrong("no memory is offered".to_owned());
    }
    if let Some(section) = header.sections.iter().find(|it| !(1..=255).contains(&it.name.len())) {
        let length = section.name.len();
        return wrong(format!("a section's name has {length} bytes: 1 to 255 are allowed"));
    }
    Ok(())
}

/// The regions that a header describes, in these files, and what is not as safe as it could be.
pub(crate) fn assemble(
    header: &Header,
    files: &[File],
) -> Result<(Vec<OfferedRegion>, Vec<String>), ReceiveError> {
    let mut warnings = Vec::new();
    for (index, file) in files.iter().enumerate() {
        warnings.extend(check_file(index, file)?);
    }
    let regions = header.regions.iter().map(|region| region_of(region, files));
    Ok((regions.collect::<Result<_, _>>()?, warnings))
}

/// Refuses what cannot be read as memory; warns of what could be cut short.
fn check_file(index: usize, file: &File) -> Result<Option<String>, ReceiveError> {
    let wrong = |why: &str| Err(ReceiveError::Wrong(format!("descriptor {index} {why}")));
    let metadata = file.metadata().map_err(io_error("look at the guest's memory"))?;
    if !metadata.is_file() {
        return wrong("is no file: give memfds, or files on tmpfs or hugetlbfs");
    }
    let mode = fcntl(file, FcntlArg::F_GETFL).map_err(io::Error::from);
    let mode = OFlag::from_bits_retain(mode.map_err(io_error("look at the guest's memory"))?);
    if mode & OFlag::O_ACCMODE == OFlag::O_WRONLY {
        return wrong("was opened for writing only: open it for reading too");
    }
    let is_sealed = fcntl(file, FcntlArg::F_GET_SEALS)
        .is_ok_and(|seals| SealFlag::from_bits_retain(seals).contains(SealFlag::F_SEAL_SHRINK));
    Ok((!is_sealed).then(|| {
        format!(
            "descriptor {index} can still be cut short by whoever has it, and its pages would be \
             lost: seal it with F_SEAL_SHRINK"
        )
    }))
}

fn region_of(region: &HeaderRegion, files: &[File]) -> Result<OfferedRegion, ReceiveError> {
    let (at, length, offset) = (region.guest_address, region.length, region.offset);
    let wrong = |why: String| {
        Err(ReceiveError::Wrong(format!("the region at guest address {at:#x} {why}")))
    };
    let Some(file) = files.get(region.file) else {
        return wrong(format!("lies in descriptor {}, {} came", region.file, files.len()));
    };
    if length == 0 || !(at | length | offset).is_multiple_of(PAGE) {
        return wrong(format!(
            "has length {length:#x} and offset {offset:#x}: all three must be multiples of {PAGE}"
        ));
    }
    let size = file.metadata().map_err(io_error("look at the guest's memory"))?.len();
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return wrong(format!(
            "needs {length} bytes from offset {offset}, its file has {size} bytes"
        ));
    }
    let file = file.try_clone().map_err(io_error("duplicate a descriptor (ulimit -n)"))?.into();
    Ok(OfferedRegion { guest_address: GuestAddress(at), length, file, offset })
}
