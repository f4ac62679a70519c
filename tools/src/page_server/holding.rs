//! A guest's place at a keeper: stored before it is taken, fetched after a death, removed when
//! it is over.
//!
//! Invariant: a guest that a VMM gave is stored together with the connection to that VMM. So
//! whoever dies in between, the VMM reads an end of the connection exactly if no successor can
//! find the guest at the keeper; and a successor that finds it tells the VMM that it was taken.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use afterimage::{Address, SessionId};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::failure::{Failure, chain};
use super::progress::Progress;
use crate::handoff::Offer;
use crate::keeper::{self, Keeper, KeeperError, KeptGuest, KeptGuestError, NamedFile, Why};

/// The connection to the VMM, in the guest's set.
const HANDOFF: &str = "handoff";
/// Between attempts to find a keeper again.
const PAUSE: Duration = Duration::from_secs(1);

/// A guest's place at a keeper.
pub(super) struct Holding {
    path: PathBuf,
    guest: String,
    /// Only while there is a guest: a client without a claim is let go after a while.
    keeper: Option<Keeper>,
    /// What is held there, to be stored again if the keeper dies. Empty without a guest.
    set: Vec<NamedFile>,
    tried: Instant,
    /// Why the last attempt to store it again failed.
    complaint: Option<String>,
}

/// A guest from a process before this one.
pub(super) struct Kept {
    pub(super) guest: KeptGuest,
    /// To the VMM that gave it, if it may not know yet that it was taken.
    pub(super) giver: Option<UnixStream>,
}

impl Holding {
    pub(super) fn connect(address: &Address, guest: &str) -> Result<Self, Failure> {
        let Address::Unix(path) = address else {
            return Err(Failure::usage(format!(
                "--keeper {address}: descriptors only travel over Unix sockets; give unix:PATH"
            )));
        };
        let keeper = Keeper::connect(path, "page-server").map_err(|it| Failure::new(chain(&it)))?;
        let (path, guest, tried) = (path.clone(), guest.to_owned(), Instant::now());
        let keeper = Some(keeper);
        Ok(Self { path, guest, keeper, set: Vec::new(), tried, complaint: None })
    }

    /// Where it is, in words.
    pub(super) fn place(&self) -> String {
        format!("{} at the keeper unix:{}", self.guest, self.path.display())
    }

    /// Claims the guest, if one is there.
    pub(super) fn fetch(&mut self) -> Result<Option<Kept>, Failure> {
        let Some(keeper) = &mut self.keeper else { return Ok(None) };
        match keeper.claim(&self.guest) {
            Err(error) if error.is(Why::NotThere) => {
                self.keeper = None;
                return Ok(None);
            }
            other => other.map_err(|error| failure(&error))?,
        }
        let (beside, set): (Vec<_>, Vec<_>) = keeper
            .fetch(&self.guest)
            .map_err(|error| failure(&error))?
            .into_iter()
            .partition(|it| it.name == HANDOFF);
        let guest = KeptGuest::unpack(&set).map_err(|what| {
            let guest = self.guest.clone();
            Failure::new(chain(&KeptGuestError::NoGuest { guest, what }))
        })?;
        self.set = set;
        let giver = beside.into_iter().next().map(|it| UnixStream::from(it.file));
        Ok(Some(Kept { guest, giver }))
    }

    /// Stores a guest that is given at this moment. On an error the keeper does not have it.
    pub(super) fn store(
        &mut self,
        offer: &Offer,
        session: SessionId,
        progress: &Progress,
    ) -> Result<(), String> {
        let pieces = offer.pieces();
        let set = KeptGuest::pack(session, &offer.giver.name, &pieces, &offer.sections);
        self.set = set.map_err(|error| chain(&error))?;
        let mut all = keeper::borrowed(&self.set);
        all.push((HANDOFF, offer.socket()));
        let connected = Keeper::connect(&self.path, "page-server");
        let stored = connected.and_then(|mut keeper| {
            keeper.store(&self.guest, &all)?;
            Ok(keeper)
        });
        match stored {
            Ok(keeper) => {
                self.keeper = Some(keeper);
                Ok(())
            }
            // It may have it after all, and a successor may find it there: so it is taken.
            Err(error @ KeeperError::InDoubt { .. }) => {
                self.lost(progress, &chain(&error));
                Ok(())
            }
            Err(error) => {
                self.set.clear();
                Err(chain(&error))
            }
        }
    }

    /// The VMM knows that its guest was taken.
    pub(super) fn settle(&mut self, progress: &Progress) {
        let Some(keeper) = &mut self.keeper else { return };
        if let Err(error) = keeper.let_go(&self.guest, &[HANDOFF]) {
            self.lost(progress, &chain(&error));
        }
    }

    /// Notices that the keeper is gone, and stores the guest again when one is there. Waits
    /// for a keeper that does not answer, some seconds.
    pub(super) fn look(&mut self, progress: &Progress) {
        if self.set.is_empty() {
            return;
        }
        if let Some(keeper) = &self.keeper {
            let mut fds = [PollFd::new(keeper.as_fd(), PollFlags::POLLIN)];
            // Nothing comes unasked but the end.
            if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
                self.lost(progress, "it has ended");
            }
            return;
        }
        if self.tried.elapsed() < PAUSE {
            return;
        }
        self.tried = Instant::now();
        let Ok(mut keeper) = Keeper::connect(&self.path, "page-server") else { return };
        // What was stored in doubt may be there.
        let claimed = match keeper.claim(&self.guest) {
            Err(error) if error.is(Why::NotThere) => Ok(()),
            other => other,
        };
        match claimed.and_then(|()| keeper.store(&self.guest, &keeper::borrowed(&self.set))) {
            Ok(()) => {
                progress.say("the keeper holds the guest again");
                (self.keeper, self.complaint) = (Some(keeper), None);
            }
            Err(error) => {
                let complaint = Some(chain(&error));
                if self.complaint != complaint {
                    tracing::warn!(complaint, "the keeper does not take the guest again");
                }
                self.complaint = complaint;
            }
        }
    }

    /// Whether a successor would find the guest.
    pub(super) const fn holds(&self) -> bool {
        self.keeper.is_some() && !self.set.is_empty()
    }

    /// The guest is elsewhere for good.
    pub(super) fn remove(&mut self, progress: &Progress) {
        let Some(keeper) = &mut self.keeper else { return };
        match keeper.remove(&self.guest) {
            Ok(()) => {}
            Err(error) if error.is(Why::NotThere) => {}
            Err(error) => progress.say(&format!(
                "warning: the guest is over, and the keeper may still hold it: {}",
                chain(&error)
            )),
        }
        self.set.clear();
    }

    fn lost(&mut self, progress: &Progress, why: &str) {
        self.keeper = None;
        self.tried = Instant::now();
        progress.say(&format!(
            "warning: the keeper at unix:{} does not hold the guest ({why}): if this process dies \
             too, the guest is lost; it is stored again when a keeper is there",
            self.path.display()
        ));
    }
}

fn failure(error: &KeeperError) -> Failure {
    Failure::new(chain(error))
}
