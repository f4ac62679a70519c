//! What is refused in the first bytes of a connection.

use crate::{STAMP, is_bad_value};
use afterimage_protocol::wire::{
    Capabilities, Channel, GREETING_PREFIX, Greeting, Hello, Incarnation, Role, SessionId,
    WireError, negotiate,
};

#[test]
fn greetings_of_other_protocols_and_versions_are_refused() {
    let prefix = |magic: &[u8; 8], newest: u16, oldest: u16, kind: u16, length: u16| {
        let numbers = [newest, oldest, kind, length].map(u16::to_le_bytes).concat();
        let bytes = [&magic[..], &numbers].concat();
        Greeting::announced(bytes.as_slice().try_into().unwrap())
    };
    let ours = b"AFTRIMG\n";
    assert_eq!(prefix(ours, 1, 1, 1, 56).unwrap().length(), 56);
    let http = b"HTTP/1.1";
    assert_eq!(prefix(http, 1, 1, 1, 56), Err(WireError::BadMagic { found: *http }));
    // Ours is older than theirs; theirs is older than ours; a range that is none.
    for (newest, oldest) in [(9, 2), (0, 0), (1, 2)] {
        assert_eq!(
            prefix(ours, newest, oldest, 1, 56),
            Err(WireError::Version {
                their_version: newest,
                their_min: oldest,
                our_version: 1,
                our_min: 1
            })
        );
    }
    assert_eq!(negotiate(9, 0), Ok(1));
    assert_eq!(negotiate(9, 1), Ok(1));
    // A refusal is read whatever version it comes from.
    assert!(prefix(ours, 9, 9, 2, 2).is_ok());
    for kind in [0, 3, u16::MAX] {
        assert!(is_bad_value(&prefix(ours, 1, 1, kind, 56).unwrap_err(), "greeting kind"));
    }
    for length in [4097, u16::MAX] {
        let error = prefix(ours, 1, 1, 1, length).unwrap_err();
        assert!(matches!(error, WireError::TooLong { limit: 4096, .. }), "{error}");
    }
}

#[test]
fn a_hello_that_cannot_be_is_refused_and_a_longer_one_is_read() {
    let good = hello(Channel::Request(1)).encode();
    let decode = |bytes: &[u8]| {
        let (prefix, body) = bytes.split_first_chunk::<GREETING_PREFIX>().unwrap();
        Greeting::decode(Greeting::announced(prefix).unwrap(), body)
    };
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        decode(&changed)
    };
    for (at, bytes, field) in [
        (16, &[0][..], "role"),
        (16, &[3], "role"),
        (17, &[0], "channel"),
        (17, &[4], "channel"),
        (17, &[1, 1, 0], "channel slot"),
        (17, &[2, 64, 0], "channel slot"),
        (17, &[3, 16, 0], "channel slot"),
        (17, &[3, 255, 255], "channel slot"),
    ] {
        let error = with(at, bytes).unwrap_err();
        assert!(is_bad_value(&error, field), "{bytes:?}: {error}");
    }
    for length in 0..56 {
        let mut short = good[..GREETING_PREFIX + length as usize].to_vec();
        assert!(matches!(decode(&short), Err(WireError::BadLength { expected: 56, .. })));
        short[14..16].copy_from_slice(&u16::to_le_bytes(length));
        assert!(matches!(decode(&short), Err(WireError::BadLength { expected: 56, .. })));
    }
    let mut longer = [&good[..], b"what a later version adds"].concat();
    assert!(matches!(decode(&longer), Err(WireError::BadLength { length: 81, .. })));
    longer[14] = 56 + 25;
    assert_eq!(decode(&longer), Ok(hello(Channel::Request(1))));
}

#[test]
#[should_panic(expected = "no peer takes channel background 16")]
fn a_hello_for_a_slot_that_cannot_be_does_not_leave() {
    let _ = hello(Channel::Background(16)).encode();
}

fn hello(channel: Channel) -> Greeting {
    Greeting::Hello(Hello {
        role: Role::Source,
        channel,
        stamp: STAMP,
        capabilities: Capabilities::default(),
        session: SessionId::UNKNOWN,
        incarnation: Incarnation::default(),
    })
}
