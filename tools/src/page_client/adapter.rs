//! What differs between the ways in which VMMs hand their memory over.
//!
//! Answers for hearing what a VMM wants, for what can be said to it, and for what its silence and
//! its end mean. How its memory is served is the same for all, and knows none of this.

mod firecracker;
mod native;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use afterimage::StateSection;

use super::report::Outcome;
use crate::attachment::{Arrival, Word};
use crate::page_server::progress::Progress;
pub(super) use firecracker::{Firecracker, Placement};
pub(super) use native::Native;

/// A way of handing memory over.
pub(super) trait Adapter: fmt::Debug + Send + Sync {
    /// Hears what somebody who has connected wants. Blocks, for a bounded time.
    fn receive(&self, socket: UnixStream) -> Result<Arrival, NoArrival>;

    /// Waits for what a VMM says next. An error is the end of the connection.
    fn hear(&self, socket: &UnixStream) -> io::Result<Word>;

    /// Says something to a VMM, if there are words for it.
    fn tell(&self, socket: &UnixStream, word: &Word) -> io::Result<()>;

    /// Hands device state over, if that is the VMM's affair.
    fn tell_state(&self, socket: &UnixStream, state: &[StateSection]) -> io::Result<()>;

    /// What such VMMs do, and what is to be done when they do it.
    fn manner(&self) -> Manner;

    /// Turns a VMM away whose memory is not served, with the reason.
    fn refuse(&self, socket: &UnixStream, reason: &str, progress: &Progress) -> AfterRefusal;

    /// Nobody serves this VMM any more, and pages are missing.
    fn forsake(&self, vmm: BorrowedFd<'_>, progress: &Progress);
}

/// What such VMMs do, and what is to be done when they do it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Manner {
    pub(super) restoring: Restoring,
    pub(super) hang_up: HangUp,
    pub(super) failure: OnFailure,
    /// How this process ends when the VMM does.
    pub(super) death: Outcome,
    /// What happens to a guest that lacks pages when this process ends.
    pub(super) after_the_end: &'static str,
}

/// Who says that a guest is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restoring {
    /// The VMM, or whoever drives it.
    IsSaid,
    /// Nobody: there is nothing to restore from here.
    IsNotOurs,
}

/// What the end of a connection means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HangUp {
    /// The VMM may come back, as long as it lives.
    MayReturn,
    /// The VMM has ended.
    IsTheEnd,
}

/// What is done when pages cannot be brought any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// Whoever needs one waits: somebody may mend it.
    GoOn,
    /// This process ends.
    End,
}

/// What follows a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterRefusal {
    /// Another VMM may come.
    WaitOn,
    /// This process was there for that one.
    End,
}

/// Why nobody has arrived who can be served.
pub(super) enum NoArrival {
    /// It was no VMM, or has been told why not; in a line.
    Stranger(String),
    /// It has handed memory over that cannot be served, and has not been told.
    Unservable { socket: UnixStream, reason: String },
}
