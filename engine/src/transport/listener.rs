//! Listening: a thread that accepts, hears hellos and hands greeted connections on.

use super::attempt::is_listened_at;
use super::greet::{GREETING_TIME, refuse};
use super::{Address, Plaintext, Stream};
use crate::sys::socket::Wait;
use crate::threads::{self, ThreadRole};
use afterimage_protocol::wire::{GREETING_PREFIX, Greeting, Hello, Refusal, RefuseCode, WireError};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use std::collections::BTreeMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// How many connections may be waiting for their hello. More are closed at once: a crowd of
/// strangers must not cost memory, and a real peer tries again.
const MAX_UNGREETED: usize = 64;
const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);

/// A listening socket, before a session uses it.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    address: Address,
    is_tcp: bool,
    /// Of a Unix socket that was made here.
    file: Option<SocketFile>,
}

/// The file of a Unix socket, by which it is known that it is still the same one.
#[derive(Debug, PartialEq, Eq)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        let found = std::fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), device: found.dev(), inode: found.ino() })
    }
}

impl Listener {
    /// Listens. Port 0 takes a free port; [`address`](Self::address) says which. A Unix
    /// socket left behind by a process that died is replaced.
    ///
    /// # Errors
    /// What the system says, or that a TCP address beyond this machine was not allowed.
    pub fn bind(address: &Address, plaintext: Plaintext) -> io::Result<Self> {
        match address {
            Address::Tcp(host) => {
                let socket = TcpListener::bind(host)?;
                let local = socket.local_addr()?;
                if plaintext == Plaintext::LoopbackOnly && !local.ip().is_loopback() {
                    return Err(io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        format!(
                            "tcp:{local} can be reached from beyond this machine, and guest memory \
                             would travel unencrypted: allow it with --insecure-plaintext \
                             (Plaintext::Anywhere) where the network can be trusted"
                        ),
                    ));
                }
                let address = Address::Tcp(local.to_string());
                Ok(Self { fd: socket.into(), address, is_tcp: true, file: None })
            }
            Address::Unix(path) => {
                let socket = bind_unix(path)?;
                let file = Some(SocketFile::at(path)?);
                Ok(Self { fd: socket.into(), address: address.clone(), is_tcp: false, file })
            }
            Address::Descriptor(number) => {
                // SAFETY: the descriptor is only duplicated; if the number is no open
                // descriptor, that fails.
                let inherited = unsafe { BorrowedFd::borrow_raw(*number) };
                let fd = inherited.try_clone_to_owned()?;
                let is_tcp = is_tcp_listener(&fd)?;
                Ok(Self { fd, address: address.clone(), is_tcp, file: None })
            }
        }
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have removed it, and listen there himself.
        if let Some(file) = &self.file
            && SocketFile::at(&file.path).is_ok_and(|present| present == *file)
        {
            let _ = std::fs::remove_file(&file.path);
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_listened_at(path)? {
                return Err(error);
            }
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

fn is_tcp_listener(fd: &OwnedFd) -> io::Result<bool> {
    use nix::sys::socket::{getsockopt, sockopt};
    if !getsockopt(fd, sockopt::AcceptConn)? {
        return Err(io::Error::other("the descriptor is no listening socket"));
    }
    let domain =
        nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(fd.as_raw_fd())?;
    Ok(domain.as_unix_addr().is_none())
}

/// A connection that has said what it is for. It is waited for an answer.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) stream: Stream,
    pub(crate) hello: Hello,
}

/// The thread behind a [`Listener`]. Dropped, it stops listening and joins the thread.
#[derive(Debug)]
pub(crate) struct Acceptor {
    stop: Arc<AtomicBool>,
    waker: Arc<Waker>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// Hands every greeted connection to `accept`, on the acceptor's thread; it should not
    /// wait.
    pub(crate) fn start(
        listener: Listener,
        hook: &threads::ThreadHook,
        accept: impl FnMut(Accepted) + Send + 'static,
    ) -> io::Result<Self> {
        crate::sys::set_nonblocking(&listener.fd)?;
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        poll.registry().register(
            &mut SourceFd(&listener.fd.as_raw_fd()),
            LISTENER,
            Interest::READABLE,
        )?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut room = Anteroom {
            poll,
            listener,
            ungreeted: BTreeMap::new(),
            next_token: 2,
            stop: Arc::clone(&stop),
            accept,
        };
        let thread = threads::spawn(hook, ThreadRole::Acceptor, 0, move || room.serve())?;
        Ok(Self { stop, waker, thread: Some(thread) })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // The thread is there until it has been joined, and so is its poll.
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            threads::join(thread);
        }
    }
}

/// A connection whose hello has not arrived.
struct Ungreeted {
    stream: Stream,
    deadline: Instant,
    bytes: Vec<u8>,
}

struct Anteroom<F> {
    poll: Poll,
    listener: Listener,
    ungreeted: BTreeMap<usize, Ungreeted>,
    next_token: usize,
    stop: Arc<AtomicBool>,
    accept: F,
}

impl<F: FnMut(Accepted)> Anteroom<F> {
    fn serve(&mut self) {
        let mut events = Events::with_capacity(64);
        while !self.stop.load(Ordering::Acquire) {
            let now = Instant::now();
            let timeout = self
                .ungreeted
                .values()
                .map(|guest| guest.deadline.saturating_duration_since(now))
                .min();
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, "the listener cannot wait; no new connections");
                    return;
                }
                Ok(()) => {}
            }
            for event in &events {
                match event.token() {
                    LISTENER => self.admit(),
                    WAKER => {}
                    Token(token) => self.hear(token),
                }
            }
            let now = Instant::now();
            self.ungreeted.retain(|_, guest| {
                if guest.deadline > now {
                    return true;
                }
                tracing::info!("a connection said no hello in {GREETING_TIME:?} and was closed");
                guest.stream.shut_down();
                false
            });
        }
    }

    fn admit(&mut self) {
        loop {
            let fd = match nix::sys::socket::accept4(
                self.listener.fd.as_raw_fd(),
                nix::sys::socket::SockFlag::SOCK_CLOEXEC,
            ) {
                // SAFETY: a fresh descriptor that nobody else owns.
                Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::ECONNABORTED) => continue,
                Err(nix::errno::Errno::EAGAIN) => return,
                Err(errno) => {
                    // Out of descriptors: those that wait may time out and free some.
                    tracing::warn!(%errno, "could not accept a connection");
                    return;
                }
            };
            if self.ungreeted.len() >= MAX_UNGREETED {
                tracing::warn!("{MAX_UNGREETED} connections have not said hello; one more closed");
                continue;
            }
            if let Err(error) = self.seat(fd) {
                tracing::warn!(%error, "could not take a connection in");
            }
        }
    }

    fn seat(&mut self, fd: OwnedFd) -> io::Result<()> {
        let token = self.next_token;
        self.next_token += 1;
        let stream = Stream::new(fd, self.listener.is_tcp)?;
        let raw = stream.as_fd().as_raw_fd();
        self.poll.registry().register(&mut SourceFd(&raw), Token(token), Interest::READABLE)?;
        let guest =
            Ungreeted { stream, deadline: Instant::now() + GREETING_TIME, bytes: Vec::new() };
        self.ungreeted.insert(token, guest);
        self.hear(token);
        Ok(())
    }

    fn hear(&mut self, token: usize) {
        let Some(guest) = self.ungreeted.get_mut(&token) else { return };
        let heard = guest.hear();
        if matches!(heard, Heard::NotYet) {
            return;
        }
        let Some(guest) = self.ungreeted.remove(&token) else { return };
        let raw = guest.stream.as_fd().as_raw_fd();
        if let Err(error) = self.poll.registry().deregister(&mut SourceFd(&raw)) {
            tracing::debug!(%error, "a connection was not registered");
        }
        match heard {
            Heard::NotYet => {}
            Heard::Hello(hello) => (self.accept)(Accepted { stream: guest.stream, hello }),
            Heard::Nonsense(code, reason) => refuse(&guest.stream, Refusal::new(code, reason)),
            Heard::Gone => guest.stream.shut_down(),
        }
    }
}

enum Heard {
    NotYet,
    Hello(Hello),
    Nonsense(RefuseCode, String),
    Gone,
}

impl Ungreeted {
    /// Reads what is there of the greeting, and not a byte beyond it.
    fn hear(&mut self) -> Heard {
        loop {
            let wanted = match self.wanted() {
                Ok(wanted) => wanted,
                Err(heard) => return heard,
            };
            let had = self.bytes.len();
            self.bytes.resize(wanted, 0);
            let got = self.stream.receive(&mut self.bytes[had..], Wait::Never);
            self.bytes.truncate(had + *got.as_ref().unwrap_or(&0));
            match got {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Heard::NotYet,
                Err(_) => return Heard::Gone,
            }
        }
    }

    /// How many bytes there should be in all, or what they say.
    fn wanted(&self) -> Result<usize, Heard> {
        let Some((prefix, body)) = self.bytes.split_first_chunk::<GREETING_PREFIX>() else {
            return Ok(GREETING_PREFIX);
        };
        let nonsense = |error: WireError| {
            let code = match error {
                WireError::Version { .. } => RefuseCode::Version,
                _ => RefuseCode::Protocol,
            };
            Heard::Nonsense(code, error.to_string())
        };
        let announced = Greeting::announced(prefix).map_err(nonsense)?;
        if body.len() < announced.length() {
            return Ok(GREETING_PREFIX + announced.length());
        }
        match Greeting::decode(announced, body) {
            Ok(Greeting::Hello(hello)) => Err(Heard::Hello(hello)),
            Ok(Greeting::Refuse(_)) => Err(Heard::Gone),
            Err(error) => Err(nonsense(error)),
        }
    }
}
