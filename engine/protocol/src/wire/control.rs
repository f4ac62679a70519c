//! Frames on the control channel.

use super::payload::{
    bad_length, check_ack, check_layout, check_offer, check_pass, check_renew, check_section,
    check_segment, decode_ack, decode_attach, decode_offer, decode_pass, decode_renew,
    decode_section, decode_segment, encode_layout, encode_offer, encode_segment, misplaced,
    payload_limit,
};
use super::{
    Channel, FLAG_LAST, FLAG_OPTIONAL, Generation, Header, Kind, MAX_CONTROL_PAYLOAD, Refusal,
    Stamp, WireError,
};
use crate::bitmap::Segment;
use crate::layout::{GuestLayout, PageRange};

/// The most regions a layout may have to travel.
pub const MAX_REGIONS: usize = 16_384;
/// The most runs in one [`ControlFrame::Ack`].
pub const MAX_ACK_RUNS: usize = 4096;
/// The longest name of a section of device state.
pub const MAX_SECTION_NAME: usize = 255;
/// The most bytes of a section in one frame; a section of any size is sent in several.
pub const MAX_SECTION_BYTES: usize = 512 << 10;

/// The most background streams an offer may ask for.
pub const MAX_STREAMS: u16 = 16;
/// The most request channels an offer may ask for.
pub const MAX_SHARDS: u16 = 64;

/// What kind of session it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SessionKind {
    /// One destination; the guest moves there.
    Migration = 1,
    /// Any number of destinations, each with a copy; nobody gives anything up.
    Snapshot = 2,
}

/// How far a destination has come, as it says when it attaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Phase {
    /// It has no device state, or not all.
    Fresh = 1,
    /// It has all device state and has said or will say ready.
    Ready = 2,
    /// It has durably refused to run.
    Refused = 3,
    /// It has durably recorded that it runs.
    Running = 4,
    /// Every page has arrived.
    Complete = 5,
    /// It has no device state, and no page for good: what it has are early copies. Said only
    /// where both sides can do precopy.
    Early = 6,
}

/// The source's first frame: what it offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Migration or snapshot.
    pub kind: SessionKind,
    /// How many background streams the destination shall open.
    pub streams: u16,
    /// How many request channels.
    pub shards: u16,
    /// A side that has nothing to say says so this often, in milliseconds.
    pub heartbeat_ms: u32,
    /// A side that hears nothing for so long takes the connection for dead.
    pub silence_ms: u32,
    /// The guest's memory at the source.
    pub layout: GuestLayout,
}

/// The destination's answer: what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// How far it is.
    pub phase: Phase,
    /// The guest's memory at the destination.
    pub layout: GuestLayout,
}

/// A frame on the control channel.
///
/// ```
/// use afterimage_protocol::wire::{ControlFrame, HEADER_BYTES, Header, Stamp};
///
/// let sent = ControlFrame::StateEnd { sections: 3 }.encode(Stamp::default(), true);
///
/// let (header, rest) = sent.split_first_chunk::<HEADER_BYTES>().expect("a header");
/// let header = Header::from_bytes(*header);
/// let payload = &rest[..ControlFrame::payload_length(&header)?];
/// header.verify([payload])?;
/// let frame = ControlFrame::decode(&header, payload)?;
/// assert_eq!(frame, Some(ControlFrame::StateEnd { sections: 3 }));
/// # Ok::<(), afterimage_protocol::wire::WireError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlFrame {
    /// Source → destination.
    Offer(Offer),
    /// Destination → source.
    Attach(Attach),
    /// Destination → source, after `Attach`: pages that are complete, in segments.
    Received {
        /// The pages that the segment covers.
        range: PageRange,
        /// Their bits.
        segment: Segment,
        /// Whether it is the last segment.
        last: bool,
    },
    /// Source → destination: all segments are taken in, the other channels may be opened.
    Begin,
    /// Source → destination: a piece of a named section of device state.
    Section {
        /// The section's name, chosen by the VMM.
        name: String,
        /// Its version, chosen by the VMM.
        version: u32,
        /// Whether the section ends with this piece.
        last: bool,
        /// The piece.
        bytes: Vec<u8>,
    },
    /// Source → destination: that was all device state.
    StateEnd {
        /// How many sections there were.
        sections: u32,
    },
    /// Destination → source: everything is restored, it could run.
    Ready,
    /// Source → destination: it may run; from here the source may not.
    Go,
    /// Destination → source: it has recorded that it runs.
    Running,
    /// Destination → source: these pages are complete.
    Ack(Vec<PageRange>),
    /// Either way: still here.
    Heartbeat {
        /// Comes back in the reply.
        token: u64,
    },
    /// Either way: heard it.
    HeartbeatReply {
        /// The heartbeat's.
        token: u64,
    },
    /// Destination → source: every page is complete.
    Complete,
    /// Source → destination: it has understood that all is done and ends the session.
    Bye,
    /// Source → destination: it asks to run again.
    TakeBack,
    /// Destination → source: it has durably recorded that it will not run.
    TakeBackAgreed,
    /// Destination → source: it runs already.
    TakeBackDenied,
    /// Either way: it hangs up, and why.
    Refuse(Refusal),
    /// Either way: the sender has given this connection up, which the peer may not have
    /// noticed. Whoever connects makes the next one.
    Renew {
        /// Not the control channel.
        channel: Channel,
        /// The connection's.
        generation: Generation,
    },
    /// Source → destination: early copies of these pages are out of date.
    Stale {
        /// The pages that the segment covers.
        range: PageRange,
        /// Their bits.
        segment: Segment,
    },
    /// Source → destination, after each `Stale` that belongs to it: a precopy pass begins, or
    /// the last of them has ended.
    Pass {
        /// Counts them on this connection, from 1 to [`MAX_PASS`](super::MAX_PASS).
        number: u16,
        /// Memory is final: every early copy that is not out of date is the page's content.
        last: bool,
    },
    /// Destination → source: it has taken in a `Pass` and all that came before it.
    PassTaken {
        /// The pass's.
        number: u16,
        /// The pass's.
        last: bool,
    },
}

impl ControlFrame {
    /// Its number.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Offer(_) => Kind::Offer,
            Self::Attach(_) => Kind::Attach,
            Self::Received { .. } => Kind::Received,
            Self::Begin => Kind::Begin,
            Self::Section { .. } => Kind::Section,
            Self::StateEnd { .. } => Kind::StateEnd,
            Self::Ready => Kind::Ready,
            Self::Go => Kind::Go,
            Self::Running => Kind::Running,
            Self::Ack(_) => Kind::Ack,
            Self::Heartbeat { .. } => Kind::Heartbeat,
            Self::HeartbeatReply { .. } => Kind::HeartbeatReply,
            Self::Complete => Kind::Complete,
            Self::Bye => Kind::Bye,
            Self::TakeBack => Kind::TakeBack,
            Self::TakeBackAgreed => Kind::TakeBackAgreed,
            Self::TakeBackDenied => Kind::TakeBackDenied,
            Self::Refuse(_) => Kind::Refuse,
            Self::Renew { .. } => Kind::Renew,
            Self::Stale { .. } => Kind::Stale,
            Self::Pass { .. } => Kind::Pass,
            Self::PassTaken { .. } => Kind::PassTaken,
        }
    }

    /// Whether it can travel: the very checks that the receiver makes. Frames with values
    /// that come from outside, such as the names of sections, are to be checked before they
    /// are encoded.
    ///
    /// # Errors
    /// What [`decode`](Self::decode) would say of it.
    pub fn check(&self) -> Result<(), WireError> {
        match self {
            Self::Offer(offer) => check_offer(offer),
            Self::Attach(attach) => check_layout(Kind::Attach, &attach.layout),
            Self::Received { range, segment, .. } | Self::Stale { range, segment } => {
                check_segment(self.kind(), *range, segment)
            }
            Self::Section { name, bytes, .. } => check_section(name, bytes),
            Self::Ack(runs) => check_ack(runs),
            Self::Renew { channel, .. } => check_renew(*channel),
            Self::Pass { number, .. } | Self::PassTaken { number, .. } => {
                check_pass(self.kind(), (*number).into())
            }
            _ => Ok(()),
        }
    }

    /// Header and payload in one piece, with a checksum if asked for.
    ///
    /// # Panics
    /// If [`check`](Self::check) refuses it: a frame that says something else than its value
    /// never leaves.
    #[must_use]
    pub fn encode(&self, stamp: Stamp, checksums: bool) -> Vec<u8> {
        if let Err(error) = self.check() {
            panic!("a frame that cannot travel: {error}");
        }
        // No cast below loses anything: `check` has bounded what is cast.
        let (mut page, mut count, mut flags) = (0, 0, 0);
        let mut payload = Vec::new();
        match self {
            Self::Offer(offer) => encode_offer(offer, &mut payload),
            Self::Attach(attach) => {
                payload.push(attach.phase as u8);
                payload.extend_from_slice(&[0; 7]);
                encode_layout(&attach.layout, &mut payload);
            }
            Self::Received { range, segment, last } => {
                (page, count) = (range.start.0, range.count as u32);
                flags = if *last { FLAG_LAST } else { 0 };
                encode_segment(segment, &mut payload);
            }
            Self::Stale { range, segment } => {
                (page, count) = (range.start.0, range.count as u32);
                encode_segment(segment, &mut payload);
            }
            Self::Pass { number, last } | Self::PassTaken { number, last } => {
                count = u32::from(*number);
                flags = if *last { FLAG_LAST } else { 0 };
            }
            Self::Section { name, version, last, bytes } => {
                count = *version;
                flags = if *last { FLAG_LAST } else { 0 };
                payload.push(name.len() as u8);
                payload.extend_from_slice(name.as_bytes());
                payload.extend_from_slice(bytes);
            }
            Self::StateEnd { sections } => count = *sections,
            Self::Ack(runs) => {
                count = runs.len() as u32;
                for run in runs {
                    payload.extend_from_slice(&run.start.0.to_le_bytes());
                    payload.extend_from_slice(&run.count.to_le_bytes());
                }
            }
            Self::Heartbeat { token } | Self::HeartbeatReply { token } => page = *token,
            Self::Refuse(refusal) => refusal.encode(&mut payload),
            Self::Renew { channel, generation } => {
                let (number, slot) = channel.numbers();
                (page, count) = (u64::from(slot) << 8 | u64::from(number), generation.0);
                flags = FLAG_OPTIONAL;
            }
            _ => {}
        }
        let mut header = Header::new(self.kind(), stamp, page, count)
            .with_flags(flags)
            .with_length(payload.len() as u32);
        if checksums {
            header = header.sealed([payload.as_slice()]);
        }
        let mut bytes = Vec::with_capacity(super::HEADER_BYTES + payload.len());
        bytes.extend_from_slice(header.bytes());
        bytes.extend_from_slice(&payload);
        bytes
    }

    /// How many payload bytes to read after a header, before anything is allocated.
    ///
    /// # Errors
    /// An unknown frame that is not optional, one that does not belong here, or a payload
    /// longer than this frame may have.
    pub fn payload_length(header: &Header) -> Result<usize, WireError> {
        let (kind, limit) = match header.kind() {
            Ok(kind) => (kind as u16, payload_limit(kind)?),
            Err(kind) if header.is_optional() => (kind, MAX_CONTROL_PAYLOAD as usize),
            Err(kind) => return Err(WireError::UnknownKind { kind }),
        };
        let length = header.length() as usize;
        if length > limit {
            return Err(WireError::TooLong { kind, length: length as u64, limit: limit as u64 });
        }
        Ok(length)
    }

    /// The frame, or `None` for an unknown one that may be skipped. Whether its pages exist
    /// is left to the session, which knows the layout.
    ///
    /// # Errors
    /// Everything that can be wrong with a payload; see [`WireError`].
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Option<Self>, WireError> {
        let length = Self::payload_length(header)?;
        let Ok(kind) = header.kind() else { return Ok(None) };
        if payload.len() != length {
            return Err(bad_length(kind, payload, length));
        }
        let frame = match kind {
            Kind::Offer => Self::Offer(decode_offer(payload)?),
            Kind::Attach => Self::Attach(decode_attach(payload)?),
            Kind::Received => {
                let (range, segment) = decode_segment(header, payload)?;
                Self::Received { range, segment, last: header.is_last() }
            }
            Kind::Stale => {
                let (range, segment) = decode_segment(header, payload)?;
                Self::Stale { range, segment }
            }
            Kind::Section => decode_section(header, payload)?,
            Kind::Ack => Self::Ack(decode_ack(header, payload)?),
            Kind::Refuse => Self::Refuse(Refusal::decode(kind as u16, payload)?),
            _ if !payload.is_empty() => return Err(bad_length(kind, payload, 0)),
            Kind::Begin => Self::Begin,
            Kind::StateEnd => Self::StateEnd { sections: header.count() },
            Kind::Ready => Self::Ready,
            Kind::Go => Self::Go,
            Kind::Running => Self::Running,
            Kind::Heartbeat => Self::Heartbeat { token: header.page() },
            Kind::HeartbeatReply => Self::HeartbeatReply { token: header.page() },
            Kind::Complete => Self::Complete,
            Kind::Bye => Self::Bye,
            Kind::TakeBack => Self::TakeBack,
            Kind::TakeBackAgreed => Self::TakeBackAgreed,
            Kind::TakeBackDenied => Self::TakeBackDenied,
            Kind::Renew => decode_renew(header)?,
            Kind::Pass => Self::Pass { number: decode_pass(header)?, last: header.is_last() },
            Kind::PassTaken => {
                Self::PassTaken { number: decode_pass(header)?, last: header.is_last() }
            }
            Kind::PageRequest | Kind::PageContent | Kind::PageZero | Kind::PageUnreadable => {
                return Err(misplaced(kind));
            }
        };
        frame.check()?;
        Ok(Some(frame))
    }
}
