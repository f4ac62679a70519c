//! What survives this process: who has the guest, in a state file, and the guest itself, in
//! files or at a keeper.
//!
//! Invariant: a session is continued only with the memory that it was begun with, and a guest
//! whose memory is gone is said to be lost, never replaced by another in the same session.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use afterimage::{
    GuestLayout, Release, ReleaseLedger, SourceLedger, SourceOptions, SourceOwnership,
    SourceRecord, SourceStateFile, StateFileError,
};

use super::failure::{Failure, chain};
use super::holding::{Holding, Kept};
use super::options::Options;
use super::progress::Progress;
use crate::handoff::Offer;

/// In the state file: where the guest's memory is.
const PLACE: &str = "guest_at";
/// In the state file: that the guest was taken from a VMM.
const TAKEN: &str = "taken";
/// In the state file: that the destination was told that the session is over.
const BYE: &str = "bye";
const YES: &str = "yes";

/// What survives this process, which may be nothing.
pub(super) struct Survival {
    file: Option<SourceStateFile>,
    pub(super) holding: Option<Holding>,
}

/// What the processes before this one have come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Past {
    /// It goes on, or begins.
    Open,
    /// The destination has everything, but may not know it.
    Complete,
    /// The same, and it was told so.
    Finished,
    /// Fenced: destinations are refused.
    Fenced,
}

/// What a session is begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// The same as before, if there was a session before.
    Same,
    /// A guest that was not here before.
    New,
}

/// Which pages were freed is noted beside the state file.
fn released_beside(state: &Path) -> PathBuf {
    let mut name = state.as_os_str().to_owned();
    name.push(".released");
    name.into()
}

/// The file in which it is noted, emptied for a session that begins. Its name is durable when
/// this returns.
fn open_ledger(path: &Path, begins: bool) -> io::Result<File> {
    let mut how = OpenOptions::new();
    let file = how.read(true).write(true).create(true).truncate(begins).mode(0o600).open(path)?;
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(file)
}

impl Survival {
    /// Takes the state file, which nobody else may use.
    pub(super) fn open(options: &Options) -> Result<Self, Failure> {
        let file = options.state.as_deref().map(SourceStateFile::open).transpose();
        Ok(Self { file: file.map_err(|error| failure(&error))?, holding: None })
    }

    pub(super) const fn state_file(&self) -> Option<&SourceStateFile> {
        self.file.as_ref()
    }

    pub(super) fn record(&self) -> Option<SourceRecord> {
        self.file.as_ref()?.record()
    }

    /// What the record says of the session.
    pub(super) fn past(&self) -> Result<Past, Failure> {
        let Some((file, record)) = self.file.as_ref().zip(self.record()) else {
            return Ok(Past::Open);
        };
        match record.ownership {
            SourceOwnership::Owner | SourceOwnership::Given => Ok(Past::Open),
            SourceOwnership::Finished if file.noted(BYE).is_some() => Ok(Past::Finished),
            SourceOwnership::Finished => Ok(Past::Complete),
            SourceOwnership::Fenced => Ok(Past::Fenced),
            SourceOwnership::Reclaimed => Err(Failure::new(format!(
                "session {} is over: the guest was taken back, and is this side's; to serve it in \
                 a new session remove {} or give another --state",
                record.session,
                file.path().display()
            ))),
        }
    }

    /// Connects to the keeper, if there is to be one.
    pub(super) fn connect(&mut self, options: &Options) -> Result<(), Failure> {
        if let (Some(address), Some(guest)) = (&options.keeper, &options.guest) {
            self.holding = Some(Holding::connect(address, guest)?);
        }
        Ok(())
    }

    /// The guest of a process before this one, if there is one and the keeper has it.
    pub(super) fn fetch(&mut self, options: &Options) -> Result<Option<Kept>, Failure> {
        let kept = self.claim()?;
        if kept.is_some() || self.file.is_none() {
            return Ok(kept);
        }
        match &self.holding {
            // A guest in files is there as long as they are.
            None if options.handoff.is_some() => {
                self.check_not_lost("page-server has died without a keeper")?;
            }
            None => {}
            Some(holding) => {
                self.check_not_lost("the keeper does not hold it any more")?;
                if options.handoff.is_none() {
                    return Err(Failure::new(format!(
                        "there is no {}: store it there, or take it from a VMM with --handoff",
                        holding.place()
                    )));
                }
            }
        }
        Ok(None)
    }

    /// The guest at the keeper, which must be this session's.
    pub(super) fn claim(&mut self) -> Result<Option<Kept>, Failure> {
        let record = self.record();
        let Some((file, holding)) = self.file.as_ref().zip(self.holding.as_mut()) else {
            return Ok(None);
        };
        let Some(kept) = holding.fetch()? else { return Ok(None) };
        if record.is_some_and(|record| record.session == kept.guest.session) {
            return Ok(Some(kept));
        }
        let recorded = record
            .map_or_else(|| "nothing".to_owned(), |record| format!("session {}", record.session));
        Err(Failure::new(format!(
            "{} is of session {}, and {} records {recorded}: give the state file of that session; \
             only if no other host has or gets that guest, remove it at the keeper",
            holding.place(),
            kept.guest.session,
            file.path().display()
        )))
    }

    /// Whether the memory is there from which a destination that has everything, and may not
    /// know it, can be told so.
    pub(super) fn can_say_bye(&mut self, options: &Options, progress: &Progress) -> bool {
        let is_kept = self.connect(options).and_then(|()| self.claim());
        // The claim is made again by whoever serves.
        let is_handed_over = options.handoff.is_some() || self.holding.take().is_some();
        match is_kept {
            Ok(kept) => !is_handed_over || kept.is_some(),
            Err(error) => {
                progress.say(&format!("warning: {error}"));
                false
            }
        }
    }

    /// Lets the keeper let go of what is left of a session that is over, if it is that
    /// session's.
    pub(super) fn tidy(&mut self, options: &Options, progress: &Progress) {
        let claimed = self.connect(options).and_then(|()| self.claim());
        match (claimed, &mut self.holding) {
            (Ok(Some(_)), Some(holding)) => holding.remove(progress),
            (Ok(_), _) => {}
            (Err(error), _) => progress.say(&format!("warning: {error}")),
        }
    }

    fn check_not_lost(&self, why: &str) -> Result<(), Failure> {
        let Some((file, record)) = self.file.as_ref().zip(self.record()) else { return Ok(()) };
        let was_here = record.ownership != SourceOwnership::Owner || file.noted(TAKEN).is_some();
        if !was_here {
            return Ok(());
        }
        Err(Failure::new(format!(
            "the guest of session {} is lost: {why}, and a destination that has not got all of it \
             cannot go on; to serve another guest remove {} or give another --state",
            record.session,
            file.path().display()
        )))
    }

    /// Begins or continues the session: what it is to be served with.
    pub(super) fn begin(
        &self,
        layout: &GuestLayout,
        memory: Memory,
        options: &mut SourceOptions,
    ) -> Result<Option<SourceRecord>, Failure> {
        let Some(file) = &self.file else { return Ok(None) };
        let before = file.record();
        let fresh = SourceStateFile::fresh();
        options.record = match memory {
            Memory::Same => file.begin(layout, fresh),
            // The session before has never had a guest.
            Memory::New => file.begin_anew(layout, fresh),
        }
        .map_err(|error| failure(&error))?;
        options.ledger = file.ledger();
        if matches!(options.release, Release::Free(_)) {
            let freed = open_ledger(
                &released_beside(&file.path()),
                before.is_none() || memory == Memory::New,
            );
            let freed = freed.map_err(Failure::of("open the file of what was freed"))?;
            options.release = Release::Free(ReleaseLedger::file(freed.into()));
        }
        Ok(before.filter(|_| memory == Memory::Same))
    }

    /// A ledger and a record for a session that is over.
    pub(super) fn ledger(&self) -> SourceLedger {
        self.file.as_ref().map_or_else(SourceLedger::volatile, SourceStateFile::ledger)
    }

    /// Notes that the guest is at the keeper.
    pub(super) fn note_kept(&self, progress: &Progress) {
        if let Some(holding) = &self.holding {
            self.note_place(&holding.place(), progress);
        }
    }

    /// Notes in which files the guest is.
    pub(super) fn note_files(&self, options: &Options, progress: &Progress) {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let pieces = options.memory.iter().map(|piece| absolute(&piece.path));
        let files = pieces.chain(options.layout.iter().map(|path| absolute(path)));
        let files: Vec<_> = files.map(|path| path.display().to_string()).collect();
        self.note_place(&files.join(", "), progress);
    }

    /// Notes where the guest is, for people.
    fn note_place(&self, place: &str, progress: &Progress) {
        self.note(PLACE, place, progress);
    }

    /// Where the guest is.
    pub(super) fn place(&self) -> Option<String> {
        self.file.as_ref()?.noted(PLACE)
    }

    /// A VMM gives its guest at this moment. On an error nobody but the VMM has it.
    pub(super) fn keep(&mut self, offer: &Offer, progress: &Progress) -> Result<(), String> {
        if let (Some(holding), Some(record)) =
            (&mut self.holding, self.file.as_ref().and_then(SourceStateFile::record))
        {
            holding.store(offer, record.session, progress)?;
        }
        self.note_kept(progress);
        self.note(TAKEN, YES, progress);
        Ok(())
    }

    /// The destination was told that the session is over.
    pub(super) fn said_bye(&mut self, progress: &Progress) {
        self.note(BYE, YES, progress);
        if let Some(holding) = &mut self.holding {
            holding.remove(progress);
        }
    }

    /// Whether page-server, started again, would go on.
    pub(super) fn has_successor(&self, is_in_files: IsInFiles) -> bool {
        let is_kept = self.holding.as_ref().is_some_and(Holding::holds);
        self.file.is_some() && (is_in_files == IsInFiles::Yes || is_kept)
    }

    /// Notes are for people, and for better messages: nothing goes wrong without.
    fn note(&self, key: &str, value: &str, progress: &Progress) {
        let Some(file) = &self.file else { return };
        if file.noted(key).as_deref() == Some(value) {
            return;
        }
        if let Err(error) = file.note(key, value) {
            progress.say(&format!("warning: {}", chain(&error)));
        }
    }
}

/// Whether guest memory is in files, which stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IsInFiles {
    Yes,
    No,
}

pub(super) fn failure(error: &StateFileError) -> Failure {
    Failure::new(chain(error))
}
