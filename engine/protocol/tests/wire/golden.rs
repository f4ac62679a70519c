//! The bytes of every frame, as they were when its version was released.
//!
//! `tests/wire_golden/vN/*.hex` are never edited: a test that fails here has found a change
//! of the protocol. A new frame gets a new file, a new version a new directory. They were
//! computed apart from this crate. A file is hexadecimal bytes, `b*n` for `n` times the
//! byte `b`, and comments from `#` to the end of the line.

use crate::{STAMP, layout_of, range, region, split};
use afterimage_protocol::bitmap::Segment;
use afterimage_protocol::layout::{Backing, GuestAddress, PageSize, Region};
use afterimage_protocol::wire::{
    Attach, Capabilities, Channel, ControlFrame, DataFrame, Epoch, GREETING_PREFIX, Generation,
    Greeting, HEADER_BYTES, Hello, Incarnation, Kind, Offer, Phase, Refusal, RefuseCode, Role,
    SessionId, SessionKind, Stamp,
};
use std::collections::BTreeSet;
use std::path::PathBuf;

#[test]
fn control_frames_have_their_golden_bytes() {
    for (name, frame) in control_frames() {
        let golden = read(name);
        assert_eq!(hex(&frame.encode(STAMP, true)), hex(&golden), "encoding {name}");
        let (header, payload) = split(&golden);
        assert_eq!(header.stamp(), STAMP, "{name}");
        assert_eq!(ControlFrame::payload_length(&header), Ok(payload.len()), "{name}");
        assert_eq!(header.verify([payload]), Ok(()), "{name}");
        assert_eq!(ControlFrame::decode(&header, payload), Ok(Some(frame.clone())), "{name}");
        assert_eq!(header.to_bytes(), golden[..HEADER_BYTES]);

        let mut unsealed = golden;
        unsealed[28..32].fill(0);
        assert_eq!(hex(&frame.encode(STAMP, false)), hex(&unsealed), "{name} without checksum");
    }
}

#[test]
fn data_frames_have_their_golden_bytes() {
    // Large enough for the longest run of zero pages.
    let layout = layout_of(vec![region(0, 1 << 46, PageSize::KIB_4, Backing::Shared)]);
    for (name, frame, pass, content) in data_frames() {
        let golden = read(name);
        let header = frame.header(STAMP);
        let header = pass.map_or(header, |pass| header.of_pass(pass)).sealed([content.as_slice()]);
        assert_eq!(hex(header.bytes()), hex(&golden[..HEADER_BYTES]), "encoding {name}");
        let (header, payload) = split(&golden);
        assert!(payload == content, "content of {name}");
        assert_eq!(header.verify(payload.chunks(4096)), Ok(()), "{name}");
        assert_eq!(DataFrame::parse(&header, &layout, "request"), Ok(frame), "{name}");
        assert_eq!(header.pass(), pass, "{name}");
    }
}

#[test]
fn greetings_have_their_golden_bytes() {
    for (name, greeting) in greetings() {
        let golden = read(name);
        assert_eq!(hex(&greeting.encode()), hex(&golden), "encoding {name}");
        let (prefix, body) = golden.split_first_chunk::<GREETING_PREFIX>().unwrap();
        let announced = Greeting::announced(prefix).unwrap();
        assert_eq!(announced.length(), body.len(), "{name}");
        assert_eq!(Greeting::decode(announced, body), Ok(greeting), "{name}");
    }
}

#[test]
fn every_kind_has_golden_bytes_and_every_file_a_test() {
    let tested: BTreeSet<_> = control_frames()
        .iter()
        .map(|(name, _)| *name)
        .chain(data_frames().iter().map(|(name, ..)| *name))
        .chain(greetings().iter().map(|(name, _)| *name))
        .map(|name| format!("{name}.hex"))
        .collect();
    let files: BTreeSet<_> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files, tested);

    let kinds: BTreeSet<_> = control_frames()
        .iter()
        .map(|(_, frame)| frame.kind() as u16)
        .chain(
            data_frames().iter().map(|(_, frame, ..)| frame.header(STAMP).kind().unwrap() as u16),
        )
        .collect();
    let known: BTreeSet<_> =
        (0..=u16::MAX).filter(|number| Kind::from_number(*number).is_some()).collect();
    assert_eq!(kinds, known);
}

fn regions() -> Vec<Region> {
    vec![
        region(0, 640 << 10, PageSize::KIB_4, Backing::Anonymous),
        region(1 << 20, 1 << 20, PageSize::KIB_4, Backing::Shared),
        region(1 << 30, 4 << 20, PageSize::MIB_2, Backing::Hugetlb),
        region(4 << 30, 64 << 10, PageSize::KIB_4, Backing::Opaque),
    ]
}

fn only(guest_address: u64) -> Vec<Region> {
    let mut regions = regions();
    regions.retain(|region| region.guest_address == GuestAddress(guest_address));
    regions
}

fn control_frames() -> Vec<(&'static str, ControlFrame)> {
    let attach = |phase| ControlFrame::Attach(Attach { phase, layout: layout_of(only(1 << 30)) });
    let token = 0xfedc_ba98_7654_3210;
    vec![
        (
            "offer_migration",
            ControlFrame::Offer(Offer {
                kind: SessionKind::Migration,
                streams: 4,
                shards: 2,
                heartbeat_ms: 1000,
                silence_ms: 5000,
                layout: layout_of(regions()),
            }),
        ),
        (
            "offer_snapshot",
            ControlFrame::Offer(Offer {
                kind: SessionKind::Snapshot,
                streams: 16,
                shards: 64,
                heartbeat_ms: 1,
                silence_ms: u32::MAX,
                layout: layout_of(only(1 << 20)),
            }),
        ),
        ("attach_fresh", attach(Phase::Fresh)),
        ("attach_ready", attach(Phase::Ready)),
        ("attach_refused", attach(Phase::Refused)),
        ("attach_running", attach(Phase::Running)),
        ("attach_complete", attach(Phase::Complete)),
        ("attach_early", attach(Phase::Early)),
        (
            "received_runs",
            ControlFrame::Received {
                range: range(64, 1000),
                segment: Segment::Runs(vec![10, 3, 0xe7, 3, 0xc8, 1]),
                last: false,
            },
        ),
        (
            "received_raw",
            ControlFrame::Received {
                range: range(128, 70),
                segment: Segment::Raw([&[0xaa; 8][..], &[0x2a, 0, 0, 0, 0, 0, 0, 0]].concat()),
                last: true,
            },
        ),
        ("begin", ControlFrame::Begin),
        (
            "section",
            ControlFrame::Section {
                name: "vcpu0".into(),
                version: 9,
                last: false,
                bytes: vec![0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99],
            },
        ),
        (
            "section_last",
            ControlFrame::Section { name: "Gär0".into(), version: 1, last: true, bytes: vec![] },
        ),
        ("state_end", ControlFrame::StateEnd { sections: 12 }),
        ("ready", ControlFrame::Ready),
        ("go", ControlFrame::Go),
        ("running", ControlFrame::Running),
        ("ack", ControlFrame::Ack(vec![range(0, 1), range(0x10_0000, 0x1_0000_0000)])),
        ("heartbeat", ControlFrame::Heartbeat { token }),
        ("heartbeat_reply", ControlFrame::HeartbeatReply { token }),
        ("complete", ControlFrame::Complete),
        ("bye", ControlFrame::Bye),
        ("take_back", ControlFrame::TakeBack),
        ("take_back_agreed", ControlFrame::TakeBackAgreed),
        ("take_back_denied", ControlFrame::TakeBackDenied),
        ("refuse", ControlFrame::Refuse(Refusal::new(RefuseCode::Layout, "region 1 differs"))),
        (
            "refuse_released",
            ControlFrame::Refuse(Refusal::new(RefuseCode::Released, "3 pages are lost")),
        ),
        (
            "renew",
            ControlFrame::Renew { channel: Channel::Background(15), generation: Generation(9) },
        ),
        (
            "stale_runs",
            ControlFrame::Stale {
                range: range(64, 1000),
                segment: Segment::Runs(vec![10, 3, 0xe7, 3, 0xc8, 1]),
            },
        ),
        (
            "stale_raw",
            ControlFrame::Stale {
                range: range(128, 70),
                segment: Segment::Raw([&[0xaa; 8][..], &[0x2a, 0, 0, 0, 0, 0, 0, 0]].concat()),
            },
        ),
        ("pass", ControlFrame::Pass { number: 2, last: false }),
        ("pass_last", ControlFrame::Pass { number: 9, last: true }),
        ("pass_taken", ControlFrame::PassTaken { number: 2, last: false }),
        ("pass_taken_last", ControlFrame::PassTaken { number: 9, last: true }),
    ]
}

/// A file, a frame, its precopy pass, its content.
fn data_frames() -> Vec<(&'static str, DataFrame, Option<u16>, Vec<u8>)> {
    let two_pages = [[0xa1; 4096], [0xb2; 4096]].concat();
    vec![
        ("page_request", DataFrame::Request(range(0x1234, 3)), None, vec![]),
        ("page_content", DataFrame::Content(range(5, 2), 8192), None, two_pages),
        ("page_zero", DataFrame::Zero(range(0x1_0000_0001, 0xffff_ffff)), None, vec![]),
        ("page_unreadable", DataFrame::Unreadable(range(77, 1)), None, vec![]),
        ("page_content_early", DataFrame::Content(range(5, 1), 4096), Some(2), vec![0xa1; 4096]),
        ("page_zero_early", DataFrame::Zero(range(0x1234, 3)), Some(4095), vec![]),
    ]
}

fn greetings() -> Vec<(&'static str, Greeting)> {
    let session = SessionId(std::array::from_fn(|index| 0x10 + index as u8));
    let incarnation = Incarnation(std::array::from_fn(|index| 0xa0 + index as u8));
    let data = |channel, capabilities| {
        Greeting::Hello(Hello {
            role: Role::Destination,
            channel,
            stamp: STAMP,
            capabilities,
            session,
            incarnation,
        })
    };
    let control = |role, epoch, session, incarnation| {
        Greeting::Hello(Hello {
            role,
            channel: Channel::Control,
            stamp: Stamp { epoch: Epoch(epoch), generation: Generation(0) },
            capabilities: Capabilities::CHECKSUMS,
            session,
            incarnation,
        })
    };
    vec![
        ("hello_control", control(Role::Destination, 0, SessionId::UNKNOWN, incarnation)),
        ("hello_control_answer", control(Role::Source, 7, session, Incarnation::default())),
        ("hello_request", data(Channel::Request(63), Capabilities(0))),
        ("hello_background", data(Channel::Background(15), Capabilities(1 << 63 | 1))),
        ("refusal", Greeting::Refuse(Refusal::new(RefuseCode::Fenced, "fenced by the operator"))),
    ]
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/wire_golden/v1")
}

fn read(name: &str) -> Vec<u8> {
    let path = directory().join(format!("{name}.hex"));
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let words = text.lines().flat_map(|line| line.split('#').next().unwrap().split_whitespace());
    words
        .flat_map(|word| {
            let (byte, count) = word.split_once('*').unwrap_or((word, "1"));
            let byte = u8::from_str_radix(byte, 16).unwrap();
            std::iter::repeat_n(byte, count.parse().unwrap())
        })
        .collect()
}

/// For messages in which the byte that differs can be found.
fn hex(bytes: &[u8]) -> String {
    let lines = bytes
        .chunks(16)
        .map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "));
    lines.collect::<Vec<_>>().join("\n")
}
