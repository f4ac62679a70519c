//! Waiting for a VMM that hands its guest over.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::{fs, io, thread};

use afterimage::{Address, SourceMemory, SourceRegion};
use crossbeam_channel::Sender;
use mio::Waker;
use nix::sys::stat::{Mode, umask};

use super::State;
use super::failure::{Failure, chain};
use super::migration::Origin;
use super::progress::Progress;
use super::report::Journal;
use super::wait::Waiter;
use crate::handoff::{self, Offer};

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
    let regions = std::mem::take(&mut offer.regions).into_iter().map(|region| {
        SourceRegion::file(region.guest_address, region.file, region.offset, region.length)
    });
    match regions.collect::<Result<_, _>>().and_then(SourceMemory::new) {
        Ok(memory) => Ok(Guest { memory: Arc::new(memory), offer }),
        Err(error) => {
            let reason = chain(&error);
            offer.refuse(&reason);
            Err(format!("a hand-over failed: {reason}"))
        }
    }
}

/// Takes the guest: from here it is this process's.
pub(super) fn take(
    mut offer: Offer,
    session: &str,
    progress: &Progress,
    journal: &mut Journal,
) -> Result<State, Failure> {
    let warnings = std::mem::take(&mut offer.warnings);
    for warning in &warnings {
        progress.say(&format!("warning: {warning}"));
    }
    let guest = offer.take(session).map_err(|error| {
        Failure::new(format!("the VMM keeps its guest: {}; hand it over again", chain(&error)))
    })?;
    progress.say(&format!(
        "{} (process {}) has handed its guest over and may exit",
        guest.giver.name, guest.giver.pid
    ));
    journal.handed_over(&guest.giver, &guest.sections, warnings);
    Ok((guest.sections, Origin::HandedOver))
}
