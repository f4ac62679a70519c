//! What can be wrong with bytes from a peer, and what a side says when it hangs up.

use super::Stamp;

/// Bytes that are no frame, or a frame that may not be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The peer does not speak this protocol at all.
    #[error("the peer does not speak Afterimage: its first bytes are {found:02x?}")]
    BadMagic {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// No version in common.
    #[error(
        "the peer speaks protocol versions {their_min} to {their_version}, this side \
         {our_min} to {our_version}: upgrade the older one"
    )]
    Version {
        /// The newest version of the peer.
        their_version: u16,
        /// The oldest version of the peer.
        their_min: u16,
        /// The newest version here.
        our_version: u16,
        /// The oldest version here.
        our_min: u16,
    },
    /// A frame that is not known and not optional.
    #[error("unknown frame kind {kind}")]
    UnknownKind {
        /// Its number.
        kind: u16,
    },
    /// A known frame on a channel or in a direction where it has no meaning.
    #[error("frame {kind} is not allowed on the {channel} channel in this direction")]
    Misplaced {
        /// Its number.
        kind: u16,
        /// The channel's name.
        channel: &'static str,
    },
    /// A payload longer than the frame may have.
    #[error("frame {kind} has a payload of {length} bytes, at most {limit} are allowed")]
    TooLong {
        /// Its number.
        kind: u16,
        /// Payload bytes.
        length: u64,
        /// The most allowed.
        limit: u64,
    },
    /// A payload that ends too early or too late.
    #[error("frame {kind} has a payload of {length} bytes where {expected} were expected")]
    BadLength {
        /// Its number.
        kind: u16,
        /// Payload bytes.
        length: u64,
        /// The number expected.
        expected: u64,
    },
    /// A field with a value it cannot have.
    #[error("frame {kind} has {field} {value}")]
    BadValue {
        /// Its number.
        kind: u16,
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// Pages that the layout does not have.
    #[error("frame {kind} names pages {first}..+{count}, the layout has {pages}")]
    OutOfRange {
        /// Its number.
        kind: u16,
        /// The first page named.
        first: u64,
        /// How many.
        count: u64,
        /// How many pages there are.
        pages: u64,
    },
    /// A frame stamped newer than the connection it came on.
    #[error("a frame stamped {frame:?} came on a connection of {connection:?}")]
    FutureStamp {
        /// The connection's stamp.
        connection: Stamp,
        /// The frame's stamp.
        frame: Stamp,
    },
    /// Header or payload changed on the way.
    #[error("frame {kind} is damaged: checksum {sent:#010x}, contents give {expected:#010x}")]
    Checksum {
        /// Its number, as it arrived.
        kind: u16,
        /// The checksum in the header.
        sent: u32,
        /// That of what arrived.
        expected: u32,
    },
    /// A layout that cannot be.
    #[error("the peer's layout is not valid")]
    Layout(#[from] crate::layout::LayoutError),
    /// A bitmap segment that cannot be.
    #[error("the peer's page bitmap is not valid")]
    Segment(#[from] crate::bitmap::SegmentError),
}

/// Why a side hangs up, as a number that programs can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum RefuseCode {
    /// No version in common.
    Version = 1,
    /// No such session here.
    UnknownSession = 2,
    /// Both sides have the same role.
    Role = 3,
    /// An epoch or generation that has passed.
    Stale = 4,
    /// Another memory than the one this session knows.
    Incarnation = 5,
    /// The layouts differ.
    Layout = 6,
    /// The session was fenced.
    Fenced = 7,
    /// More channels or sessions than allowed.
    TooMany = 8,
    /// A frame that is wrong or out of place.
    Protocol = 9,
    /// The session has ended.
    Ended = 10,
    /// This side gave up for a reason of its own.
    Failed = 11,
    /// Pages that the source has freed are missing at the destination.
    Released = 12,
}

impl RefuseCode {
    /// The code with this number. Unknown numbers of newer peers become `Failed`.
    #[must_use]
    pub fn from_number(number: u16) -> Self {
        match number {
            1 => Self::Version,
            2 => Self::UnknownSession,
            3 => Self::Role,
            4 => Self::Stale,
            5 => Self::Incarnation,
            6 => Self::Layout,
            7 => Self::Fenced,
            8 => Self::TooMany,
            9 => Self::Protocol,
            10 => Self::Ended,
            12 => Self::Released,
            _ => Self::Failed,
        }
    }
}

/// A refusal with its reason in words, cut to 512 bytes on the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// For programs.
    pub code: RefuseCode,
    /// For people: what, where, and how to mend it.
    pub reason: String,
}

impl Refusal {
    /// The most bytes of text that travel.
    pub const MAX_REASON: usize = 512;

    /// A refusal with this reason.
    #[must_use]
    pub fn new(code: RefuseCode, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }

    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        let end = self.reason.floor_char_boundary(Self::MAX_REASON);
        bytes.extend_from_slice(&(self.code as u16).to_le_bytes());
        bytes.extend_from_slice(&self.reason.as_bytes()[..end]);
    }

    /// From the bytes of a frame of this kind.
    pub(super) fn decode(kind: u16, bytes: &[u8]) -> Result<Self, WireError> {
        let length = bytes.len() as u64;
        let (code, reason) = bytes.split_first_chunk::<2>().ok_or(WireError::BadLength {
            kind,
            length,
            expected: 2,
        })?;
        if reason.len() > Self::MAX_REASON {
            return Err(WireError::TooLong { kind, length, limit: 2 + Self::MAX_REASON as u64 });
        }
        // The text is shown to people: what a peer sends must not steer their terminal.
        let mut reason = String::from_utf8_lossy(reason).replace(char::is_control, " ");
        // What is no UTF-8 became longer.
        reason.truncate(reason.floor_char_boundary(Self::MAX_REASON));
        Ok(Self { code: RefuseCode::from_number(u16::from_le_bytes(*code)), reason })
    }
}
