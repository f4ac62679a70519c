//! Handing a stopped guest over to another process of the machine: its memory as file
//! descriptors, its layout, and its device state.
//!
//! A VMM calls [`give`]; whoever serves the memory from then on, as page-server does, calls
//! [`receive`]. The protocol is described byte by byte in docs/page-server.md.
//!
//! Invariant: at any instant at most one side may run or serve the guest. The giver says
//! `given` last, and may resume only if `taken` never comes and the connection has ended;
//! the receiver serves only after it has read `given` and has answered `taken`, or has
//! found the giver dead.

pub(crate) mod framing;
mod give;
mod receive;

pub(crate) use give::header_of;
pub use give::{GiveError, Piece, Taken, give};
pub use receive::{Handover, Offer, OfferedRegion, ReceiveError, receive};
pub(crate) use receive::{assemble, check as check_header, say_taken};

use serde::{Deserialize, Serialize};

/// The version of the protocol that this is.
pub const VERSION: u32 = 1;
/// The most descriptors in one hand-over.
pub const MAX_FILES: usize = 1024;
/// The most regions in one hand-over.
pub const MAX_REGIONS: usize = 16_384;
/// The most sections of device state.
pub const MAX_SECTIONS: usize = 4096;
/// The most bytes of device state, all sections together.
pub const MAX_STATE_BYTES: u64 = 1 << 30;

/// What is offered; the descriptors and the device state follow it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) giver: Giver,
    /// Descriptors that follow.
    pub(crate) files: usize,
    regions: Vec<HeaderRegion>,
    pub(crate) sections: Vec<HeaderSection>,
}

/// Who hands a guest over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Giver {
    /// The program's name, for people.
    pub name: String,
    /// Its process id, as the kernel tells the receiver.
    #[serde(skip)]
    pub pid: i32,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HeaderRegion {
    guest_address: u64,
    length: u64,
    /// Which of the descriptors, from 0.
    file: usize,
    offset: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HeaderSection {
    pub(crate) name: String,
    pub(crate) version: u32,
    pub(crate) length: u64,
}

/// What both sides say after the offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum Word {
    /// Receiver: everything is here and usable.
    Ready,
    /// Receiver: no, and why. The guest stays the giver's.
    Refused { reason: String },
    /// Giver: it is yours.
    Given,
    /// Receiver: it is mine; the giver may exit.
    Taken { session: String },
}

#[cfg(test)]
mod tests;
