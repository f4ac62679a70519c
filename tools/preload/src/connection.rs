//! A Unix socket with messages, which are a length and JSON, and descriptors.

use crate::table::Placed;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::OsStr;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the other side may take to hear or to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most bytes of a message.
const MAX_MESSAGE: usize = 4 << 20;
/// Descriptors in one message.
const BATCH: usize = 64;
/// The byte that carries descriptors.
const CARRIER: &[u8] = b"D";

/// One side of it.
pub(crate) struct Connection(UnixStream);

impl Connection {
    pub(crate) fn open(path: &[u8]) -> io::Result<Self> {
        Self::over(UnixStream::connect(OsStr::from_bytes(path))?)
    }

    pub(crate) fn over(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    pub(crate) const fn socket(&self) -> &UnixStream {
        &self.0
    }

    /// The first message. `prefix` says which protocol it is of, and which version of that.
    pub(crate) fn greet(&mut self, prefix: &[u8], message: &impl Serialize) -> io::Result<()> {
        self.0.write_all(prefix)?;
        self.send(message)
    }

    pub(crate) fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let json = serde_json::to_vec(message)?;
        let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
        bytes.extend(json);
        self.0.write_all(&bytes)
    }

    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(io::Error::other(format!("a message of {length} bytes")));
        }
        let mut json = vec![0; length];
        self.0.read_exact(&mut json)?;
        Ok(serde_json::from_slice(&json)?)
    }

    pub(crate) fn send_descriptors(&self, descriptors: &[OwnedFd]) -> io::Result<()> {
        for batch in descriptors.chunks(BATCH) {
            let raw: Vec<RawFd> = batch.iter().map(AsRawFd::as_raw_fd).collect();
            let (carrier, rights) = ([IoSlice::new(CARRIER)], [ControlMessage::ScmRights(&raw)]);
            let socket = self.0.as_raw_fd();
            while let Err(errno) =
                sendmsg::<()>(socket, &carrier, &rights, MsgFlags::MSG_NOSIGNAL, None)
            {
                if errno != Errno::EINTR {
                    return Err(errno.into());
                }
            }
        }
        Ok(())
    }
}

/// A region of guest memory in a message.
#[derive(Debug, Serialize)]
pub(crate) struct RegionOfVmm {
    guest_address: u64,
    address: u64,
    length: u64,
    page_size: u64,
    /// Which of the files, and where in it.
    file: (usize, u64),
}

impl From<&Placed> for RegionOfVmm {
    fn from(placed: &Placed) -> Self {
        let Placed { guest_address, address, length, page: page_size, file, offset } = *placed;
        Self { guest_address, address, length, page_size, file: (file, offset) }
    }
}
