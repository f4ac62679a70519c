//! What the engine costs, without a clock: system calls and bytes per fault, per MiB in
//! background, per zero page, per acknowledgement and heartbeat.
//!
//! Both sides run in processes of their own, and every system call of the engine's threads
//! is counted by ptrace ([`trace`]), from the outside. Polling is off, and where the order
//! of two threads would else be chance's the tracer decides it, so that the counts do not
//! hang on how fast the machine is. What time alone decides (how often a thread wakes to
//! look) is bounded by the time that passed.
//!
//! Bounds are exact, but where the kernel cuts bytes into pieces as it likes: who saves a call
//! lowers its number here, so that it cannot come back unnoticed. Memory is verified in every test, by the child that plays the
//! destination.

#[path = "../common/mod.rs"]
mod common;

mod background;
mod calls;
mod control;
mod faults;
mod roles;
mod trace;

use calls::{Call, Tally};
use common::skip;
use roles::Scenario;
use std::time::Duration;
use trace::Tracer;

const MIB: u64 = 1 << 20;
const HEADER: u64 = 32;
/// A heartbeat that no test lives to see.
const NEVER: Duration = Duration::from_mins(10);
/// Calls that chance makes: two threads meet at a lock, the allocator asks for more. As many
/// in a whole window as are far from one a fault or one a piece.
const BY_CHANCE: u64 = 24;

/// Both sides up to the destination's first step; `None`, after saying so, where this
/// machine cannot.
fn trace(scenario: &Scenario) -> Option<Tracer> {
    match Tracer::start(scenario) {
        Ok(tracer) => tracer,
        Err(error) => {
            skip("ptrace", &error.to_string());
            None
        }
    }
}

/// How often a call may be made.
#[derive(Clone, Copy, Debug)]
enum Bound {
    Exactly(u64),
    /// The kernel decides into how many pieces bytes are cut.
    AtMost(u64),
}

/// Panics where a thread made other calls than these, beside what chance makes, of which at
/// most `by_chance`.
fn check_calls(what: &str, tally: &Tally, bounds: &[(Call, Bound)], by_chance: u64) {
    for (call, bound) in bounds {
        let calls = tally.of(*call).calls;
        let is_kept = match bound {
            Bound::Exactly(expected) => calls == *expected,
            Bound::AtMost(most) => calls <= *most,
        };
        assert!(is_kept, "{what}: {calls} of {call:?}, {bound:?} is right\n{tally:?}");
    }
    let mut chance = 0;
    for (call, count) in tally.all().filter(|(call, _)| bounds.iter().all(|(it, _)| it != call)) {
        match call {
            Call::Clock => {}
            Call::Lock | Call::Memory | Call::Advise => chance += count.calls,
            _ => panic!("{what}: {call:?} is not called there\n{tally:?}"),
        }
    }
    assert!(
        chance <= by_chance,
        "{what}: {chance} calls by chance, {by_chance} allowed\n{tally:?}"
    );
}

/// A line for whoever asks what things cost now (`--nocapture`).
fn report(what: &str, count: u64, of: u64, unit: &str) {
    println!("{what}: {:.2} a {unit}", count as f64 / of as f64);
}
