//! What tests need: what the machine has, memory of every backing, and numbers that can be
//! drawn again.

mod area;
mod handover;

pub(crate) use area::{Area, Kind};
pub(crate) use handover::{Child, child_socket, receive, send};

use super::uffd::{FaultScope, Features, UffdError, create};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fmt::Display;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use userfaultfd::Uffd;

/// After this long a test that waits has failed. Far more than any of them needs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Says that a test is skipped because the machine lacks `what`: on the real standard error,
/// because the harness swallows `println`.
///
/// # Panics
/// If `AFTERIMAGE_REQUIRE` names it.
pub(crate) fn skip(what: &str, why: impl Display) {
    let required = std::env::var("AFTERIMAGE_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|name| name.trim() == what);
    assert!(!is_required, "AFTERIMAGE_REQUIRE names {what}, but: {why}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED (no {what}): {test}: {why}");
}

/// The widest scope that this process may have.
pub(crate) fn scope() -> FaultScope {
    if nix::unistd::geteuid().is_root() { FaultScope::KernelAndUser } else { FaultScope::UserOnly }
}

/// A userfaultfd, or `None` (said aloud) where there is none to be had.
pub(crate) fn userfaultfd(features: Features) -> Option<Uffd> {
    match create(scope(), features) {
        Ok(uffd) => Some(uffd),
        Err(error @ UffdError::Unavailable(_)) => {
            skip("userfaultfd", error);
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Waits until there is something to read.
pub(crate) fn await_readable(fd: impl AsFd, what: &str) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut fds, timeout).unwrap(), 1, "waited in vain for {what}");
}

/// Waits for what another thread sends.
pub(crate) fn await_message<T>(from: &Receiver<T>, what: &str) -> T {
    match from.recv_timeout(DEADLINE) {
        Ok(message) => message,
        Err(RecvTimeoutError::Timeout) => panic!("waited in vain for {what}"),
        Err(RecvTimeoutError::Disconnected) => panic!("{what}: the thread has died"),
    }
}

/// Looks again and again until it holds.
pub(crate) fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "waited in vain until {what}");
        std::thread::yield_now();
    }
}

/// The seed of this run: `AFTERIMAGE_SEED`, or a fresh one.
pub(crate) fn seed() -> u64 {
    match std::env::var("AFTERIMAGE_SEED") {
        Ok(text) => text.parse().expect("AFTERIMAGE_SEED is a decimal number"),
        Err(_) => {
            let now = std::time::SystemTime::now();
            now.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64
        }
    }
}

/// Numbers that follow from a seed (splitmix64).
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True once in `n` times.
    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Scatters the bits of a number.
pub(crate) const fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}
