//! The daemon: one thread that waits for clients and answers them.
//!
//! Invariant: no client can keep another from being answered: a round takes a bounded number of
//! packets of each, an answer never waits for its reader, and who neither says anything nor
//! holds a claim for long is let go.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use afterimage::Address;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::stat::{Mode, umask};

use super::packet::{self, Packet};
use super::shelf::{Client, Shelf};
use super::words::{MAX_CLIENTS, MAX_NAME, Reply, Request, VERSION, Why};
use crate::page_server::Notice;

const LISTENER: Token = Token(0);
const SIGNALS: Token = Token(1);
const FIRST_CLIENT: usize = 2;
/// Packets of one client before the next has its turn.
const ROUND: usize = 16;
/// More packets than a socket can hold.
const WHOLE: usize = 4096;
/// How long a client without a claim may be silent.
const IDLE: Duration = Duration::from_secs(30);
/// Between looks for such clients.
const LOOK: Duration = Duration::from_secs(5);
/// Descriptors beside those that are held and those of clients: what packets bring before
/// they are refused, and what is being closed.
const SPARE: usize = 512;

/// Why the daemon cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    #[error(
        "{needed} descriptors may have to be open, and {allowed} are allowed: raise the limit \
         (ulimit -n, LimitNOFILE= of a unit) or lower --max-files"
    )]
    Limit { needed: usize, allowed: u64 },
    #[error(
        "another keeper listens on unix:{}: use that one, or choose another address",
        path.display()
    )]
    InUse { path: PathBuf },
    #[error("{} is there and is no socket: choose another address", path.display())]
    NotASocket { path: PathBuf },
    #[error("could not listen on unix:{} (its directory must be there, and writable)", path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("could not {operation}")]
    Io { operation: &'static str, source: io::Error },
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> ServeError {
    move |source| ServeError::Io { operation, source }
}

/// Hears what the daemon says.
pub(super) type Hearer = Box<dyn Fn(Notice)>;

/// Holds descriptors until a signal.
pub(super) fn serve(path: &Path, max_files: usize, hear: Hearer) -> Result<ExitCode, ServeError> {
    let signals = signals().map_err(failed("wait for signals"))?;
    allow(max_files + MAX_CLIENTS + SPARE)?;
    let doorway = Doorway::open(path)?;
    let poll = Poll::new().map_err(failed("wait for clients"))?;
    for (fd, token) in [(doorway.listener.as_raw_fd(), LISTENER), (signals.as_raw_fd(), SIGNALS)] {
        let registered = poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE);
        registered.map_err(failed("wait for clients"))?;
    }
    let (sender, gone) = std::sync::mpsc::channel::<Vec<OwnedFd>>();
    // Closing can take long: it may free a guest's memory.
    thread::Builder::new()
        .name("closer".to_owned())
        .spawn(move || gone.into_iter().for_each(drop))
        .map_err(failed("start a thread"))?;
    let shelf = Shelf::new(max_files, move |files| {
        // Its thread ends with the process.
        let _ = sender.send(files);
    });
    hear(Notice::Listening(Address::Unix(path.to_owned())));
    let clients = BTreeMap::new();
    Server { poll, doorway, signals, shelf, clients, next: FIRST_CLIENT, hear }.run()
}

fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

/// Sees to it that so many descriptors may be open.
fn allow(needed: usize) -> Result<(), ServeError> {
    let wrap = |errno: nix::errno::Errno| failed("look at the limit of open files")(errno.into());
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(wrap)?;
    if hard < needed as u64 {
        return Err(ServeError::Limit { needed, allowed: hard });
    }
    if soft < needed as u64 {
        setrlimit(Resource::RLIMIT_NOFILE, needed as u64, hard).map_err(wrap)?;
    }
    Ok(())
}

/// The socket, which only this user and root may use, and which one keeper has at a time.
struct Doorway {
    listener: OwnedFd,
    path: PathBuf,
    _lock: Flock<File>,
}

impl Doorway {
    fn open(path: &Path) -> Result<Self, ServeError> {
        let wrap = |source| ServeError::Listen { path: path.to_owned(), source };
        let mut lock = path.as_os_str().to_owned();
        lock.push(".lock");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(PathBuf::from(lock)).map_err(wrap)?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    nix::errno::Errno::EWOULDBLOCK => ServeError::InUse { path: path.to_owned() },
                    other => wrap(other.into()),
                },
            )?;
        // Whoever has the lock may replace a socket that a dead keeper has left.
        match fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => fs::remove_file(path).map_err(wrap)?,
            Ok(_) => return Err(ServeError::NotASocket { path: path.to_owned() }),
            Err(_) => {}
        }
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = packet::listen(path);
        umask(before);
        Ok(Self { listener: listener.map_err(wrap)?, path: path.to_owned(), _lock: lock })
    }
}

impl Drop for Doorway {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = fs::remove_file(&self.path);
    }
}

struct Connection {
    socket: OwnedFd,
    client: Client,
    /// What it calls itself, once it has said hello.
    name: Option<String>,
    heard: Instant,
    /// More packets may be there than the last round took.
    has_more: bool,
}

struct Server {
    poll: Poll,
    doorway: Doorway,
    signals: SignalFd,
    shelf: Shelf,
    clients: BTreeMap<usize, Connection>,
    next: usize,
    hear: Hearer,
}

impl Server {
    fn say(&self, line: &str) {
        (self.hear)(Notice::Line(line.to_owned()));
    }

    fn run(mut self) -> Result<ExitCode, ServeError> {
        let mut events = Events::with_capacity(64);
        let mut signals = 0;
        loop {
            self.admit();
            let is_busy = self.clients.values().any(|it| it.has_more);
            let timeout = if is_busy { Some(Duration::ZERO) } else { self.look() };
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(failed("wait for clients")(error));
                }
                _ => {}
            }
            for event in &events {
                if let Some(connection) = self.clients.get_mut(&event.token().0) {
                    connection.has_more = true;
                }
            }
            let busy = self.clients.iter().filter(|(_, it)| it.has_more);
            let busy: Vec<_> = busy.map(|(number, _)| *number).collect();
            for number in busy {
                self.hear(number, ROUND, Conflicts::Settle);
            }
            self.let_go_of_the_idle();
            while let Ok(Some(_)) = self.signals.read_signal() {
                signals += 1;
                match (self.shelf.guests(), signals) {
                    (0, _) => return Ok(ExitCode::SUCCESS),
                    (guests, 1) => self.say(&format!(
                        "not stopping: {guests} guests are held, which may be lost; a second \
                         signal lets go of them"
                    )),
                    _ => return Ok(ExitCode::from(4)),
                }
            }
        }
    }

    fn look(&self) -> Option<Duration> {
        (!self.clients.is_empty()).then_some(LOOK)
    }

    /// Takes every connection that waits, as long as there is room.
    fn admit(&mut self) {
        loop {
            let socket = match packet::accept(self.doorway.listener.as_fd()) {
                Ok(socket) => socket,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.say(&format!("could not accept a client: {error}")),
            };
            let peer = getsockopt(&socket, PeerCredentials);
            let own = nix::unistd::geteuid().as_raw();
            let refusal = match &peer {
                Ok(peer) if peer.uid() != own && peer.uid() != 0 => {
                    Some((Why::Wrong, "this keeper is another user's".to_owned()))
                }
                Ok(_) if self.clients.len() >= MAX_CLIENTS => {
                    Some((Why::Full, format!("{MAX_CLIENTS} clients are connected: try again")))
                }
                Ok(_) => None,
                Err(errno) => Some((Why::Wrong, format!("who connects is not known: {errno}"))),
            };
            if let Some(refusal) = refusal {
                // It may have gone already.
                let _ = packet::send(&socket, &Reply::from(refusal), &[]);
                continue;
            }
            let client = Client { number: self.next, pid: peer.map_or(0, |peer| peer.pid()) };
            let raw = socket.as_raw_fd();
            let token = Token(client.number);
            let registry = self.poll.registry();
            if let Err(error) = registry.register(&mut SourceFd(&raw), token, Interest::READABLE) {
                self.say(&format!("could not wait for a client: {error}"));
                continue;
            }
            self.next += 1;
            let heard = Instant::now();
            let connection = Connection { socket, client, name: None, heard, has_more: true };
            self.clients.insert(client.number, connection);
        }
    }

    /// Takes packets of a client, at most so many.
    fn hear(&mut self, number: usize, most: usize, conflicts: Conflicts) {
        for _ in 0..most {
            let Some(connection) = self.clients.get_mut(&number) else { return };
            match packet::receive(&connection.socket) {
                Ok(Some(packet)) => {
                    connection.heard = Instant::now();
                    self.answer(number, packet, conflicts);
                }
                Ok(None) => return self.part(number, None),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    connection.has_more = false;
                    return;
                }
                Err(error) => return self.part(number, Some(&error.to_string())),
            }
        }
    }

    fn answer(&mut self, number: usize, packet: Packet, conflicts: Conflicts) {
        let request = match serde_json::from_slice::<Request>(&packet.bytes) {
            Ok(request) => request,
            Err(error) => return self.part(number, Some(&format!("not understood: {error}"))),
        };
        let Some(connection) = self.clients.get_mut(&number) else { return };
        let client = connection.client;
        match &request {
            Request::Hello { version, name } if connection.name.is_none() => {
                if *version != VERSION {
                    let why = format!("version {version} is spoken there, {VERSION} here");
                    return self.part(number, Some(&why));
                }
                let plain = name.chars().filter(|it| !it.is_control()).take(MAX_NAME);
                connection.name = Some(plain.collect());
                return self.reply(number, &Reply::Done);
            }
            _ if connection.name.is_none() => {
                return self.part(number, Some("it did not say hello"));
            }
            _ => {}
        }
        // A holder that has died in the meantime is in nobody's way, nor is what it said last.
        if conflicts == Conflicts::Settle
            && let Some(holder) = self.shelf.in_the_way(client, &request)
        {
            self.hear(holder.number, WHOLE, Conflicts::Leave);
        }
        let told = told(&request);
        let (reply, files) = self.shelf.take(client, request, packet.files);
        let Some(connection) = self.clients.get(&number) else { return };
        if let (Some((guest, what)), Reply::Done) = (&told, &reply) {
            let name = connection.name.as_deref().unwrap_or_default();
            let line = format!("{guest} is {what} by {name} (process {})", client.pid);
            (self.hear)(Notice::Line(line));
        }
        let sent = packet::send(&connection.socket, &reply, &files);
        self.check_sent(number, sent);
    }

    fn reply(&mut self, number: usize, reply: &Reply) {
        let Some(connection) = self.clients.get(&number) else { return };
        let sent = packet::send(&connection.socket, reply, &[]);
        self.check_sent(number, sent);
    }

    /// An answer is never waited for: who does not read, or is gone, is let go.
    fn check_sent(&mut self, number: usize, sent: io::Result<()>) {
        match sent {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.part(number, None),
            Err(error) => self.part(number, Some(&format!("it cannot be answered: {error}"))),
        }
    }

    /// Ends a client's connection, with a reason for it and for the log unless it went itself.
    fn part(&mut self, number: usize, why: Option<&str>) {
        let Some(connection) = self.clients.remove(&number) else { return };
        if let Some(why) = why {
            let pid = connection.client.pid;
            let why: String = why.chars().filter(|it| !it.is_control()).collect();
            self.say(&format!("process {pid} is hung up on: {why}"));
            // It may be unable to hear it.
            let _ = packet::send(&connection.socket, &Reply::from((Why::Wrong, why)), &[]);
        }
        // The descriptor is closed in any case, which ends the registration.
        let raw = connection.socket.as_raw_fd();
        let _ = self.poll.registry().deregister(&mut SourceFd(&raw));
        self.shelf.gone(connection.client);
    }

    fn let_go_of_the_idle(&mut self) {
        let is_idle =
            |it: &Connection| it.heard.elapsed() > IDLE && !self.shelf.is_holder(it.client);
        let idle = self.clients.iter().filter(|(_, it)| is_idle(it));
        let idle: Vec<_> = idle.map(|(number, _)| *number).collect();
        for number in idle {
            self.part(number, Some("it was silent for too long without a claim"));
        }
    }
}

/// Whether a claim that is in a request's way is looked at again: its holder may be dead, and
/// nobody has read so yet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Conflicts {
    Settle,
    Leave,
}

/// What the log says when this has been done.
fn told(request: &Request) -> Option<(String, &'static str)> {
    match request {
        Request::Commit { guest } => Some((guest.clone(), "stored")),
        Request::Claim { guest } => Some((guest.clone(), "claimed")),
        Request::Remove { guest } => Some((guest.clone(), "removed")),
        _ => None,
    }
}
