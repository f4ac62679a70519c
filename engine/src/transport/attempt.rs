//! One attempt to connect, which can be called off at any moment.
//!
//! Invariant: nothing here waits where [`Wanted::forget`] does not end the wait, but for the
//! look-up of a name, during which [`Wanted::is_resolving`] says so.

use super::{Address, ConnectError, Plaintext, Stream};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a connection may take to come about, for each address of a name. A host that
/// answers at all does so in a small part of it; one that is behind a black hole never does.
pub(super) const CONNECT_TIME: Duration = Duration::from_secs(1);

/// Grows with each wish of any dialer: what was wished for before is told apart for ever.
static WISHES: AtomicU64 = AtomicU64::new(1);

/// Which wish a dialer is to fulfil at present.
#[derive(Debug)]
pub(super) struct Wanted {
    present: AtomicU64,
    changed: EventFd,
    is_resolving: AtomicBool,
}

impl Wanted {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let wish = WISHES.fetch_add(1, Ordering::Relaxed);
        Ok(Self {
            present: AtomicU64::new(wish),
            changed: EventFd::from_value_and_flags(0, flags)?,
            is_resolving: AtomicBool::new(false),
        })
    }

    pub(super) fn present(&self) -> u64 {
        self.present.load(Ordering::SeqCst)
    }

    /// Whatever was wished for is not wanted any more, and its waits end.
    pub(super) fn forget(&self) {
        self.present.store(WISHES.fetch_add(1, Ordering::Relaxed), Ordering::SeqCst);
        // Cannot fail short of 2^64 wishes.
        let _ = self.changed.write(1);
    }

    /// Whether the thread looks up a name at this moment, which nothing can end. If this is
    /// false after [`forget`](Self::forget), it will not begin for an older wish.
    pub(super) fn is_resolving(&self) -> bool {
        self.is_resolving.load(Ordering::SeqCst)
    }
}

/// An attempt to fulfil one wish.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt<'w> {
    pub(super) wanted: &'w Wanted,
    pub(super) wish: u64,
}

impl Attempt<'_> {
    pub(super) fn is_wanted(self) -> bool {
        self.wanted.present() == self.wish
    }

    /// Waits for a socket, but not beyond `deadline`, and not when it is not wanted any more.
    pub(super) fn wait(
        self,
        fd: BorrowedFd<'_>,
        flags: PollFlags,
        deadline: Instant,
    ) -> io::Result<()> {
        let mut fds = [PollFd::new(fd, flags), PollFd::new(self.wanted.changed.as_fd(), READABLE)];
        loop {
            let left = self.left(deadline)?;
            match poll(&mut fds, left) {
                Ok(_) if self.was_told(&fds[1]) => {}
                Ok(1..) => return Ok(()),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for a while, unless it is not wanted any more before.
    pub(super) fn pause(self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut fds = [PollFd::new(self.wanted.changed.as_fd(), READABLE)];
        while let Ok(left) = self.left(deadline) {
            if poll(&mut fds, left).is_err() {
                return;
            }
            self.was_told(&fds[0]);
        }
    }

    /// How long is left until `deadline`: never nothing.
    fn left(self, deadline: Instant) -> io::Result<PollTimeout> {
        if !self.is_wanted() {
            return Err(io::Error::other("nobody wants this connection any more"));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX))
    }

    /// Whether a wish has changed: looked at before it is taken note of, so that none is lost.
    fn was_told(self, changed: &PollFd<'_>) -> bool {
        let was_told = changed.any() == Some(true);
        if was_told {
            // Only this thread reads it.
            let _ = self.wanted.changed.read();
        }
        was_told
    }

    /// Makes a connection.
    pub(super) fn dial(
        self,
        address: &Address,
        plaintext: Plaintext,
    ) -> Result<Stream, ConnectError> {
        let wrap = |source| ConnectError::Io { address: address.clone(), source };
        match address {
            Address::Unix(path) => {
                let socket = self.connect_unix(path).map_err(wrap)?;
                Stream::new(socket, false).map_err(wrap)
            }
            Address::Descriptor(_) => Err(ConnectError::Descriptor { address: address.clone() }),
            Address::Tcp(host) => {
                let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for resolved in self.resolve(host).map_err(wrap)? {
                    if plaintext == Plaintext::LoopbackOnly && !resolved.ip().is_loopback() {
                        return Err(ConnectError::Plaintext { address: address.clone() });
                    }
                    match self.connect_tcp(resolved) {
                        Ok(socket) => return Stream::new(socket, true).map_err(wrap),
                        Err(error) => last = error,
                    }
                }
                Err(wrap(last))
            }
        }
    }

    fn resolve(self, host: &str) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        self.wanted.is_resolving.store(true, Ordering::SeqCst);
        let resolved = if self.is_wanted() {
            host.to_socket_addrs().map(Iterator::collect)
        } else {
            Err(io::Error::other("nobody wants this connection any more"))
        };
        self.wanted.is_resolving.store(false, Ordering::SeqCst);
        resolved
    }

    fn connect_unix(self, path: &Path) -> io::Result<OwnedFd> {
        self.connect(AddressFamily::Unix, &UnixAddr::new(path)?)
    }

    fn connect_tcp(self, address: SocketAddr) -> io::Result<OwnedFd> {
        let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        self.connect(family, &socket::SockaddrStorage::from(address))
    }

    fn connect(self, family: AddressFamily, to: &dyn SockaddrLike) -> io::Result<OwnedFd> {
        use nix::errno::Errno;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket::socket(family, SockType::Stream, flags, None)?;
        match socket::connect(fd.as_raw_fd(), to) {
            Ok(()) => {}
            // A Unix socket: as many wait as its listener lets wait. It would block for ever.
            Err(Errno::EAGAIN) => {
                return Err(io::Error::other("the listener does not accept what waits there"));
            }
            Err(Errno::EINPROGRESS | Errno::EINTR) => {
                let deadline = Instant::now() + CONNECT_TIME;
                self.wait(fd.as_fd(), PollFlags::POLLOUT, deadline)?;
                let failed = socket::getsockopt(&fd, socket::sockopt::SocketError)?;
                if failed != 0 {
                    return Err(io::Error::from_raw_os_error(failed));
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        crate::sys::set_blocking(&fd)?;
        Ok(fd)
    }
}

const READABLE: PollFlags = PollFlags::POLLIN;

/// Whether somebody listens at a Unix socket's path. Does not wait: a listener whose queue is
/// full is one too.
pub(super) fn is_listened_at(path: &Path) -> io::Result<bool> {
    use nix::errno::Errno;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    Ok(socket::connect(fd.as_raw_fd(), &UnixAddr::new(path)?) != Err(Errno::ECONNREFUSED))
}
