//! The VMM's side.

use super::{
    Giver, Header, HeaderRegion, HeaderSection, MAX_FILES, MAX_REGIONS, MAX_SECTIONS,
    MAX_STATE_BYTES, VERSION, Word, framing,
};
use afterimage::{GuestAddress, StateSection};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the receiver may take for each step before the guest is given.
const PATIENCE: Duration = Duration::from_secs(30);

/// A piece of guest memory to hand over.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'f> {
    /// Where it begins in guest physical memory.
    pub guest_address: GuestAddress,
    /// Its length in bytes, a multiple of 4096.
    pub length: u64,
    /// A memfd, or a file on tmpfs or hugetlbfs. Best sealed against shrinking.
    pub file: BorrowedFd<'f>,
    /// Where in the file it begins, a multiple of 4096.
    pub offset: u64,
}

/// The receiver has the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Taken {
    /// The id of the migration session that it will be served in.
    pub session: String,
}

/// Why a guest could not be handed over. Whatever the error: the guest is still the
/// giver's, and may be resumed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GiveError {
    /// Nobody listens there.
    #[error(
        "could not connect to {0}: start page-server --handoff unix:{0} first",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// More than the protocol allows.
    #[error("{what}: {have}, at most {most} can be handed over")]
    TooMuch {
        /// Of what.
        what: &'static str,
        /// How much there is.
        have: u64,
        /// How much is allowed.
        most: u64,
    },
    /// The receiver does not want it.
    #[error("the receiver refuses the guest: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
    /// The connection failed before the receiver had the guest.
    #[error("could not {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Hands a stopped guest over to whoever listens on the Unix socket `path`.
///
/// vCPUs and device DMA must be stopped before the call. On success the memory is the
/// receiver's: this process must neither write it nor resume the guest, and may exit at
/// once. On an error the guest is still this process's.
///
/// Blocks until the receiver has taken everything: it waits up to 30 s for each step, but
/// without a limit for the last word, because only that, or the receiver's end, tells whose
/// the guest is.
///
/// # Errors
/// [`GiveError`].
pub fn give(
    path: &Path,
    name: &str,
    pieces: &[Piece<'_>],
    state: &[StateSection],
) -> Result<Taken, GiveError> {
    let (header, files) = header_of(name, pieces, state)?;
    let socket = UnixStream::connect(path)
        .map_err(|source| GiveError::Connect { path: path.to_owned(), source })?;
    let limits = socket
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| socket.set_write_timeout(Some(PATIENCE)));
    limits.map_err(io_error("limit the time of the hand-over"))?;
    if let Err(source) = offer(&socket, &header, &files, state) {
        // The receiver may have said why it stopped listening.
        return Err(match framing::receive(&socket) {
            Ok(Word::Refused { reason }) => GiveError::Refused { reason },
            _ => GiveError::Io { operation: "send the guest to the receiver", source },
        });
    }
    match framing::receive(&socket).map_err(io_error("hear whether the receiver is ready"))? {
        Word::Ready => {}
        other => return Err(unexpected(other)),
    }
    socket.set_read_timeout(None).map_err(io_error("wait for the receiver without a limit"))?;
    framing::send(&socket, &Word::Given).map_err(io_error("give the guest away"))?;
    match framing::receive(&socket).map_err(io_error("hear that the guest was taken"))? {
        Word::Taken { session } => Ok(Taken { session }),
        other => Err(unexpected(other)),
    }
}

fn io_error(operation: &'static str) -> impl FnOnce(io::Error) -> GiveError {
    move |source| GiveError::Io { operation, source }
}

fn unexpected(word: Word) -> GiveError {
    let reason = match word {
        Word::Refused { reason } => reason,
        other => format!("it says {other:?} out of turn"),
    };
    GiveError::Refused { reason }
}

fn offer(
    socket: &UnixStream,
    header: &Header,
    files: &[BorrowedFd<'_>],
    state: &[StateSection],
) -> io::Result<()> {
    framing::send_bytes(socket, &framing::MAGIC)?;
    framing::send_bytes(socket, &VERSION.to_le_bytes())?;
    framing::send(socket, header)?;
    framing::send_files(socket, files)?;
    state.iter().try_for_each(|section| framing::send_bytes(socket, &section.bytes))
}

/// The header, and each descriptor once.
pub(crate) fn header_of<'f>(
    name: &str,
    pieces: &[Piece<'f>],
    state: &[StateSection],
) -> Result<(Header, Vec<BorrowedFd<'f>>), GiveError> {
    let mut files: Vec<BorrowedFd<'f>> = Vec::new();
    let regions = pieces.iter().map(|piece| {
        let raw = piece.file.as_raw_fd();
        let file = files.iter().position(|it| it.as_raw_fd() == raw).unwrap_or_else(|| {
            files.push(piece.file);
            files.len() - 1
        });
        let (length, offset) = (piece.length, piece.offset);
        HeaderRegion { guest_address: piece.guest_address.0, length, file, offset }
    });
    let regions: Vec<_> = regions.collect();
    let sections = state.iter().map(|section| HeaderSection {
        name: section.name.clone(),
        version: section.version,
        length: section.bytes.len() as u64,
    });
    let sections: Vec<_> = sections.collect();
    let bytes = sections.iter().map(|section| section.length).sum();
    for (what, have, most) in [
        ("files of guest memory", files.len() as u64, MAX_FILES as u64),
        ("regions of guest memory", regions.len() as u64, MAX_REGIONS as u64),
        ("sections of device state", sections.len() as u64, MAX_SECTIONS as u64),
        ("bytes of device state", bytes, MAX_STATE_BYTES),
    ] {
        if have > most {
            return Err(GiveError::TooMuch { what, have, most });
        }
    }
    let giver = Giver { name: name.to_owned(), pid: 0 };
    Ok((Header { giver, files: files.len(), regions, sections }, files))
}
