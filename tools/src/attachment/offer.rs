//! page-client's side: what a VMM that connects wants.

use super::{DrivenBy, Hello, MAGIC, MAX_FILES, MAX_REGIONS, RegionOfVmm, VERSION, Word};
use crate::handoff::framing;
use afterimage::{DestinationRegion, GuestAddress, PageSize, RegisteredAddress};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long a VMM may take to say what it wants.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest name of a guest, in bytes.
const MAX_NAME: usize = 255;

/// A VMM that has connected.
#[derive(Debug)]
pub enum Arrival {
    /// With a guest.
    Offer(Offer),
    /// To the successor of the page-client that it had.
    Return {
        /// Whose memory it is.
        name: String,
        /// To talk to it.
        socket: UnixStream,
    },
    /// Not with a guest, but to drive one.
    Drive {
        /// Which.
        name: String,
        /// To talk to it.
        socket: UnixStream,
    },
}

/// Guest memory that is handed over.
#[derive(Debug)]
pub struct Offer {
    /// Whose it is.
    pub name: String,
    /// The userfaultfd with which it is registered.
    pub uffd: OwnedFd,
    /// Who restores and starts it.
    pub driven_by: DrivenBy,
    pub(crate) regions: Vec<RegionOfVmm>,
    /// The files behind the regions.
    pub files: Vec<OwnedFd>,
    /// To talk to the VMM.
    pub socket: UnixStream,
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OfferError {
    /// What came is something else.
    #[error("what connected is no VMM that wants its memory served")]
    Stranger,
    /// Another version of the protocol.
    #[error(
        "the VMM speaks version {theirs} of the attachment, this is {VERSION}: use matching releases"
    )]
    Version {
        /// The VMM's.
        theirs: u32,
    },
    /// It is another user's.
    #[error(
        "user {theirs} may not drive a guest here: run the driver as the user of page-client, or \
         as root"
    )]
    User {
        /// The driver's.
        theirs: u32,
    },
    /// It cannot be right.
    #[error("{0}")]
    Wrong(String),
    /// The connection failed, or the VMM was silent for too long.
    #[error("could not hear what a VMM wants")]
    Io(#[from] io::Error),
}

/// Hears what a VMM wants. On an error it has been told why.
///
/// Blocks; a VMM that is silent for 10 s is given up.
///
/// # Errors
/// [`OfferError`].
pub fn receive(socket: UnixStream) -> Result<Arrival, OfferError> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let heard = hear(&socket);
    if let Err(error) = &heard {
        let reason = error.to_string();
        // It may have gone.
        let _ = framing::send(&socket, &Word::Refused { reason });
    }
    Ok(match heard? {
        Heard::Return(name) => Arrival::Return { name, socket },
        Heard::Drive(name) => Arrival::Drive { name, socket },
        Heard::Attach { name, uffd, files, regions, driven_by } => {
            Arrival::Offer(Offer { name, uffd, driven_by, regions, files, socket })
        }
    })
}

enum Heard {
    Return(String),
    Drive(String),
    Attach {
        name: String,
        uffd: OwnedFd,
        files: Vec<OwnedFd>,
        regions: Vec<RegionOfVmm>,
        driven_by: DrivenBy,
    },
}

fn hear(socket: &UnixStream) -> Result<Heard, OfferError> {
    if framing::receive_bytes(socket, MAGIC.len() as u64)? != MAGIC {
        return Err(OfferError::Stranger);
    }
    let version = framing::receive_bytes(socket, 4)?;
    let theirs = u32::from_le_bytes(version.try_into().expect("four bytes"));
    if theirs != VERSION {
        return Err(OfferError::Version { theirs });
    }
    let (name, files, regions, driven_by) = match framing::receive(socket)? {
        Hello::Return { name } => return Ok(Heard::Return(checked(name)?)),
        Hello::Drive { name } => {
            check_user(socket)?;
            return Ok(Heard::Drive(checked(name)?));
        }
        Hello::Attach { name, files, regions, driven } => (checked(name)?, files, regions, driven),
    };
    if files > MAX_FILES || !(1..=MAX_REGIONS).contains(&regions.len()) {
        let count = regions.len();
        return Err(OfferError::Wrong(format!(
            "a guest of {count} regions in {files} files: 1 to {MAX_REGIONS} regions in up to \
             {MAX_FILES} files can be served"
        )));
    }
    let mut descriptors = framing::receive_files(socket, files + 1)?;
    let uffd = descriptors.remove(0);
    check(&regions, files)?;
    Ok(Heard::Attach { name, uffd, files: descriptors, regions, driven_by })
}

/// A VMM can only hand over its own memory; whoever drives a guest decides for another process.
fn check_user(socket: &UnixStream) -> Result<(), OfferError> {
    let theirs = getsockopt(socket, PeerCredentials).map_err(io::Error::from)?.uid();
    if theirs == 0 || theirs == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    Err(OfferError::User { theirs })
}

fn checked(name: String) -> Result<String, OfferError> {
    if (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(name);
    }
    let wrong = format!("a guest has a name of 1 to {MAX_NAME} printable bytes");
    Err(OfferError::Wrong(wrong))
}

/// What the engine does not check, because it is told by those that link it.
fn check(regions: &[RegionOfVmm], files: usize) -> Result<(), OfferError> {
    for region in regions {
        let at = region.guest_address;
        let wrong = |what: &str| {
            Err(OfferError::Wrong(format!("the region at guest address {at:#x} {what}")))
        };
        let Some(page) = PageSize::from_bytes(region.page_size) else {
            return wrong(&format!("has pages of {} bytes", region.page_size));
        };
        let is_aligned = |bytes: u64| bytes.is_multiple_of(page.bytes());
        if !is_aligned(region.address) || region.file.is_some_and(|(_, offset)| !is_aligned(offset))
        {
            return wrong("does not begin on a page of its own size");
        }
        if region.address.checked_add(region.length).is_none() {
            return wrong("ends beyond the last address");
        }
        if region.file.is_some_and(|(file, _)| file >= files) {
            return wrong("names a file that was not handed over");
        }
    }
    Ok(())
}

/// The regions in the engine's terms.
pub(crate) fn regions_of(
    regions: &[RegionOfVmm],
    files: &[OwnedFd],
) -> Result<Vec<DestinationRegion>, OfferError> {
    check(regions, files.len())?;
    let regions = regions.iter().map(|region| {
        let page_size = PageSize::from_bytes(region.page_size).unwrap_or(PageSize::KIB_4);
        let file = match region.file {
            Some((file, offset)) => Some((files[file].try_clone()?, offset)),
            None => None,
        };
        Ok(DestinationRegion::handed_over(
            GuestAddress(region.guest_address),
            RegisteredAddress(region.address),
            region.length,
            page_size,
            file,
        ))
    });
    regions.collect()
}
