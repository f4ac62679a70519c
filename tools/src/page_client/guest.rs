//! A guest whose memory is served here: as a VMM hands it over, and as a keeper holds it.
//!
//! Invariant: a VMM hears that its memory is taken only after everything that a successor
//! needs is at the keeper, if there is one.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};

use afterimage::DestinationMemory;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::Failure;
use crate::attachment::{Offer, RegionOfVmm, regions_of};
use crate::keeper::{Keeper, NamedFile};
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
    regions: Vec<RegionOfVmm>,
}

/// Everything that is needed to serve a guest's memory.
#[derive(Debug)]
pub(super) struct Served {
    /// The VMM's name for it.
    pub(super) name: String,
    /// The process that runs it.
    pub(super) pid: i32,
    /// The same, as a descriptor that becomes readable at its end.
    pub(super) vmm: OwnedFd,
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
            pid,
            vmm,
            uffd: offer.uffd.try_clone()?,
            planes: DestinationMemory::planes_file()?,
            files: std::mem::take(&mut offer.files),
            regions: std::mem::take(&mut offer.regions),
        })
    }

    /// Stores it at the keeper.
    pub(super) fn store(&self, keeper: &mut Keeper, guest: &str) -> Result<(), Failure> {
        let description = Description {
            version: VERSION,
            name: self.name.clone(),
            pid: self.pid,
            regions: self.regions.clone(),
        };
        let described = describe(&description).map_err(Failure::of("describe the guest"))?;
        let names: Vec<_> = (0..self.files.len()).map(|index| format!("{FILE}{index}")).collect();
        let mut set = vec![
            (DESCRIPTION, described.as_fd()),
            (UFFD, self.uffd.as_fd()),
            (PLANES, self.planes.as_fd()),
            (VMM, self.vmm.as_fd()),
        ];
        let files = names.iter().zip(&self.files);
        set.extend(files.map(|(name, file)| (name.as_str(), file.as_fd())));
        keeper.store(guest, &set).map_err(Failure::of("store the guest at the keeper"))
    }

    /// A guest that a process before this one has served.
    pub(super) fn kept(set: Vec<NamedFile>) -> Result<Self, Failure> {
        let wrong = |what: &str| {
            Failure::new(format!("what the keeper holds is no guest of a page-client: {what}"))
        };
        let (mut files, mut named) = (Vec::new(), std::collections::BTreeMap::new());
        for NamedFile { name, file } in set {
            match name.strip_prefix(FILE).and_then(|index| index.parse::<usize>().ok()) {
                Some(index) => files.push((index, file)),
                None => drop(named.insert(name, file)),
            }
        }
        files.sort_by_key(|(index, _)| *index);
        let mut take = |name: &str| named.remove(name).ok_or_else(|| wrong(&format!("no {name}")));
        let description = read(take(DESCRIPTION)?).map_err(|error| wrong(&error.to_string()))?;
        if description.version != VERSION {
            let theirs = description.version;
            return Err(wrong(&format!("its description has version {theirs}, not {VERSION}")));
        }
        Ok(Self {
            name: description.name,
            pid: description.pid,
            vmm: take(VMM)?,
            uffd: take(UFFD)?,
            planes: take(PLANES)?,
            files: files.into_iter().map(|(_, file)| file).collect(),
            regions: description.regions,
        })
    }

    /// Its memory in the engine's terms. Not before whoever served it has ended.
    pub(super) fn attach(&self) -> Result<DestinationMemory, Failure> {
        let regions = regions_of(&self.regions, &self.files)
            .map_err(Failure::of("understand the guest's memory"))?;
        let duplicate = |file: &OwnedFd| file.try_clone().map_err(Failure::of("duplicate a file"));
        DestinationMemory::attach_kept(duplicate(&self.uffd)?, regions, duplicate(&self.planes)?)
            .map_err(Failure::of("serve the guest's memory"))
    }
}

fn describe(description: &Description) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"afterimage-client", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&serde_json::to_vec(description)?)?;
    Ok(file)
}

fn read(file: OwnedFd) -> io::Result<Description> {
    let mut file = File::from(file);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(16 << 20).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}
