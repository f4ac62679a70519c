//! Everything that can be wrong with a frame's bytes is refused by name, and no such frame
//! leaves.

use crate::{STAMP, is_bad_value, layout_of, range, region, split};
use afterimage_protocol::bitmap::{MAX_SEGMENT_PAGES, Segment, SegmentError};
use afterimage_protocol::layout::{Backing, GuestLayout, LayoutError, PageSize};
use afterimage_protocol::wire::{
    Attach, ControlFrame, DataFrame, Epoch, FLAG_LAST, FLAG_OPTIONAL, Generation, Header, Kind,
    MAX_ACK_RUNS, MAX_CONTENT_BYTES, MAX_CONTROL_PAYLOAD, MAX_FRAME_PAGES, MAX_REGIONS,
    MAX_REQUEST_PAGES, MAX_SECTION_BYTES, MAX_SECTION_NAME, Phase, Refusal, RefuseCode, Stamp,
    WireError,
};

const MIB: u64 = 1 << 20;

/// The raw bytes of a header, with a kind that no version may know.
fn raw_header(kind: u16, flags: u16, length: u32, page: u64, count: u32) -> Header {
    let mut bytes = [0; 32];
    bytes[0..2].copy_from_slice(&kind.to_le_bytes());
    bytes[2..4].copy_from_slice(&flags.to_le_bytes());
    bytes[4..8].copy_from_slice(&length.to_le_bytes());
    bytes[16..24].copy_from_slice(&page.to_le_bytes());
    bytes[24..28].copy_from_slice(&count.to_le_bytes());
    Header::from_bytes(bytes)
}

/// What a receiver says to a control frame with this payload.
fn control(kind: Kind, page: u64, count: u32, payload: &[u8]) -> WireError {
    let header = raw_header(kind as u16, 0, payload.len() as u32, page, count);
    ControlFrame::decode(&header, payload).unwrap_err()
}

#[test]
fn unknown_frames_are_refused_unless_they_are_optional() {
    let strict = raw_header(9999, 0, 3, 0, 0);
    let unknown = WireError::UnknownKind { kind: 9999 };
    assert_eq!(ControlFrame::payload_length(&strict), Err(unknown.clone()));
    assert_eq!(ControlFrame::decode(&strict, b"abc"), Err(unknown.clone()));
    let optional = raw_header(9999, FLAG_OPTIONAL, 3, 0, 0);
    assert_eq!(ControlFrame::payload_length(&optional), Ok(3));
    assert_eq!(ControlFrame::decode(&optional, b"abc"), Ok(None));
    let endless = raw_header(9999, FLAG_OPTIONAL, MAX_CONTROL_PAYLOAD + 1, 0, 0);
    assert!(matches!(
        ControlFrame::payload_length(&endless),
        Err(WireError::TooLong { kind: 9999, .. })
    ));
    // On data channels nothing is optional.
    assert_eq!(DataFrame::parse(&optional, &small(), "request"), Err(unknown));
}

#[test]
fn a_frame_on_the_wrong_channel_is_misplaced_whatever_else_it_says() {
    for kind in (0..100).filter_map(Kind::from_number) {
        let header = raw_header(kind as u16, 0, u32::MAX, u64::MAX, u32::MAX);
        let misplaced = |channel| WireError::Misplaced { kind: kind as u16, channel };
        if (kind as u16) < 16 {
            assert_eq!(ControlFrame::payload_length(&header), Err(misplaced("control")));
            assert_eq!(ControlFrame::decode(&header, b"x"), Err(misplaced("control")));
        } else {
            let parsed = DataFrame::parse(&header, &small(), "background");
            assert_eq!(parsed, Err(misplaced("background")));
        }
    }
}

#[test]
fn no_control_frame_is_longer_than_its_kind_can_be() {
    for kind in (16..100).filter_map(Kind::from_number) {
        let limit = match kind {
            Kind::Offer => 16 + 24 * MAX_REGIONS,
            Kind::Attach => 8 + 24 * MAX_REGIONS,
            Kind::Received | Kind::Stale => 1 + MAX_SEGMENT_PAGES as usize / 8,
            Kind::Section => 1 + MAX_SECTION_NAME + MAX_SECTION_BYTES,
            Kind::Ack => 16 * MAX_ACK_RUNS,
            Kind::Refuse => 2 + Refusal::MAX_REASON,
            _ => 0,
        };
        assert!(limit <= MAX_CONTROL_PAYLOAD as usize);
        let length = |length: usize| {
            ControlFrame::payload_length(&raw_header(kind as u16, 0, length as u32, 0, 0))
        };
        assert_eq!(length(limit), Ok(limit), "{kind:?}");
        let too_long = |length: usize| {
            Err(WireError::TooLong {
                kind: kind as u16,
                length: length as u64,
                limit: limit as u64,
            })
        };
        assert_eq!(length(limit + 1), too_long(limit + 1));
        assert_eq!(length(u32::MAX as usize), too_long(u32::MAX as usize));
    }
}

#[test]
fn a_payload_of_another_length_than_the_header_says_is_refused() {
    let frame = ControlFrame::Section {
        name: "ram".into(),
        version: 1,
        last: true,
        bytes: vec![1, 2, 3, 4],
    };
    let bytes = frame.encode(STAMP, false);
    let (header, payload) = split(&bytes);
    for length in 0..payload.len() {
        let expected = payload.len() as u64;
        assert_eq!(
            ControlFrame::decode(&header, &payload[..length]),
            Err(WireError::BadLength {
                kind: Kind::Section as u16,
                length: length as u64,
                expected
            })
        );
    }
    let longer = [payload, &[0]].concat();
    assert!(ControlFrame::decode(&header, &longer).is_err());
}

#[test]
fn truncated_payloads_are_refused() {
    let short = |kind, payload: &[u8]| {
        let error = control(kind, 0, 0, payload);
        assert!(matches!(error, WireError::BadLength { .. }), "{kind:?}: {error}");
    };
    short(Kind::Offer, &[1; 15]);
    short(Kind::Attach, &[1; 7]);
    short(Kind::Received, &[]);
    short(Kind::Section, &[]);
    short(Kind::Refuse, &[1]);
    short(Kind::Attach, &[&[1, 0, 0, 0, 0, 0, 0, 0][..], &[0; 23]].concat());
    for payload in [&[5, b'a', b'b'][..], &[0], &[1]] {
        assert!(is_bad_value(&control(Kind::Section, 0, 0, payload), "name length"));
    }
    for (count, bytes) in [(1, 15), (1, 17), (2, 16), (0, 16)] {
        let error = control(Kind::Ack, 0, count, &vec![1; bytes]);
        assert!(matches!(error, WireError::BadLength { .. }), "{error}");
    }
}

#[test]
fn fields_of_an_offer_that_cannot_be_are_refused() {
    let offer = |at: usize, bytes: &[u8]| {
        let mut payload = vec![1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0];
        payload.extend(raw_region(0, MIB, 12, 1));
        payload[at..at + bytes.len()].copy_from_slice(bytes);
        let header = raw_header(Kind::Offer as u16, 0, payload.len() as u32, 0, 0);
        ControlFrame::decode(&header, &payload)
    };
    assert!(offer(0, &[1]).is_ok());
    for (at, bytes, field) in [
        (0, &[0][..], "session kind"),
        (0, &[3], "session kind"),
        (2, &[0, 0], "background streams"),
        (2, &[17, 0], "background streams"),
        (4, &[0, 0], "request channels"),
        (4, &[65, 0], "request channels"),
        (8, &[0, 0, 0, 0], "heartbeat time"),
        (8, &[2, 0, 0, 0], "silence time"),
        (12, &[0, 0, 0, 0], "silence time"),
        (32, &[11], "page size 2 to the power of"),
        (32, &[31], "page size 2 to the power of"),
        (32, &[255], "page size 2 to the power of"),
        (33, &[0], "backing"),
        (33, &[5], "backing"),
    ] {
        let error = offer(at, bytes).unwrap_err();
        assert!(is_bad_value(&error, field), "{field}: {error}");
    }
    // Reserved bytes are ignored, so that a newer peer may use them.
    assert_eq!(offer(1, &[9]), offer(0, &[1]));
    assert_eq!(offer(34, &[9; 6]), offer(0, &[1]));
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let attach = |regions: &[[u8; 24]]| {
        let payload = [&[1, 0, 0, 0, 0, 0, 0, 0][..], &regions.concat()].concat();
        match control(Kind::Attach, 0, 0, &payload) {
            WireError::Layout(error) => error,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(attach(&[]), LayoutError::Empty));
    assert!(matches!(attach(&[raw_region(0, 0, 12, 1)]), LayoutError::ZeroLength { .. }));
    assert!(matches!(attach(&[raw_region(1, 4096, 12, 1)]), LayoutError::Unaligned { .. }));
    assert!(matches!(attach(&[raw_region(0, 4097, 12, 1)]), LayoutError::UnalignedLength { .. }));
    assert!(matches!(attach(&[raw_region(0, MIB, 12, 3)]), LayoutError::NotHuge { .. }));
    let last_page = 0_u64.wrapping_sub(4096);
    assert!(matches!(attach(&[raw_region(last_page, 8192, 12, 1)]), LayoutError::Overflow { .. }));
    let overlap = [raw_region(0, MIB, 12, 1), raw_region(MIB - 4096, MIB, 12, 1)];
    assert!(matches!(attach(&overlap), LayoutError::Overlap { .. }));

    let phases =
        control(Kind::Attach, 0, 0, &[&[7, 0, 0, 0, 0, 0, 0, 0], &overlap[0][..]].concat());
    assert!(is_bad_value(&phases, "phase"));
}

#[test]
fn bitmap_segments_that_cannot_be_are_refused() {
    let received = |page, count, payload: &[u8]| control(Kind::Received, page, count, payload);
    assert!(is_bad_value(&received(1, 64, &[1]), "first page"));
    assert!(is_bad_value(&received(u64::MAX - 63, 64, &[1]), "first page"));
    assert!(is_bad_value(&received(0, MAX_SEGMENT_PAGES as u32 + 1, &[1]), "page count"));
    assert!(is_bad_value(&received(0, u32::MAX, &[1]), "page count"));
    assert!(is_bad_value(&received(0, 64, &[0]), "bitmap form"));
    assert!(is_bad_value(&received(0, 64, &[3]), "bitmap form"));
    let segment = |error| match error {
        WireError::Segment(error) => error,
        other => panic!("{other}"),
    };
    let beyond = segment(received(0, 10, &[1, 5, 6]));
    assert_eq!(beyond, SegmentError::Beyond { reached: 11, pages: 10 });
    let number = segment(received(0, 10, &[1, 5, 0x85]));
    assert_eq!(number, SegmentError::BadNumber { offset: 1 });
    let raw = segment(received(0, 10, &[2, 0, 4, 0, 0, 0, 0, 0, 0]));
    assert_eq!(raw, SegmentError::BadRaw { bytes: 8, pages: 10 });
}

#[test]
fn acks_that_cannot_be_are_refused() {
    let run = |start: u64, count: u64| [start.to_le_bytes(), count.to_le_bytes()].concat();
    let empty_or_endless = "empty or endless run at page";
    assert!(is_bad_value(&control(Kind::Ack, 0, 1, &run(5, 0)), empty_or_endless));
    assert!(is_bad_value(&control(Kind::Ack, 0, 1, &run(5, u64::MAX)), empty_or_endless));
    let too_many = MAX_ACK_RUNS as u32 + 1;
    assert!(is_bad_value(&control(Kind::Ack, 0, too_many, &run(5, 1)), "number of runs"));
    assert!(is_bad_value(&control(Kind::Ack, 0, u32::MAX, &[]), "number of runs"));
}

#[test]
fn names_of_sections_are_text() {
    let error = control(Kind::Section, 0, 0, &[3, b'a', 0xff, b'b']);
    assert!(is_bad_value(&error, "name that is not UTF-8 from byte"), "{error}");
    let header = raw_header(Kind::Section as u16, FLAG_LAST, 256, 0, 0);
    let longest = [&[255][..], &[b'n'; 255]].concat();
    assert!(ControlFrame::decode(&header, &longest).is_ok());
    let mut payload = vec![1, b'a'];
    payload.resize(2 + MAX_SECTION_BYTES + 1, 0);
    let error = control(Kind::Section, 0, 0, &payload);
    assert!(matches!(error, WireError::TooLong { .. }), "{error}");
}

/// Three regions: pages 0..256, 256..4352, and one huge page 4352.
fn small() -> GuestLayout {
    layout_of(vec![
        region(0, MIB, PageSize::KIB_4, Backing::Anonymous),
        region(MIB, 16 * MIB, PageSize::KIB_4, Backing::Shared),
        region(1 << 30, 1 << 30, PageSize::GIB_1, Backing::Hugetlb),
    ])
}

#[test]
fn pages_that_the_layout_does_not_have_are_refused() {
    for kind in [Kind::PageRequest, Kind::PageContent, Kind::PageZero, Kind::PageUnreadable] {
        for (page, count) in [(4353, 1), (4352, 2), (0, 0), (0, 4354), (u64::MAX, 2), (1, u32::MAX)]
        {
            let header = Header::new(kind, STAMP, page, count);
            assert_eq!(
                DataFrame::parse(&header, &small(), "request"),
                Err(WireError::OutOfRange {
                    kind: kind as u16,
                    first: page,
                    count: count.into(),
                    pages: 4353
                })
            );
        }
    }
}

#[test]
fn content_is_exactly_as_long_as_its_pages_of_one_region() {
    let content = |page, count, length: u32| {
        let header = Header::new(Kind::PageContent, STAMP, page, count).with_length(length);
        DataFrame::parse(&header, &small(), "background")
    };
    assert_eq!(content(254, 2, 8192), Ok(DataFrame::Content(range(254, 2), 8192)));
    for length in [0, 4096, 8191, 8193, u32::MAX] {
        assert!(matches!(
            content(254, 2, length),
            Err(WireError::BadLength { expected: 8192, .. })
        ));
    }
    assert!(is_bad_value(&content(255, 2, 8192).unwrap_err(), "pages of two regions from page"));
    let most = (MAX_CONTENT_BYTES / 4096) as u32;
    assert!(content(256, most, MAX_CONTENT_BYTES as u32).is_ok());
    assert!(matches!(
        content(256, most + 1, MAX_CONTENT_BYTES as u32 + 4096),
        Err(WireError::TooLong { limit: MAX_CONTENT_BYTES, .. })
    ));
    // A single page may be larger.
    assert!(content(4352, 1, 1 << 30).is_ok());
}

#[test]
fn data_frames_without_content_have_no_payload_and_requests_are_short() {
    for kind in [Kind::PageRequest, Kind::PageZero, Kind::PageUnreadable] {
        let header = Header::new(kind, STAMP, 0, 1).with_length(1);
        assert!(matches!(
            DataFrame::parse(&header, &small(), "request"),
            Err(WireError::BadLength { expected: 0, length: 1, .. })
        ));
    }
    let request = |count| {
        DataFrame::parse(&Header::new(Kind::PageRequest, STAMP, 0, count), &small(), "request")
    };
    assert!(request(MAX_REQUEST_PAGES).is_ok());
    assert!(is_bad_value(&request(MAX_REQUEST_PAGES + 1).unwrap_err(), "page count"));
}

#[test]
fn newer_stamps_are_an_error_and_older_ones_change_nothing() {
    let stamp =
        |epoch, generation| Stamp { epoch: Epoch(epoch), generation: Generation(generation) };
    let connection = stamp(7, 3);
    assert_eq!(connection.admits(stamp(7, 3)), Ok(true));
    for older in [stamp(7, 2), stamp(6, 3), stamp(6, 9), stamp(0, 0)] {
        assert_eq!(connection.admits(older), Ok(false), "{older:?}");
    }
    for frame in [stamp(7, 4), stamp(8, 0), stamp(8, 3), stamp(u32::MAX, 0)] {
        assert_eq!(connection.admits(frame), Err(WireError::FutureStamp { connection, frame }));
    }
}

#[test]
fn damage_to_any_single_bit_is_found() {
    let mut content = vec![0x5a; 4096];
    content[17] = 0;
    let header = DataFrame::Content(range(0, 1), 4096).header(STAMP).sealed([&content[..]]);
    let ack = ControlFrame::Ack(vec![range(1, 2), range(70, 4)]).encode(STAMP, true);
    let bye = ControlFrame::Bye.encode(STAMP, true);
    for frame in [ack, bye, [header.bytes(), &content].concat()] {
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let (header, payload) = split(&damaged);
            let found = header.verify([payload]);
            assert!(matches!(found, Err(WireError::Checksum { .. })), "bit {bit}");
        }
    }
}

#[test]
fn a_refusal_of_wrong_length_is_refused_and_its_text_cannot_steer_a_terminal() {
    let refusal = |payload: &[u8]| {
        let header = raw_header(Kind::Refuse as u16, 0, payload.len() as u32, 0, 0);
        ControlFrame::decode(&header, payload)
    };
    let error = refusal(&[9; 515]).unwrap_err();
    assert!(matches!(error, WireError::TooLong { length: 515, limit: 514, .. }), "{error}");
    let ugly = refusal(b"\x04\0\x1b[2Jgone\n\xff").unwrap();
    let reason = " [2Jgone \u{fffd}";
    assert_eq!(ugly, Some(ControlFrame::Refuse(Refusal::new(RefuseCode::Stale, reason))));
    let newer = refusal(&[200, 1]).unwrap();
    assert_eq!(newer, Some(ControlFrame::Refuse(Refusal::new(RefuseCode::Failed, ""))));
    let no_text = refusal(&[0xff; 514]).unwrap();
    let replaced = Refusal::new(RefuseCode::Failed, "\u{fffd}".repeat(512 / 3));
    assert_eq!(no_text, Some(ControlFrame::Refuse(replaced)));
    // 511 bytes and a letter of two: the letter does not travel in half.
    let long = Refusal::new(RefuseCode::Failed, "x".repeat(511) + "ä and more");
    let bytes = ControlFrame::Refuse(long).encode(STAMP, false);
    assert_eq!(bytes.len(), 32 + 2 + 511);
}

#[test]
fn no_frame_leaves_that_says_something_else_than_its_value() {
    let refused = |frame: ControlFrame| {
        assert!(frame.check().is_err(), "{:?}", frame.kind());
        let encoded = std::panic::catch_unwind(|| frame.encode(STAMP, false));
        assert!(encoded.is_err(), "{:?} was encoded", frame.kind());
    };
    let section = |name: String, size| ControlFrame::Section {
        name,
        version: 0,
        last: true,
        bytes: vec![0; size],
    };
    refused(section("n".repeat(256), 0));
    refused(section(String::new(), 0));
    refused(section("n".into(), MAX_SECTION_BYTES + 1));
    assert_eq!(section("n".repeat(255), MAX_SECTION_BYTES).check(), Ok(()));
    refused(ControlFrame::Ack(vec![range(0, 1); MAX_ACK_RUNS + 1]));
    refused(ControlFrame::Ack(vec![range(0, 0)]));
    assert_eq!(ControlFrame::Ack(vec![range(0, 1); MAX_ACK_RUNS]).check(), Ok(()));
    let received = |range, segment| ControlFrame::Received { range, segment, last: true };
    refused(received(range(0, 1 << 32), Segment::Runs(vec![])));
    refused(received(range(63, 1), Segment::Runs(vec![])));
    refused(received(range(0, 10), Segment::Runs(vec![0, 11])));
    refused(received(range(0, 10), Segment::Runs(vec![0; MAX_SEGMENT_PAGES as usize / 8 + 1])));
    let regions = |count: usize| {
        let region = |index| region(index as u64 * 4096, 4096, PageSize::KIB_4, Backing::Shared);
        let layout = layout_of((0..count).map(region).collect());
        ControlFrame::Attach(Attach { phase: Phase::Fresh, layout })
    };
    refused(regions(MAX_REGIONS + 1));
    let most = regions(MAX_REGIONS);
    let bytes = most.encode(STAMP, false);
    let (header, payload) = split(&bytes);
    assert_eq!(ControlFrame::decode(&header, payload), Ok(Some(most)));
}

#[test]
#[should_panic(expected = "one frame cannot name pages")]
fn a_run_of_more_pages_than_a_header_can_say_does_not_leave() {
    let _ = DataFrame::Zero(range(0, MAX_FRAME_PAGES + 1)).header(STAMP);
}

fn raw_region(guest_address: u64, length: u64, page_shift: u8, backing: u8) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[0..8].copy_from_slice(&guest_address.to_le_bytes());
    bytes[8..16].copy_from_slice(&length.to_le_bytes());
    (bytes[16], bytes[17]) = (page_shift, backing);
    bytes
}
