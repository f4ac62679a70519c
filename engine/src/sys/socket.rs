//! Socket calls on raw memory: pages leave from where they lie and arrive where they belong.

use super::mapping::RawRun;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Whether a call may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Until something can be done.
    Block,
    /// Not at all: [`io::ErrorKind::WouldBlock`] instead.
    Never,
}

impl Wait {
    const fn flag(self) -> i32 {
        match self {
            Self::Block => 0,
            Self::Never => libc::MSG_DONTWAIT,
        }
    }
}

/// Receives up to the length of `into`. 0 is the end of the stream.
pub(crate) fn receive(fd: BorrowedFd<'_>, into: &mut [u8], wait: Wait) -> io::Result<usize> {
    let run = RawRun { start: into.as_mut_ptr(), length: into.len() };
    // SAFETY: `into` is writable for its whole length and exclusively borrowed.
    unsafe { receive_raw(fd, run, wait) }
}

/// The same into raw memory.
///
/// # Safety
/// The run must be mapped writable, and nobody else may use its bytes during the call.
pub(crate) unsafe fn receive_raw(
    fd: BorrowedFd<'_>,
    into: RawRun,
    wait: Wait,
) -> io::Result<usize> {
    loop {
        // SAFETY: the caller's promise.
        let got =
            unsafe { libc::recv(fd.as_raw_fd(), into.start.cast(), into.length, wait.flag()) };
        if got >= 0 {
            return Ok(got as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Bytes to send: anywhere in readable memory.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Piece(libc::iovec);

impl Piece {
    /// Bytes that the caller keeps in place until they are sent.
    pub(crate) fn bytes(bytes: &[u8]) -> Self {
        Self(libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() })
    }

    /// Guest memory.
    pub(crate) fn memory(run: RawRun) -> Self {
        Self(libc::iovec { iov_base: run.start.cast(), iov_len: run.length })
    }

    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    fn advance(&mut self, bytes: usize) {
        self.0.iov_base = self.0.iov_base.wrapping_byte_add(bytes);
        self.0.iov_len -= bytes;
    }
}

/// Sends pieces, or as much of them as goes; returns how many bytes.
///
/// # Safety
/// Every piece must be readable during the call. Guest memory may change meanwhile; what is
/// sent then is what the kernel saw.
pub(crate) unsafe fn send(fd: BorrowedFd<'_>, pieces: &[Piece], wait: Wait) -> io::Result<usize> {
    loop {
        // SAFETY: all zeros is a valid `msghdr`.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_ptr().cast_mut().cast();
        message.msg_iovlen = pieces.len();
        let flags = libc::MSG_NOSIGNAL | wait.flag();
        // SAFETY: `Piece` is a transparent iovec; the caller promises that each is readable.
        let sent = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) };
        if sent >= 0 {
            return Ok(sent as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Sends all of the pieces, waiting as long as it takes. `pieces` is used up.
///
/// # Safety
/// As for [`send`].
pub(crate) unsafe fn send_all(fd: BorrowedFd<'_>, pieces: &mut [Piece]) -> io::Result<()> {
    let mut rest = pieces;
    while !rest.is_empty() {
        let most = rest.len().min(libc::UIO_MAXIOV as usize);
        // SAFETY: the caller's promise.
        let mut sent = unsafe { send(fd, &rest[..most], Wait::Block) }?;
        while let Some(first) = rest.first_mut() {
            if sent < first.len() {
                first.advance(sent);
                break;
            }
            sent -= first.len();
            rest = &mut rest[1..];
        }
    }
    Ok(())
}

/// The first fields of the kernel's `tcp_info`, which only ever grows at its end.
#[repr(C)]
struct TcpInfo {
    /// Eight bytes of states, 24 numbers of 32 bits, two rates.
    before: [u64; 15],
    /// `tcpi_bytes_acked`, since Linux 4.1.
    bytes_acked: u64,
}

/// How many bytes the peer's kernel has acknowledged on a TCP connection.
pub(crate) fn tcp_bytes_acked(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut info = TcpInfo { before: [0; 15], bytes_acked: 0 };
    let mut length = size_of::<TcpInfo>() as u32;
    // SAFETY: writes at most `length` bytes to `info`, which may hold any.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if (length as usize) < size_of::<TcpInfo>() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(info.bytes_acked)
}

/// Sets an integer option.
pub(crate) fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the value is an int that lives through the call, with its length.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as u32,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
