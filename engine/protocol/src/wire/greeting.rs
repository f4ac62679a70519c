//! The first bytes on every connection, the same in every version of the protocol.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..8 | magic `AFTRIMG\n` |
//! | 8..10 | newest version spoken |
//! | 10..12 | oldest version spoken |
//! | 12..14 | 1 for a hello, 2 for a refusal |
//! | 14..16 | bytes that follow |
//!
//! Whoever connects sends a hello; whoever accepted answers with its own or refuses. A
//! hello may be longer than this version knows: the rest is skipped.

use super::control::{MAX_SHARDS, MAX_STREAMS};
use super::{Epoch, Generation, MIN_VERSION, Refusal, Stamp, VERSION, WireError};
use std::fmt;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first eight bytes on every connection.
pub const MAGIC: [u8; 8] = *b"AFTRIMG\n";
/// Bytes before the hello or refusal itself.
pub const GREETING_PREFIX: usize = 16;
/// The longest hello or refusal that is read.
const MAX_BODY: u16 = 4096;
/// The kind number under which errors name a greeting.
const GREETING_KIND: u16 = 0;

/// A session's name, random.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// What a destination says that does not know the session's id yet.
    pub const UNKNOWN: Self = Self([0; 16]);
}

/// The name of a destination's memory, random: a restarted destination whose memory is
/// gone has another.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub [u8; 16]);

macro_rules! shown_in_hexadecimal {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    )*};
}
shown_in_hexadecimal!(SessionId, Incarnation);

/// Which side of a migration somebody is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Has the memory.
    Source = 1,
    /// Gets it.
    Destination = 2,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Channel {
    /// Capabilities, layout, device state, ownership, acks, bitmaps, heartbeats.
    Control,
    /// Page requests and what they ask for; one for each fault shard, numbered from 0, below
    /// [`MAX_SHARDS`](super::MAX_SHARDS).
    Request(u16),
    /// Runs of pages; one for each stream, numbered from 0, below
    /// [`MAX_STREAMS`](super::MAX_STREAMS).
    Background(u16),
}

impl Channel {
    /// Its name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Request(_) => "request",
            Self::Background(_) => "background",
        }
    }

    pub(super) const fn numbers(self) -> (u8, u16) {
        match self {
            Self::Control => (1, 0),
            Self::Request(slot) => (2, slot),
            Self::Background(slot) => (3, slot),
        }
    }

    pub(super) const fn from_numbers(kind: u8, slot: u16) -> Option<Self> {
        match (kind, slot) {
            (1, 0) => Some(Self::Control),
            (2, slot) if slot < MAX_SHARDS => Some(Self::Request(slot)),
            (3, slot) if slot < MAX_STREAMS => Some(Self::Background(slot)),
            _ => None,
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => f.write_str("control"),
            Self::Request(slot) => write!(f, "request {slot}"),
            Self::Background(slot) => write!(f, "background {slot}"),
        }
    }
}

/// What a side can do beyond the version's minimum; both use what both can. Unknown bits
/// are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    /// Every frame carries a CRC-32C of header and payload.
    pub const CHECKSUMS: Self = Self(1);
    /// Pages may travel while the guest still runs at the source: a source can tell which of
    /// them it has written since, a destination can keep them where no guest sees them.
    pub const PRECOPY: Self = Self(2);

    /// What both have.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What either has.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Who connects, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The sender's side.
    pub role: Role,
    /// What the connection is for.
    pub channel: Channel,
    /// Epoch and generation of the connection. On a control connection the epoch is the
    /// newest that the sender knows.
    pub stamp: Stamp,
    /// What the sender can do.
    pub capabilities: Capabilities,
    /// The session, or [`SessionId::UNKNOWN`].
    pub session: SessionId,
    /// The destination's memory; zero where a source does not know it yet.
    pub incarnation: Incarnation,
}

/// A hello or a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// Welcome, or may I.
    Hello(Hello),
    /// Go away, with the reason.
    Refuse(Refusal),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPrefix {
    magic: [u8; 8],
    version: U16,
    min_version: U16,
    kind: U16,
    length: U16,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHello {
    role: u8,
    channel: u8,
    slot: U16,
    epoch: U32,
    generation: U32,
    reserved: U32,
    capabilities: U64,
    session: [u8; 16],
    incarnation: [u8; 16],
}

const _: () = assert!(size_of::<RawPrefix>() == GREETING_PREFIX);
const _: () = assert!(size_of::<RawHello>() == 56);

/// What the prefix of a greeting announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    is_refusal: bool,
    length: u16,
}

impl Announced {
    /// How many bytes follow.
    #[must_use]
    pub const fn length(self) -> usize {
        self.length as usize
    }
}

impl Greeting {
    /// Its bytes.
    ///
    /// # Panics
    /// If a hello names a slot that its channel cannot have.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let kind = match self {
            Self::Hello(hello) => {
                let (channel, slot) = hello.channel.numbers();
                assert!(
                    Channel::from_numbers(channel, slot).is_some(),
                    "no peer takes channel {}",
                    hello.channel
                );
                let raw = RawHello {
                    role: hello.role as u8,
                    channel,
                    slot: slot.into(),
                    epoch: hello.stamp.epoch.0.into(),
                    generation: hello.stamp.generation.0.into(),
                    reserved: 0.into(),
                    capabilities: hello.capabilities.0.into(),
                    session: hello.session.0,
                    incarnation: hello.incarnation.0,
                };
                body.extend_from_slice(raw.as_bytes());
                1
            }
            Self::Refuse(refusal) => {
                refusal.encode(&mut body);
                2
            }
        };
        let prefix = RawPrefix {
            magic: MAGIC,
            version: VERSION.into(),
            min_version: MIN_VERSION.into(),
            kind: kind.into(),
            // At most 514: a refusal cuts its reason.
            length: (body.len() as u16).into(),
        };
        [prefix.as_bytes(), &body].concat()
    }

    /// Checks the first 16 bytes of a connection and says how many follow.
    ///
    /// # Errors
    /// Another magic, no version in common, an unknown kind, or too much to come.
    pub fn announced(prefix: &[u8; GREETING_PREFIX]) -> Result<Announced, WireError> {
        let raw: RawPrefix = zerocopy::transmute!(*prefix);
        if raw.magic != MAGIC {
            return Err(WireError::BadMagic { found: raw.magic });
        }
        let is_refusal = match raw.kind.get() {
            1 => false,
            2 => true,
            value => {
                return Err(WireError::BadValue {
                    kind: GREETING_KIND,
                    field: "greeting kind",
                    value: value.into(),
                });
            }
        };
        // A refusal for want of a common version must still be readable.
        if !is_refusal {
            negotiate(raw.version.get(), raw.min_version.get())?;
        }
        let length = raw.length.get();
        if length > MAX_BODY {
            return Err(WireError::TooLong {
                kind: GREETING_KIND,
                length: length.into(),
                limit: MAX_BODY.into(),
            });
        }
        Ok(Announced { is_refusal, length })
    }

    /// What follows the first 16 bytes.
    ///
    /// # Errors
    /// A body shorter than a hello or of another length than announced, or a field that has
    /// a value it cannot have.
    pub fn decode(announced: Announced, body: &[u8]) -> Result<Self, WireError> {
        let bad_length = |expected: usize| WireError::BadLength {
            kind: GREETING_KIND,
            length: body.len() as u64,
            expected: expected as u64,
        };
        if body.len() != announced.length() {
            return Err(bad_length(announced.length()));
        }
        if announced.is_refusal {
            return Refusal::decode(GREETING_KIND, body).map(Self::Refuse);
        }
        let (raw, _newer) =
            RawHello::ref_from_prefix(body).map_err(|_| bad_length(size_of::<RawHello>()))?;
        let bad_value =
            |field, value: u64| WireError::BadValue { kind: GREETING_KIND, field, value };
        let role = match raw.role {
            1 => Role::Source,
            2 => Role::Destination,
            value => return Err(bad_value("role", value.into())),
        };
        let (channel, slot) = (raw.channel, raw.slot.get());
        let field = if matches!(channel, 1..=3) { "channel slot" } else { "channel" };
        let value = if matches!(channel, 1..=3) { slot } else { channel.into() };
        let channel =
            Channel::from_numbers(channel, slot).ok_or_else(|| bad_value(field, value.into()))?;
        Ok(Self::Hello(Hello {
            role,
            channel,
            stamp: Stamp {
                epoch: Epoch(raw.epoch.get()),
                generation: Generation(raw.generation.get()),
            },
            capabilities: Capabilities(raw.capabilities.get()),
            session: SessionId(raw.session),
            incarnation: Incarnation(raw.incarnation),
        }))
    }
}

/// The version that both sides speak: the newest of the older one.
///
/// # Errors
/// [`WireError::Version`] with both ranges, if they do not meet.
pub fn negotiate(their_version: u16, their_min: u16) -> Result<u16, WireError> {
    let version = VERSION.min(their_version);
    if version < MIN_VERSION || version < their_min {
        return Err(WireError::Version {
            their_version,
            their_min,
            our_version: VERSION,
            our_min: MIN_VERSION,
        });
    }
    Ok(version)
}
