//! One guest's place at a keeper, as a client sees it: stored, fetched after a death, stored
//! again if the keeper dies, removed when it is over.
//!
//! Invariant: what is held there is also here, so that the death of the keeper alone loses
//! nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use afterimage::Address;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::client::{Keeper, KeeperError, NamedFile, borrowed};
use super::line;
use super::words::Why;

/// Between attempts to find a keeper again.
const PAUSE: Duration = Duration::from_secs(1);

/// A guest's place at a keeper.
pub(crate) struct Place {
    path: PathBuf,
    guest: String,
    /// Who this is, for the keeper.
    who: &'static str,
    /// Only while there is a guest: a client without a claim is let go after a while.
    keeper: Option<Keeper>,
    /// What is held there. Empty without a guest.
    set: Vec<NamedFile>,
    tried: Instant,
    /// Why the last attempt to store it again failed.
    complaint: Option<String>,
}

impl Place {
    /// Connects to the keeper, so that a wrong address shows at once.
    ///
    /// # Errors
    /// In one line.
    pub(crate) fn connect(
        path: &Path,
        guest: &str,
        who: &'static str,
    ) -> Result<Self, KeeperError> {
        let keeper = Some(Keeper::connect(path, who)?);
        let (path, guest, tried) = (path.to_owned(), guest.to_owned(), Instant::now());
        Ok(Self { path, guest, who, keeper, set: Vec::new(), tried, complaint: None })
    }

    /// The guest's name there.
    pub(crate) fn guest(&self) -> &str {
        &self.guest
    }

    /// Where it is, in words.
    pub(crate) fn name(&self) -> String {
        format!("{} at the keeper unix:{}", self.guest, self.path.display())
    }

    /// Claims the guest and fetches its set, if there is one.
    ///
    /// # Errors
    /// Also if another process has it.
    pub(crate) fn fetch(&mut self) -> Result<Option<Vec<NamedFile>>, KeeperError> {
        let Some(keeper) = &mut self.keeper else { return Ok(None) };
        match keeper.claim(&self.guest) {
            Err(error) if error.is(Why::NotThere) => {
                self.keeper = None;
                return Ok(None);
            }
            other => other?,
        }
        keeper.fetch(&self.guest).map(Some)
    }

    /// This set, which was fetched, is what is to be held.
    pub(crate) fn holds_this(&mut self, set: Vec<NamedFile>) {
        self.set = set;
    }

    /// Stores a guest, and descriptors beside it that are let go later. On an error the keeper
    /// does not have it.
    ///
    /// # Errors
    /// In one line.
    pub(crate) fn store(
        &mut self,
        set: Vec<NamedFile>,
        beside: &[(&str, BorrowedFd<'_>)],
        say: impl Fn(&str),
    ) -> Result<(), String> {
        self.set = set;
        let mut all = borrowed(&self.set);
        all.extend(beside);
        let connected = Keeper::connect(&self.path, self.who);
        let stored = connected.and_then(|mut keeper| {
            keeper.store(&self.guest, &all)?;
            Ok(keeper)
        });
        match stored {
            Ok(keeper) => {
                self.keeper = Some(keeper);
                Ok(())
            }
            // It may have it after all, and a successor may find it there: so it counts.
            Err(error @ KeeperError::InDoubt { .. }) => {
                self.lost(&line(&error), say);
                Ok(())
            }
            Err(error) => {
                self.set.clear();
                Err(line(&error))
            }
        }
    }

    /// Lets go of descriptors that were stored beside the guest.
    pub(crate) fn let_go(&mut self, names: &[&str], say: impl Fn(&str)) {
        let Some(keeper) = &mut self.keeper else { return };
        if let Err(error) = keeper.let_go(&self.guest, names) {
            self.lost(&line(&error), say);
        }
    }

    /// Notices that the keeper is gone, and stores the guest again when one is there. Waits
    /// for a keeper that does not answer, some seconds.
    pub(crate) fn look(&mut self, say: impl Fn(&str)) {
        if self.set.is_empty() {
            return;
        }
        if let Some(keeper) = &self.keeper {
            let mut fds = [PollFd::new(keeper.as_fd(), PollFlags::POLLIN)];
            // Nothing comes unasked but the end.
            if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
                self.lost("it has ended", say);
            }
            return;
        }
        if self.tried.elapsed() < PAUSE {
            return;
        }
        self.tried = Instant::now();
        let Ok(mut keeper) = Keeper::connect(&self.path, self.who) else { return };
        // What was stored in doubt may be there.
        let claimed = match keeper.claim(&self.guest) {
            Err(error) if error.is(Why::NotThere) => Ok(()),
            other => other,
        };
        match claimed.and_then(|()| keeper.store(&self.guest, &borrowed(&self.set))) {
            Ok(()) => {
                say("the keeper holds the guest again");
                (self.keeper, self.complaint) = (Some(keeper), None);
            }
            Err(error) => {
                let complaint = Some(line(&error));
                if self.complaint != complaint {
                    tracing::warn!(complaint, "the keeper does not take the guest again");
                }
                self.complaint = complaint;
            }
        }
    }

    /// Whether a successor would find the guest.
    pub(crate) const fn holds(&self) -> bool {
        self.keeper.is_some() && !self.set.is_empty()
    }

    /// The guest is elsewhere for good, or gone. Also where the keeper has it in doubt.
    pub(crate) fn remove(&mut self, say: impl Fn(&str)) {
        if std::mem::take(&mut self.set).is_empty() {
            return;
        }
        let keeper = self.keeper.take().map_or_else(|| Keeper::connect(&self.path, self.who), Ok);
        match keeper.and_then(|mut keeper| keeper.remove(&self.guest)) {
            // A keeper that is not there holds nothing.
            Ok(()) | Err(KeeperError::Connect { .. }) => {}
            Err(error) if error.is(Why::NotThere) => {}
            Err(error) => say(&format!(
                "warning: the guest is over, and the keeper may still hold it: {}",
                line(&error)
            )),
        }
    }

    fn lost(&mut self, why: &str, say: impl Fn(&str)) {
        self.keeper = None;
        self.tried = Instant::now();
        say(&format!(
            "warning: the keeper at unix:{} does not hold the guest ({why}): if this process dies \
             too, the guest is lost; it is stored again when a keeper is there",
            self.path.display()
        ));
    }
}

/// The path of a keeper's address.
///
/// # Errors
/// In one line.
pub(crate) fn path_of(address: &Address) -> Result<&Path, String> {
    match address {
        Address::Unix(path) => Ok(path),
        other => Err(format!(
            "--keeper {other}: descriptors only travel over Unix sockets; give unix:PATH"
        )),
    }
}

#[cfg(test)]
mod tests;
