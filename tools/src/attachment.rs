//! Having one's guest memory served by page-client: a VMM registers its memory, hands the
//! userfaultfd and the files over, and is told when its guest may run.
//!
//! A VMM calls [`Attachment::attach`]; page-client receives with [`receive`]. Where the process
//! that has the memory is not the one that restores the guest and starts its vCPUs, it calls
//! [`Attachment::attach_driven`], and that one [`Driver::connect`]. The protocol is described
//! byte by byte in docs/page-client.md.
//!
//! Invariant: the guest runs only after [`AttachmentEvent::Run`], which page-client says only
//! once it is on record. page-client may die at any moment; the VMM connects to its successor,
//! and what either has said may be said again.

mod driver;
mod listening;
mod offer;
mod vmm;

pub use driver::Driver;
pub use listening::{AttachError, AttachmentEvent};
pub(crate) use offer::regions_of;
pub use offer::{Arrival, Offer, OfferError, receive};
pub use vmm::Attachment;

use crate::handoff::framing;
use afterimage::StateSection;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::net::UnixStream;

/// The version of the protocol that this is.
pub const VERSION: u32 = 1;
/// The first bytes of a connection; the version follows, in 4 bytes.
const MAGIC: [u8; 8] = *b"AIMGATCH";
/// The most regions of one guest.
pub const MAX_REGIONS: usize = 16_384;
/// The most files of one guest.
pub const MAX_FILES: usize = 1024;
/// The most sections of device state.
const MAX_SECTIONS: usize = 4096;
/// The most bytes of device state, all sections together.
const MAX_STATE_BYTES: u64 = 1 << 30;

/// What a VMM says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum Hello {
    /// Here is a guest; the userfaultfd and the files follow.
    Attach {
        name: String,
        files: usize,
        regions: Vec<RegionOfVmm>,
        #[serde(default)]
        driven: DrivenBy,
    },
    /// The page-client that I had is gone.
    Return { name: String },
    /// I restore and start the guest whose memory another process hands over, or has.
    Drive { name: String },
}

/// Who restores a guest and starts its vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "bool", into = "bool")]
pub enum DrivenBy {
    /// The process that has its memory.
    #[default]
    Vmm,
    /// Another one: a [`Driver`].
    Driver,
}

impl From<bool> for DrivenBy {
    fn from(driven: bool) -> Self {
        if driven { Self::Driver } else { Self::Vmm }
    }
}

impl From<DrivenBy> for bool {
    fn from(by: DrivenBy) -> Self {
        by == DrivenBy::Driver
    }
}

/// One region of guest memory as its VMM has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RegionOfVmm {
    pub(crate) guest_address: u64,
    /// Where it is registered in the VMM's address space.
    pub(crate) address: u64,
    pub(crate) length: u64,
    pub(crate) page_size: u64,
    /// Which of the files, from 0, and where in it; none for private memory.
    pub(crate) file: Option<(usize, u64)>,
}

impl RegionOfVmm {
    /// Whether it has huge pages, and no file that they are in.
    pub(crate) const fn has_huge_pages_of_its_own(&self) -> bool {
        self.file.is_none() && self.page_size > 4096
    }
}

/// What either says after that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub(crate) enum Word {
    /// page-client: faults of this memory are answered from here on.
    Attached,
    /// page-client: no, and why; or no more.
    Refused { reason: String },
    /// page-client: the device state follows.
    State { sections: Vec<SectionOfVmm> },
    /// Whoever drives the guest: it is restored, and could run.
    Ready,
    /// VMM or driver: it has failed, and gives the guest up. Nothing has run in this memory.
    Withdrawn,
    /// Driver: the guest runs, or stays paused as it was; nothing is left to be done for it.
    Started,
    /// page-client: the guest may run; it is on record.
    Run,
    /// page-client: every page is in place, the userfaultfd may be closed.
    AllArrived,
    /// page-client: the source knows it too; the session is over.
    Finished,
    /// page-client: the guest must not run here, or not any more, and why.
    NotHere { reason: String },
    /// page-client: something failed; whoever touches a missing page waits.
    Failed { reason: String },
}

/// A section of device state; its bytes follow, after those of the sections before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SectionOfVmm {
    name: String,
    version: u32,
    length: u64,
}

/// Sends device state.
pub(crate) fn send_state(socket: &UnixStream, state: &[StateSection]) -> io::Result<()> {
    let sections = state.iter().map(|section| SectionOfVmm {
        name: section.name.clone(),
        version: section.version,
        length: section.bytes.len() as u64,
    });
    framing::send(socket, &Word::State { sections: sections.collect() })?;
    state.iter().try_for_each(|section| framing::send_bytes(socket, &section.bytes))
}

/// Receives the bytes of device state that was announced.
fn receive_state(
    socket: &UnixStream,
    sections: Vec<SectionOfVmm>,
) -> io::Result<Vec<StateSection>> {
    let bytes = sections.iter().try_fold(0u64, |sum, section| sum.checked_add(section.length));
    if sections.len() > MAX_SECTIONS || bytes.is_none_or(|bytes| bytes > MAX_STATE_BYTES) {
        let what = format!("device state of {} sections, {bytes:?} bytes", sections.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let sections = sections.into_iter().map(|section| {
        let bytes = framing::receive_bytes(socket, section.length)?;
        Ok(StateSection { name: section.name, version: section.version, bytes })
    });
    sections.collect()
}
