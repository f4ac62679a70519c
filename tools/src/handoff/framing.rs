//! Messages on the hand-over socket: a length and JSON; descriptors; raw bytes in pieces.

use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::descriptors::{self, Received};

/// The first bytes of a hand-over; the version follows, in 4 bytes.
pub(crate) const MAGIC: [u8; 8] = *b"AIMGHAND";
/// The most bytes of one JSON message.
const MAX_MESSAGE: usize = 4 << 20;
/// Descriptors in one system call, below the kernel's limit of 253.
const BATCH: usize = 64;
/// The byte that carries descriptors: they cannot travel alone.
const CARRIER: u8 = b'D';
/// Device state is sent and taken in pieces of this size.
const PIECE: usize = 1 << 20;

/// Sends one message.
pub(crate) fn send(mut socket: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_MESSAGE {
        return Err(invalid(format!(
            "a message of {} bytes, {MAX_MESSAGE} are allowed",
            json.len()
        )));
    }
    let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
    bytes.extend(json);
    socket.write_all(&bytes)
}

/// Receives one message.
pub(crate) fn receive<T: DeserializeOwned>(mut socket: &UnixStream) -> io::Result<T> {
    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(invalid(format!("a message of {length} bytes, {MAX_MESSAGE} are allowed")));
    }
    let json = receive_bytes(socket, length as u64)?;
    serde_json::from_slice(&json).map_err(|error| invalid(format!("not understood: {error}")))
}

/// Receives so many bytes; memory is allocated as they arrive.
pub(crate) fn receive_bytes(mut socket: &UnixStream, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < length {
        let had = bytes.len();
        let piece = (length - had as u64).min(PIECE as u64) as usize;
        bytes.resize(had + piece, 0);
        socket.read_exact(&mut bytes[had..])?;
    }
    Ok(bytes)
}

/// Sends bytes as they are.
pub(crate) fn send_bytes(mut socket: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    bytes.chunks(PIECE).try_for_each(|piece| socket.write_all(piece))
}

/// Sends descriptors, in several messages if they are many.
pub(crate) fn send_files(socket: &UnixStream, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    for batch in files.chunks(BATCH) {
        let raw: Vec<RawFd> = batch.iter().map(AsRawFd::as_raw_fd).collect();
        let carrier = [IoSlice::new(&[CARRIER])];
        let rights = [ControlMessage::ScmRights(&raw)];
        let fd = socket.as_raw_fd();
        loop {
            match sendmsg::<()>(fd, &carrier, &rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

/// Receives exactly so many descriptors.
pub(crate) fn receive_files(socket: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut files = Vec::new();
    while files.len() < count {
        let got = receive_batch(socket)?;
        if got.is_empty() {
            let had = files.len();
            return Err(invalid(format!("{had} descriptors came, {count} were announced")));
        }
        files.extend(got);
    }
    if files.len() > count {
        let had = files.len();
        return Err(invalid(format!("{had} descriptors came, {count} were announced")));
    }
    Ok(files)
}

fn receive_batch(socket: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut carrier = [0];
    let Received { length, files, is_cut } = descriptors::receive(socket.as_fd(), &mut carrier)?;
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if is_cut || files.len() > BATCH {
        let why = format!("more than {BATCH} descriptors in one message, or none left (ulimit -n)");
        return Err(invalid(why));
    }
    if carrier[0] != CARRIER {
        return Err(invalid("descriptors were announced, and something else came".to_owned()));
    }
    Ok(files)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
