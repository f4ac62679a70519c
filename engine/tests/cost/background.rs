//! What it costs to bring the rest: all memory comes over one background stream, and nobody
//! asks for anything.

use super::calls::{Call, Tally};
use super::common::{Content, Kind};
use super::roles::{Scenario, Who};
use super::trace::{Seen, Side};
use super::{BY_CHANCE, Bound, HEADER, MIB, NEVER, check_calls, report, trace};
use crate::prologue;
use std::time::Duration;

/// Content goes out and is placed in pieces of so many bytes, or of one page if it is larger.
const PIECE: u64 = 256 << 10;
/// How far one look for content goes.
const LOOK_AHEAD: u64 = 64 * MIB;
/// Bytes of memory that are looked through before what they hold is sent.
const LOOKED_AT_ONCE: u64 = MIB;
/// How many looks at holes are as much.
const LOOKS_AT_ONCE: u64 = 8;
/// Pieces with content that one look finds.
const EXTENTS_AT_ONCE: u64 = 256;
/// The alias gives back its page tables each time so much was written through it.
const ALIAS_WINDOW: u64 = 32 * MIB;
/// In how many calls the content of a piece of 256 KiB may be received. Seen: 1 to 2; where
/// sockets may hold little there are more.
const RECEIVES_PER_PIECE: u64 = 8;
/// Calls to show the last piece of a file more than once. Its pages are complete before they
/// are shown; where the session thread sees that nothing is missing and unregisters the
/// memory in between, showing fails, is tried by halves down to a page, and whoever waits is
/// woken.
const LAST_PIECE: u64 = 8;
/// An acknowledgement of one run.
const ACK_BYTES: u64 = HEADER + 16;
/// Frames at the end of a session, from the destination.
const END_BYTES: u64 = 2 * HEADER;
/// How often a source that has nothing more to send looks whether it is still connected.
const LOOK_AFTER: Duration = Duration::from_millis(50);
/// How often a destination wakes to see whether there is something to acknowledge.
const ACK_PAUSE: Duration = Duration::from_millis(20);

/// Everything from the first byte in background until the destination has all.
fn count(kind: Kind, content: Content, mib: u64) -> Option<Seen> {
    let scenario = Scenario { kind, content, bytes: mib * MIB, touched: 0, heartbeat: NEVER };
    let mut tracer = trace(&scenario)?;
    tracer.until_quiet();
    tracer.open_window();
    tracer.holds.background = false;
    tracer.step();
    tracer.until(|it| {
        it.all_in(Side::Source, Who::Background, Call::Lock)
            && it.all_in(Side::Destination, Who::Background, Call::Receive)
    });
    let seen = tracer.close_window();
    tracer.finish();
    let of = |side| seen.of(side, Who::Background).total();
    report(&format!("{kind:?}, {content:?}: source"), of(Side::Source), mib, "MiB");
    report(&format!("{kind:?}, {content:?}: destination"), of(Side::Destination), mib, "MiB");
    Some(seen)
}

fn sender(seen: &Seen) -> Tally {
    seen.of(Side::Source, Who::Background)
}

fn receiver(seen: &Seen) -> Tally {
    seen.of(Side::Destination, Who::Background)
}

/// The sending thread makes `calls`, and waits when it has sent all: each acknowledgement
/// wakes it, and so does a timer, to look at its socket.
fn check_sender(seen: &Seen, calls: &[(Call, Bound)]) {
    let acks = seen.of(Side::Destination, Who::Control).of(Call::Send).calls;
    let timer = 1 + (seen.time.as_millis() / LOOK_AFTER.as_millis()) as u64;
    let polls = (Call::Poll, Bound::AtMost(timer));
    let calls: Vec<_> = calls.iter().copied().chain([polls]).collect();
    check_calls("the sender", &sender(seen), &calls, BY_CHANCE + 2 * (acks + timer));
}

/// The receiving thread makes `calls`, and says when the last page is there, unless the
/// session thread has seen it first.
fn check_receiver(seen: &Seen, calls: &[(Call, Bound)]) {
    let told = (Call::Write, Bound::AtMost(1));
    let calls: Vec<_> = calls.iter().copied().chain([told]).collect();
    check_calls("the receiver", &receiver(seen), &calls, BY_CHANCE);
}

/// Bytes besides content: a header a frame, and acknowledgements.
fn check_bytes(seen: &Seen, mib: u64, content: u64, frames: u64) {
    let sent = sender(seen).sent();
    assert_eq!(sent, content + frames * HEADER, "bytes from the source in background");
    assert_eq!(receiver(seen).received(), sent, "bytes at the destination in background");
    assert_eq!(receiver(seen).sent(), 0);
    let control = seen.of(Side::Destination, Who::Control);
    let most = frames * ACK_BYTES + END_BYTES;
    assert!(control.sent() <= most, "{most} bytes of control allowed: {control:?}");
    report("bytes besides content", frames * HEADER + control.sent(), mib, "MiB");
}

/// The session threads: what they do comes of acknowledgements and of time.
fn check_control(seen: &Seen) {
    let destination = seen.of(Side::Destination, Who::Control);
    let source = seen.of(Side::Source, Who::Control);
    let acks = destination.of(Call::Send).calls;
    let ticks = (seen.time.as_millis() / ACK_PAUSE.as_millis()) as u64;
    assert!(acks <= ticks + 4, "{acks} frames of control in {ticks} pauses: {destination:?}");
    // A wait, a look at the socket, a frame; and once the end: unregistering, telling.
    let most = 3 * (ticks + 4) + BY_CHANCE;
    assert!(destination.total() <= most, "{most} calls allowed: {destination:?}");
    // A wait, a header, a payload, a look for more, and the sender is woken.
    let most = 5 * acks + BY_CHANCE;
    assert!(source.total() <= most, "{most} calls allowed: {source:?}");
}

fn content_costs_what_it_should(kind: Kind, mib: u64) {
    let Some(seen) = count(kind, Content::Dense, mib) else { return };
    let piece = if kind == Kind::Huge { 2 * MIB } else { PIECE };
    let pieces = mib * MIB / piece;
    let each = Bound::Exactly(pieces);
    // A header and its content leave in one call. Private memory is sent from where it lies,
    // a file is read.
    let looks = Bound::Exactly((mib * MIB).div_ceil(LOOK_AHEAD));
    match kind {
        Kind::Anonymous => check_sender(&seen, &[(Call::Send, each), (Call::Ioctl, looks)]),
        _ => check_sender(&seen, &[(Call::Send, each), (Call::ReadAt, each), (Call::Seek, looks)]),
    }
    // A header before large content is received by itself. An alias is populated before each piece.
    let receives = pieces + pieces * RECEIVES_PER_PIECE * (piece / PIECE);
    let receives = (Call::Receive, Bound::AtMost(receives));
    let populated = Bound::Exactly(pieces + mib * MIB / ALIAS_WINDOW);
    let shown = (Call::Ioctl, Bound::AtMost(pieces + LAST_PIECE));
    match kind {
        Kind::Anonymous => check_receiver(&seen, &[receives, (Call::Ioctl, each)]),
        _ => check_receiver(&seen, &[receives, shown, (Call::Advise, populated)]),
    }
    check_bytes(&seen, mib, mib * MIB, pieces);
    check_control(&seen);
}

#[test]
fn content_in_anonymous_memory_costs_four_calls_a_mib_and_a_few_more_to_place() {
    prologue!("content_in_anonymous_memory");
    content_costs_what_it_should(Kind::Anonymous, 64);
}

#[test]
fn content_in_a_memfd_costs_eight_calls_a_mib_and_a_few_more_to_place() {
    prologue!("content_in_a_memfd");
    content_costs_what_it_should(Kind::Memfd, 64);
}

#[test]
fn content_in_huge_pages_costs_a_few_calls_a_page() {
    prologue!("content_in_huge_pages");
    content_costs_what_it_should(Kind::Huge, 32);
}

/// Every fourth page has content: its own frame, between frames of three zero pages.
fn scattered_content_costs_what_it_should(kind: Kind) {
    let mib = 64;
    let Some(seen) = count(kind, Content::Scattered, mib) else { return };
    let pages = mib * MIB / 4096 / 4;
    // Many frames leave in one call: it ends with the first page that makes it long enough.
    let (long_enough, page) = (PIECE / 8 * 7, 4096 + 2 * HEADER);
    let sends = pages.div_ceil(long_enough.div_ceil(page));
    match kind {
        Kind::Anonymous => {
            // One for 256 pages with content, each of which goes on where the last one ended.
            let looks = Bound::AtMost(pages / EXTENTS_AT_ONCE + 2);
            check_sender(&seen, &[(Call::Send, Bound::Exactly(sends)), (Call::Ioctl, looks)]);
        }
        _ => {
            // Holes are read as zeros along with content, and fill the buffer half-way. Each
            // piece that ends in one is followed by a look for where it ends.
            let sends = Bound::AtMost(2 * sends);
            let reads = mib * MIB / PIECE * 2;
            let (reads, seeks) = (Bound::AtMost(reads), Bound::AtMost(reads));
            let calls = [(Call::Send, sends), (Call::ReadAt, reads), (Call::Seek, seeks)];
            let calls = calls.iter().copied().chain([(Call::Status, Bound::AtMost(1))]);
            check_sender(&seen, &calls.collect::<Vec<_>>());
        }
    }
    // Many frames come in one call; where sockets hold little there are more.
    let receives = (Call::Receive, Bound::AtMost(mib * RECEIVES_PER_PIECE));
    match kind {
        // Pages that do not follow one another are placed by a call each.
        Kind::Anonymous => check_receiver(&seen, &[receives, (Call::Ioctl, Bound::Exactly(pages))]),
        _ => {
            let shown = (Call::Ioctl, Bound::AtMost(pages + LAST_PIECE));
            let populated = (Call::Advise, Bound::AtMost(pages + 1));
            check_receiver(&seen, &[receives, shown, populated]);
        }
    }
    check_bytes(&seen, mib, pages * 4096, 2 * pages);
    check_control(&seen);
}

#[test]
fn scattered_content_in_anonymous_memory_costs_two_calls_a_mib_and_one_a_page_to_place() {
    prologue!("scattered_content_in_anonymous_memory");
    scattered_content_costs_what_it_should(Kind::Anonymous);
}

#[test]
fn scattered_content_in_a_memfd_costs_twelve_calls_a_mib_and_two_a_page_to_place() {
    prologue!("scattered_content_in_a_memfd");
    scattered_content_costs_what_it_should(Kind::Memfd);
}

/// Zeros that were written have to be looked through, and cost a frame a MiB.
fn written_zeros_cost_what_they_should(kind: Kind) {
    let mib = 64;
    let Some(seen) = count(kind, Content::Zeros, mib) else { return };
    let frames = mib * MIB / LOOKED_AT_ONCE;
    let each = Bound::Exactly(frames);
    match kind {
        Kind::Anonymous => {
            let looks = Bound::Exactly((mib * MIB).div_ceil(LOOK_AHEAD));
            check_sender(&seen, &[(Call::Send, each), (Call::Ioctl, looks)]);
        }
        _ => {
            // Is it a hole, and where does it end? It is none.
            let reads = mib * MIB / PIECE;
            let (reads, seeks) = (Bound::Exactly(reads), Bound::Exactly(2 * reads));
            check_sender(&seen, &[(Call::Send, each), (Call::ReadAt, reads), (Call::Seek, seeks)]);
        }
    }
    // Nobody has touched any of the pages, and nobody is woken.
    check_receiver(&seen, &[(Call::Receive, Bound::AtMost(frames))]);
    check_bytes(&seen, mib, 0, frames);
    check_control(&seen);
}

#[test]
fn zeros_written_to_anonymous_memory_cost_a_call_a_mib() {
    prologue!("zeros_written_to_anonymous_memory");
    written_zeros_cost_what_they_should(Kind::Anonymous);
}

#[test]
fn zeros_written_to_a_memfd_cost_thirteen_calls_a_mib() {
    prologue!("zeros_written_to_a_memfd");
    written_zeros_cost_what_they_should(Kind::Memfd);
}

/// A hole costs a frame of 32 bytes for each 512 MiB: a quarter of a thousandth of a byte a
/// page.
fn holes_cost_next_to_nothing(kind: Kind) {
    let mib = 1024;
    let Some(seen) = count(kind, Content::Empty, mib) else { return };
    let looks = Bound::Exactly(mib * MIB / LOOK_AHEAD);
    let frames = mib * MIB / LOOK_AHEAD / LOOKS_AT_ONCE;
    let each = Bound::Exactly(frames);
    match kind {
        Kind::Anonymous => check_sender(&seen, &[(Call::Send, each), (Call::Ioctl, looks)]),
        // Behind the last content of a file its size is asked for: was it cut short?
        _ => check_sender(&seen, &[(Call::Send, each), (Call::Seek, looks), (Call::Status, looks)]),
    }
    // Nobody has touched any of the pages, and nobody is woken.
    check_receiver(&seen, &[(Call::Receive, each)]);
    check_bytes(&seen, mib, 0, frames);
    check_control(&seen);
    let pages = mib * MIB / 4096;
    let bytes = sender(&seen).sent() + seen.of(Side::Destination, Who::Control).sent();
    report(&format!("{kind:?}: zero pages, bytes"), bytes, pages, "page");
    assert!(bytes * 100 < pages, "{bytes} bytes for {pages} zero pages");
}

#[test]
fn a_hole_in_anonymous_memory_costs_a_frame_for_512_mib() {
    prologue!("a_hole_in_anonymous_memory");
    holes_cost_next_to_nothing(Kind::Anonymous);
}

#[test]
fn a_hole_in_a_memfd_costs_a_frame_for_512_mib() {
    prologue!("a_hole_in_a_memfd");
    holes_cost_next_to_nothing(Kind::Memfd);
}
