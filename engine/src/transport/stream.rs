//! One connected socket. It blocks; calls that shall not wait say so.

use super::attempt::CONNECT_TIME;
use crate::sys::mapping::RawRun;
use crate::sys::socket::{self, Piece, Wait};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Unsent bytes that a background socket may hold: what is in there cannot be overtaken.
const NOT_SENT_LOW_WATER: i32 = 128 << 10;
/// Socket buffers of a background connection.
const BACKGROUND_BUFFER: i32 = 4 << 20;

/// Unanswered probes after which an idle connection is dead.
const KEEP_ALIVE_PROBES: i32 = 3;
/// The longest time between probes that the kernel takes, in seconds.
const LONGEST_KEEP_ALIVE: f64 = 32_767.0;

/// A connected socket; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    fd: Arc<OwnedFd>,
    is_tcp: bool,
}

impl Stream {
    /// A connected socket. TCP gets `TCP_NODELAY`, and is watched as long as greetings are said.
    pub(crate) fn new(fd: OwnedFd, is_tcp: bool) -> io::Result<Self> {
        let stream = Self { fd: Arc::new(fd), is_tcp };
        if is_tcp {
            socket::set_option(stream.as_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
        }
        stream.watch(CONNECT_TIME)?;
        Ok(stream)
    }

    /// Lets the kernel end the connection if what is sent is not acknowledged, or not taken,
    /// for `silence`; if nothing is sent, if the peer's kernel is not heard for a few times
    /// that, in whole seconds. Only TCP can lose its peer without a word.
    pub(crate) fn watch(&self, silence: Duration) -> io::Result<()> {
        let millis = i32::try_from(silence.as_millis()).unwrap_or(i32::MAX);
        self.keep_alive(silence)?;
        self.set_tcp(libc::TCP_USER_TIMEOUT, millis)
    }

    fn keep_alive(&self, silence: Duration) -> io::Result<()> {
        if !self.is_tcp {
            return Ok(());
        }
        let seconds = silence.as_secs_f64().ceil().clamp(1.0, LONGEST_KEEP_ALIVE) as i32;
        socket::set_option(self.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        self.set_tcp(libc::TCP_KEEPIDLE, seconds)?;
        self.set_tcp(libc::TCP_KEEPINTVL, seconds)?;
        self.set_tcp(libc::TCP_KEEPCNT, KEEP_ALIVE_PROBES)
    }

    fn set_tcp(&self, name: i32, value: i32) -> io::Result<()> {
        if !self.is_tcp {
            return Ok(());
        }
        socket::set_option(self.as_fd(), libc::IPPROTO_TCP, name, value)
    }

    /// Large buffers, little of it unsent. `TCP_USER_TIMEOUT` would end a connection whose
    /// receiver has no room for so long, and a background stream may well be kept waiting: it
    /// is watched by its acknowledgements instead.
    pub(crate) fn prepare_background(&self, silence: Duration) -> io::Result<()> {
        let fd = self.as_fd();
        self.keep_alive(silence)?;
        self.set_tcp(libc::TCP_USER_TIMEOUT, 0)?;
        socket::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, BACKGROUND_BUFFER)?;
        if self.is_tcp {
            self.set_tcp(libc::TCP_NOTSENT_LOWAT, NOT_SENT_LOW_WATER)?;
        } else {
            // Everything a Unix socket holds is at the receiver already.
            socket::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, NOT_SENT_LOW_WATER * 2)?;
        }
        Ok(())
    }

    /// Ends the connection for every clone: calls that wait return.
    pub(crate) fn shut_down(&self) {
        use std::os::fd::AsRawFd;
        // Fails if the peer was first, which is as good.
        let _ = nix::sys::socket::shutdown(self.fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }

    /// Whether the connection is broken, or the peer sends no more. Does not wait.
    pub(crate) fn has_ended(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        // nix has no name for it, and then reports no flags where it is set.
        let no_more_comes = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut fds = [PollFd::new(self.as_fd(), no_more_comes)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// How many bytes the peer's kernel has taken so far; `None` where nobody knows, as for a
    /// Unix socket. Does not wait.
    pub(crate) fn bytes_taken(&self) -> Option<u64> {
        if self.is_tcp { socket::tcp_bytes_acked(self.as_fd()).ok() } else { None }
    }

    /// Receives some bytes; the end of the stream is an error.
    pub(crate) fn receive(&self, into: &mut [u8], wait: Wait) -> io::Result<usize> {
        not_the_end(socket::receive(self.as_fd(), into, wait)?)
    }

    /// Fills `into`, waiting as long as it takes.
    pub(crate) fn receive_exact(&self, into: &mut [u8]) -> io::Result<()> {
        let mut got = 0;
        while got < into.len() {
            got += self.receive(&mut into[got..], Wait::Block)?;
        }
        Ok(())
    }

    /// Fills a run of memory, waiting as long as it takes.
    ///
    /// # Safety
    /// The run must be mapped writable, and nobody else may use its bytes during the call.
    pub(crate) unsafe fn receive_run(&self, run: RawRun) -> io::Result<()> {
        let mut got = 0;
        while got < run.length {
            let rest = RawRun { start: run.start.wrapping_add(got), length: run.length - got };
            // SAFETY: the caller's promise.
            got += not_the_end(unsafe { socket::receive_raw(self.as_fd(), rest, Wait::Block) }?)?;
        }
        Ok(())
    }

    /// Receives and drops bytes.
    pub(crate) fn skip(&self, mut bytes: u64) -> io::Result<()> {
        let mut bin = [0; 16 << 10];
        while bytes > 0 {
            let most = bin.len().min(bytes as usize);
            bytes -= self.receive(&mut bin[..most], Wait::Block)? as u64;
        }
        Ok(())
    }

    /// Sends all bytes, waiting as long as it takes.
    pub(crate) fn send_all(&self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: `bytes` is borrowed through the call.
        unsafe { socket::send_all(self.as_fd(), &mut [Piece::bytes(bytes)]) }
    }

    /// Sends what goes without waiting.
    pub(crate) fn send_some(&self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: `bytes` is borrowed through the call.
        unsafe { socket::send(self.as_fd(), &[Piece::bytes(bytes)], Wait::Never) }
    }

    /// Sends all pieces in as few calls as the kernel allows. `pieces` is used up.
    ///
    /// # Safety
    /// Every piece must be readable during the call.
    pub(crate) unsafe fn send_pieces(&self, pieces: &mut [Piece]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { socket::send_all(self.as_fd(), pieces) }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn not_the_end(bytes: usize) -> io::Result<usize> {
    if bytes == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(bytes) }
}
