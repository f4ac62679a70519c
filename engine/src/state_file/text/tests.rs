//! What is written is read; what was not written is refused, and said how it shows.

use super::*;
use afterimage_protocol::layout::{Backing, GuestAddress, PageSize, Region};

fn layout(length: u64) -> GuestLayout {
    let region = Region::new(GuestAddress(0), length, PageSize::KIB_4, Backing::Shared);
    GuestLayout::new(vec![region]).unwrap()
}

fn source() -> Text<SourceRecord> {
    let record = SourceRecord {
        session: SessionId([0x5e; 16]),
        epoch: Epoch(u32::MAX),
        ownership: SourceOwnership::Given,
        incarnation: Incarnation(*b"0123456789abcdef"),
        pages: SourcePages::Released,
    };
    Text::new(record, LayoutDigest::of(&layout(8192)))
}

/// The same text with another line or more, and the checksum that belongs to it.
fn sealed(text: &str) -> Vec<u8> {
    let checksum = crc32c::crc32c(text.as_bytes());
    format!("{text}{CHECKSUM}{checksum:08x}\n").into_bytes()
}

fn body(text: &Text<SourceRecord>) -> String {
    let whole = String::from_utf8(text.encode()).unwrap();
    whole[..whole.rfind(CHECKSUM).unwrap()].to_owned()
}

#[test]
fn every_record_is_read_as_it_was_written() {
    for ownership in [
        SourceOwnership::Owner,
        SourceOwnership::Given,
        SourceOwnership::Reclaimed,
        SourceOwnership::Fenced,
        SourceOwnership::Finished,
    ] {
        let text = source();
        let text = text.with(SourceRecord { ownership, ..text.record });
        assert_eq!(Text::decode(&text.encode()), Ok(text));
    }
    for ownership in [
        DestinationOwnership::Waiting,
        DestinationOwnership::Refused,
        DestinationOwnership::Running,
    ] {
        let record = DestinationRecord {
            session: SessionId::UNKNOWN,
            incarnation: Incarnation([0xff; 16]),
            epoch: Epoch(0),
            ownership,
        };
        let text = Text::new(record, LayoutDigest::of(&layout(4096)));
        assert_eq!(Text::decode(&text.encode()), Ok(text));
    }
}

#[test]
fn the_form_is_the_documented_one() {
    let text = source().with_note("guest", "web\x1b1=\n").with_note("odd Key", "");
    let expected = "afterimage-state 1\nside=source\nsession=5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e\n\
                    epoch=4294967295\nownership=given\n\
                    incarnation=30313233343536373839616263646566\npages=released\nregions=1\nbytes=8192\n\
                    layout=d1adda24\nnote.guest=web?1=?\nnote.odd__ey=\n";
    assert_eq!(body(&text), expected);
    assert_eq!(text.noted("guest"), Some("web?1=?"));
    assert_eq!(text.with_note("guest", "db1").noted("guest"), Some("db1"));
}

#[test]
fn no_cut_and_no_flipped_bit_is_believed() {
    let whole = source().with_note("guest", "web1").encode();
    for length in 0..whole.len() {
        let error = Text::<SourceRecord>::decode(&whole[..length]).unwrap_err();
        assert!(matches!(error, Wrong::Damaged(_)), "{length} bytes: {error:?}");
    }
    for bit in 0..whole.len() * 8 {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Text::<SourceRecord>::decode(&bytes).is_err(), "bit {bit}");
    }
}

#[test]
fn what_is_not_known_is_kept_unless_it_must_be_understood() {
    let newer = format!("{}colour=blue\n", body(&source()));
    let text = Text::<SourceRecord>::decode(&sealed(&newer)).unwrap();
    let next = text.with(SourceRecord { epoch: Epoch(7), ..text.record }).with_note("a", "b");
    let written = String::from_utf8(next.encode()).unwrap();
    assert!(written.contains("\nepoch=7\n") && written.contains("\ncolour=blue\n"), "{written}");
    let binding = format!("{}must_wait=yes\n", body(&source()));
    let error = Text::<SourceRecord>::decode(&sealed(&binding)).unwrap_err();
    assert_eq!(error, Wrong::Unknown("must_wait".to_owned()));
}

#[test]
fn what_cannot_be_right_is_named() {
    let good = body(&source());
    let wrong = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        Text::<SourceRecord>::decode(&sealed(&good.replace(from, to))).unwrap_err()
    };
    let named = |error: Wrong, key: &str| match &error {
        Wrong::Damaged(what) => assert!(what.starts_with(key), "{what}"),
        other => panic!("{other:?}"),
    };
    named(wrong("=given", "=lost"), "ownership");
    named(wrong("epoch=4294967295", "epoch=4294967296"), "epoch");
    named(wrong("epoch=4294967295", "epoch=+1"), "epoch");
    named(wrong("session=5e", "session=5E"), "session");
    named(wrong("session=5e", "session="), "session");
    named(wrong("regions=1", "regions=1\nregions=1"), "regions stands twice");
    named(wrong("bytes=8192\n", ""), "bytes is not there");
    named(wrong("regions=1", "regions"), "a line has no =");
    assert_eq!(wrong("state 1", "state 2"), Wrong::Version("2".to_owned()));
    assert_eq!(wrong("afterimage", "beforeimage"), Wrong::Stranger);
    let side = wrong("side=source", "side=destination");
    assert_eq!(side, Wrong::Side { theirs: "destination".to_owned(), ours: "source" });
}

#[test]
fn layouts_differ_by_address_length_and_page_size() {
    let of = |at, length, size| {
        let region = Region::new(GuestAddress(at), length, size, Backing::Shared);
        LayoutDigest::of(&GuestLayout::new(vec![region]).unwrap())
    };
    let big = 4 << 20;
    let all = [
        of(0, big, PageSize::KIB_4),
        of(big, big, PageSize::KIB_4),
        of(0, big * 2, PageSize::KIB_4),
        of(0, big, PageSize::MIB_2),
    ];
    for (index, one) in all.iter().enumerate() {
        assert!(all[index + 1..].iter().all(|other| one != other), "{one}");
    }
}
