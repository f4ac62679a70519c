//! The frames, byte for byte.
//!
//! A connection begins with a [`Greeting`] each way, the same in every version of the
//! protocol. After it every frame has a [`Header`] of 32 bytes and a payload whose length
//! the header gives; what it means depends on the channel: [`ControlFrame`] on the control
//! channel, [`DataFrame`] on request and background channels. Integers are little-endian.
//!
//! Nothing is allocated for a length before it has been bounded, and a frame that says
//! more than it may is an error that names the frame and the value.
//!
//! `docs/protocol.md` describes the bytes for whoever writes a peer; `tests/wire_golden`
//! keeps them.

mod control;
mod data;
mod error;
mod greeting;
mod payload;

pub use control::{
    Attach, ControlFrame, MAX_ACK_RUNS, MAX_REGIONS, MAX_SECTION_BYTES, MAX_SECTION_NAME,
    MAX_SHARDS, MAX_STREAMS, Offer, Phase, SessionKind,
};
pub use data::{DataFrame, MAX_CONTENT_BYTES, MAX_FRAME_PAGES, MAX_REQUEST_PAGES};
pub use error::{Refusal, RefuseCode, WireError};
pub use greeting::{
    Announced, Capabilities, Channel, GREETING_PREFIX, Greeting, Hello, Incarnation, MAGIC, Role,
    SessionId, negotiate,
};

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The version of the protocol that this code speaks.
pub const VERSION: u16 = 1;
/// The oldest version that it still understands.
pub const MIN_VERSION: u16 = 1;
/// Bytes in a [`Header`].
pub const HEADER_BYTES: usize = 32;
/// The longest payload on the control channel.
pub const MAX_CONTROL_PAYLOAD: u32 = 1 << 20;

/// One per session, grown by the source at each connection of the control channel. Frames
/// of an older epoch change nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u32);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Counts the connections of one channel slot within an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

/// What a frame is. Numbers are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[expect(missing_docs, reason = "each is described at the frame it stands for")]
pub enum Kind {
    PageRequest = 1,
    PageContent = 2,
    PageZero = 3,
    PageUnreadable = 4,
    Offer = 16,
    Attach = 17,
    Received = 18,
    Begin = 19,
    Section = 20,
    StateEnd = 21,
    Ready = 22,
    Go = 23,
    Running = 24,
    Ack = 25,
    Heartbeat = 26,
    HeartbeatReply = 27,
    Complete = 28,
    Bye = 29,
    TakeBack = 30,
    TakeBackAgreed = 31,
    TakeBackDenied = 32,
    Refuse = 33,
    Renew = 34,
    Stale = 35,
    Pass = 36,
    PassTaken = 37,
}

impl Kind {
    const ALL: [Self; 26] = [
        Self::PageRequest,
        Self::PageContent,
        Self::PageZero,
        Self::PageUnreadable,
        Self::Offer,
        Self::Attach,
        Self::Received,
        Self::Begin,
        Self::Section,
        Self::StateEnd,
        Self::Ready,
        Self::Go,
        Self::Running,
        Self::Ack,
        Self::Heartbeat,
        Self::HeartbeatReply,
        Self::Complete,
        Self::Bye,
        Self::TakeBack,
        Self::TakeBackAgreed,
        Self::TakeBackDenied,
        Self::Refuse,
        Self::Renew,
        Self::Stale,
        Self::Pass,
        Self::PassTaken,
    ];

    /// The kind with this number, if there is one.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

/// A receiver that does not know the frame may skip it.
pub const FLAG_OPTIONAL: u16 = 1;
/// The last of several frames that belong together.
pub const FLAG_LAST: u16 = 2;
/// On background channels: the guest may have written these pages since they were sent.
const FLAG_EARLY: u16 = 4;
/// Where the number of its pass stands in the flags of an early frame.
const PASS_SHIFT: u16 = 4;
/// The highest number of a precopy pass on one connection.
pub const MAX_PASS: u16 = u16::MAX >> PASS_SHIFT;

/// The 32 bytes before every payload.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    kind: U16,
    flags: U16,
    length: U32,
    epoch: U32,
    generation: U32,
    page: U64,
    count: U32,
    checksum: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

impl Header {
    /// A header with no flags, no payload and no checksum.
    #[must_use]
    pub const fn new(kind: Kind, stamp: Stamp, page: u64, count: u32) -> Self {
        Self {
            kind: U16::new(kind as u16),
            flags: U16::new(0),
            length: U32::new(0),
            epoch: U32::new(stamp.epoch.0),
            generation: U32::new(stamp.generation.0),
            page: U64::new(page),
            count: U32::new(count),
            checksum: U32::new(0),
        }
    }

    /// The same with a payload of `length` bytes.
    #[must_use]
    pub const fn with_length(mut self, length: u32) -> Self {
        self.length = U32::new(length);
        self
    }

    /// The same with flags.
    #[must_use]
    pub const fn with_flags(mut self, flags: u16) -> Self {
        self.flags = U16::new(flags);
        self
    }

    /// The same, as a frame of a precopy pass.
    ///
    /// # Panics
    /// If the number is 0 or more than [`MAX_PASS`].
    #[must_use]
    pub fn of_pass(self, pass: u16) -> Self {
        assert!((1..=MAX_PASS).contains(&pass), "there is no pass {pass}");
        self.with_flags(FLAG_EARLY | pass << PASS_SHIFT)
    }

    /// The same with the checksum of itself and its payload.
    #[must_use]
    pub fn sealed<'a>(mut self, payload: impl IntoIterator<Item = &'a [u8]>) -> Self {
        self.checksum = U32::new(self.expected_checksum(payload));
        self
    }

    /// Checks what [`sealed`](Self::sealed) put in.
    ///
    /// # Errors
    /// [`WireError::Checksum`] if header or payload changed on the way.
    pub fn verify<'a>(&self, payload: impl IntoIterator<Item = &'a [u8]>) -> Result<(), WireError> {
        let expected = self.expected_checksum(payload);
        if expected == self.checksum.get() {
            return Ok(());
        }
        Err(WireError::Checksum { kind: self.kind.get(), sent: self.checksum.get(), expected })
    }

    fn expected_checksum<'a>(&self, payload: impl IntoIterator<Item = &'a [u8]>) -> u32 {
        let blank = Self { checksum: U32::new(0), ..*self };
        payload.into_iter().fold(crc32c::crc32c(blank.as_bytes()), crc32c::crc32c_append)
    }

    /// The header in these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Self {
        zerocopy::transmute!(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        zerocopy::transmute!(self)
    }

    /// Its bytes, in place.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    /// What it is, or the number that no kind has.
    ///
    /// # Errors
    /// The number, where no kind has it.
    pub fn kind(&self) -> Result<Kind, u16> {
        Kind::from_number(self.kind.get()).ok_or(self.kind.get())
    }

    /// Whether a receiver that does not know the kind may skip it.
    #[must_use]
    pub const fn is_optional(&self) -> bool {
        self.flags.get() & FLAG_OPTIONAL != 0
    }

    /// Whether it is the last of several.
    #[must_use]
    pub const fn is_last(&self) -> bool {
        self.flags.get() & FLAG_LAST != 0
    }

    /// The precopy pass that the pages belong to, if the guest may have written them since.
    #[must_use]
    pub const fn pass(&self) -> Option<u16> {
        let flags = self.flags.get();
        if flags & FLAG_EARLY != 0 { Some(flags >> PASS_SHIFT) } else { None }
    }

    /// Bytes in the payload.
    #[must_use]
    pub const fn length(&self) -> u32 {
        self.length.get()
    }

    /// Which connection it belongs to.
    #[must_use]
    pub const fn stamp(&self) -> Stamp {
        Stamp { epoch: Epoch(self.epoch.get()), generation: Generation(self.generation.get()) }
    }

    /// The first page, or what else the frame puts here.
    #[must_use]
    pub const fn page(&self) -> u64 {
        self.page.get()
    }

    /// The number of pages, or what else the frame puts here.
    #[must_use]
    pub const fn count(&self) -> u32 {
        self.count.get()
    }
}

impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Header")
            .field("kind", &self.kind())
            .field("flags", &self.flags.get())
            .field("length", &self.length())
            .field("stamp", &self.stamp())
            .field("page", &self.page())
            .field("count", &self.count())
            .finish_non_exhaustive()
    }
}

/// Which connection of a session a frame belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// The session's epoch.
    pub epoch: Epoch,
    /// The generation of the channel's slot.
    pub generation: Generation,
}

impl Stamp {
    /// Whether a frame with stamp `theirs` counts on a connection with this stamp.
    ///
    /// # Errors
    /// [`WireError::FutureStamp`] for a frame that claims to be newer than its connection.
    pub fn admits(self, theirs: Self) -> Result<bool, WireError> {
        if theirs == self {
            Ok(true)
        } else if theirs.epoch > self.epoch
            || (theirs.epoch == self.epoch && theirs.generation > self.generation)
        {
            Err(WireError::FutureStamp { connection: self, frame: theirs })
        } else {
            Ok(false)
        }
    }
}
