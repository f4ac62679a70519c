//! Hearing page-client, and each of its successors.

use super::{Hello, MAGIC, VERSION, Word, receive_state};
use crate::handoff::framing;
use afterimage::StateSection;
use crossbeam_channel::Sender;
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

/// What page-client tells the VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AttachmentEvent {
    /// All device state is there. Restore it, then call [`Attachment::ready`].
    State(Vec<StateSection>),
    /// The guest may run from now on. Told once.
    Run,
    /// Every page is in place; call [`DestinationMemory::all_arrived`].
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

#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) socket: Option<UnixStream>,
    pub(super) is_ready: bool,
    pub(super) is_dropped: bool,
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
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

/// What the VMM knows already: successors say things again.
#[derive(Debug, Default)]
struct Told {
    state: bool,
    run: bool,
    all_arrived: bool,
    refusal: Option<String>,
}

/// The thread that hears page-client, and each of its successors.
pub(super) struct Listening {
    pub(super) path: PathBuf,
    pub(super) name: String,
    pub(super) shared: Arc<Mutex<Shared>>,
    pub(super) sender: Sender<AttachmentEvent>,
}

impl Listening {
    pub(super) fn run(self, mut socket: UnixStream) {
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
                if std::mem::replace(&mut told.state, true) {
                    // It is being restored.
                    return Ok(false);
                }
                AttachmentEvent::State(state)
            }
            Word::Run if std::mem::replace(&mut told.run, true) => return Ok(false),
            Word::Run => AttachmentEvent::Run,
            Word::AllArrived if std::mem::replace(&mut told.all_arrived, true) => {
                return Ok(false);
            }
            Word::AllArrived => AttachmentEvent::AllArrived,
            Word::Finished => {
                is_last = true;
                AttachmentEvent::Finished
            }
            Word::NotHere { reason } | Word::Refused { reason } => AttachmentEvent::NotHere(reason),
            Word::Failed { reason } => AttachmentEvent::Failed(reason),
            Word::Attached => return Ok(false),
            word @ (Word::Ready | Word::Withdrawn) => {
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
        let hello = Hello::Return { name: self.name.clone() };
        let socket = connect(&self.path, &hello)
            .map_err(|source| AttachError::Connect { path: self.path.clone(), source })?;
        is_attached(&socket, "return to page-client")?;
        socket.set_read_timeout(None).map_err(wrap())?;
        let mut shared = lock(&self.shared);
        if shared.is_ready {
            framing::send(&socket, &Word::Ready).map_err(wrap())?;
        }
        shared.socket = Some(socket.try_clone().map_err(wrap())?);
        Ok(socket)
    }
}
