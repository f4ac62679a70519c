//! Plain sockets for the floors: TCP or Unix, by the addresses that the engine uses.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use crate::error::{BenchError, Doing};
use crate::unit::{POLLING, Wait};

/// Unsent bytes that a background stream may have in the kernel: enough for the line, and
/// little for others to wait behind.
static NOT_SENT: i32 = 128 << 10;

/// Where a floor's source listens.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A path.
    Unix(UnixListener, String),
}

impl Listener {
    /// Listens at `tcp:HOST:PORT` or `unix:PATH`.
    ///
    /// # Errors
    /// If the address is not understood or not to be had.
    pub fn bind(address: &str) -> Result<Self, BenchError> {
        let doing = || format!("cannot listen at {address}");
        if let Some(address) = address.strip_prefix("tcp:") {
            return TcpListener::bind(address).map(Self::Tcp).doing(&doing());
        }
        let path = unix_path(address)?;
        // Left by the unit before this one.
        let _ = std::fs::remove_file(path);
        UnixListener::bind(path).map(|it| Self::Unix(it, path.to_owned())).doing(&doing())
    }

    /// The address to connect to.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn address(&self) -> Result<String, BenchError> {
        Ok(match self {
            Self::Tcp(listener) => {
                format!("tcp:{}", listener.local_addr().doing("the address of a socket")?)
            }
            Self::Unix(_, path) => format!("unix:{path}"),
        })
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// If it fails.
    pub fn accept(&self) -> Result<Socket, BenchError> {
        let socket = match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Socket::Tcp(stream)),
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
        };
        socket.doing("cannot accept a connection")?.at_once()
    }
}

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    /// If nobody listens there.
    pub fn connect(address: &str) -> Result<Self, BenchError> {
        let socket = match address.strip_prefix("tcp:") {
            Some(address) => TcpStream::connect(address).map(Self::Tcp),
            None => UnixStream::connect(unix_path(address)?).map(Self::Unix),
        };
        socket.doing(&format!("cannot connect to {address}"))?.at_once()
    }

    fn at_once(self) -> Result<Self, BenchError> {
        if let Self::Tcp(stream) = &self {
            stream.set_nodelay(true).doing("TCP_NODELAY")?;
        }
        Ok(self)
    }

    /// Keeps little unsent in the kernel.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn keep_short(&self) -> Result<(), BenchError> {
        let Self::Tcp(stream) = self else { return Ok(()) };
        let fd = stream.as_raw_fd();
        let length = size_of::<i32>() as libc::socklen_t;
        // SAFETY: the value is an int, as the option wants it.
        let result = unsafe {
            libc::setsockopt(
                fd,
                libc::IPPROTO_TCP,
                libc::TCP_NOTSENT_LOWAT,
                (&raw const NOT_SENT).cast(),
                length,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error()).doing("TCP_NOTSENT_LOWAT")
        }
    }

    /// Fills `into`; `false` at the end of the stream.
    ///
    /// # Errors
    /// If it breaks, or ends in between.
    pub fn receive(&self, into: &mut [u8], wait: Wait) -> io::Result<bool> {
        let started = Instant::now();
        let mut filled = 0;
        while filled < into.len() {
            let polls = wait == Wait::Polling && started.elapsed() < POLLING;
            let flags = if polls { libc::MSG_DONTWAIT } else { 0 };
            let rest = &mut into[filled..];
            // SAFETY: `rest` is writable for its length.
            let got = unsafe {
                libc::recv(self.as_fd().as_raw_fd(), rest.as_mut_ptr().cast(), rest.len(), flags)
            };
            match got {
                0 if filled == 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                1.. => filled += got as usize,
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(true)
    }

    /// Sends all of it.
    ///
    /// # Errors
    /// If it breaks.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&*stream).write_all(bytes),
            Self::Unix(stream) => (&*stream).write_all(bytes),
        }
    }

    /// Ends both directions.
    pub fn shut_down(&self) {
        self.end(Shutdown::Both);
    }

    /// Ends one direction, or both.
    pub fn end(&self, direction: Shutdown) {
        // If it has ended already, that is as good.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(direction),
            Self::Unix(stream) => stream.shutdown(direction),
        };
    }

    /// Another handle of the same socket.
    ///
    /// # Errors
    /// If there are no descriptors left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn unix_path(address: &str) -> Result<&str, BenchError> {
    address.strip_prefix("unix:").ok_or_else(|| {
        BenchError::Failed(format!("{address:?} is neither tcp:HOST:PORT nor unix:PATH"))
    })
}
