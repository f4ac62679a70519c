//! Hearing page-client, and each of its successors.

use super::{Hello, MAGIC, VERSION, Word, receive_state};
use crate::handoff::framing;
use afterimage::StateSection;
use crossbeam_channel::{Receiver, Sender};
use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long page-client may take to take a guest's memory.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pauses between attempts to find a successor.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// What page-client tells the VMM, or whoever drives its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttachmentEvent {
    /// The memory is there, and served. Told to a [`Driver`](super::Driver), once; a VMM knows it
    /// from [`Attachment::attach`](super::Attachment::attach).
    Attached,
    /// There is no such guest to drive, or another process drives it now, with the reason.
    /// Nothing follows. Told to a [`Driver`](super::Driver).
    Refused(String),
    /// All device state is there. Restore it, then say that it is
    /// [ready](super::Attachment::ready).
    State(Vec<StateSection>),
    /// The guest may run from now on. Told once.
    Run,
    /// Every page is in place; the VMM calls
    /// [`DestinationMemory::all_arrived`](afterimage::DestinationMemory::all_arrived).
    AllArrived,
    /// The source knows it too: the session is over.
    Finished,
    /// page-client is gone. Whoever touches a missing page waits for its successor.
    Lost,
    /// A successor is there.
    Back,
    /// The guest must not run here, or not any more, with the reason.
    NotHere(String),
    /// Something failed, with the reason; whoever touches a missing page waits.
    Failed(String),
}

/// Why memory could not be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Nobody listens there.
    #[error("could not connect to {0}: start page-client --attach unix:{0} first", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// page-client does not take it.
    #[error("page-client refuses the guest's memory: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
    /// The connection failed.
    #[error("could not {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

pub(super) fn io_error(operation: &'static str) -> impl Fn(io::Error) -> AttachError {
    move |source| AttachError::Io { operation, source }
}

/// A connection that outlives page-client.
///
/// Dropped, it hangs up.
#[derive(Debug)]
pub(super) struct Line {
    events: Receiver<AttachmentEvent>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    socket: Option<UnixStream>,
    is_ready: bool,
    has_started: bool,
    is_dropped: bool,
}

impl Line {
    /// Listens on `socket`, and says `again` to each successor of whoever is there.
    pub(super) fn start(socket: UnixStream, path: PathBuf, again: Hello) -> io::Result<Self> {
        let shared = Shared { socket: Some(socket.try_clone()?), ..Shared::default() };
        let shared = Arc::new(Mutex::new(shared));
        let (sender, events) = crossbeam_channel::unbounded();
        let listening = Listening { path, again, shared: Arc::clone(&shared), sender };
        thread::Builder::new()
            .name("attachment".to_owned())
            .spawn(move || listening.run(socket))?;
        Ok(Self { events, shared })
    }

    pub(super) fn next(&self, most: Duration) -> Option<AttachmentEvent> {
        self.events.recv_timeout(most).ok()
    }

    pub(super) fn ready(&self) {
        let mut shared = lock(&self.shared);
        shared.is_ready = true;
        if let Some(socket) = &shared.socket {
            // If it is gone, its successor is told.
            let _ = framing::send(socket, &Word::Ready);
        }
    }

    pub(super) fn started(&self) {
        let mut shared = lock(&self.shared);
        shared.has_started = true;
        if let Some(socket) = &shared.socket {
            // Likewise.
            let _ = framing::send(socket, &Word::Started);
        }
    }

    pub(super) fn withdraw(&self) {
        if let Some(socket) = &lock(&self.shared).socket {
            // If it is gone, it has let go of the guest, or its successor waits for a driver.
            let _ = framing::send(socket, &Word::Withdrawn);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        shared.is_dropped = true;
        if let Some(socket) = shared.socket.take() {
            // The thread that listens ends by it.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether page-client, or its successor, serves the memory.
pub(super) fn is_attached(socket: &UnixStream, operation: &'static str) -> Result<(), AttachError> {
    match framing::receive(socket).map_err(io_error(operation))? {
        Word::Attached => Ok(()),
        Word::Refused { reason } => Err(AttachError::Refused { reason }),
        other => {
            let reason = format!("it says {other:?} out of turn");
            Err(AttachError::Refused { reason })
        }
    }
}

pub(super) fn connect(path: &Path, hello: &Hello) -> io::Result<UnixStream> {
    let socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    framing::send_bytes(&socket, &MAGIC)?;
    framing::send_bytes(&socket, &VERSION.to_le_bytes())?;
    framing::send(&socket, hello)?;
    Ok(socket)
}

/// What is known already: successors say things again.
#[derive(Debug, Default)]
struct Told {
    once: BTreeSet<Once>,
    refusal: Option<String>,
}

/// What is told once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Once {
    Attached,
    State,
    Run,
    AllArrived,
}

impl Told {
    fn is_known(&mut self, what: Once) -> bool {
        !self.once.insert(what)
    }
}

/// The thread that hears page-client, and each of its successors.
struct Listening {
    path: PathBuf,
    /// What is said to each successor.
    again: Hello,
    shared: Arc<Mutex<Shared>>,
    sender: Sender<AttachmentEvent>,
}

impl Listening {
    const fn drives(&self) -> bool {
        matches!(self.again, Hello::Drive { .. })
    }

    fn run(self, mut socket: UnixStream) {
        let mut told = Told::default();
        loop {
            match self.hear(&socket, &mut told) {
                Ok(true) => return,
                Ok(false) => continue,
                Err(error) => tracing::info!(%error, "page-client is gone"),
            }
            lock(&self.shared).socket = None;
            if lock(&self.shared).is_dropped || self.sender.send(AttachmentEvent::Lost).is_err() {
                return;
            }
            match self.find_successor(&mut told) {
                Some(found) => socket = found,
                None => return,
            }
        }
    }

    /// Takes one word; `true` if it was the last.
    fn hear(&self, socket: &UnixStream, told: &mut Told) -> io::Result<bool> {
        let mut is_last = false;
        let event = match framing::receive(socket)? {
            Word::State { sections } => {
                let state = receive_state(socket, sections)?;
                if lock(&self.shared).is_ready {
                    // A successor of the one that brought it; it is restored already.
                    framing::send(socket, &Word::Ready)?;
                    return Ok(false);
                }
                if told.is_known(Once::State) {
                    // It is being restored.
                    return Ok(false);
                }
                AttachmentEvent::State(state)
            }
            Word::Run if told.is_known(Once::Run) => return Ok(false),
            Word::Run => AttachmentEvent::Run,
            Word::AllArrived if told.is_known(Once::AllArrived) => {
                return Ok(false);
            }
            Word::AllArrived => AttachmentEvent::AllArrived,
            Word::Finished => {
                is_last = true;
                AttachmentEvent::Finished
            }
            Word::Refused { reason } if self.drives() => {
                is_last = true;
                AttachmentEvent::Refused(reason)
            }
            Word::NotHere { reason } | Word::Refused { reason } => AttachmentEvent::NotHere(reason),
            Word::Failed { reason } => AttachmentEvent::Failed(reason),
            Word::Attached if told.is_known(Once::Attached) => return Ok(false),
            Word::Attached if self.drives() => AttachmentEvent::Attached,
            Word::Attached => return Ok(false),
            word @ (Word::Ready | Word::Withdrawn | Word::Started) => {
                let what = format!("page-client says {word:?}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        };
        Ok(self.sender.send(event).is_err() || is_last)
    }

    /// Connects until somebody is there again; `None` if nobody wants to know.
    fn find_successor(&self, told: &mut Told) -> Option<UnixStream> {
        let mut pause = FIRST_PAUSE;
        loop {
            if lock(&self.shared).is_dropped {
                return None;
            }
            let begun = Instant::now();
            match self.return_to_it() {
                Ok(socket) => {
                    self.sender.send(AttachmentEvent::Back).ok()?;
                    return Some(socket);
                }
                Err(AttachError::Refused { reason }) => {
                    if told.refusal.as_ref() != Some(&reason) {
                        told.refusal = Some(reason.clone());
                        let reason = format!("whoever is at page-client's place refuses: {reason}");
                        self.sender.send(AttachmentEvent::Failed(reason)).ok()?;
                    }
                    pause = LAST_PAUSE;
                }
                Err(error) => tracing::debug!(%error, "no successor of page-client yet"),
            }
            thread::sleep(pause.saturating_sub(begun.elapsed()));
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    fn return_to_it(&self) -> Result<UnixStream, AttachError> {
        let wrap = || io_error("return to page-client");
        let socket = connect(&self.path, &self.again)
            .map_err(|source| AttachError::Connect { path: self.path.clone(), source })?;
        if !self.drives() {
            is_attached(&socket, "return to page-client")?;
        }
        socket.set_read_timeout(None).map_err(wrap())?;
        let mut shared = lock(&self.shared);
        // Nobody would hear what comes, and page-client would take it for heard.
        if shared.is_dropped {
            return Err(wrap()(io::ErrorKind::NotConnected.into()));
        }
        if shared.is_ready {
            framing::send(&socket, &Word::Ready).map_err(wrap())?;
        }
        if shared.has_started {
            framing::send(&socket, &Word::Started).map_err(wrap())?;
        }
        shared.socket = Some(socket.try_clone().map_err(wrap())?);
        Ok(socket)
    }
}
