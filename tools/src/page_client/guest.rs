//! A guest whose memory is served here: as a VMM hands it over, and as a keeper holds it.
//!
//! Invariant: a VMM hears that its memory is taken only after everything that a successor
//! needs is at the keeper, if there is one.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use afterimage::{
    Backing, DestinationMemory, DestinationOptions, GuestAddress, GuestLayout, Incarnation,
    PageSize, Region,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::fstat;
use serde::{Deserialize, Serialize};

use super::Failure;
use crate::attachment::{DrivenBy, Offer, RegionOfVmm, regions_of};
use crate::keeper::NamedFile;
use crate::processes;

/// Grows when the description changes.
const VERSION: u32 = 1;
const DESCRIPTION: &str = "client";
const UFFD: &str = "uffd";
const PLANES: &str = "planes";
const VMM: &str = "vmm";
const FILE: &str = "file";

/// What a keeper holds beside the descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: u32,
    name: String,
    pid: i32,
    /// Of this memory, as in its record: hexadecimal.
    incarnation: String,
    #[serde(default)]
    driven: DrivenBy,
    regions: Vec<RegionOfVmm>,
}

/// Everything that is needed to serve a guest's memory.
#[derive(Debug)]
pub(super) struct Served {
    /// The VMM's name for it.
    pub(super) name: String,
    /// This memory: its record must name the same.
    pub(super) incarnation: Incarnation,
    /// The process that runs it.
    pub(super) pid: i32,
    /// The same, as a descriptor that becomes readable at its end.
    pub(super) vmm: OwnedFd,
    /// Who restores and starts it.
    pub(super) driven_by: DrivenBy,
    uffd: OwnedFd,
    planes: OwnedFd,
    files: Vec<OwnedFd>,
    regions: Vec<RegionOfVmm>,
}

impl Served {
    /// A guest that is offered.
    pub(super) fn offered(offer: &mut Offer) -> io::Result<Self> {
        let (pid, vmm) = processes::peer(offer.socket.as_fd())?;
        Ok(Self {
            name: offer.name.clone(),
            incarnation: DestinationOptions::default().record.incarnation,
            pid,
            vmm,
            driven_by: offer.driven_by,
            uffd: offer.uffd.try_clone()?,
            planes: DestinationMemory::planes_file()?,
            files: std::mem::take(&mut offer.files),
            regions: std::mem::take(&mut offer.regions),
        })
    }

    /// As a keeper holds it.
    pub(super) fn set(&self) -> io::Result<Vec<NamedFile>> {
        let description = Description {
            version: VERSION,
            name: self.name.clone(),
            pid: self.pid,
            incarnation: self.incarnation.to_string(),
            driven: self.driven_by,
            regions: self.regions.clone(),
        };
        let mut set =
            vec![NamedFile { name: DESCRIPTION.to_owned(), file: describe(&description)? }];
        for (name, file) in [(UFFD, &self.uffd), (PLANES, &self.planes), (VMM, &self.vmm)] {
            set.push(NamedFile { name: name.to_owned(), file: file.try_clone()? });
        }
        for (index, file) in self.files.iter().enumerate() {
            set.push(NamedFile { name: format!("{FILE}{index}"), file: file.try_clone()? });
        }
        Ok(set)
    }

    /// A guest that a process before this one has served.
    pub(super) fn kept(set: &[NamedFile]) -> Result<Self, Failure> {
        let wrong = |what: &str| {
            Failure::new(format!("what the keeper holds is no guest of a page-client: {what}"))
        };
        let take = |name: &str| {
            let found = set.iter().find(|it| it.name == name);
            let file = found.ok_or_else(|| wrong(&format!("no {name}")))?;
            file.file.try_clone().map_err(Failure::of("duplicate what the keeper holds"))
        };
        let description = read(take(DESCRIPTION)?).map_err(|error| wrong(&error.to_string()))?;
        if description.version != VERSION {
            let theirs = description.version;
            return Err(wrong(&format!("its description has version {theirs}, not {VERSION}")));
        }
        let incarnation = u128::from_str_radix(&description.incarnation, 16)
            .map_err(|_| wrong("its memory has no name"))?;
        let count = set.iter().filter(|it| it.name.starts_with(FILE)).count();
        let files = (0..count).map(|index| take(&format!("{FILE}{index}")));
        let files = files.collect::<Result<_, _>>()?;
        Ok(Self {
            name: description.name,
            incarnation: Incarnation(incarnation.to_be_bytes()),
            pid: description.pid,
            vmm: take(VMM)?,
            driven_by: description.driven,
            uffd: take(UFFD)?,
            planes: take(PLANES)?,
            files,
            regions: description.regions,
        })
    }

    /// Whether the VMM of this guest is at the other end.
    pub(super) fn is_the_vmm(&self, socket: &UnixStream) -> bool {
        processes::peer(socket.as_fd()).is_ok_and(|(pid, _)| pid == self.pid)
    }

    /// Whether a VMM offers this very guest: it has not heard that it was taken.
    pub(super) fn is_offered_again(&self, offer: &Offer) -> bool {
        let are_same = |(one, other): (&OwnedFd, &OwnedFd)| match (fstat(one), fstat(other)) {
            (Ok(one), Ok(other)) => (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino),
            _ => false,
        };
        self.is_the_vmm(&offer.socket)
            && offer.name == self.name
            && offer.driven_by == self.driven_by
            && offer.regions == self.regions
            && offer.files.len() == self.files.len()
            && offer.files.iter().zip(&self.files).all(are_same)
    }

    /// Whether a process has begun to serve this memory, and may have put something there.
    pub(super) fn has_begun(&self) -> io::Result<bool> {
        Ok(fstat(&self.planes)?.st_size > 0)
    }

    /// Its layout, as far as a record knows it.
    pub(super) fn layout(&self) -> Result<GuestLayout, Failure> {
        let regions = self.regions.iter().map(|region| {
            let page_size = PageSize::from_bytes(region.page_size).unwrap_or(PageSize::KIB_4);
            let at = GuestAddress(region.guest_address);
            Region::new(at, region.length, page_size, Backing::Opaque)
        });
        GuestLayout::new(regions.collect()).map_err(Failure::of("understand the guest's memory"))
    }

    /// Its memory in the engine's terms. Not before whoever served it has ended.
    pub(super) fn attach(&self) -> Result<DestinationMemory, Failure> {
        let regions = regions_of(&self.regions, &self.files)
            .map_err(Failure::of("understand the guest's memory"))?;
        let duplicate = |file: &OwnedFd| file.try_clone().map_err(Failure::of("duplicate a file"));
        let (uffd, planes) = (duplicate(&self.uffd)?, duplicate(&self.planes)?);
        let memory = DestinationMemory::attach_kept(uffd, regions, planes)
            .map_err(Failure::of("serve the guest's memory"))?;
        if !self.regions.iter().any(RegionOfVmm::has_huge_pages_of_its_own) {
            return Ok(memory);
        }
        // No process has the number 0: nothing is there of one that has ended.
        let process = processes::number(self.vmm.as_fd()).map(Option::unwrap_or_default);
        process.and_then(|process| memory.of_process(process)).map_err(|error| {
            Failure::new(format!(
                "could not read the page map of process {}, without which its huge pages cannot be \
                 served: {error}; run page-client as the VMM's user, or as root, where it sees that \
                 process",
                self.pid
            ))
        })
    }
}

fn describe(description: &Description) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(c"afterimage-client", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(description)?)?;
    Ok(file.into())
}

fn read(file: OwnedFd) -> io::Result<Description> {
    let mut file = File::from(file);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(16 << 20).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}
