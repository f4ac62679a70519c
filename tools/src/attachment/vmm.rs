//! The VMM's side: attach, hear what page-client says, and find its successor.

use super::{Hello, MAGIC, RegionOfVmm, VERSION, Word, receive_state};
use crate::handoff::framing;
use afterimage::{DestinationMemory, StateSection};
use crossbeam_channel::{Receiver, Sender};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
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

fn io_error(operation: &'static str) -> impl Fn(io::Error) -> AttachError {
    move |source| AttachError::Io { operation, source }
}

/// Guest memory that a page-client serves. Methods may be called from any thread.
///
/// Dropped, it hangs up; page-client serves on, for the VMM may come back.
#[derive(Debug)]
pub struct Attachment {
    events: Receiver<AttachmentEvent>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    socket: Option<UnixStream>,
    is_ready: bool,
    is_dropped: bool,
}

impl Attachment {
    /// Hands memory over to the page-client that listens on the Unix socket `path`. `name`
    /// says whose it is, the same after a restart of page-client. When this returns, faults
    /// are answered as soon as the source has given the guest. Keep `memory` until
    /// [`AttachmentEvent::AllArrived`].
    ///
    /// Blocks until page-client has taken it, 30 s at most.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(
        path: &Path,
        name: &str,
        memory: &DestinationMemory,
    ) -> Result<Self, AttachError> {
        let wrap = io_error("duplicate descriptors of guest memory");
        let (regions, descriptors) = describe(memory).map_err(wrap)?;
        let (name, files) = (name.to_owned(), descriptors.len() - 1);
        let hello = Hello::Attach { name: name.clone(), files, regions };
        let socket = connect(path, &hello)
            .map_err(|source| AttachError::Connect { path: path.to_owned(), source })?;
        let ending = socket.try_clone().map_err(io_error("duplicate the connection"))?;
        let attached = hand_over(&socket, &descriptors).and_then(|()| {
            Self::listen(socket, path.to_owned(), name).map_err(io_error("start a thread"))
        });
        if attached.is_err() {
            // Or page-client would serve memory that nobody comes back for. It may be gone.
            let _ = framing::send(&ending, &Word::Withdrawn);
        }
        attached
    }

    fn listen(socket: UnixStream, path: PathBuf, name: String) -> io::Result<Self> {
        let shared = Shared { socket: Some(socket.try_clone()?), ..Shared::default() };
        let shared = Arc::new(Mutex::new(shared));
        let (sender, events) = crossbeam_channel::unbounded();
        let listening = Listening { path, name, shared: Arc::clone(&shared), sender };
        thread::Builder::new()
            .name("attachment".to_owned())
            .spawn(move || listening.run(socket))?;
        Ok(Self { events, shared })
    }

    /// Waits for the next event, for `most` at most; `None` if none came or none will come.
    #[must_use]
    pub fn next(&self, most: Duration) -> Option<AttachmentEvent> {
        self.events.recv_timeout(most).ok()
    }

    /// The device state is restored: [`AttachmentEvent::Run`] follows when the source has
    /// given the guest away. Said again to a successor of page-client without a call.
    pub fn ready(&self) {
        let mut shared = lock(&self.shared);
        shared.is_ready = true;
        if let Some(socket) = &shared.socket {
            // If it is gone, its successor is told.
            let _ = framing::send(socket, &Word::Ready);
        }
    }
}

impl Drop for Attachment {
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

/// The regions, and the userfaultfd and the files behind them.
fn describe(memory: &DestinationMemory) -> io::Result<(Vec<RegionOfVmm>, Vec<OwnedFd>)> {
    let mut descriptors = vec![memory.userfaultfd()?];
    let regions = memory.layout().regions().iter().enumerate().map(|(index, region)| {
        let file = memory.file(index)?.map(|(file, offset)| {
            descriptors.push(file);
            (descriptors.len() - 2, offset)
        });
        Ok(RegionOfVmm {
            guest_address: region.guest_address.0,
            address: region.registered.unwrap_or_default().0,
            length: region.length,
            page_size: region.page_size.bytes(),
            file,
        })
    });
    let regions = regions.collect::<io::Result<_>>()?;
    Ok((regions, descriptors))
}

/// Waits until page-client has taken it.
fn hand_over(socket: &UnixStream, descriptors: &[OwnedFd]) -> Result<(), AttachError> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if let Err(source) = framing::send_files(socket, &borrowed) {
        // It may have said why it stopped listening.
        return Err(match framing::receive(socket) {
            Ok(Word::Refused { reason }) => AttachError::Refused { reason },
            _ => AttachError::Io { operation: "hand guest memory over", source },
        });
    }
    is_attached(socket, "hear whether memory was taken")?;
    socket.set_read_timeout(None).map_err(io_error("wait for page-client without a limit"))
}

/// Whether page-client, or its successor, serves the memory.
fn is_attached(socket: &UnixStream, operation: &'static str) -> Result<(), AttachError> {
    match framing::receive(socket).map_err(io_error(operation))? {
        Word::Attached => Ok(()),
        Word::Refused { reason } => Err(AttachError::Refused { reason }),
        other => {
            let reason = format!("it says {other:?} out of turn");
            Err(AttachError::Refused { reason })
        }
    }
}

fn connect(path: &Path, hello: &Hello) -> io::Result<UnixStream> {
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
struct Listening {
    path: PathBuf,
    name: String,
    shared: Arc<Mutex<Shared>>,
    sender: Sender<AttachmentEvent>,
}

impl Listening {
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
