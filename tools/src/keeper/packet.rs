//! Packets of JSON with descriptors, over Unix sockets that keep packets apart: what comes,
//! comes whole.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use serde::Serialize;

use crate::descriptors::{self, Received};

/// The most bytes of JSON in a packet.
pub(super) const MAX_BYTES: usize = 64 << 10;
/// The most descriptors in a packet, below the kernel's limit of 253.
pub(super) const MAX_FILES: usize = 64;

/// Connects. No call on the connection waits for longer than `limit`, nor does this one where
/// the other side takes nobody in.
pub(super) fn connect(path: &Path, limit: Duration) -> io::Result<OwnedFd> {
    let fd = open(SockFlag::SOCK_CLOEXEC)?;
    let limit = TimeVal::nanoseconds(limit.as_nanos() as i64);
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    nix::sys::socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(fd)
}

/// Listens, without ever waiting.
pub(super) fn listen(path: &Path) -> io::Result<OwnedFd> {
    let fd = open(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    nix::sys::socket::listen(&fd, Backlog::new(64)?)?;
    Ok(fd)
}

fn open(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

/// The next connection, which never waits.
pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let raw = nix::sys::socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: a fresh descriptor that this call has just made, owned by nobody yet.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Sends one packet, whole or not at all.
pub(super) fn send(
    socket: &impl AsFd,
    message: &impl Serialize,
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    if json.len() > MAX_BYTES || files.len() > MAX_FILES {
        let (bytes, files) = (json.len(), files.len());
        return Err(invalid(format!("a packet of {bytes} bytes and {files} descriptors")));
    }
    let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let rights = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let fd = socket.as_fd().as_raw_fd();
    loop {
        match sendmsg::<()>(fd, &[IoSlice::new(&json)], rights, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// What came in one packet.
#[derive(Debug)]
pub(super) struct Packet {
    /// JSON, if the peer keeps to what was agreed.
    pub(super) bytes: Vec<u8>,
    pub(super) files: Vec<OwnedFd>,
}

/// Receives one packet; `None` at the end of the connection.
///
/// # Errors
/// Also if a packet did not come whole, because it was too large or because this process has
/// no descriptors left.
pub(super) fn receive(socket: &impl AsFd) -> io::Result<Option<Packet>> {
    // A byte more, so that one that is too long shows.
    let mut bytes = vec![0; MAX_BYTES + 1];
    let Received { length, files, is_cut } = descriptors::receive(socket.as_fd(), &mut bytes)?;
    if is_cut || length > MAX_BYTES || files.len() > MAX_FILES {
        return Err(invalid(format!(
            "a packet of more than {MAX_BYTES} bytes or {MAX_FILES} descriptors, or there are no \
             descriptors left here (ulimit -n)"
        )));
    }
    // Nobody sends empty packets here, so that this is the end.
    if length == 0 && files.is_empty() {
        return Ok(None);
    }
    bytes.truncate(length);
    Ok(Some(Packet { bytes, files }))
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_that_takes_nobody_in_is_not_waited_for_without_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keeper");
        let _listener = listen(&path).unwrap();
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // More than may wait to be taken in.
            let connected = (0..100).map(|_| connect(&path, Duration::from_millis(20)));
            sender.send(connected.collect::<io::Result<Vec<_>>>().map(drop))
        });
        let ended = ended.recv_timeout(Duration::from_mins(1)).expect("it waits without end");
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
