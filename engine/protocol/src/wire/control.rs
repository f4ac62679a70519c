//! Frames on the control channel.

use super::{FLAG_LAST, Header, Kind, MAX_CONTROL_PAYLOAD, Refusal, Stamp, WireError};
use crate::bitmap::{MAX_SEGMENT_PAGES, Segment};
use crate::layout::{Backing, GuestAddress, GuestLayout, PageNumber, PageRange, PageSize, Region};

/// The most regions a layout may have to travel.
pub const MAX_REGIONS: usize = 16_384;
/// The most runs in one [`ControlFrame::Ack`].
pub const MAX_ACK_RUNS: usize = 4096;
/// The longest name of a section of device state.
pub const MAX_SECTION_NAME: usize = 255;
/// The most bytes of a section in one frame; a section of any size is sent in several.
pub const MAX_SECTION_BYTES: usize = 512 << 10;
const REGION_BYTES: usize = 24;

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
        }
    }

    /// Header and payload in one piece, with a checksum if asked for.
    #[must_use]
    pub fn encode(&self, stamp: Stamp, checksums: bool) -> Vec<u8> {
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
                let (form, bytes) = match segment {
                    Segment::Runs(bytes) => (1, bytes),
                    Segment::Raw(bytes) => (2, bytes),
                };
                payload.push(form);
                payload.extend_from_slice(bytes);
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
    /// An unknown frame that is not optional, or a payload that is too long.
    pub fn payload_length(header: &Header) -> Result<usize, WireError> {
        let kind = match header.kind() {
            Ok(kind) => kind as u16,
            Err(kind) if header.is_optional() => kind,
            Err(kind) => return Err(WireError::UnknownKind { kind }),
        };
        if header.length() > MAX_CONTROL_PAYLOAD {
            return Err(WireError::TooLong {
                kind,
                length: header.length().into(),
                limit: MAX_CONTROL_PAYLOAD.into(),
            });
        }
        Ok(header.length() as usize)
    }

    /// The frame, or `None` for an unknown one that may be skipped.
    ///
    /// # Errors
    /// Everything that can be wrong with a payload; see [`WireError`].
    pub fn decode(header: &Header, payload: &[u8]) -> Result<Option<Self>, WireError> {
        let kind = match header.kind() {
            Ok(kind) => kind,
            Err(_) if header.is_optional() => return Ok(None),
            Err(kind) => return Err(WireError::UnknownKind { kind }),
        };
        let frame = match kind {
            Kind::Offer => Self::Offer(decode_offer(payload)?),
            Kind::Attach => Self::Attach(decode_attach(payload)?),
            Kind::Received => decode_received(header, payload)?,
            Kind::Section => decode_section(header, payload)?,
            Kind::Ack => Self::Ack(decode_ack(header, payload)?),
            Kind::Refuse => {
                Self::Refuse(Refusal::decode(payload).ok_or_else(|| bad_length(kind, payload, 2))?)
            }
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
            Kind::PageRequest | Kind::PageContent | Kind::PageZero | Kind::PageUnreadable => {
                return Err(WireError::Misplaced { kind: kind as u16, channel: "control" });
            }
        };
        Ok(Some(frame))
    }
}

fn bad_length(kind: Kind, payload: &[u8], expected: usize) -> WireError {
    WireError::BadLength {
        kind: kind as u16,
        length: payload.len() as u64,
        expected: expected as u64,
    }
}

fn bad_value(kind: Kind, field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::BadValue { kind: kind as u16, field, value: value.into() }
}

fn encode_offer(offer: &Offer, bytes: &mut Vec<u8>) {
    bytes.push(offer.kind as u8);
    bytes.push(0);
    bytes.extend_from_slice(&offer.streams.to_le_bytes());
    bytes.extend_from_slice(&offer.shards.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&offer.heartbeat_ms.to_le_bytes());
    bytes.extend_from_slice(&offer.silence_ms.to_le_bytes());
    encode_layout(&offer.layout, bytes);
}

fn decode_offer(payload: &[u8]) -> Result<Offer, WireError> {
    let kind = Kind::Offer;
    let (fixed, layout) =
        payload.split_first_chunk::<16>().ok_or_else(|| bad_length(kind, payload, 16))?;
    let session = match fixed[0] {
        1 => SessionKind::Migration,
        2 => SessionKind::Snapshot,
        value => return Err(bad_value(kind, "session kind", value)),
    };
    let number = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
    let wide = |at: usize| u32::from(number(at)) | u32::from(number(at + 2)) << 16;
    let (streams, shards) = (number(2), number(4));
    if !(1..=16).contains(&streams) {
        return Err(bad_value(kind, "background streams", streams));
    }
    if !(1..=64).contains(&shards) {
        return Err(bad_value(kind, "request channels", shards));
    }
    let (heartbeat_ms, silence_ms) = (wide(8), wide(12));
    if heartbeat_ms == 0 || silence_ms <= heartbeat_ms {
        return Err(bad_value(kind, "silence time", silence_ms));
    }
    let layout = decode_layout(kind, layout)?;
    Ok(Offer { kind: session, streams, shards, heartbeat_ms, silence_ms, layout })
}

fn decode_attach(payload: &[u8]) -> Result<Attach, WireError> {
    let kind = Kind::Attach;
    let (fixed, layout) =
        payload.split_first_chunk::<8>().ok_or_else(|| bad_length(kind, payload, 8))?;
    let phase = match fixed[0] {
        1 => Phase::Fresh,
        2 => Phase::Ready,
        3 => Phase::Refused,
        4 => Phase::Running,
        5 => Phase::Complete,
        value => return Err(bad_value(kind, "phase", value)),
    };
    Ok(Attach { phase, layout: decode_layout(kind, layout)? })
}

fn encode_layout(layout: &GuestLayout, bytes: &mut Vec<u8>) {
    for region in layout.regions() {
        bytes.extend_from_slice(&region.guest_address.0.to_le_bytes());
        bytes.extend_from_slice(&region.length.to_le_bytes());
        bytes.push(region.page_size.shift() as u8);
        bytes.push(region.backing as u8);
        bytes.extend_from_slice(&[0; 6]);
    }
}

fn decode_layout(kind: Kind, bytes: &[u8]) -> Result<GuestLayout, WireError> {
    if !bytes.len().is_multiple_of(REGION_BYTES) {
        return Err(bad_length(kind, bytes, bytes.len().next_multiple_of(REGION_BYTES)));
    }
    let count = bytes.len() / REGION_BYTES;
    if count > MAX_REGIONS {
        return Err(bad_value(kind, "number of regions", count as u64));
    }
    let mut regions = Vec::with_capacity(count);
    for raw in bytes.chunks_exact(REGION_BYTES) {
        let number = |at: usize| {
            raw[at..at + 8].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        let page_size = (raw[16] < 64)
            .then(|| PageSize::from_bytes(1 << raw[16]))
            .flatten()
            .ok_or_else(|| bad_value(kind, "page size 2 to the power of", raw[16]))?;
        let backing = match raw[17] {
            1 => Backing::Anonymous,
            2 => Backing::Shared,
            3 => Backing::Hugetlb,
            4 => Backing::Opaque,
            value => return Err(bad_value(kind, "backing", value)),
        };
        regions.push(Region::new(GuestAddress(number(0)), number(8), page_size, backing));
    }
    Ok(GuestLayout::new(regions)?)
}

fn decode_received(header: &Header, payload: &[u8]) -> Result<ControlFrame, WireError> {
    let kind = Kind::Received;
    let range = PageRange::new(PageNumber(header.page()), u64::from(header.count()));
    if !range.start.0.is_multiple_of(64) || range.end().is_none() {
        return Err(bad_value(kind, "first page", range.start.0));
    }
    if range.count > MAX_SEGMENT_PAGES {
        return Err(bad_value(kind, "page count", range.count));
    }
    let (form, bytes) = payload.split_first().ok_or_else(|| bad_length(kind, payload, 1))?;
    let segment = match form {
        1 => Segment::Runs(bytes.to_vec()),
        2 => Segment::Raw(bytes.to_vec()),
        value => return Err(bad_value(kind, "bitmap form", *value)),
    };
    // Decoded once here, so that whoever applies it cannot meet an error half way.
    segment.decode(range, |_| ())?;
    Ok(ControlFrame::Received { range, segment, last: header.is_last() })
}

fn decode_section(header: &Header, payload: &[u8]) -> Result<ControlFrame, WireError> {
    let kind = Kind::Section;
    let (&length, rest) = payload.split_first().ok_or_else(|| bad_length(kind, payload, 1))?;
    let length = usize::from(length);
    if length == 0 || rest.len() < length {
        return Err(bad_value(kind, "name length", length as u64));
    }
    let (name, bytes) = rest.split_at(length);
    if bytes.len() > MAX_SECTION_BYTES {
        return Err(WireError::TooLong {
            kind: kind as u16,
            length: bytes.len() as u64,
            limit: MAX_SECTION_BYTES as u64,
        });
    }
    let name = std::str::from_utf8(name).map_err(|error| {
        bad_value(kind, "name that is not UTF-8 from byte", error.valid_up_to() as u64)
    })?;
    Ok(ControlFrame::Section {
        name: name.to_owned(),
        version: header.count(),
        last: header.is_last(),
        bytes: bytes.to_vec(),
    })
}

fn decode_ack(header: &Header, payload: &[u8]) -> Result<Vec<PageRange>, WireError> {
    let kind = Kind::Ack;
    let count = header.count() as usize;
    if count > MAX_ACK_RUNS {
        return Err(bad_value(kind, "number of runs", header.count()));
    }
    if payload.len() != count * 16 {
        return Err(bad_length(kind, payload, count * 16));
    }
    payload
        .chunks_exact(16)
        .map(|raw| {
            let number = |at: usize| {
                raw[at..at + 8].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
            };
            let run = PageRange::new(PageNumber(number(0)), number(8));
            if run.is_empty() || run.end().is_none() {
                return Err(bad_value(kind, "empty or endless run at page", run.start.0));
            }
            Ok(run)
        })
        .collect()
}
