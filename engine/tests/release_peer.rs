//! A destination that acknowledges pages which are still being sent to it: they are freed only
//! when they have left.

mod common;

use afterimage::{
    Endpoint, Incarnation, Release, ReleaseLedger, Source, SourceEvent, SourceOptions,
};
use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::{Channel, ControlFrame, DataFrame, HEADER_BYTES, Header};
use common::peer::{HandDestination, Wire, pages};
use common::{Content, EventLog, Kind, Memory};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// The most that may be under way in a batch: 256 KiB and a page.
const BATCH_PAGES: u64 = 65;

/// Until the guest runs at the destination that the test plays.
fn run(hand: &mut HandDestination) {
    let hear = |hand: &mut HandDestination, wanted: ControlFrame| {
        while hand.control.hear_control().said("a source goes on") != wanted {}
    };
    hear(hand, ControlFrame::StateEnd { sections: 0 });
    hand.say(&ControlFrame::Ready);
    hear(hand, ControlFrame::Go);
    hand.say(&ControlFrame::Running);
}

/// Reads frames of a stream until `page` has come, and compares what they hold.
fn read_until(stream: &mut Wire, page: u64, expected: &Memory, hand: &HandDestination) {
    loop {
        let header = stream.receive(HEADER_BYTES).said("a header");
        let header = Header::from_bytes(header.try_into().expect("a whole header"));
        let frame = DataFrame::parse(&header, &hand.offer.layout, "answer").expect("a right frame");
        let DataFrame::Content(pages, length) = frame else {
            panic!("every page has content, and this says {frame:?}");
        };
        let content = stream.receive(length as usize).said("content");
        for (number, bytes) in pages.iter().zip(content.chunks_exact(4096)) {
            let expected = expected.word(number.0, 9).load(std::sync::atomic::Ordering::Relaxed);
            let got = u64::from_le_bytes(bytes[72..80].try_into().expect("8 bytes"));
            assert_eq!(got, expected, "page {number} was freed before it was sent");
        }
        if pages.contains(afterimage::PageNumber(page)) {
            return;
        }
    }
}

#[test]
fn what_is_acknowledged_while_it_is_sent_is_freed_when_it_has_left() {
    let _watchdog = common::Watchdog::start("what_is_acknowledged_while_it_is_sent");
    let kinds = [(Kind::Anonymous, 64 * MIB)];
    let (old, twin) = (Memory::new(&kinds), Memory::new(&kinds));
    old.fill(5, Content::Dense);
    twin.fill(5, Content::Dense);
    let mut options = SourceOptions::default();
    options.silence = Duration::from_mins(1);
    options.release = Release::Free(ReleaseLedger::volatile());
    let listener = common::session::listen();
    let address = listener.address().clone();
    let (source, events) =
        Source::start(old.as_source(), Endpoint::Listen(listener), options).expect("a source");
    let events = EventLog::new(events);
    let dump = || format!("{:?}", source.stats());
    let mut hand = HandDestination::attach(&address, Incarnation([3; 16]));
    let (_requests, _) = hand.open(Channel::Request(0), 1);
    let (mut stream, _) = hand.open(Channel::Background(0), 1);
    source.switch_over(Vec::new()).expect("may switch over");
    run(&mut hand);
    events.wait("running", dump, |it| *it == SourceEvent::Running);
    read_until(&mut stream, 1000, &twin, &hand);
    // Nobody reads on: it stands still with a batch half sent.
    let mut taken = (0, 0);
    common::wait_until("the stream to stand still", dump, || {
        let now = source.stats().pages_background;
        taken = if now == taken.0 { (now, taken.1 + 1) } else { (now, 0) };
        taken.1 > 200
    });
    let taken = taken.0;
    assert!(taken > BATCH_PAGES && taken < old.pages(), "{taken} pages fit into buffers");
    let run: PageRange = pages(0, taken);
    hand.say(&ControlFrame::Ack(vec![run]));
    common::wait_until("all but the batch to be freed", dump, || {
        source.stats().pages_released >= taken - BATCH_PAGES
    });
    assert!(source.stats().pages_released < taken, "a batch is still being sent");
    read_until(&mut stream, taken - 1, &twin, &hand);
    // What follows is sent only when that has left.
    read_until(&mut stream, taken, &twin, &hand);
    common::wait_until("the rest to be freed", dump, || source.stats().pages_released == taken);
}
