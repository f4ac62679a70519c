//! Firecracker's protocol of a page fault handler, for `PUT /snapshot/load` with `Uffd`.
//!
//! Firecracker connects, says once where its memory lies, hands the userfaultfd over, and says
//! nothing more; nothing is said to it. The connection stays open as long as it lives.

mod handshake;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use afterimage::StateSection;

use super::super::options::OnExit;
use super::super::report::Outcome;
use super::{Adapter, AfterRefusal, HangUp, Manner, NoArrival, OnFailure, Restoring};
use crate::attachment::{Arrival, DrivenBy, Offer, Word};
use crate::page_server::progress::Progress;
use crate::processes;
pub(in super::super) use handshake::Placement;

/// One Firecracker, and what is done to it when it cannot be served.
#[derive(Debug)]
pub(in super::super) struct Firecracker {
    pub(in super::super) on_exit: OnExit,
    pub(in super::super) placement: Placement,
}

impl Adapter for Firecracker {
    fn receive(&self, socket: UnixStream) -> Result<Arrival, NoArrival> {
        match handshake::receive(&socket, self.placement) {
            Ok((uffd, regions)) => Ok(Arrival::Offer(Offer {
                name: "firecracker".to_owned(),
                uffd,
                driven_by: DrivenBy::Vmm,
                regions,
                files: Vec::new(),
                socket,
            })),
            Err(handshake::Error::Nothing(why)) => Err(NoArrival::Stranger(format!(
                "somebody connected, and handed no memory over: {why}"
            ))),
            Err(handshake::Error::Wrong(reason)) => {
                let reason = format!("a Firecracker cannot be served: {reason}");
                Err(NoArrival::Unservable { socket, reason })
            }
        }
    }

    /// Nothing is said after the memory was handed over; what comes all the same is not heeded.
    fn hear(&self, mut socket: &UnixStream) -> io::Result<Word> {
        let mut bytes = [0; 512];
        loop {
            match socket.read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => tracing::warn!(length, "Firecracker says something out of turn"),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn tell(&self, _: &UnixStream, _: &Word) -> io::Result<()> {
        Ok(())
    }

    /// Firecracker has read its device state by itself.
    fn tell_state(&self, _: &UnixStream, _: &[StateSection]) -> io::Result<()> {
        Ok(())
    }

    fn manner(&self) -> Manner {
        let (failure, after_the_end) = match self.on_exit {
            OnExit::KillVmm => (OnFailure::End, "the VM is killed"),
            OnExit::Leave => (OnFailure::GoOn, "whoever touches one waits for ever"),
        };
        Manner {
            restoring: Restoring::IsNotOurs,
            hang_up: HangUp::IsTheEnd,
            failure,
            death: Outcome::VmEnded,
            after_the_end,
        }
    }

    /// It cannot be told: what is not served hangs from its first fault on.
    fn refuse(&self, socket: &UnixStream, _: &str, progress: &Progress) -> AfterRefusal {
        match processes::peer(socket.as_fd()) {
            Ok((_, vmm)) => self.forsake(vmm.as_fd(), progress),
            Err(error) => {
                tracing::info!(%error, "who has connected has gone");
                return AfterRefusal::WaitOn;
            }
        }
        AfterRefusal::End
    }

    fn forsake(&self, vmm: BorrowedFd<'_>, progress: &Progress) {
        match self.on_exit {
            OnExit::Leave => progress.say(
                "the VM is left (--on-exit leave): whoever touches a missing page there waits for \
                 ever; kill it",
            ),
            OnExit::KillVmm => match processes::kill(vmm) {
                Ok(()) => progress.say(
                    "the VM was killed, because nobody would bring its missing pages (--on-exit \
                     kill-vmm)",
                ),
                Err(error) => progress.say(&format!(
                    "the VM could not be killed ({error}): kill it, or it waits for ever; \
                     page-client must be root, or run as the same user"
                )),
            },
        }
    }
}
