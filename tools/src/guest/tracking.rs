//! What tells which pages a running guest writes, and which guests it can be had for.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use afterimage::dirty::TrackedRegion;
use afterimage::{GuestAddress, RegisteredAddress};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{GuestError, GuestKind};
use crate::ram::{Backing, GuestRam};

/// How writes of a guest are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// KVM's dirty log, beside a bitmap of what the VMM writes; needs KVM
    Log,
    /// KVM's dirty rings, beside a bitmap of what the VMM writes; needs KVM
    Ring,
    /// Asynchronous write protection, found in the page map; for any guest
    Pagemap,
    /// A bitmap that the writers mark themselves; for a guest on threads
    Bitmap,
}

impl TrackerKind {
    /// What is taken where nobody says otherwise.
    #[must_use]
    pub const fn default_for(guest: GuestKind) -> Self {
        match guest {
            GuestKind::Kvm => Self::Log,
            GuestKind::Threads => Self::Pagemap,
        }
    }

    /// Whether a guest of this kind can be tracked so.
    ///
    /// # Errors
    /// [`GuestError::Untracked`], with the reason and with what to use instead.
    pub fn check(self, guest: GuestKind) -> Result<(), GuestError> {
        let reason = match (self, guest) {
            (Self::Log | Self::Ring, GuestKind::Threads) => {
                "KVM keeps it, and this guest runs on threads without KVM; use pagemap or bitmap"
            }
            (Self::Bitmap, GuestKind::Kvm) => {
                "the vCPUs of KVM mark nothing; use log, ring or pagemap"
            }
            _ => return Ok(()),
        };
        Err(self.refused(io::Error::new(io::ErrorKind::Unsupported, reason)))
    }

    /// An error of setting it up.
    pub(crate) fn refused(self, source: io::Error) -> GuestError {
        GuestError::Untracked { tracker: self, source }
    }
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Log => "log",
            Self::Ring => "ring",
            Self::Pagemap => "pagemap",
            Self::Bitmap => "bitmap",
        })
    }
}

/// RAM as write protection tracks it.
pub(crate) fn tracked_regions(ram: &GuestRam) -> io::Result<Vec<TrackedRegion>> {
    let regions = ram.regions().iter().map(|region| {
        let guest = GuestAddress(region.guest_base().0);
        let start = RegisteredAddress(region.host_base().as_ptr() as u64);
        let length = region.length();
        Ok(match (region.file(), ram.backing()) {
            (Some(_), Backing::Hugetlb) => TrackedRegion::hugetlb(guest, start, length),
            (Some((file, offset)), _) => {
                let file = file.as_fd().try_clone_to_owned()?;
                TrackedRegion::shared(guest, start, length, file, offset)
            }
            (None, _) => TrackedRegion::private(guest, start, length),
        })
    });
    regions.collect()
}
