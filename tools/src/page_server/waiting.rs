//! Waiting for a VMM that hands its guest over.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io, thread};

use afterimage::{Address, SourceMemory, SourceMemoryError, SourceRegion};
use crossbeam_channel::Sender;
use mio::Waker;
use nix::sys::stat::{Mode, umask};

use super::failure::{Failure, chain};
use super::holding::Kept;
use super::migration::Origin;
use super::progress::Progress;
use super::report::Journal;
use super::survival::Survival;
use super::wait::Waiter;
use super::{State, Supply};
use crate::handoff::{self, Offer, OfferedRegion};

/// The socket that VMMs connect to; only this user's and root's may.
#[derive(Debug)]
pub(super) struct Doorway {
    listener: UnixListener,
    address: Address,
}

/// A guest whose memory is mapped and which can be taken.
pub(super) struct Guest {
    pub(super) memory: Arc<SourceMemory>,
    pub(super) offer: Offer,
}

impl Doorway {
    /// Listens. Call it before any thread is started.
    pub(super) fn open(address: &Address) -> Result<Self, Failure> {
        let listener = listen_privately(address, "--handoff")?;
        Ok(Self { listener, address: address.clone() })
    }

    pub(super) fn address(&self) -> Address {
        self.address.clone()
    }

    /// Waits for a guest that can be served; `None` if a signal came first. What is wrong
    /// with others is said, and they keep their guests.
    pub(super) fn wait(
        self,
        waiter: &mut Waiter,
        progress: &Progress,
    ) -> Result<Option<Guest>, Failure> {
        let (sender, arrivals) = crossbeam_channel::unbounded();
        let listener = self.listener.try_clone().map_err(Failure::of("duplicate a socket"))?;
        let waker = waiter.waker();
        // It ends with the first good offer, or with the process.
        thread::Builder::new()
            .name("handoff".to_owned())
            .spawn(move || admit(&listener, &sender, &waker))
            .map_err(Failure::of("start a thread"))?;
        loop {
            let signals =
                waiter.wait(progress.interval()).map_err(Failure::of("wait for a VMM"))?;
            for arrival in arrivals.try_iter() {
                match arrival {
                    Ok(guest) => return Ok(Some(guest)),
                    Err(line) => progress.say(&line),
                }
            }
            if signals > 0 {
                progress.say("stopped before a guest was handed over");
                return Ok(None);
            }
        }
    }
}

impl Drop for Doorway {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        if let Address::Unix(path) = &self.address {
            let _ = fs::remove_file(path);
        }
    }
}

/// Listens on a Unix socket that only this user and root may connect to. `flag` is where the
/// address was given. Call it before any thread is started.
pub(crate) fn listen_privately(address: &Address, flag: &str) -> Result<UnixListener, Failure> {
    let Address::Unix(path) = address else {
        return Err(Failure::usage(format!(
            "{flag} {address}: descriptors only travel over Unix sockets; give unix:PATH"
        )));
    };
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = bind(path);
    umask(before);
    bound.map_err(|error| Failure::listen(address, &error))
}

/// A socket left behind by a process that died is replaced.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let is_socket = fs::symlink_metadata(path)?.file_type().is_socket();
            let is_dead = UnixStream::connect(path)
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            if !(is_socket && is_dead) {
                return Err(error);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
}

fn admit(listener: &UnixListener, to: &Sender<Result<Guest, String>>, waker: &Waker) {
    loop {
        let arrival = match listener.accept() {
            Ok((socket, _)) => receive(socket),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => Err(format!("could not accept a VMM: {error}")),
        };
        let is_last = arrival.is_ok();
        // The waiter may have gone; then nobody needs to be woken.
        if to.send(arrival).is_err() || waker.wake().is_err() || is_last {
            return;
        }
    }
}

/// Takes an offer as far as that its memory is mapped.
fn receive(socket: UnixStream) -> Result<Guest, String> {
    let mut offer = handoff::receive(socket)
        .map_err(|error| format!("a hand-over failed: {}", chain(&error)))?;
    match map(std::mem::take(&mut offer.regions)) {
        Ok(memory) => Ok(Guest { memory, offer }),
        Err(error) => {
            let reason = chain(&error);
            offer.refuse(&reason);
            Err(format!("a hand-over failed: {reason}"))
        }
    }
}

/// Takes the guest: from here it is this process's, and the keeper's.
pub(super) fn take(
    mut offer: Offer,
    session: &str,
    survival: &mut Survival,
    progress: &Progress,
    journal: &mut Journal,
) -> Result<State, Failure> {
    let warnings = std::mem::take(&mut offer.warnings);
    for warning in &warnings {
        progress.say(&format!("warning: {warning}"));
    }
    let guest = offer.take_and_keep(session, |offer| survival.keep(offer, progress));
    let guest = guest.map_err(|error| {
        Failure::new(format!("the VMM keeps its guest: {}; hand it over again", chain(&error)))
    })?;
    if let Some(holding) = &mut survival.holding {
        holding.settle(progress);
    }
    progress.say(&format!(
        "{} (process {}) has handed its guest over and may exit",
        guest.giver.name, guest.giver.pid
    ));
    journal.handed_over(&guest.giver, &guest.sections, warnings);
    Ok((guest.sections, Origin::HandedOver))
}

/// The memory of a guest that the keeper has.
pub(super) fn map_kept(mut kept: Kept) -> Result<(Arc<SourceMemory>, Supply), Failure> {
    let regions = std::mem::take(&mut kept.guest.regions);
    let memory = map(regions).map_err(Failure::of("use the memory that the keeper holds"))?;
    Ok((memory, Supply::Kept(kept)))
}

/// Goes on with a guest that a process before this one had.
pub(super) fn resume(
    kept: Kept,
    session: &str,
    survival: &mut Survival,
    progress: &Progress,
) -> Result<State, Failure> {
    if let Some(giver) = kept.giver {
        // It still waits, or has heard it and gone.
        handoff::say_taken(&giver, session).map_err(|error| Failure::new(chain(&error)))?;
        if let Some(holding) = &mut survival.holding {
            holding.settle(progress);
        }
    }
    survival.note_kept(progress);
    progress.say(&format!("the keeper has the guest that {} gave", kept.guest.giver.name));
    Ok((kept.guest.sections, Origin::HandedOver))
}

fn map(regions: Vec<OfferedRegion>) -> Result<Arc<SourceMemory>, SourceMemoryError> {
    let regions = regions.into_iter().map(|region| {
        SourceRegion::file(region.guest_address, region.file, region.offset, region.length)
    });
    Ok(Arc::new(SourceMemory::new(regions.collect::<Result<_, _>>()?)?))
}
