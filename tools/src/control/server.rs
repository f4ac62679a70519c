//! The thread that talks to clients and to those who read the metrics.
//!
//! Invariant: it waits for its sockets, for news and for the time, and for nothing else.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

use super::board::{Board, News, Outlet};
use super::client::{Client, Ordered};
use super::connection::{Broken, Connection, Socket};
use super::scrape::Scrape;
use super::words::{self, Refusal};
use super::worker::Job;

const CONTROL: Token = Token(0);
const METRICS: Token = Token(1);
const WAKER: Token = Token(2);
const FIRST_CLIENT: usize = 3;

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// Who reads the metrics, at a time.
const MAX_SCRAPES: usize = 8;
/// How long who reads may take to read the last words.
const FAREWELL: Duration = Duration::from_secs(1);
/// Until accepting is tried again where descriptors have run out.
const RETRY: Duration = Duration::from_millis(100);

/// Where somebody can connect.
pub(super) enum Door {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl From<UnixListener> for Door {
    fn from(listener: UnixListener) -> Self {
        Self::Unix(listener)
    }
}

impl From<TcpListener> for Door {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

impl Door {
    fn raw(&self) -> RawFd {
        match self {
            Self::Unix(listener) => listener.as_raw_fd(),
            Self::Tcp(listener) => listener.as_raw_fd(),
        }
    }

    fn open(&self) -> io::Result<()> {
        match self {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    fn accept(&self) -> io::Result<Box<dyn Socket>> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(stream))
            }
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(stream))
            }
        }
    }
}

/// Both doors, as far as they are wanted.
#[derive(Default)]
pub(super) struct Doors {
    pub(super) control: Option<Door>,
    pub(super) metrics: Option<Door>,
}

impl Doors {
    pub(super) const fn is_empty(&self) -> bool {
        self.control.is_none() && self.metrics.is_none()
    }

    fn each(&self) -> impl Iterator<Item = (Token, &Door)> {
        let control = self.control.as_ref().map(|door| (CONTROL, door));
        control.into_iter().chain(self.metrics.as_ref().map(|door| (METRICS, door)))
    }
}

/// Somebody who is connected.
#[derive(Debug)]
enum Visitor {
    Client(Client),
    Scrape(Scrape),
}

impl Visitor {
    const fn connection(&self) -> &Connection {
        match self {
            Self::Client(client) => client.connection(),
            Self::Scrape(scrape) => scrape.connection(),
        }
    }

    fn flush(&mut self) -> Result<(), Broken> {
        match self {
            Self::Client(client) => client.flush(),
            Self::Scrape(scrape) => scrape.flush(),
        }
    }

    fn is_done(&self) -> bool {
        match self {
            Self::Client(client) => client.is_done(),
            Self::Scrape(scrape) => scrape.is_done(),
        }
    }
}

/// How near the end is.
enum End {
    /// Nothing more is done; with how it ended.
    Near(String),
    /// What was under way was answered.
    Here,
}

pub(super) struct Server {
    poll: Poll,
    doors: Doors,
    news: Receiver<News>,
    visitors: BTreeMap<usize, Visitor>,
    next: usize,
    /// Those of whom there may be more to read without another event.
    unread: Vec<usize>,
    /// Whether somebody may wait at a door without another event.
    has_waiting: bool,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("visitors", &self.visitors).finish_non_exhaustive()
    }
}

impl Server {
    pub(super) fn new(doors: Doors) -> io::Result<(Self, Outlet)> {
        let poll = Poll::new()?;
        for (token, door) in doors.each() {
            door.open()?;
            poll.registry().register(&mut SourceFd(&door.raw()), token, Interest::READABLE)?;
        }
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let (sender, news) = crossbeam_channel::unbounded();
        let server = Self {
            poll,
            doors,
            news,
            visitors: BTreeMap::new(),
            next: FIRST_CLIENT,
            unread: Vec::new(),
            has_waiting: false,
        };
        Ok((server, Outlet::new(sender, waker)))
    }

    /// Serves until it is told to stop, and all answers are there. What may wait goes to `jobs`.
    pub(super) fn run(mut self, board: &Board, jobs: Sender<Job>) {
        let mut events = Events::with_capacity(64);
        let (mut jobs, mut last_words, mut outcome) = (Some(jobs), None, String::new());
        loop {
            if !self.poll(&mut events, jobs.as_ref(), last_words) {
                return;
            }
            if jobs.is_some() {
                self.greet_those_at_the_doors(board, &events);
            }
            self.turn(board, jobs.as_ref(), &events);
            match self.take_news() {
                Some(End::Near(how)) => (jobs, outcome) = (None, how),
                Some(End::Here) => {
                    // After every answer, and nothing comes after it.
                    let (sequence, line) = board.closing(&outcome);
                    self.tell(sequence, &line);
                    last_words = Some(Instant::now() + FAREWELL);
                }
                None => {}
            }
            let owed = self.visitors.values().any(|it| it.connection().has_unsent());
            if last_words.is_some_and(|until| !owed || until <= Instant::now()) {
                return;
            }
        }
    }

    /// Waits for something to do. `false` if that is not possible any more.
    fn poll(
        &mut self,
        events: &mut Events,
        jobs: Option<&Sender<Job>>,
        last_words: Option<Instant>,
    ) -> bool {
        let now = Instant::now();
        let due = self.visitors.values().filter_map(|visitor| match visitor {
            Visitor::Client(client) => client.due().filter(|_| jobs.is_some()),
            Visitor::Scrape(scrape) => Some(scrape.until()),
        });
        let due = due.chain(last_words).chain(self.has_waiting.then(|| now + RETRY)).min();
        let timeout = due.map(|due| due.saturating_duration_since(now));
        let timeout = if self.unread.is_empty() { timeout } else { Some(Duration::ZERO) };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                tracing::error!(%error, "the control socket is closed: its thread cannot wait");
                false
            }
            _ => true,
        }
    }

    fn greet_those_at_the_doors(&mut self, board: &Board, events: &Events) {
        let is_at = |token| events.iter().any(|event| event.token() == token);
        let is_waiting = std::mem::take(&mut self.has_waiting);
        if is_waiting || is_at(CONTROL) {
            self.accept(board, CONTROL);
        }
        if is_waiting || is_at(METRICS) {
            self.accept(board, METRICS);
        }
    }

    fn accept(&mut self, board: &Board, at: Token) {
        // More than ever are there at once; those behind them wait for the next turn.
        for _ in 0..2 * MAX_CLIENTS {
            let door = if at == CONTROL { &self.doors.control } else { &self.doors.metrics };
            let Some(door) = door else { return };
            match door.accept() {
                Ok(socket) => self.admit(board, Connection::new(socket), at),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "somebody could not be let in");
                    break;
                }
            }
        }
        self.has_waiting = true;
    }

    fn admit(&mut self, board: &Board, mut connection: Connection, at: Token) {
        let is_client = |it: &&Visitor| matches!(it, Visitor::Client(_));
        let clients = self.visitors.values().filter(is_client).count();
        let is_full = match at {
            CONTROL => clients >= MAX_CLIENTS,
            _ => self.visitors.len() - clients >= MAX_SCRAPES,
        };
        if is_full {
            let why = format!("{MAX_CLIENTS} clients are connected: disconnect one, or try later");
            if at == CONTROL {
                // It need not hear why.
                let _ = connection.say(&words::refuse(None, &Refusal::not_now(why)));
            }
            return;
        }
        let name = self.next;
        let raw = connection.raw();
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registered = self.poll.registry().register(&mut SourceFd(&raw), Token(name), interest);
        let visitor = registered.map_err(Broken::from).and_then(|()| {
            Ok(match at {
                CONTROL => Visitor::Client(Client::new(connection, board)?),
                _ => Visitor::Scrape(Scrape::new(connection)),
            })
        });
        match visitor {
            Ok(visitor) => {
                self.next += 1;
                self.visitors.insert(name, visitor);
            }
            Err(error) => tracing::info!(%error, "somebody could not be let in"),
        }
    }

    /// Hears and tells everybody whose turn it is.
    fn turn(&mut self, board: &Board, jobs: Option<&Sender<Job>>, events: &Events) {
        let mut readable = std::mem::take(&mut self.unread);
        let mut gone = Vec::new();
        for event in events {
            let name = event.token().0;
            if event.is_writable() {
                self.with(name, Visitor::flush);
            }
            if event.is_readable() && name >= FIRST_CLIENT && !readable.contains(&name) {
                readable.push(name);
            }
            if event.is_error() || event.is_write_closed() {
                gone.push(name);
            }
        }
        for name in readable {
            let mut has_more = false;
            self.with(name, |visitor| {
                has_more = match visitor {
                    Visitor::Client(client) => client.hear(board, |it| order(jobs, name, it))?,
                    Visitor::Scrape(scrape) => scrape.hear(board)?,
                };
                Ok(())
            });
            if has_more {
                self.unread.push(name);
            }
        }
        // What they have said before they hung up both ways holds.
        for name in gone {
            self.leave(name, None);
        }
        let now = Instant::now();
        self.each(|visitor| match visitor {
            // Whoever waits for the end has heard how things stand.
            Visitor::Client(client) if jobs.is_some() => client.progress(now, board),
            Visitor::Scrape(scrape) if scrape.until() <= now => {
                Err(io::Error::from(io::ErrorKind::TimedOut).into())
            }
            Visitor::Client(_) | Visitor::Scrape(_) => Ok(()),
        });
    }

    /// Passes on what has happened, and says if that is the end.
    fn take_news(&mut self) -> Option<End> {
        let mut end = None;
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Happened { sequence, line } => self.tell(sequence, &line),
                News::Answered { client, line } => self.with(client, |visitor| match visitor {
                    Visitor::Client(client) => client.answer(&line),
                    Visitor::Scrape(_) => Ok(()),
                }),
                News::Stop(outcome) => end = Some(End::Near(outcome)),
                News::AllAnswered => end = Some(End::Here),
            }
        }
        end
    }

    /// Tells an event to those who have subscribed.
    fn tell(&mut self, sequence: u64, line: &str) {
        self.each(|visitor| match visitor {
            Visitor::Client(client) => client.tell(sequence, line),
            Visitor::Scrape(_) => Ok(()),
        });
    }

    fn each(&mut self, mut what: impl FnMut(&mut Visitor) -> Result<(), Broken>) {
        let names: Vec<_> = self.visitors.keys().copied().collect();
        for name in names {
            self.with(name, &mut what);
        }
    }

    /// Does something with a visitor, if it is still there; whoever is broken or done goes.
    fn with(&mut self, name: usize, what: impl FnOnce(&mut Visitor) -> Result<(), Broken>) {
        let Some(visitor) = self.visitors.get_mut(&name) else { return };
        match what(visitor) {
            Ok(()) if visitor.is_done() => self.leave(name, None),
            Ok(()) => {}
            Err(error) => self.leave(name, Some(&error)),
        }
    }

    fn leave(&mut self, name: usize, why: Option<&Broken>) {
        let Some(visitor) = self.visitors.remove(&name) else { return };
        let raw = visitor.connection().raw();
        // Closing takes it out as well.
        let _ = self.poll.registry().deregister(&mut SourceFd(&raw));
        match why {
            Some(error @ Broken::Unread) => {
                tracing::warn!("a client of the control socket was dropped: {error}");
            }
            Some(Broken::Io(error)) => tracing::info!(%error, "a client has gone"),
            None => {}
        }
    }
}

fn order(jobs: Option<&Sender<Job>>, client: usize, (id, call): Ordered) -> Result<(), Refusal> {
    let jobs = jobs.ok_or_else(|| Refusal::not_now("the process ends"))?;
    jobs.try_send(Job { client, id, call }).map_err(|_| {
        Refusal::not_now("too many requests are under way: wait for their answers, then try again")
    })
}
