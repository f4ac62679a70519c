//! A guest's place at a keeper: stored before it is taken, fetched after a death, removed when
//! it is over.
//!
//! Invariant: a guest that a VMM gave is stored together with the connection to that VMM. So
//! whoever dies in between, the VMM reads an end of the connection exactly if no successor can
//! find the guest at the keeper; and a successor that finds it tells the VMM that it was taken.

use std::os::unix::net::UnixStream;

use afterimage::{Address, SessionId};

use super::failure::{Failure, chain};
use super::progress::Progress;
use crate::handoff::Offer;
use crate::keeper::{KeptGuest, KeptGuestError, Place, place_path};

/// The connection to the VMM, in the guest's set.
const HANDOFF: &str = "handoff";

/// A guest's place at a keeper.
pub(super) struct Holding(Place);

/// A guest from a process before this one.
pub(super) struct Kept {
    pub(super) guest: KeptGuest,
    /// To the VMM that gave it, if it may not know yet that it was taken.
    pub(super) giver: Option<UnixStream>,
}

impl Holding {
    pub(super) fn connect(address: &Address, guest: &str) -> Result<Self, Failure> {
        let path = place_path(address).map_err(Failure::usage)?;
        let place = Place::connect(path, guest, "page-server");
        place.map(Self).map_err(|error| Failure::new(chain(&error)))
    }

    /// Where it is, in words.
    pub(super) fn place(&self) -> String {
        self.0.name()
    }

    /// Claims the guest, if one is there.
    pub(super) fn fetch(&mut self) -> Result<Option<Kept>, Failure> {
        let Some(all) = self.0.fetch().map_err(|error| Failure::new(chain(&error)))? else {
            return Ok(None);
        };
        let (beside, set): (Vec<_>, Vec<_>) = all.into_iter().partition(|it| it.name == HANDOFF);
        let guest = KeptGuest::unpack(&set).map_err(|what| {
            let guest = self.0.guest().to_owned();
            Failure::new(chain(&KeptGuestError::NoGuest { guest, what }))
        })?;
        self.0.holds_this(set);
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
        let set = set.map_err(|error| chain(&error))?;
        self.0.store(set, &[(HANDOFF, offer.socket())], |line| progress.say(line))
    }

    /// The VMM knows that its guest was taken.
    pub(super) fn settle(&mut self, progress: &Progress) {
        self.0.let_go(&[HANDOFF], |line| progress.say(line));
    }

    /// Notices that the keeper is gone, and stores the guest again when one is there.
    pub(super) fn look(&mut self, progress: &Progress) {
        self.0.look(|line| progress.say(line));
    }

    /// Whether a successor would find the guest.
    pub(super) const fn holds(&self) -> bool {
        self.0.holds()
    }

    /// The guest is elsewhere for good.
    pub(super) fn remove(&mut self, progress: &Progress) {
        self.0.remove(|line| progress.say(line));
    }
}
