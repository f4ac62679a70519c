//! Finding out what an unmodified VMM writes: the memory of a VMM that runs with the preload
//! library and `AFTERIMAGE_TRACKING`, as a dirty tracker for the process that migrates it.
//!
//! The protocol is described in docs/preload.md; the tracking is the engine's
//! [`WriteProtectTracker`].

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage::dirty::{DirtyTracker, TrackedRegion, WriteProtectTracker};
use afterimage::{GuestAddress, PageSize, RegisteredAddress};
use serde::Deserialize;

use crate::attachment::{MAX_FILES, MAX_REGIONS, RegionOfVmm};
use crate::handoff::framing;
use crate::processes;

/// The first bytes of a connection, and the version of the protocol.
const PREFIX: &[u8] = b"AIMGTRCK\x01\0\0\0";
/// How long the VMM may take. Its library answers by itself, whatever the VMM does.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a VMM's memory cannot be tracked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrackingError {
    /// Nobody listens there.
    #[error(
        "could not connect to unix:{0}: start the VMM with libafterimage_preload.so and \
         AFTERIMAGE_TRACKING=unix:{0}", path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The library says no.
    #[error("the VMM's memory cannot be tracked: {reason}")]
    Refused {
        /// In its words.
        reason: String,
    },
    /// What came cannot be right.
    #[error("what listens at unix:{} is no VMM that can be tracked: {what}", path.display())]
    Stranger {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The connection failed, or the process may not be looked at.
    #[error("could not {operation}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(operation: &'static str) -> impl Fn(io::Error) -> TrackingError {
    move |source| TrackingError::Io { operation, source }
}

/// Writes of a VMM to its guest memory, by whichever of its threads or by KVM. What other
/// processes write (vhost-user) or devices (DMA) is not seen.
///
/// As long as this lives nobody else can track this VMM, and the VMM maps the memory nowhere
/// else. When the VMM ends, [`collect`](DirtyTracker::collect) says so.
#[derive(Debug)]
pub struct VmmTracker {
    // Ends before the lease does.
    tracker: WriteProtectTracker,
    regions: Vec<(GuestAddress, u64)>,
    process: u32,
    _lease: Lease,
}

/// The VMM's memory, for as long as this is connected.
#[derive(Debug)]
struct Lease(UnixStream);

impl Drop for Lease {
    fn drop(&mut self) {
        // At once, even if a child that is about to exec has the descriptor too. It may be over.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

#[derive(Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
enum Word {
    Tracked { files: usize, regions: Vec<RegionOfVmm> },
    Refused { reason: String },
}

impl VmmTracker {
    /// Takes the memory of the VMM whose library listens at the Unix socket `path`. This process
    /// must be of the VMM's user, or root, and be allowed to trace it (`PTRACE_MODE_READ`).
    ///
    /// Blocks for 10 s at most.
    ///
    /// # Errors
    /// [`TrackingError`].
    pub fn connect(path: &Path) -> Result<Self, TrackingError> {
        let socket = UnixStream::connect(path)
            .map_err(|source| TrackingError::Connect { path: path.to_owned(), source })?;
        let patience = Some(PATIENCE);
        let limited = socket.set_read_timeout(patience).and(socket.set_write_timeout(patience));
        limited.map_err(io_error("limit how long the VMM may take"))?;
        let (process, _) = processes::peer(socket.as_fd())
            .map_err(io_error("find the process that is to be tracked"))?;
        let stranger = |what: String| TrackingError::Stranger { path: path.to_owned(), what };
        let (uffd, files, regions) = receive(&socket, stranger)?;
        let places = regions.iter().map(|it| (GuestAddress(it.guest_address), it.length)).collect();
        let memory = regions.iter().map(|region| region_of(region, &files));
        let memory = memory.collect::<Result<_, _>>().map_err(stranger)?;
        let process = process as u32;
        let tracker = WriteProtectTracker::of_process(process, uffd, memory)
            .map_err(io_error("look at the VMM's page map (is this its user, or root?)"))?;
        Ok(Self { tracker, regions: places, process, _lease: Lease(socket) })
    }

    /// The regions that are tracked: where each begins for the guest, and its bytes.
    #[must_use]
    pub fn regions(&self) -> &[(GuestAddress, u64)] {
        &self.regions
    }

    /// The VMM.
    #[must_use]
    pub const fn process(&self) -> u32 {
        self.process
    }
}

impl DirtyTracker for VmmTracker {
    fn start(&mut self) -> io::Result<()> {
        self.tracker.start()
    }

    fn collect(&mut self, written: &mut dyn FnMut(GuestAddress, u64)) -> io::Result<()> {
        self.tracker.collect(written)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.tracker.stop()
    }
}

type Received = (OwnedFd, Vec<OwnedFd>, Vec<RegionOfVmm>);

fn receive(
    socket: &UnixStream,
    stranger: impl Fn(String) -> TrackingError,
) -> Result<Received, TrackingError> {
    let failed = io_error("hear what the VMM has");
    let prefix = framing::receive_bytes(socket, PREFIX.len() as u64).map_err(&failed)?;
    if prefix != PREFIX {
        return Err(stranger("it speaks another protocol, or another version".to_owned()));
    }
    let (files, regions) = match framing::receive(socket).map_err(&failed)? {
        Word::Tracked { files, regions } => (files, regions),
        Word::Refused { reason } => return Err(TrackingError::Refused { reason }),
    };
    if files > MAX_FILES || !(1..=MAX_REGIONS).contains(&regions.len()) {
        let count = regions.len();
        return Err(stranger(format!("it has {count} regions in {files} files")));
    }
    let mut descriptors = framing::receive_files(socket, files + 1).map_err(&failed)?;
    Ok((descriptors.remove(0), descriptors, regions))
}

fn region_of(region: &RegionOfVmm, files: &[OwnedFd]) -> Result<TrackedRegion, String> {
    let (guest, start) = (GuestAddress(region.guest_address), RegisteredAddress(region.address));
    let at = region.guest_address;
    let file = region.file.and_then(|(file, offset)| Some((files.get(file)?, offset)));
    let Some((file, offset)) = file else {
        return Err(format!("the region at guest address {at:#x} has no file"));
    };
    if PageSize::from_bytes(region.page_size) != Some(PageSize::KIB_4) {
        return Ok(TrackedRegion::hugetlb(guest, start, region.length));
    }
    let file = file.try_clone().map_err(|error| error.to_string())?;
    Ok(TrackedRegion::shared(guest, start, region.length, file, offset))
}
