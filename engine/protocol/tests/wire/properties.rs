//! What holds for any bytes and any frame.

use crate::{STAMP, layout_of, range, region, split};
use afterimage_protocol::bitmap::{Bitmap, MAX_SEGMENT_PAGES, Segment};
use afterimage_protocol::layout::{Backing, GuestLayout, PageRange, PageSize, Region};
use afterimage_protocol::wire::{
    Attach, Capabilities, Channel, ControlFrame, DataFrame, Epoch, GREETING_PREFIX, Generation,
    Greeting, HEADER_BYTES, Header, Hello, Incarnation, MAGIC, MAX_ACK_RUNS, MAX_CONTENT_BYTES,
    MAX_CONTROL_PAYLOAD, MAX_PASS, MAX_REGIONS, MAX_REQUEST_PAGES, MAX_SECTION_BYTES, Offer, Phase,
    Refusal, RefuseCode, Role, SessionId, SessionKind, Stamp,
};
use proptest::array::uniform16;
use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_bytes_on_the_control_channel_panic_or_grow(
        (header, payload) in (header_bytes(), payload_bytes()),
        honest in prop::bool::weighted(0.9),
    ) {
        let mut bytes = header;
        if honest {
            bytes[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        }
        let header = Header::from_bytes(bytes);
        prop_assert_eq!(header.to_bytes(), bytes);
        if let Ok(length) = ControlFrame::payload_length(&header) {
            prop_assert!(length <= MAX_CONTROL_PAYLOAD as usize);
        }
        let Ok(Some(frame)) = ControlFrame::decode(&header, &payload) else { return Ok(()) };
        assert_bounded(&frame, payload.len())?;
        // What was taken in could be sent on, and would be read the same.
        let again = frame.encode(header.stamp(), false);
        let (header, payload) = split(&again);
        prop_assert_eq!(ControlFrame::decode(&header, payload), Ok(Some(frame)));
    }

    #[test]
    fn no_bytes_on_a_data_channel_name_pages_that_are_not_there(
        bytes in header_bytes(),
        kind in 1..5_u16,
        page in 0..5000_u64,
        count in 0..1200_u32,
        fits in any::<bool>(),
        near in any::<bool>(),
    ) {
        let layout = layout();
        let mut bytes = bytes;
        if near {
            bytes[..2].copy_from_slice(&kind.to_le_bytes());
            bytes[16..24].copy_from_slice(&page.to_le_bytes());
            bytes[24..28].copy_from_slice(&count.to_le_bytes());
            let length = if fits { count * 4096 } else { 0 };
            bytes[4..8].copy_from_slice(&length.to_le_bytes());
        }
        let header = Header::from_bytes(bytes);
        let Ok(frame) = DataFrame::parse(&header, &layout, "background") else { return Ok(()) };
        let (DataFrame::Request(pages)
        | DataFrame::Content(pages, _)
        | DataFrame::Zero(pages)
        | DataFrame::Unreadable(pages)) = frame;
        prop_assert!(layout.contains(pages) && !pages.is_empty());
        match frame {
            DataFrame::Content(pages, length) => {
                let runs: Vec<_> = layout.split(pages).collect();
                prop_assert_eq!(runs.len(), 1);
                prop_assert_eq!(runs[0].length, u64::from(length));
                prop_assert!(pages.count == 1 || u64::from(length) <= MAX_CONTENT_BYTES);
            }
            DataFrame::Request(pages) => {
                prop_assert!(pages.count <= u64::from(MAX_REQUEST_PAGES));
            }
            _ => prop_assert_eq!(header.length(), 0),
        }
        let header = frame.header(header.stamp());
        prop_assert_eq!(DataFrame::parse(&header, &layout, "background"), Ok(frame));
    }

    #[test]
    fn no_first_bytes_of_a_connection_panic_or_grow(
        prefix in any::<[u8; GREETING_PREFIX]>(),
        body in vec(prop_oneof![0..5_u8, any::<u8>()], 0..600),
        ours in prop::bool::weighted(0.9),
        honest in prop::bool::weighted(0.9),
        kind in 0..4_u16,
    ) {
        let mut prefix = prefix;
        if ours {
            prefix[..8].copy_from_slice(&MAGIC);
            prefix[8..12].copy_from_slice(&[1, 0, 1, 0]);
            prefix[12..14].copy_from_slice(&kind.to_le_bytes());
        }
        if honest {
            prefix[14..16].copy_from_slice(&(body.len() as u16).to_le_bytes());
        }
        let Ok(announced) = Greeting::announced(&prefix) else { return Ok(()) };
        prop_assert!(announced.length() <= 4096);
        let Ok(greeting) = Greeting::decode(announced, &body) else { return Ok(()) };
        if let Greeting::Refuse(refusal) = &greeting {
            prop_assert!(refusal.reason.len() <= Refusal::MAX_REASON);
            prop_assert!(!refusal.reason.contains(char::is_control));
        }
    }

    #[test]
    fn every_frame_arrives_as_it_left_or_does_not_leave(
        frame in frame(),
        checksums in any::<bool>(),
    ) {
        if let Err(error) = frame.check() {
            prop_assert!(is_extreme(&frame), "{} refused: {error}", frame.kind() as u16);
            return Ok(());
        }
        let bytes = frame.encode(STAMP, checksums);
        prop_assert!(bytes.len() <= HEADER_BYTES + MAX_CONTROL_PAYLOAD as usize);
        let (header, payload) = split(&bytes);
        prop_assert_eq!(header.stamp(), STAMP);
        prop_assert_eq!(ControlFrame::payload_length(&header), Ok(payload.len()));
        if checksums {
            // In any number of pieces.
            prop_assert_eq!(header.verify(payload.chunks(7)), Ok(()));
        }
        prop_assert_eq!(ControlFrame::decode(&header, payload), Ok(Some(frame)));
    }

    #[test]
    fn every_greeting_arrives_as_it_left(greeting in greeting()) {
        let bytes = greeting.encode();
        let (prefix, body) = bytes.split_first_chunk::<GREETING_PREFIX>().unwrap();
        let announced = Greeting::announced(prefix).unwrap();
        prop_assert_eq!(announced.length(), body.len());
        prop_assert_eq!(Greeting::decode(announced, body), Ok(greeting));
    }
}

/// What a frame holds is bounded by the bytes that came, and by the limits.
fn assert_bounded(frame: &ControlFrame, payload: usize) -> Result<(), TestCaseError> {
    match frame {
        ControlFrame::Offer(Offer { layout, .. }) | ControlFrame::Attach(Attach { layout, .. }) => {
            prop_assert!(layout.regions().len() <= MAX_REGIONS);
            prop_assert!(layout.regions().len() <= payload / 24);
        }
        ControlFrame::Received { range, segment, .. } => {
            prop_assert!(range.count <= MAX_SEGMENT_PAGES && range.end().is_some());
            let (Segment::Runs(bytes) | Segment::Raw(bytes)) = segment;
            prop_assert!(bytes.len() < payload);
            prop_assert!(segment.decode(*range, |_| ()).is_ok());
        }
        ControlFrame::Stale { range, segment } => {
            prop_assert!(range.count <= MAX_SEGMENT_PAGES && range.end().is_some());
            prop_assert!(segment.decode(*range, |_| ()).is_ok());
        }
        ControlFrame::Section { name, bytes, .. } => {
            prop_assert!(bytes.len() <= MAX_SECTION_BYTES);
            prop_assert_eq!(1 + name.len() + bytes.len(), payload);
        }
        ControlFrame::Ack(runs) => {
            prop_assert!(runs.len() <= MAX_ACK_RUNS && runs.len() * 16 == payload);
        }
        ControlFrame::Refuse(refusal) => {
            prop_assert!(refusal.reason.len() <= Refusal::MAX_REASON);
        }
        _ => prop_assert_eq!(payload, 0),
    }
    Ok(())
}

/// Whether a frame of [`frame`] has a value at which it may be refused.
fn is_extreme(frame: &ControlFrame) -> bool {
    match frame {
        ControlFrame::Section { name, .. } => name.is_empty() || name.len() > 255,
        ControlFrame::Ack(runs) => runs.iter().any(|run| run.is_empty() || run.end().is_none()),
        _ => false,
    }
}

fn layout() -> GuestLayout {
    layout_of(vec![
        region(0, 1 << 20, PageSize::KIB_4, Backing::Anonymous),
        region(1 << 20, 16 << 20, PageSize::KIB_4, Backing::Shared),
        region(1 << 30, 8 << 20, PageSize::MIB_2, Backing::Hugetlb),
    ])
}

/// Headers of known and unknown kinds, with fields small enough to be meant.
fn header_bytes() -> impl Strategy<Value = [u8; HEADER_BYTES]> {
    let kind = prop_oneof![8 => 0..40_u16, 1 => any::<u16>()];
    let length = prop_oneof![0..600_u32, any::<u32>()];
    let page = prop_oneof![(0..9_u64).prop_map(|word| word * 64), any::<u64>()];
    let count = prop_oneof![0..40_u32, any::<u32>()];
    (any::<[u8; HEADER_BYTES]>(), kind, length, page, count).prop_map(
        |(mut bytes, kind, length, page, count)| {
            bytes[0..2].copy_from_slice(&kind.to_le_bytes());
            bytes[4..8].copy_from_slice(&length.to_le_bytes());
            bytes[16..24].copy_from_slice(&page.to_le_bytes());
            bytes[24..28].copy_from_slice(&count.to_le_bytes());
            bytes
        },
    )
}

/// Payloads that are nothing, nearly something, or the payload of a frame.
fn payload_bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        Just(Vec::new()),
        vec(any::<u8>(), 0..600),
        vec(0..4_u8, 0..100),
        (frame(), vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)).prop_map(
            |(frame, damage)| {
                if frame.check().is_err() {
                    return Vec::new();
                }
                let mut payload = frame.encode(STAMP, false).split_off(HEADER_BYTES);
                for (at, byte) in
                    damage.into_iter().filter(|_| !payload.is_empty()).collect::<Vec<_>>()
                {
                    let at = at.index(payload.len());
                    payload[at] = byte;
                }
                payload
            }
        ),
    ]
}

fn frame() -> impl Strategy<Value = ControlFrame> {
    let offer = (any::<bool>(), 1..=16_u16, 1..=64_u16, 1..u32::MAX, 1..u32::MAX, regions());
    let phase = prop::sample::select(vec![
        Phase::Fresh,
        Phase::Ready,
        Phase::Refused,
        Phase::Running,
        Phase::Complete,
        Phase::Early,
    ]);
    let plain = prop::sample::select(vec![
        ControlFrame::Begin,
        ControlFrame::Ready,
        ControlFrame::Go,
        ControlFrame::Running,
        ControlFrame::Complete,
        ControlFrame::Bye,
        ControlFrame::TakeBack,
        ControlFrame::TakeBackAgreed,
        ControlFrame::TakeBackDenied,
    ]);
    prop_oneof![
        offer.prop_map(|(migration, streams, shards, heartbeat_ms, silence, layout)| {
            let kind = if migration { SessionKind::Migration } else { SessionKind::Snapshot };
            let silence_ms = heartbeat_ms.saturating_add(silence);
            ControlFrame::Offer(Offer { kind, streams, shards, heartbeat_ms, silence_ms, layout })
        }),
        (phase, regions())
            .prop_map(|(phase, layout)| { ControlFrame::Attach(Attach { phase, layout }) }),
        (vec(any::<bool>(), 0..400), 0..1_u64 << 40, any::<bool>()).prop_map(received),
        (".{0,100}", any::<u32>(), any::<bool>(), vec(any::<u8>(), 0..50)).prop_map(
            |(name, version, last, bytes)| ControlFrame::Section { name, version, last, bytes }
        ),
        (vec(any::<bool>(), 0..400), 0..1_u64 << 40, any::<bool>()).prop_map(|of| {
            let ControlFrame::Received { range, segment, .. } = received(of) else { panic!() };
            ControlFrame::Stale { range, segment }
        }),
        (1..=MAX_PASS, any::<bool>())
            .prop_map(|(number, last)| ControlFrame::Pass { number, last }),
        (1..=MAX_PASS, any::<bool>())
            .prop_map(|(number, last)| ControlFrame::PassTaken { number, last }),
        any::<u32>().prop_map(|sections| ControlFrame::StateEnd { sections }),
        vec(run(), 0..20).prop_map(ControlFrame::Ack),
        any::<u64>().prop_map(|token| ControlFrame::Heartbeat { token }),
        any::<u64>().prop_map(|token| ControlFrame::HeartbeatReply { token }),
        refusal().prop_map(ControlFrame::Refuse),
        (0..16_u16, any::<bool>(), any::<u32>()).prop_map(|(slot, asks, generation)| {
            let channel = if asks { Channel::Request(slot) } else { Channel::Background(slot) };
            ControlFrame::Renew { channel, generation: Generation(generation) }
        }),
        plain,
    ]
}

fn received((bits, first, last): (Vec<bool>, u64, bool)) -> ControlFrame {
    let pages = bits.len() as u64;
    let bitmap = Bitmap::new(pages);
    for (page, _) in bits.iter().enumerate().filter(|(_, bit)| **bit) {
        bitmap.set(range(page as u64, 1), |_| ());
    }
    let segment = Segment::encode(&bitmap, range(0, pages));
    ControlFrame::Received { range: range(first * 64, pages), segment, last }
}

fn run() -> impl Strategy<Value = PageRange> {
    prop_oneof![
        20 => (any::<u32>(), 1..u64::from(u32::MAX)).prop_map(|(start, count)| range(start.into(), count)),
        1 => (any::<u64>(), any::<u64>()).prop_map(|(start, count)| range(start, count)),
    ]
}

fn regions() -> impl Strategy<Value = GuestLayout> {
    let backing = prop::sample::select(vec![
        Backing::Anonymous,
        Backing::Shared,
        Backing::Hugetlb,
        Backing::Opaque,
    ]);
    let one = (0..4_u64, 1..5_u64, 0..=18_u32, backing).prop_map(|(gap, count, shift, backing)| {
        let shift = if backing == Backing::Hugetlb { 21 + shift % 10 } else { 12 + shift };
        (gap, count, PageSize::from_bytes(1 << shift).unwrap(), backing)
    });
    vec(one, 1..8).prop_map(|regions| {
        let mut next = 0_u64;
        let place = |(gap, count, page_size, backing): (u64, u64, PageSize, Backing)| -> Region {
            let start = (next + gap * 4096).next_multiple_of(page_size.bytes());
            next = start + count * page_size.bytes();
            region(start, count * page_size.bytes(), page_size, backing)
        };
        layout_of(regions.into_iter().map(place).collect())
    })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    (1..=11_u16, "\\PC{0,100}")
        .prop_map(|(code, reason)| Refusal::new(RefuseCode::from_number(code), reason))
}

fn greeting() -> impl Strategy<Value = Greeting> {
    let channel = prop_oneof![
        Just(Channel::Control),
        (0..64_u16).prop_map(Channel::Request),
        (0..16_u16).prop_map(Channel::Background),
    ];
    let stamp = (any::<u32>(), any::<u32>()).prop_map(|(epoch, generation)| Stamp {
        epoch: Epoch(epoch),
        generation: Generation(generation),
    });
    let ids = (uniform16(any::<u8>()), uniform16(any::<u8>()));
    let hello = (any::<bool>(), channel, stamp, any::<u64>(), ids).prop_map(
        |(source, channel, stamp, capabilities, (session, incarnation))| {
            Greeting::Hello(Hello {
                role: if source { Role::Source } else { Role::Destination },
                channel,
                stamp,
                capabilities: Capabilities(capabilities),
                session: SessionId(session),
                incarnation: Incarnation(incarnation),
            })
        },
    );
    prop_oneof![hello, refusal().prop_map(Greeting::Refuse)]
}
