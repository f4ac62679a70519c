//! What one fault costs, with nothing else going on: pages are asked for one after the other
//! by one thread, and the background has not begun.

use super::calls::Call;
use super::common::{Content, Kind};
use super::roles::{Scenario, Who};
use super::trace::{Seen, Side, Tracer};
use super::{BY_CHANCE, Bound, HEADER, MIB, NEVER, check_calls, report, trace};
use crate::prologue;

/// The first faults find maps and buffers that have to grow.
const WARMING_UP: u64 = 8;
const FAULTS: u64 = 64;
const HUGE_FAULTS: u64 = 6;

/// The destination's fault thread sleeps twice in a fault: until the fault, and until its
/// answer. It reads what it was woken for, once each.
const SLEEPS: u64 = 2;
/// It asks in one call, and places the page in one.
const FAULT_CALLS: u64 = SLEEPS + 2 + 2;
/// A page of a file is allocated by a call that can fail; a write that cannot would be SIGBUS.
const FILE_CALLS: u64 = 1;
/// The source's request thread sleeps in its receiving, brings the page (or asks the page map
/// about it) and answers in one call.
const REQUEST_CALLS: u64 = 3;
/// How many pieces an answer of 2 MiB may come in: each is a sleep and a look more. Seen: up to 3; where sockets may hold little there are more.
const HUGE_PIECES: u64 = 64;
/// An acknowledgement of one page, if it finds no company.
const ACK_BYTES: u64 = HEADER + 16;

fn scenario(kind: Kind) -> Scenario {
    let (bytes, touched) = match kind {
        Kind::Huge => (20 * MIB, 2 + HUGE_FAULTS),
        _ => (8 * MIB, WARMING_UP + FAULTS),
    };
    Scenario { kind, content: Content::Dense, bytes, touched, heartbeat: NEVER }
}

/// Counts `count` faults, the last ones; the others come before.
fn count(tracer: &mut Tracer, scenario: &Scenario, count: u64) -> Seen {
    for _ in count..scenario.touched {
        tracer.until_quiet();
        tracer.step();
    }
    tracer.until_quiet();
    tracer.open_window();
    for _ in 0..count {
        tracer.step();
        tracer.until_quiet();
    }
    tracer.close_window()
}

/// The request thread, and the bytes both ways. `bring` is how it gets at the page.
fn check_request(scenario: &Scenario, seen: &Seen, faults: u64, bring: Call) {
    let thread = seen.of(Side::Source, Who::Request);
    report(&format!("{:?}: source", scenario.kind), thread.total(), faults, "fault");
    let each = Bound::Exactly(faults);
    let calls = [(Call::Receive, each), (bring, each), (Call::Send, each)];
    assert_eq!(calls.len() as u64, REQUEST_CALLS);
    check_calls("the request thread", &thread, &calls, BY_CHANCE);
    let answers = faults * (HEADER + scenario.page_bytes());
    assert_eq!(thread.received(), faults * HEADER, "bytes of requests at the source");
    assert_eq!(thread.sent(), answers, "bytes of answers from the source");
    let fault_thread = seen.of(Side::Destination, Who::Fault);
    assert_eq!(fault_thread.sent(), faults * HEADER, "bytes of requests from the destination");
    assert_eq!(fault_thread.received(), answers, "bytes of answers at the destination");
}

/// What else may be going on is the acknowledging of these pages.
fn check_rest(scenario: &Scenario, seen: &Seen) {
    for side in [Side::Source, Side::Destination] {
        let background = seen.of(side, Who::Background);
        assert_eq!(background.total(), 0, "{side:?}: the background has not begun");
    }
    let acks = seen.of(Side::Destination, Who::Control).sent();
    report("acknowledgements, bytes", acks, scenario.touched, "fault");
    // Those of the first faults, and the news that the guest runs, may come late.
    let most = HEADER + scenario.touched * ACK_BYTES;
    assert!(acks <= most, "{acks} bytes of acknowledgements, {most} allowed");
    // The page's arrival is told by the destination alone.
    assert_eq!(seen.of(Side::Source, Who::Control).sent(), 0, "bytes of control from the source");
}

fn small_faults_cost_what_they_should(kind: Kind, bring: Call) {
    let scenario = scenario(kind);
    let Some(mut tracer) = trace(&scenario) else { return };
    let seen = count(&mut tracer, &scenario, FAULTS);
    let thread = seen.of(Side::Destination, Who::Fault);
    report(&format!("{kind:?}: destination"), thread.total(), FAULTS, "fault");
    // Once a second, while a page is waited for, the thread wakes to look whether it must be
    // asked for again.
    let timer = thread.of(Call::Wait).in_vain;
    let file_calls = if kind == Kind::Anonymous { 0 } else { FILE_CALLS };
    let calls = [
        (Call::Wait, Bound::Exactly(SLEEPS * FAULTS + timer)),
        (Call::Read, Bound::Exactly(FAULTS)),
        (Call::ReceiveNow, Bound::Exactly(FAULTS)),
        (Call::Send, Bound::Exactly(FAULTS)),
        (Call::Ioctl, Bound::Exactly(FAULTS)),
        (Call::Advise, Bound::Exactly(file_calls * FAULTS)),
    ];
    check_calls("the fault thread", &thread, &calls, BY_CHANCE);
    let most = (FAULT_CALLS + file_calls) * FAULTS + timer + BY_CHANCE;
    assert!(thread.total() <= most, "{thread:?}");
    check_request(&scenario, &seen, FAULTS, bring);
    check_rest(&scenario, &seen);
    tracer.finish();
}

#[test]
fn a_fault_on_anonymous_memory_costs_six_calls_and_three_at_the_source() {
    prologue!("a_fault_on_anonymous_memory");
    // The page map is asked whether the page is there at all.
    small_faults_cost_what_they_should(Kind::Anonymous, Call::Ioctl);
}

#[test]
fn a_fault_on_a_memfd_costs_seven_calls_and_three_at_the_source() {
    prologue!("a_fault_on_a_memfd");
    small_faults_cost_what_they_should(Kind::Memfd, Call::ReadAt);
}

#[test]
fn a_fault_on_a_huge_page_costs_little_more() {
    prologue!("a_fault_on_a_huge_page");
    let scenario = scenario(Kind::Huge);
    let Some(mut tracer) = trace(&scenario) else { return };
    let seen = count(&mut tracer, &scenario, HUGE_FAULTS);
    let thread = seen.of(Side::Destination, Who::Fault);
    report("Huge: destination", thread.total(), HUGE_FAULTS, "fault");
    let timer = thread.of(Call::Wait).in_vain;
    let pieces = HUGE_FAULTS * (HUGE_PIECES - 1);
    let calls = [
        (Call::Wait, Bound::AtMost(SLEEPS * HUGE_FAULTS + pieces + timer)),
        // An answer fills the buffer, so there may be more: one look everywhere.
        (Call::Read, Bound::AtMost(2 * HUGE_FAULTS)),
        (Call::ReceiveNow, Bound::AtMost(2 * HUGE_FAULTS + 2 * pieces)),
        (Call::Advise, Bound::Exactly(HUGE_FAULTS)),
        (Call::Send, Bound::Exactly(HUGE_FAULTS)),
        (Call::Ioctl, Bound::Exactly(HUGE_FAULTS)),
    ];
    check_calls("the fault thread", &thread, &calls, BY_CHANCE);
    check_request(&scenario, &seen, HUGE_FAULTS, Call::ReadAt);
    check_rest(&scenario, &seen);
    tracer.finish();
}
