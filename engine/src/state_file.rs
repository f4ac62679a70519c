//! What a session has durably recorded, in a file: who owns the guest, in which session and
//! epoch.
//!
//! Answers for the file: that one process at a time uses it, that it is replaced whole or not
//! at all, and that it is believed only where it can be right. What the record means is the
//! session's affair.
//!
//! Invariant: after [`StateFile::write`] has returned success the new record survives a power
//! failure; until then the old one does, whatever fails. No record is ever overwritten by a
//! process that has not read it, and what cannot be understood is left as it is.
//!
//! The form is text, for people: a line with the version, lines `key=value`, and a CRC-32C of
//! all that. `text` reads and writes it.

mod error;
mod text;

pub use error::StateFileError;
pub use text::LayoutDigest;

use crate::destination::{DestinationLedger, DestinationOwnership, DestinationRecord};
use crate::source::{
    Incarnation, SessionId, SourceLedger, SourceOwnership, SourcePages, SourceRecord,
};
use afterimage_protocol::layout::GuestLayout;
use afterimage_protocol::wire::Epoch;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use text::Text;

/// The longest state file that is read, in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// A record that a state file can hold: [`SourceRecord`] or [`DestinationRecord`].
pub trait StateRecord: text::Fields {}

impl StateRecord for SourceRecord {}
impl StateRecord for DestinationRecord {}

/// The state file of a source.
pub type SourceStateFile = StateFile<SourceRecord>;
/// The state file of a destination.
pub type DestinationStateFile = StateFile<DestinationRecord>;

/// The durable record of one side of a session, in a file.
///
/// A file has one user at a time: it is locked, by a file beside it with the ending `.lock`
/// which stays there, from [`open`](Self::open) until this and every ledger made of it are
/// dropped. Beside the record a file has [notes](Self::note), and keeps what a newer release
/// has put there.
///
/// Methods may be called from any thread. Those that write wait for the disk.
#[derive(Debug)]
pub struct StateFile<R: StateRecord> {
    shared: Arc<Mutex<Shared<R>>>,
}

impl<R: StateRecord> Clone for StateFile<R> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

#[derive(Debug)]
struct Shared<R> {
    path: PathBuf,
    /// Nothing has been recorded yet if there is none.
    text: Option<Text<R>>,
    /// Held as long as anybody may write.
    _lock: Flock<File>,
}

impl<R: StateRecord> StateFile<R> {
    /// Locks a state file and reads what is there; that there is no file yet is no error. What
    /// has been read is made durable first, because it may be acted on.
    ///
    /// # Errors
    /// [`StateFileError`] if another process uses it, or if it cannot be read or believed. It
    /// is left as it is.
    pub fn open(path: &Path) -> Result<Self, StateFileError> {
        let path = resolve(path)?;
        let lock = lock(&path)?;
        let text = match read(&path)? {
            None => None,
            Some(bytes) => Some(Text::decode(&bytes).map_err(|wrong| wrong.at(&path))?),
        };
        Ok(Self { shared: Arc::new(Mutex::new(Shared { path, text, _lock: lock })) })
    }

    /// What is durably recorded; `None` if nothing is yet.
    #[must_use]
    pub fn record(&self) -> Option<R> {
        self.lock().text.as_ref().map(|text| text.record)
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.lock().path.clone()
    }

    /// Takes up the record that is there, if it is of this memory, or records `fresh`.
    ///
    /// # Errors
    /// [`StateFileError`] if the record is of memory with another layout (addresses, lengths
    /// and page sizes of the regions), or cannot be made durable.
    pub fn begin(&self, layout: &GuestLayout, fresh: R) -> Result<R, StateFileError> {
        let mut shared = self.lock();
        let here = LayoutDigest::of(layout);
        if let Some(text) = &shared.text {
            if text.layout != here {
                let (there, path) = (text.layout, shared.path.clone());
                return Err(StateFileError::Layout { path, there, here });
            }
            return Ok(text.record);
        }
        shared.replace(Text::new(fresh, here))?;
        Ok(fresh)
    }

    /// Forgets what is there and records `fresh`, of memory with this layout. Only for a record
    /// that binds nobody any more: at a source one that says
    /// [`Owner`](SourceOwnership::Owner), if its guest is not served from that memory again; at
    /// a destination one that says [`Waiting`](DestinationOwnership::Waiting), if its memory is
    /// gone. Notes are forgotten too.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn begin_anew(&self, layout: &GuestLayout, fresh: R) -> Result<R, StateFileError> {
        self.lock().replace(Text::new(fresh, LayoutDigest::of(layout)))?;
        Ok(fresh)
    }

    /// Records `record`. Waits until it would survive a power failure.
    ///
    /// # Errors
    /// [`StateFileError`] if it cannot be made durable, or nothing has been
    /// [begun](Self::begin).
    pub fn write(&self, record: &R) -> Result<(), StateFileError> {
        let mut shared = self.lock();
        let text = shared.begun()?.with(*record);
        shared.replace(text)
    }

    /// Records a remark for whoever reads or continues the session: `key` of lower-case
    /// letters, digits and `_`, and any text; characters that control a terminal become `?`.
    /// Waits until it is durable.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn note(&self, key: &str, value: &str) -> Result<(), StateFileError> {
        let mut shared = self.lock();
        let text = shared.begun()?.with_note(key, value);
        shared.replace(text)
    }

    /// A remark that was recorded.
    #[must_use]
    pub fn noted(&self, key: &str) -> Option<String> {
        self.lock().text.as_ref()?.noted(key).map(str::to_owned)
    }

    fn lock(&self) -> MutexGuard<'_, Shared<R>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateFile<SourceRecord> {
    /// For a source that is to continue what the file says, or to begin and be remembered
    /// there: what to give to [`SourceOptions`](crate::SourceOptions). The file stays locked
    /// as long as the ledger lives.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`begin`](Self::begin).
    pub fn open_or_create(
        path: &Path,
        layout: &GuestLayout,
    ) -> Result<(SourceRecord, SourceLedger), StateFileError> {
        let file = Self::open(path)?;
        let record = file.begin(layout, Self::fresh())?;
        Ok((record, file.ledger()))
    }

    /// The record of a new session with a random id.
    #[must_use]
    pub fn fresh() -> SourceRecord {
        SourceRecord::new(SessionId(crate::sys::random_id()))
    }

    /// A ledger that writes to this file.
    #[must_use]
    pub fn ledger(&self) -> SourceLedger {
        let file = self.clone();
        SourceLedger::new(move |record| file.write(record).map_err(StateFileError::into_io))
    }

    /// An operator declares that the destination is dead and will never run the guest: the
    /// guest is the source's again, as of the switchover. The epoch grows, and a source that
    /// is started with this record refuses the destination if it comes back. An operator is
    /// believed: whoever fences a destination that runs has two guests.
    ///
    /// Waits until it is durable. A session that was fenced already stays so.
    ///
    /// # Errors
    /// [`StateFileError`] if nothing is recorded, the session is over, or it cannot be made
    /// durable.
    pub fn fence(&self) -> Result<SourceRecord, StateFileError> {
        let mut shared = self.lock();
        let text = shared.begun()?;
        let mut next = text.record;
        let why = match next.ownership {
            SourceOwnership::Given if next.pages == SourcePages::Released => Some(
                "pages that had arrived were freed here (--release): the guest exists only at the \
                 destination, and if that is dead it is lost",
            ),
            SourceOwnership::Fenced => return Ok(next),
            SourceOwnership::Owner | SourceOwnership::Given => None,
            SourceOwnership::Reclaimed => Some("the source has taken the guest back already"),
            SourceOwnership::Finished => Some("the destination has everything: the guest is there"),
        };
        if let Some(why) = why {
            return Err(StateFileError::Fence { path: shared.path.clone(), why });
        }
        (next.epoch, next.ownership) = (next.epoch.next(), SourceOwnership::Fenced);
        let text = text.with(next);
        shared.replace(text)?;
        Ok(next)
    }
}

impl StateFile<DestinationRecord> {
    /// For a destination that is to continue what the file says, or to begin and be
    /// remembered there: what to give to [`DestinationOptions`](crate::DestinationOptions).
    /// The file stays locked as long as the ledger lives.
    ///
    /// A record names the destination's memory, its incarnation. If that memory is gone, the
    /// record must not be continued: remove the file, if the guest has not run here.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`begin`](Self::begin).
    pub fn open_or_create(
        path: &Path,
        layout: &GuestLayout,
    ) -> Result<(DestinationRecord, DestinationLedger), StateFileError> {
        let file = Self::open(path)?;
        let record = file.begin(layout, Self::fresh())?;
        Ok((record, file.ledger()))
    }

    /// The record of new memory, with a random incarnation, that belongs to no session yet.
    #[must_use]
    pub fn fresh() -> DestinationRecord {
        DestinationRecord {
            session: SessionId::UNKNOWN,
            incarnation: Incarnation(crate::sys::random_id()),
            epoch: Epoch::default(),
            ownership: DestinationOwnership::Waiting,
        }
    }

    /// A ledger that writes to this file.
    #[must_use]
    pub fn ledger(&self) -> DestinationLedger {
        let file = self.clone();
        DestinationLedger::new(move |record| file.write(record).map_err(StateFileError::into_io))
    }
}

impl<R: StateRecord> Shared<R> {
    fn begun(&self) -> Result<&Text<R>, StateFileError> {
        self.text.as_ref().ok_or_else(|| StateFileError::Empty { path: self.path.clone() })
    }

    /// Puts a new content in the place of the old one, durably.
    fn replace(&mut self, text: Text<R>) -> Result<(), StateFileError> {
        let new = beside(&self.path, ".new");
        let wrap = |operation| {
            let path = self.path.clone();
            move |source| StateFileError::Io { operation, path, source }
        };
        let written = write_new(&new, &text.encode()).map_err(wrap("write"));
        if let Err(error) =
            written.and_then(|()| fs::rename(&new, &self.path).map_err(wrap("replace")))
        {
            // The old record is what counts; what is left of the new one is in nobody's way.
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        if let Err(error) = sync_directory(&self.path) {
            // Whether it would survive is not known. It must not count, and so not be read by a
            // later process either.
            self.put_back(&new);
            return Err(wrap("make durable")(error));
        }
        self.text = Some(text);
        Ok(())
    }

    /// The old content takes the place of the new one again.
    fn put_back(&self, new: &Path) {
        let restored = match &self.text {
            Some(old) => write_new(new, &old.encode()).and_then(|()| fs::rename(new, &self.path)),
            None => fs::remove_file(&self.path),
        };
        if let Err(error) = restored {
            let path = self.path.display();
            tracing::error!(%error, %path, "a record that does not count stays in the state file");
        }
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// The file that a path stands for, so that a rename replaces that and not a link to it.
fn resolve(path: &Path) -> Result<PathBuf, StateFileError> {
    let wrap = |source| StateFileError::Io { operation: "open", path: path.to_owned(), source };
    match path.canonicalize() {
        Ok(path) => Ok(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let Some(name) = path.file_name() else { return Err(wrap(error)) };
            let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
            let directory = directory.unwrap_or(Path::new("."));
            Ok(directory.canonicalize().map_err(wrap)?.join(name))
        }
        Err(error) => Err(wrap(error)),
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Locks a file beside the state file, which is replaced at each write and so holds no lock.
fn lock(path: &Path) -> Result<Flock<File>, StateFileError> {
    let at = beside(path, ".lock");
    let wrap = |source| StateFileError::Io { operation: "lock", path: at.clone(), source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&at).map_err(wrap)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            // For the message below only.
            let _ = lock.set_len(0).and_then(|()| writeln!(*lock, "{}", std::process::id()));
            Ok(lock)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut pid = String::new();
            // Without a number the message says "another process".
            let _ = file.read_to_string(&mut pid);
            Err(StateFileError::InUse { path: path.to_owned(), pid: pid.trim().parse().ok() })
        }
        Err((_, errno)) => Err(wrap(errno.into())),
    }
}

/// The bytes of the file, durable, if there is one.
fn read(path: &Path) -> Result<Option<Vec<u8>>, StateFileError> {
    let wrap = |source| StateFileError::Io { operation: "read", path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrap(error)),
    };
    let metadata = file.metadata().map_err(wrap)?;
    if !metadata.is_file() || metadata.len() > MAX_BYTES {
        return Err(StateFileError::Stranger { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    (&file).take(MAX_BYTES).read_to_end(&mut bytes).map_err(wrap)?;
    file.sync_all().and_then(|()| sync_directory(path)).map_err(wrap)?;
    Ok(Some(bytes))
}
