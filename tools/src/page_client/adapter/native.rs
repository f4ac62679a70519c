//! The attachment protocol, which this project's own VMMs speak.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use afterimage::StateSection;

use super::super::report::Outcome;
use super::{Adapter, AfterRefusal, HangUp, Manner, NoArrival, OnFailure, Restoring};
use crate::attachment::{self, Arrival, Word, send_state};
use crate::handoff::framing;
use crate::page_server::progress::Progress;

/// A VMM that speaks it is told everything, and may come back when its connection has ended.
#[derive(Debug)]
pub(in super::super) struct Native;

impl Adapter for Native {
    fn receive(&self, socket: UnixStream) -> Result<Arrival, NoArrival> {
        attachment::receive(socket)
            .map_err(|error| NoArrival::Stranger(format!("a VMM was turned away: {error}")))
    }

    fn hear(&self, socket: &UnixStream) -> io::Result<Word> {
        framing::receive(socket)
    }

    fn tell(&self, socket: &UnixStream, word: &Word) -> io::Result<()> {
        framing::send(socket, word)
    }

    fn tell_state(&self, socket: &UnixStream, state: &[StateSection]) -> io::Result<()> {
        send_state(socket, state)
    }

    fn manner(&self) -> Manner {
        Manner {
            restoring: Restoring::IsSaid,
            hang_up: HangUp::MayReturn,
            failure: OnFailure::GoOn,
            death: Outcome::VmmDied,
            after_the_end: "whoever touches one waits until page-client is started again",
        }
    }

    fn refuse(&self, socket: &UnixStream, reason: &str, _: &Progress) -> AfterRefusal {
        // It may have gone.
        let _ = framing::send(socket, &Word::Refused { reason: reason.to_owned() });
        AfterRefusal::WaitOn
    }

    /// Whoever touches a missing page waits for a successor of this process.
    fn forsake(&self, _: BorrowedFd<'_>, _: &Progress) {}
}
