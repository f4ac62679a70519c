//! The process of a VMM that hands its guest over to a page server, and is killed.
//!
//! Invariant: after it has handed its guest over it touches the memory no more, and waits
//! for its end.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use afterimage::GuestAddress;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use sha2::{Digest, Sha256};

use super::error::DemoError;
use super::messages::{Command, Line, Message, Setup, Stopped, now_us};
use super::report::hex;
use super::source::{Running, boot, run_for_a_while};
use crate::guest::GuestSpec;
use crate::handoff::{self, Piece};
use crate::migrate;
use crate::ram::{GuestRam, PAGE_BYTES, Region};

/// Plays a source that hands its guest over at `path`.
pub(super) fn run(line: &Line, setup: &Setup, path: &Path) -> Result<(), DemoError> {
    let Running { ram, spec, mut guest, .. } = boot(line, setup)?;
    let pieces = pieces(&ram)?;
    run_for_a_while(&mut *guest, setup.limit)?;
    // While the guest runs: it does not write these pages, and there will be no time later.
    let sha256 = digest(&ram, &spec)
        .map_err(|error| DemoError::failed("cannot read guest memory", &error))?;
    while line.command(setup.limit)? != Command::HandOver {}

    let at_us = now_us();
    let state =
        guest.stop().map_err(|error| DemoError::failed("the guest did not stop", &error))?;
    if let Some(failure) = guest.failure() {
        return Err(DemoError::Failed(format!("the guest failed before it moved: {failure}")));
    }
    let sections = migrate::state_sections(&state);
    let state_bytes = sections.iter().map(|section| section.bytes.len() as u64).sum();
    handoff::give(path, "demo", &pieces, &sections)
        .map_err(|error| DemoError::failed("cannot hand the guest over", &error))?;
    line.say(&Message::HandedOver {
        stopped: Stopped {
            at_us,
            rounds: guest.rounds(),
            state_bytes,
            event_us: None,
            cause: None,
        },
        at_us: now_us(),
        sha256,
    });
    // To be killed now, with all that a VMM has open and mapped.
    loop {
        line.command(setup.limit)?;
    }
}

/// Guest memory as it is handed over. From here on its files cannot be cut short.
fn pieces(ram: &GuestRam) -> Result<Vec<Piece<'_>>, DemoError> {
    let pieces = ram.regions().iter().map(|region| {
        let (file, offset) = region.file().ok_or(io::ErrorKind::Unsupported)?;
        fcntl(&**file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;
        let guest_address = GuestAddress(region.guest_base().0);
        Ok(Piece { guest_address, length: region.length(), file: file.as_fd(), offset })
    });
    pieces
        .collect::<io::Result<_>>()
        .map_err(|error| DemoError::failed("cannot seal guest memory", &error))
}

/// SHA-256 of the pages that no vCPU writes. Read through the files, unlike
/// [`guest::digest`](crate::guest::digest): this does not fill their holes.
fn digest(ram: &GuestRam, spec: &GuestSpec) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut bytes = [0; PAGE_BYTES as usize];
    for page in spec.worked_pages()..spec.geometry().pages {
        let address = spec.geometry().address(page).0;
        let holds = |region: &&Region| {
            address.checked_sub(region.guest_base().0).is_some_and(|it| it < region.length())
        };
        let region = ram.regions().iter().find(holds).ok_or(io::ErrorKind::NotFound)?;
        let (file, offset) = region.file().ok_or(io::ErrorKind::Unsupported)?;
        file.read_exact_at(&mut bytes, offset + (address - region.guest_base().0))?;
        hasher.update(bytes);
    }
    Ok(hex(&hasher.finalize()))
}
