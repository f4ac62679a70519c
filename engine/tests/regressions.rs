//! What was once wrong, and shall not come back.

mod common;

use afterimage::{
    Address, CallError, Destination, DestinationEvent, DiscardNotice, Endpoint, GuestAddress,
    GuestLayout, Incarnation, PageSize, SessionId, SnapshotServer, Source, SourceEvent,
    SourceOwnership, StateSection,
};
use afterimage_protocol::bitmap::{Bitmap, Segment};
use afterimage_protocol::layout::{Backing, Region};
use afterimage_protocol::wire::{
    Attach, Channel, ControlFrame, DataFrame, HEADER_BYTES, Header, Kind as FrameKind, Offer,
    Phase, Role,
};
use common::peer::{HandSource, Wire, content, hello_of, offer_of, pages};
use common::{Content, EventLog, Kind, Memory, Pair, Setup, Toucher};
use std::sync::Arc;
use std::time::Instant;

const MIB: u64 = 1 << 20;
/// Pages whose content is claimed before it has come, and in one step.
const BLOCK: u64 = 8;

fn section(name: &str, length: usize) -> StateSection {
    StateSection { name: name.into(), version: 1, bytes: vec![1; length] }
}

#[test]
fn a_section_that_cannot_travel_is_refused_before_anything_happens() {
    prologue!("a_section_that_cannot_travel");
    let pair = Pair::start(&Setup::default()).expect("no huge pages");
    for name in [String::new(), "x".repeat(256)] {
        let state = StateSection { name, version: 1, bytes: vec![] };
        let error = pair.source.switch_over(vec![state]).unwrap_err();
        assert!(matches!(error, CallError::SectionName { .. }), "{error:?}");
    }
    // Nothing has happened: it can still be done rightly.
    pair.switch(&[section("right", 1)]);
    pair.finish();
    pair.check_content();
}

#[test]
fn a_destination_dropped_when_all_has_arrived_leaves_a_guest_that_reads_everything() {
    prologue!("a_destination_dropped");
    for round in 0..40 {
        let kind = if round % 2 == 0 { Kind::Anonymous } else { Kind::Memfd };
        let setup = Setup {
            kinds: vec![(kind, 4 * MIB)],
            content: Content::ZeroRuns,
            seed: round,
            ..Setup::default()
        };
        let pair = Pair::start(&setup).expect("no huge pages");
        pair.switch(&[]);
        let total = pair.new.pages();
        let deadline = Instant::now() + common::PATIENCE;
        // Not a millisecond later: the session thread must not have heard of it yet.
        while pair.destination.stats().pages_complete < total {
            assert!(Instant::now() < deadline, "not every page came\n{}", pair.dump());
        }
        let Pair { destination, at_destination, source, new, .. } = pair;
        drop(destination);
        assert!(!at_destination.until_end().contains(&DestinationEvent::Abandoned));
        let (seed, content) = (setup.seed, setup.content);
        let reader = {
            let new: Arc<Memory> = Arc::clone(&new);
            Toucher::start(move || new.check(seed, content))
        };
        reader.finish("reading after the destination is gone", || format!("round {round}"));
        drop(source);
    }
}

#[test]
fn a_snapshot_that_arrived_before_ready_may_still_run() {
    prologue!("a_snapshot_that_arrived");
    let setup = Setup { kinds: vec![(Kind::Memfd, MIB)], ..Setup::default() };
    let image = Memory::new(&setup.kinds);
    image.fill(setup.seed, setup.content);
    let listener = common::session::listen();
    let address = listener.address().clone();
    let options = common::session::source_options(&setup);
    let (server, _events) =
        SnapshotServer::start(image.as_source(), listener, options, 1).expect("a server");
    let new = Memory::new(&setup.kinds);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let options = common::session::destination_options(&setup);
    let (destination, events) =
        Destination::start(memory, Endpoint::Connect(address), options).expect("a destination");
    let events = EventLog::new(events);
    let dump = || format!("{:?} {:?}", server.stats(), destination.stats());
    events.wait("the end", dump, |event| *event == DestinationEvent::Finished);
    destination.ready().expect("all of it is there");
    events.wait("run", dump, |event| *event == DestinationEvent::Run);
    new.check(setup.seed, setup.content);
}

#[test]
fn pages_that_came_twice_and_broke_off_once_are_asked_for() {
    prologue!("pages_that_came_twice");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let new = Memory::new(&[(kind, 32 * MIB)]);
        let memory = new.register(DiscardNotice::Called).expect("registered memory");
        let listener = common::session::listen();
        let address = listener.address().clone();
        let options = common::session::destination_options(&Setup::default());
        let (destination, _events) =
            Destination::start(memory, Endpoint::Listen(listener), options).expect("started");
        let region = Region::new(GuestAddress(0), 32 * MIB, PageSize::KIB_4, Backing::Anonymous);
        let mut offer = offer_of(&GuestLayout::new(vec![region]).expect("a layout"));
        offer.streams = 2;
        let mut hand = HandSource::greet(&address, SessionId([6; 16]), 1);
        hand.begin_with(offer);
        let (mut request, answer) = hand.open(&address, Channel::Request(0), 1);
        let (mut one, at_one) = hand.open(&address, Channel::Background(0), 1);
        let (mut two, at_two) = hand.open(&address, Channel::Background(1), 1);
        let stats = || destination.stats();
        let dump = || format!("{:?}", stats());
        // One stream breaks off in the middle of pages that the other brings whole. Which of
        // them claims the pages first is chance; until it is the one that breaks off.
        let torn = (0..500).find(|&block| {
            let pages_of = pages(block * BLOCK, BLOCK);
            let whole = content(pages_of, at_one, 1);
            one.send(&whole[..HEADER_BYTES + 1000]);
            two.send(&content(pages_of, at_two, 1));
            // When what follows has been heard, it is settled what became of that copy.
            two.send(DataFrame::Zero(pages(500 * BLOCK + block, 1)).header(at_two).bytes());
            common::wait_until("what follows", dump, || stats().pages_zero == block + 1);
            if stats().pages_background == block * BLOCK {
                return true;
            }
            // It was first: this copy is dropped, and the next pages are tried.
            one.send(&whole[HEADER_BYTES + 1000..]);
            false
        });
        let torn = torn.expect("in five hundred attempts");
        drop(one);
        for page in torn * BLOCK..(torn + 1) * BLOCK {
            let asked = request.receive(HEADER_BYTES).said("a request for what broke off");
            let asked = Header::from_bytes(asked.try_into().expect("a header's length"));
            assert_eq!((asked.kind(), asked.page()), (Ok(FrameKind::PageRequest), page));
            request.send(&content(pages(page, 1), answer, 1));
        }
        common::wait_until("the pages", dump, || stats().pages_requested == BLOCK);
        assert_eq!(stats().fault_latency.count, 0, "nobody waited for them");
    }
}

/// A destination that has everything, and whose source connects: up to the begin.
fn greet_complete(listener: &std::net::TcpListener, incarnation: Incarnation) -> Wire {
    let (mut wire, theirs) = loop {
        let mut wire = Wire::over(listener.accept().expect("a source connects").0);
        let theirs = wire.hear_hello("a source greets");
        // Those for data are of no use here.
        if theirs.channel == Channel::Control {
            break (wire, theirs);
        }
    };
    let mut hello = hello_of(Role::Destination, Channel::Control);
    (hello.session, hello.incarnation) = (theirs.session, incarnation);
    assert!(wire.send_hello(hello));
    let offer = wire.hear_control().said("a source offers");
    let ControlFrame::Offer(Offer { layout, .. }) = offer else { panic!("{offer:?}") };
    let range = layout.all_pages();
    let attach = ControlFrame::Attach(Attach { phase: Phase::Complete, layout });
    let all = Bitmap::new(range.count);
    all.set(range, |_| ());
    let segment = Segment::encode(&all, range);
    for frame in [attach, ControlFrame::Received { range, segment, last: true }] {
        assert!(wire.send(&frame.encode(theirs.stamp, false)));
    }
    assert_eq!(wire.hear_control().said("a source begins"), ControlFrame::Begin);
    wire
}

#[test]
fn a_source_that_connects_comes_back_until_its_bye_was_heard() {
    prologue!("a_source_that_connects_comes_back");
    let old = Memory::new(&[(Kind::Anonymous, MIB)]);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = Address::Tcp(listener.local_addr().expect("bound").to_string());
    let mut options = common::session::source_options(&Setup::default());
    let incarnation = Incarnation([3; 16]);
    options.record.ownership = SourceOwnership::Given;
    options.record.incarnation = incarnation;
    let (_source, events) =
        Source::start(old.as_source(), Endpoint::Connect(address), options).expect("a source");
    let events = EventLog::new(events);
    // The first connection breaks before anybody has heard the bye.
    drop(greet_complete(&listener, incarnation));
    let mut wire = greet_complete(&listener, incarnation);
    let bye = wire.hear_control().said("a source says bye");
    assert_eq!(bye, ControlFrame::Bye);
    events.wait("the end", String::new, |event| *event == SourceEvent::Finished);
}
