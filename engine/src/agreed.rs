//! What the two sides of a connection have agreed on.

use afterimage_protocol::wire::Capabilities;
use std::sync::atomic::{AtomicU64, Ordering};

/// What both sides of a session can do: the rest is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Agreed {
    /// Frames carry checksums.
    pub checksums: bool,
    /// Memory may be sent while the guest still runs at the source. At the source this side has
    /// a tracker if it is; at the destination
    /// [`DestinationMemory::precopy_lack`](crate::DestinationMemory::precopy_lack) says what its
    /// memory lacks.
    pub precopy: bool,
}

/// Set by the session thread, read by anybody.
#[derive(Debug, Default)]
pub(crate) struct AgreedCell(AtomicU64);

/// No capability has it.
const IS_KNOWN: u64 = 1 << 63;

impl AgreedCell {
    pub(crate) fn set(&self, common: Capabilities) {
        self.0.store(common.0 | IS_KNOWN, Ordering::Release);
    }

    pub(crate) fn get(&self) -> Option<Agreed> {
        let bits = self.0.load(Ordering::Acquire);
        let common = Capabilities(bits & !IS_KNOWN);
        (bits & IS_KNOWN != 0).then(|| Agreed {
            checksums: common.has(Capabilities::CHECKSUMS),
            precopy: common.has(Capabilities::PRECOPY),
        })
    }
}
