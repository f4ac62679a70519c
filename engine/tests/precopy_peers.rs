//! Precopy with a peer whose every frame the test chooses: orders that two honest sides seldom
//! come to.

mod common;

use afterimage::dirty::{DirtyBitmap, DirtyTracker};
use afterimage::{
    Address, Destination, Endpoint, GuestAddress, Incarnation, Passes, Precopy, SessionId,
    SourceEvent,
};
use afterimage_protocol::bitmap::{Bitmap, Segment};
use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::{
    Attach, Capabilities, Channel, ControlFrame, DataFrame, Greeting, Phase, Role,
};
use common::memory::PAGE;
use common::peer::{
    HandDestination, HandSource, Wire, content, hello_of, offer_of, pages, request, source_hello,
};
use common::victim::Victim;
use common::{Kind, Memory, Setup, session};
use std::sync::Arc;
use std::time::Duration;

const ONE: Incarnation = Incarnation([1; 16]);
const OTHER: Incarnation = Incarnation([2; 16]);
/// No side gives the other up meanwhile.
const PATIENT: Duration = Duration::from_mins(1);

/// A source that does precopy, and what its guest has written.
struct Moving {
    victim: Victim,
    dirty: Arc<DirtyBitmap>,
}

impl Moving {
    fn start(passes: Passes) -> Self {
        let dirty = DirtyBitmap::new(&[(GuestAddress(0), 1 << 40)]).expect("a range");
        let dirty = Arc::new(dirty);
        let tracker: Box<dyn DirtyTracker> = Box::new(Arc::clone(&dirty));
        let victim = Victim::start(|options| {
            options.silence = PATIENT;
            let mut precopy = Precopy::new(tracker);
            precopy.passes = passes;
            options.precopy = Some(precopy);
        });
        Self { victim, dirty }
    }

    fn write(&self, page: u64) {
        self.dirty.mark(self.victim.old.guest_address(page), PAGE);
    }

    fn wait(&self, what: &str, is_wanted: impl Fn(&SourceEvent) -> bool) {
        self.victim.at_source.wait(what, String::new, is_wanted);
    }

    fn wait_gone(&self) {
        self.wait("the end of a connection", |event| *event == SourceEvent::Disconnected);
    }

    /// Attaches a destination that has no page, or all of them.
    fn attach(&self, incarnation: Incarnation, phase: Phase, has_all: bool) -> Hand {
        let mut hello = hello_of(Role::Destination, Channel::Control);
        (hello.incarnation, hello.capabilities) = (incarnation, Capabilities::PRECOPY);
        let mut control = None;
        // It may not have noticed yet that another has gone.
        common::wait_until("a greeting", String::new, || {
            let mut wire = Wire::connect(&self.victim.address);
            assert!(wire.send_hello(hello));
            let Greeting::Hello(theirs) = wire.hear_greeting().said("a greeting") else {
                return false;
            };
            (hello.session, hello.stamp) = (theirs.session, theirs.stamp);
            control = Some(wire);
            true
        });
        let mut control = control.expect("greeted");
        let ControlFrame::Offer(offer) = control.hear_control().said("an offer") else {
            panic!("an offer comes first");
        };
        let address = self.victim.address.clone();
        let layout = offer.layout.clone();
        let mut hand = HandDestination { address, control, hello, offer };
        hand.say(&ControlFrame::Attach(Attach { phase, layout: layout.clone() }));
        let range = layout.all_pages();
        let received = Bitmap::new(range.count);
        if has_all {
            received.set(range, |_| ());
        }
        let segment = Segment::encode(&received, range);
        hand.say(&ControlFrame::Received { range, segment, last: true });
        assert_eq!(hand.control.hear_control().said("begin"), ControlFrame::Begin);
        Hand { hand, pages: range.count }
    }
}

/// A destination in the test's hand.
struct Hand {
    hand: HandDestination,
    pages: u64,
}

impl Hand {
    /// What is stale, and the pass that begins with it, which is taken in.
    fn take_pass(&mut self) -> Vec<u64> {
        let (stale, number, last) = self.hear_pass();
        self.hand.say(&ControlFrame::PassTaken { number, last });
        stale
    }

    fn hear_pass(&mut self) -> (Vec<u64>, u16, bool) {
        let mut stale = Vec::new();
        loop {
            match self.hand.control.hear_control().said("a pass") {
                ControlFrame::Stale { range, segment } => {
                    let add = |run: PageRange| stale.extend(run.iter().map(|page| page.0));
                    segment.decode(range, add).expect("a segment");
                }
                ControlFrame::Pass { number, last } => return (stale, number, last),
                other => panic!("{other:?} instead of a pass"),
            }
        }
    }

    fn acknowledge(&mut self, first: u64, count: u64) {
        self.hand.say(&ControlFrame::Ack(vec![pages(first, count)]));
    }

    fn acknowledge_all(&mut self) {
        self.acknowledge(0, self.pages);
    }
}

fn is_pass(number: u32) -> impl Fn(&SourceEvent) -> bool {
    move |event| matches!(event, SourceEvent::PassEnded(pass) if pass.number == number)
}

#[test]
fn what_one_destination_was_told_is_not_vouched_for_to_another() {
    let moving = Moving::start(Passes::Count(1000));
    let mut one = moving.attach(ONE, Phase::Early, false);
    one.take_pass();
    one.acknowledge_all();
    moving.wait("a pass", is_pass(1));
    drop(one);
    moving.wait_gone();
    moving.write(5);
    let mut other = moving.attach(OTHER, Phase::Early, false);
    other.take_pass();
    other.acknowledge_all();
    assert_eq!(other.take_pass(), [5]);
    other.acknowledge(5, 1);
    moving.wait("a pass", is_pass(3));
    drop(other);
    moving.wait_gone();
    let mut one = moving.attach(ONE, Phase::Early, true);
    let (stale, ..) = one.hear_pass();
    assert!(stale.contains(&5), "its page is of before the write");
}

#[test]
fn an_acknowledgement_of_a_copy_that_has_become_stale_does_not_count() {
    let moving = Moving::start(Passes::Count(1000));
    let mut hand = moving.attach(ONE, Phase::Early, false);
    hand.take_pass();
    hand.acknowledge_all();
    moving.wait("a pass", is_pass(1));
    moving.write(5);
    let (stale, number, last) = hand.hear_pass();
    assert_eq!(stale, [5]);
    // A second copy of the first pass, acknowledged before any of this was read.
    hand.acknowledge(5, 1);
    hand.hand.say(&ControlFrame::PassTaken { number, last });
    moving.victim.source.switch_over(Vec::new()).expect("may switch over");
    hand.take_pass();
    let (mut wire, stamp) = hand.hand.open(Channel::Request(0), 1);
    assert!(wire.send(&request(pages(5, 1), stamp)));
    let answer = wire.hear_data(&hand.hand.offer.layout).said("an answer");
    assert!(matches!(answer.0, DataFrame::Content(..) | DataFrame::Zero(..)), "{answer:?}");
}

#[test]
fn a_guest_that_has_all_of_its_memory_runs_although_the_link_broke() {
    let moving = Moving::start(Passes::Converged);
    let mut hand = moving.attach(ONE, Phase::Early, false);
    hand.take_pass();
    hand.acknowledge_all();
    moving.wait("the time to stop", |event| matches!(event, SourceEvent::SwitchoverDue(_)));
    moving.victim.source.switch_over(Vec::new()).expect("may switch over");
    assert!(hand.hear_pass().2, "the last");
    drop(hand);
    moving.wait_gone();
    let mut hand = moving.attach(ONE, Phase::Fresh, true);
    hand.hand.say(&ControlFrame::Ready);
    loop {
        match hand.hand.control.hear_control().said("that it may run") {
            ControlFrame::Go => return,
            ControlFrame::StateEnd { .. } | ControlFrame::Heartbeat { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_written_while_nobody_is_connected_is_told_by_the_last_pass() {
    let moving = Moving::start(Passes::Count(1));
    let mut hand = moving.attach(ONE, Phase::Early, false);
    hand.take_pass();
    hand.acknowledge_all();
    moving.wait("a pass", is_pass(1));
    drop(hand);
    moving.wait_gone();
    moving.write(5);
    moving.victim.source.stopped().expect("may stop");
    let mut hand = moving.attach(ONE, Phase::Early, true);
    let (stale, _, last) = hand.hear_pass();
    assert!(last && stale == [5], "{stale:?}");
}

/// Says that memory is final, and waits until that is taken in.
fn end_passes(source: &mut HandSource, number: u16, last: bool) {
    source.say(&ControlFrame::Pass { number, last });
    loop {
        let heard = source.control.hear_control().said("that a pass was taken in");
        if heard == (ControlFrame::PassTaken { number, last }) {
            return;
        }
    }
}

fn hand_source(address: &Address, old: &Memory) -> HandSource {
    let mut control = Wire::connect(address);
    let mut hello = source_hello(SessionId([4; 16]), 1);
    hello.capabilities = Capabilities::PRECOPY;
    assert!(control.send_hello(hello));
    let theirs = control.hear_hello("a greeting");
    let mut source = HandSource { control, hello, theirs };
    let mut offer = offer_of(old.as_source().layout());
    offer.streams = 2;
    source.begin_with(offer);
    source
}

#[test]
fn a_page_that_came_for_good_while_an_early_copy_was_written_is_asked_for() {
    prologue!("a_page_that_came_for_good_while_an_early_copy");
    let kinds = vec![(Kind::Memfd, 4 << 20)];
    let setup = Setup { kinds, streams: 2, ..Setup::default() };
    let (old, new) = (Memory::new(&setup.kinds), Memory::new(&setup.kinds));
    let memory = new.register(setup.discards).expect("registered");
    let listener = session::listen();
    let address = listener.address().clone();
    let mut options = session::destination_options(&setup);
    options.silence = PATIENT;
    let (destination, _events) =
        Destination::start(memory, Endpoint::Listen(listener), options).expect("a destination");
    let mut source = hand_source(&address, &old);
    end_passes(&mut source, 1, false);
    let (mut requests, _) = source.open(&address, Channel::Request(0), 1);
    let (mut first, stamp) = source.open(&address, Channel::Background(0), 1);
    let (mut second, other_stamp) = source.open(&address, Channel::Background(1), 1);
    let range = pages(0, 64);
    let header = DataFrame::Content(range, 64 * PAGE as u32).header(stamp).of_pass(1);
    let early = [header.bytes(), &vec![7; 64 * PAGE as usize][..]].concat();
    // A page that is there shows that what came before it on this channel was read.
    let marker = DataFrame::Content(pages(100, 1), PAGE as u32).header(stamp).of_pass(1);
    assert!(first.send(&[marker.bytes(), &vec![7; PAGE as usize][..]].concat()));
    let acknowledged = source.control.hear_control().said("an acknowledgement");
    assert_eq!(acknowledged, ControlFrame::Ack(vec![pages(100, 1)]));
    assert!(first.send(&early[..100_000]));
    // Loopback has brought all of it when the call returns.
    let read = || first.unread_by_peer() == 0;
    common::wait_until("the half is read", || format!("{:?}", destination.stats()), read);
    end_passes(&mut source, 2, true);
    assert!(second.send(&content(range, other_stamp, 9)));
    assert!(second.send(&content(pages(200, 1), other_stamp, 9)));
    let acknowledged = source.control.hear_control().said("an acknowledgement");
    assert_eq!(acknowledged, ControlFrame::Ack(vec![pages(200, 1)]), "the others are claimed");
    assert!(first.send(&early[100_000..]));
    let asked = requests.hear_data(old.as_source().layout()).said("a request");
    assert!(matches!(asked.0, DataFrame::Request(_)), "{asked:?}");
}
