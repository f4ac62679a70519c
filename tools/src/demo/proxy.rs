//! A network that can be cut: the connections between the two sides go through here.
//!
//! One thread carries all of them, so that a cut falls between two pieces of data and finds
//! every connection there is. The background can be held up, so that nothing is too late for
//! what is to happen in the middle of it.
//!
//! Invariant: what is carried is carried whole and in order until a cut; a cut ends both ends of
//! every connection of its moment, and none that is made later.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage::Address;
use crossbeam_channel::{Receiver, Sender};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;

/// Everything is looked at: there are few connections.
const ANYTHING: Token = Token(0);
const PIECE: usize = 256 << 10;
/// How long a silent connection stays open: longer than both sides wait for a word.
const SILENCE: Duration = Duration::from_secs(3);
/// How long the two sides have to hang up after they were told that nothing more comes.
const GRACE: Duration = Duration::from_secs(1);

/// How connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Cut {
    /// Both ends are told that the connection is broken.
    Reset,
    /// Both ends are told that nothing more comes.
    Closed,
    /// Nobody is told anything: what is sent vanishes.
    Silent,
}

/// Where a hello names its channel, and the number of the background.
const CHANNEL_AT: usize = 17;
const BACKGROUND: u8 = 3;

/// A network of one listening address. Dropped, it ends with all of its connections.
#[derive(Debug)]
pub(super) struct Proxy {
    address: Address,
    orders: Sender<Order>,
    waker: Arc<Waker>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

/// How many bytes of the background have passed, and may pass.
#[derive(Debug)]
struct Gate {
    passed: AtomicU64,
    allowed: AtomicU64,
}

impl Gate {
    fn left(&self) -> u64 {
        let passed = self.passed.load(Ordering::Relaxed);
        self.allowed.load(Ordering::Acquire).saturating_sub(passed)
    }
}

#[derive(Debug)]
enum Order {
    Lead(Option<Address>),
    Cut(Cut, Sender<usize>),
    Stop,
}

impl Proxy {
    /// Listens at `address`. Who connects is hung up on until it is known where to.
    pub(super) fn start(address: &Address) -> io::Result<Self> {
        let (listener, address) = Listening::bind(address)?;
        let poll = Poll::new()?;
        register(&poll, listener.as_fd())?;
        let waker = Arc::new(Waker::new(poll.registry(), ANYTHING)?);
        let (orders, received) = crossbeam_channel::unbounded();
        let gate = Gate { passed: AtomicU64::new(0), allowed: AtomicU64::new(u64::MAX) };
        let gate = Arc::new(gate);
        let (target, links) = (None, Vec::new());
        let network = Network { poll, listener, target, links, received, gate: Arc::clone(&gate) };
        let thread = thread::Builder::new().name("network".to_owned()).spawn(|| network.run())?;
        Ok(Self { address, orders, waker, gate, thread: Some(thread) })
    }

    /// How many bytes of the background have passed to whoever connects.
    pub(super) fn passed(&self) -> u64 {
        self.gate.passed.load(Ordering::Relaxed)
    }

    /// Lets the background go on until so many bytes of it have passed in all.
    pub(super) fn allow(&self, bytes: u64) {
        self.gate.allowed.store(bytes, Ordering::Release);
        self.wake();
    }

    /// Where it listens.
    pub(super) const fn address(&self) -> &Address {
        &self.address
    }

    /// From now on connections lead there, or nowhere.
    pub(super) fn lead(&self, target: Option<Address>) {
        self.order(Order::Lead(target));
    }

    /// Cuts every connection; returns how many there were.
    pub(super) fn cut(&self, how: Cut) -> usize {
        let (reply, answer) = crossbeam_channel::bounded(1);
        self.order(Order::Cut(how, reply));
        // A thread that has gone has no connection left.
        answer.recv().unwrap_or(0)
    }

    fn order(&self, order: Order) {
        // The thread ends only after it was told to, or because it cannot wait any more.
        if self.orders.send(order).is_ok() {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "the network cannot be told anything");
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.order(Order::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic has said what it had to say.
            let _ = thread.join();
        }
    }
}

struct Network {
    poll: Poll,
    listener: Listening,
    target: Option<Address>,
    links: Vec<Link>,
    received: Receiver<Order>,
    gate: Arc<Gate>,
}

impl Network {
    fn run(mut self) {
        let mut events = Events::with_capacity(64);
        loop {
            while let Ok(order) = self.received.try_recv() {
                match order {
                    Order::Lead(target) => self.target = target,
                    Order::Cut(how, reply) => {
                        let count = self.links.iter_mut().filter_map(|it| it.cut(how)).count();
                        // Whoever asked may have gone.
                        let _ = reply.send(count);
                    }
                    Order::Stop => return,
                }
            }
            self.accept();
            let mut is_busy = false;
            self.links.retain_mut(|link| match link.carry(&self.gate) {
                Carried::Something => {
                    is_busy = true;
                    true
                }
                Carried::Nothing => true,
                Carried::Over => false,
            });
            let now = Instant::now();
            let ends = self.links.iter().filter_map(|link| link.end);
            let next = ends.min().map(|end| end.saturating_duration_since(now));
            let most = if is_busy { Some(Duration::ZERO) } else { next };
            if let Err(error) = self.poll.poll(&mut events, most)
                && error.kind() != ErrorKind::Interrupted
            {
                tracing::error!(%error, "the network cannot wait for data, and ends");
                return;
            }
        }
    }

    fn accept(&mut self) {
        loop {
            let accepted = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    return;
                }
            };
            let Some(target) = &self.target else { continue };
            match Link::make(accepted, target, &self.poll) {
                Ok(link) => self.links.push(link),
                Err(error) => tracing::info!(%error, %target, "nobody could be reached"),
            }
        }
    }
}

fn register(poll: &Poll, descriptor: BorrowedFd<'_>) -> io::Result<()> {
    let raw = descriptor.as_raw_fd();
    poll.registry().register(&mut SourceFd(&raw), ANYTHING, Interest::READABLE | Interest::WRITABLE)
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Carried {
    Something,
    Nothing,
    Over,
}

/// A connection from one side to the other.
struct Link {
    /// Who connected, and whom.
    ends: [Socket; 2],
    /// From the first end to the second, and back.
    ways: [Way; 2],
    is_background: bool,
    cut: Option<Cut>,
    /// When one that was cut is dropped.
    end: Option<Instant>,
}

impl Link {
    fn make(accepted: Socket, target: &Address, poll: &Poll) -> io::Result<Self> {
        let ends = [accepted, Socket::connect(target)?];
        for socket in &ends {
            socket.prepare()?;
            register(poll, socket.as_fd())?;
        }
        let ways = [Way::new(), Way::new()];
        Ok(Self { ends, ways, is_background: false, cut: None, end: None })
    }

    /// Cuts it, if it has not been cut before.
    fn cut(&mut self, how: Cut) -> Option<()> {
        if self.cut.is_some() {
            return None;
        }
        self.cut = Some(how);
        let left = match how {
            Cut::Reset => Duration::ZERO,
            Cut::Closed => {
                self.ends.iter().for_each(Socket::say_no_more);
                GRACE
            }
            Cut::Silent => SILENCE,
        };
        self.end = Some(Instant::now() + left);
        Some(())
    }

    /// Carries what is there, a piece each way.
    fn carry(&mut self, gate: &Gate) -> Carried {
        let [near, far] = &mut self.ends;
        let [there, back] = &mut self.ways;
        let gate = Some(gate).filter(|_| self.is_background);
        let carried = match self.cut {
            None => {
                let there = there.carry(near, far, None);
                both(there, back.carry(far, near, gate))
            }
            Some(Cut::Closed) => both(there.discard(near), back.discard(far)),
            Some(Cut::Silent | Cut::Reset) => Carried::Nothing,
        };
        // Whoever connects says a hello first, in one piece.
        let hello = &self.ways[0];
        self.is_background |=
            hello.is_first && hello.end > CHANNEL_AT && hello.buffer[CHANNEL_AT] == BACKGROUND;
        let is_late = self.end.is_some_and(|end| end <= Instant::now());
        if !is_late && carried != Carried::Over {
            return carried;
        }
        if self.cut != Some(Cut::Closed) {
            self.ends.iter().for_each(Socket::reset_when_dropped);
        }
        Carried::Over
    }
}

/// A connection is over when it is so both ways; one that is broken is so both ways.
fn both(there: io::Result<Carried>, back: io::Result<Carried>) -> Carried {
    match (there, back) {
        (Err(_), _) | (_, Err(_)) | (Ok(Carried::Over), Ok(Carried::Over)) => Carried::Over,
        (Ok(Carried::Something), _) | (_, Ok(Carried::Something)) => Carried::Something,
        _ => Carried::Nothing,
    }
}

/// What is under way in one direction.
struct Way {
    buffer: Vec<u8>,
    /// What of it has been read and not written.
    begin: usize,
    end: usize,
    /// What is in the buffer is what came first.
    is_first: bool,
    /// Nothing more comes.
    is_over: bool,
    /// And that has been passed on.
    is_told: bool,
}

impl Way {
    fn new() -> Self {
        let buffer = vec![0; PIECE];
        Self { buffer, begin: 0, end: 0, is_first: true, is_over: false, is_told: false }
    }

    /// Carries a piece, as far as the gate allows it, if there is one.
    fn carry(
        &mut self,
        from: &mut Socket,
        to: &mut Socket,
        gate: Option<&Gate>,
    ) -> io::Result<Carried> {
        if self.is_told {
            return Ok(Carried::Over);
        }
        let mut carried = Carried::Nothing;
        let most = gate.map_or(u64::MAX, Gate::left).min(PIECE as u64) as usize;
        if self.begin == self.end && !self.is_over && most > 0 {
            match from.read(&mut self.buffer[..most]) {
                Ok(0) => self.is_over = true,
                Ok(got) => {
                    self.is_first &= self.end == 0;
                    (self.begin, self.end) = (0, got);
                    if let Some(gate) = gate {
                        gate.passed.fetch_add(got as u64, Ordering::Relaxed);
                    }
                }
                Err(error) => passing(error)?,
            }
        }
        if self.begin < self.end {
            match to.write(&self.buffer[self.begin..self.end]) {
                Ok(sent) => {
                    self.begin += sent;
                    carried = Carried::Something;
                }
                Err(error) => passing(error)?,
            }
        }
        if self.is_over && self.begin == self.end {
            to.say_no_more();
            self.is_told = true;
            carried = Carried::Something;
        }
        Ok(carried)
    }

    /// Reads to the end, so that nothing unread turns the end into a reset.
    fn discard(&mut self, from: &mut Socket) -> io::Result<Carried> {
        match from.read(&mut self.buffer) {
            Ok(0) => Ok(Carried::Over),
            Ok(_) => Ok(Carried::Something),
            Err(error) => passing(error).map(|()| Carried::Nothing),
        }
    }
}

/// An error that passes is none.
fn passing(error: io::Error) -> io::Result<()> {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(()),
        _ => Err(error),
    }
}

/// Where connections come from.
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listening {
    fn bind(address: &Address) -> io::Result<(Self, Address)> {
        Ok(match address {
            Address::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                listener.set_nonblocking(true)?;
                (Self::Unix(listener), address.clone())
            }
            Address::Tcp(host) => {
                let listener = TcpListener::bind(host)?;
                listener.set_nonblocking(true)?;
                let local = Address::Tcp(listener.local_addr()?.to_string());
                (Self::Tcp(listener), local)
            }
            _ => return Err(ErrorKind::Unsupported.into()),
        })
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(socket, _)| Socket::Tcp(socket)),
            Self::Unix(listener) => listener.accept().map(|(socket, _)| Socket::Unix(socket)),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

/// One end of a connection.
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// On one machine this does not wait.
    fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Address::Tcp(host) => TcpStream::connect(host).map(Self::Tcp),
            _ => Err(ErrorKind::Unsupported.into()),
        }
    }

    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => {
                socket.set_nodelay(true)?;
                socket.set_nonblocking(true)
            }
            Self::Unix(socket) => socket.set_nonblocking(true),
        }
    }

    /// Nothing more is written to it.
    fn say_no_more(&self) {
        // One that is broken needs no telling.
        let _ = match self {
            Self::Tcp(socket) => socket.shutdown(Shutdown::Write),
            Self::Unix(socket) => socket.shutdown(Shutdown::Write),
        };
    }

    /// What TCP has for that; a Unix socket just ends.
    fn reset_when_dropped(&self) {
        if let Self::Tcp(socket) = self {
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            // It ends in any case.
            let _ = setsockopt(socket, sockopt::Linger, &linger);
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buffer),
            Self::Unix(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
