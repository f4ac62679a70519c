//! The payloads of control frames: what lies behind their headers.

use super::control::{
    Attach, ControlFrame, MAX_ACK_RUNS, MAX_REGIONS, MAX_SECTION_BYTES, MAX_SECTION_NAME,
    MAX_SHARDS, MAX_STREAMS, Offer, Phase, SessionKind,
};
use super::{Channel, Generation, Header, Kind, MAX_PASS, Refusal, WireError};
use crate::bitmap::{MAX_SEGMENT_PAGES, Segment};
use crate::layout::{Backing, GuestAddress, GuestLayout, PageNumber, PageRange, PageSize, Region};

/// Bytes before the regions of an offer.
const OFFER_BYTES: usize = 16;
/// Bytes before the regions of an attach.
const ATTACH_BYTES: usize = 8;
/// Bytes of one region.
const REGION_BYTES: usize = 24;
/// Bytes of one run of an ack.
const RUN_BYTES: usize = 16;

/// The longest payload of a frame on the control channel.
pub(super) fn payload_limit(kind: Kind) -> Result<usize, WireError> {
    Ok(match kind {
        Kind::Offer => OFFER_BYTES + MAX_REGIONS * REGION_BYTES,
        Kind::Attach => ATTACH_BYTES + MAX_REGIONS * REGION_BYTES,
        // By runs is only chosen where it is smaller than raw.
        Kind::Received | Kind::Stale => 1 + MAX_SEGMENT_PAGES as usize / 8,
        Kind::Section => 1 + MAX_SECTION_NAME + MAX_SECTION_BYTES,
        Kind::Ack => MAX_ACK_RUNS * RUN_BYTES,
        Kind::Refuse => 2 + Refusal::MAX_REASON,
        Kind::PageRequest | Kind::PageContent | Kind::PageZero | Kind::PageUnreadable => {
            return Err(misplaced(kind));
        }
        _ => 0,
    })
}

pub(super) fn misplaced(kind: Kind) -> WireError {
    WireError::Misplaced { kind: kind as u16, channel: "control" }
}

pub(super) fn check_offer(offer: &Offer) -> Result<(), WireError> {
    let kind = Kind::Offer;
    if !(1..=MAX_STREAMS).contains(&offer.streams) {
        return Err(bad_value(kind, "background streams", offer.streams));
    }
    if !(1..=MAX_SHARDS).contains(&offer.shards) {
        return Err(bad_value(kind, "request channels", offer.shards));
    }
    if offer.heartbeat_ms == 0 {
        return Err(bad_value(kind, "heartbeat time", offer.heartbeat_ms));
    }
    if offer.silence_ms <= offer.heartbeat_ms {
        return Err(bad_value(kind, "silence time", offer.silence_ms));
    }
    check_layout(kind, &offer.layout)
}

pub(super) fn check_layout(kind: Kind, layout: &GuestLayout) -> Result<(), WireError> {
    check_region_count(kind, layout.regions().len())
}

fn check_region_count(kind: Kind, count: usize) -> Result<(), WireError> {
    if count > MAX_REGIONS {
        return Err(bad_value(kind, "number of regions", count as u64));
    }
    Ok(())
}

pub(super) fn check_segment(
    kind: Kind,
    range: PageRange,
    segment: &Segment,
) -> Result<(), WireError> {
    if !range.start.0.is_multiple_of(64) || range.end().is_none() {
        return Err(bad_value(kind, "first page", range.start.0));
    }
    if range.count > MAX_SEGMENT_PAGES {
        return Err(bad_value(kind, "page count", range.count));
    }
    let (Segment::Runs(bytes) | Segment::Raw(bytes)) = segment;
    let limit = payload_limit(kind)?;
    if 1 + bytes.len() > limit {
        let length = 1 + bytes.len() as u64;
        return Err(WireError::TooLong { kind: kind as u16, length, limit: limit as u64 });
    }
    // Decoded once here, so that whoever applies it cannot meet an error half way.
    Ok(segment.decode(range, |_| ())?)
}

pub(super) fn check_section(name: &str, bytes: &[u8]) -> Result<(), WireError> {
    let kind = Kind::Section;
    if name.is_empty() || name.len() > MAX_SECTION_NAME {
        return Err(bad_value(kind, "name length", name.len() as u64));
    }
    if bytes.len() > MAX_SECTION_BYTES {
        return Err(WireError::TooLong {
            kind: kind as u16,
            length: bytes.len() as u64,
            limit: MAX_SECTION_BYTES as u64,
        });
    }
    Ok(())
}

pub(super) fn check_ack(runs: &[PageRange]) -> Result<(), WireError> {
    let kind = Kind::Ack;
    if runs.len() > MAX_ACK_RUNS {
        return Err(bad_value(kind, "number of runs", runs.len() as u64));
    }
    match runs.iter().find(|run| run.is_empty() || run.end().is_none()) {
        Some(run) => Err(bad_value(kind, "empty or endless run at page", run.start.0)),
        None => Ok(()),
    }
}

pub(super) fn bad_length(kind: Kind, payload: &[u8], expected: usize) -> WireError {
    WireError::BadLength {
        kind: kind as u16,
        length: payload.len() as u64,
        expected: expected as u64,
    }
}

pub(super) fn check_renew(channel: Channel) -> Result<(), WireError> {
    let (number, slot) = channel.numbers();
    match Channel::from_numbers(number, slot) {
        Some(Channel::Request(_) | Channel::Background(_)) => Ok(()),
        _ => Err(bad_value(Kind::Renew, "channel", renewed(number, slot))),
    }
}

pub(super) fn check_pass(kind: Kind, number: u32) -> Result<(), WireError> {
    if (1..=u32::from(MAX_PASS)).contains(&number) {
        return Ok(());
    }
    Err(bad_value(kind, "pass", number))
}

pub(super) fn decode_pass(header: &Header) -> Result<u16, WireError> {
    let kind = if header.kind() == Ok(Kind::Pass) { Kind::Pass } else { Kind::PassTaken };
    check_pass(kind, header.count())?;
    Ok(header.count() as u16)
}

fn renewed(number: u8, slot: u16) -> u64 {
    u64::from(slot) << 8 | u64::from(number)
}

pub(super) fn decode_renew(header: &Header) -> Result<ControlFrame, WireError> {
    let page = header.page();
    let bad = || bad_value(Kind::Renew, "channel", page);
    let slot = u16::try_from(page >> 8).map_err(|_| bad())?;
    let channel = Channel::from_numbers(page as u8, slot).ok_or_else(bad)?;
    Ok(ControlFrame::Renew { channel, generation: Generation(header.count()) })
}

fn bad_value(kind: Kind, field: &'static str, value: impl Into<u64>) -> WireError {
    WireError::BadValue { kind: kind as u16, field, value: value.into() }
}

pub(super) fn encode_offer(offer: &Offer, bytes: &mut Vec<u8>) {
    bytes.push(offer.kind as u8);
    bytes.push(0);
    bytes.extend_from_slice(&offer.streams.to_le_bytes());
    bytes.extend_from_slice(&offer.shards.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&offer.heartbeat_ms.to_le_bytes());
    bytes.extend_from_slice(&offer.silence_ms.to_le_bytes());
    encode_layout(&offer.layout, bytes);
}

pub(super) fn decode_offer(payload: &[u8]) -> Result<Offer, WireError> {
    let kind = Kind::Offer;
    let (fixed, layout) = payload
        .split_first_chunk::<OFFER_BYTES>()
        .ok_or_else(|| bad_length(kind, payload, OFFER_BYTES))?;
    let session = match fixed[0] {
        1 => SessionKind::Migration,
        2 => SessionKind::Snapshot,
        value => return Err(bad_value(kind, "session kind", value)),
    };
    let number = |at: usize| u16::from_le_bytes([fixed[at], fixed[at + 1]]);
    let wide = |at: usize| u32::from(number(at)) | u32::from(number(at + 2)) << 16;
    let (streams, shards) = (number(2), number(4));
    let (heartbeat_ms, silence_ms) = (wide(8), wide(12));
    let layout = decode_layout(kind, layout)?;
    Ok(Offer { kind: session, streams, shards, heartbeat_ms, silence_ms, layout })
}

pub(super) fn decode_attach(payload: &[u8]) -> Result<Attach, WireError> {
    let kind = Kind::Attach;
    let (fixed, layout) = payload
        .split_first_chunk::<ATTACH_BYTES>()
        .ok_or_else(|| bad_length(kind, payload, ATTACH_BYTES))?;
    let phase = match fixed[0] {
        1 => Phase::Fresh,
        2 => Phase::Ready,
        3 => Phase::Refused,
        4 => Phase::Running,
        5 => Phase::Complete,
        6 => Phase::Early,
        value => return Err(bad_value(kind, "phase", value)),
    };
    Ok(Attach { phase, layout: decode_layout(kind, layout)? })
}

pub(super) fn encode_layout(layout: &GuestLayout, bytes: &mut Vec<u8>) {
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
    check_region_count(kind, count)?;
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

pub(super) fn encode_segment(segment: &Segment, bytes: &mut Vec<u8>) {
    let (form, content) = match segment {
        Segment::Runs(content) => (1, content),
        Segment::Raw(content) => (2, content),
    };
    bytes.push(form);
    bytes.extend_from_slice(content);
}

pub(super) fn decode_segment(
    header: &Header,
    payload: &[u8],
) -> Result<(PageRange, Segment), WireError> {
    let kind = if header.kind() == Ok(Kind::Stale) { Kind::Stale } else { Kind::Received };
    let range = PageRange::new(PageNumber(header.page()), u64::from(header.count()));
    let (form, bytes) = payload.split_first().ok_or_else(|| bad_length(kind, payload, 1))?;
    let segment = match form {
        1 => Segment::Runs(bytes.to_vec()),
        2 => Segment::Raw(bytes.to_vec()),
        value => return Err(bad_value(kind, "bitmap form", *value)),
    };
    Ok((range, segment))
}

pub(super) fn decode_section(header: &Header, payload: &[u8]) -> Result<ControlFrame, WireError> {
    let kind = Kind::Section;
    let (&length, rest) = payload.split_first().ok_or_else(|| bad_length(kind, payload, 1))?;
    let length = usize::from(length);
    if length == 0 || rest.len() < length {
        return Err(bad_value(kind, "name length", length as u64));
    }
    let (name, bytes) = rest.split_at(length);
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

pub(super) fn decode_ack(header: &Header, payload: &[u8]) -> Result<Vec<PageRange>, WireError> {
    let kind = Kind::Ack;
    let count = header.count() as usize;
    if count > MAX_ACK_RUNS {
        return Err(bad_value(kind, "number of runs", header.count()));
    }
    if payload.len() != count * RUN_BYTES {
        return Err(bad_length(kind, payload, count * RUN_BYTES));
    }
    let runs = payload.chunks_exact(RUN_BYTES).map(|raw| {
        let number = |at: usize| {
            raw[at..at + 8].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte))
        };
        PageRange::new(PageNumber(number(0)), number(8))
    });
    Ok(runs.collect())
}
