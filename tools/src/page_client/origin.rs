//! Where the pages come from: a source elsewhere, or a snapshot's memory file, which is served
//! inside this process.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage::{
    Address, Endpoint, GuestLayout, Incarnation, Listener, Plaintext, SnapshotServer, SourceEvent,
    SourceMemory, SourceOptions,
};

use super::Failure;
use super::options::Options;
use crate::bandwidth::Bandwidth;
use crate::page_server::memory::{self, Access, Placed};
use crate::page_server::options::{FilePiece, Hole};
use crate::page_server::progress::Progress;

/// Where the pages come from.
pub(super) enum Origin {
    Elsewhere(Endpoint),
    File(PathBuf),
}

/// A file's server in this process, as long as it is held.
#[derive(Debug)]
pub(super) struct FileServer {
    memory: Arc<SourceMemory>,
    _server: SnapshotServer,
    _events: afterimage::Events<(Incarnation, SourceEvent)>,
    /// By which its socket is found: it has no name any more.
    _socket: OwnedFd,
}

impl FileServer {
    /// What it serves, for who needs no server to read what is in memory.
    pub(super) fn memory(&self) -> Arc<SourceMemory> {
        Arc::clone(&self.memory)
    }
}

impl Origin {
    /// What can be wrong with it shows here.
    pub(super) fn open(options: &Options, progress: &Progress) -> Result<Self, Failure> {
        let Some(path) = &options.memory else {
            if options.bandwidth != Bandwidth::default() {
                return Err(Failure::usage(
                    "--bandwidth is for --memory; a page-server at --connect is told how fast it \
                     sends by its own --bandwidth",
                ));
            }
            return super::endpoint(options, progress).map(Self::Elsewhere);
        };
        memory::place(&[FilePiece { path: path.clone(), piece: None }], Hole::None)?;
        Ok(Self::File(path.clone()))
    }

    /// Where the destination of memory with this layout finds its source.
    pub(super) fn endpoint(
        self,
        options: &Options,
        layout: &GuestLayout,
    ) -> Result<(Endpoint, Option<FileServer>), Failure> {
        match self {
            Self::Elsewhere(endpoint) => Ok((endpoint, None)),
            Self::File(path) => {
                serve(&path, options, layout).map(|(endpoint, server)| (endpoint, Some(server)))
            }
        }
    }
}

/// A snapshot's memory file is exactly as long as the memory.
fn check_length(path: &Path, layout: &GuestLayout) -> Result<(), Failure> {
    let length = std::fs::metadata(path).map_err(Failure::of("look at the memory file"))?.len();
    // One that is shorter cannot be mapped, which is said then.
    if length <= layout.bytes() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{} has {length} bytes, and the VM has {} of memory: give the memory file of the snapshot \
         that was loaded",
        path.display(),
        layout.bytes()
    )))
}

/// Serves the file to this very process. Its guest addresses are the file's offsets.
fn serve(
    path: &Path,
    options: &Options,
    layout: &GuestLayout,
) -> Result<(Endpoint, FileServer), Failure> {
    check_length(path, layout)?;
    let pieces = layout.regions().iter().map(|region| Placed {
        guest_address: region.guest_address.0,
        length: region.length,
        path: path.to_owned(),
        offset: region.guest_address.0,
    });
    let memory = memory::map(&pieces.collect::<Vec<_>>(), Access::Read)?;
    let directory = tempfile::tempdir().map_err(Failure::of("make a directory for a socket"))?;
    let name = directory.path().join("pages");
    let listener = Listener::bind(&Address::Unix(name.clone()), Plaintext::LoopbackOnly)
        .map_err(Failure::of("listen in a directory of its own"))?;
    let socket = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&name)
        .map_err(Failure::of("open a socket of its own"))?;
    // Nobody else finds it, and nothing is left behind.
    directory.close().map_err(Failure::of("remove a directory of its own"))?;
    let mut with = SourceOptions::default();
    with.background = options.bandwidth.into();
    with.polling = options.polling;
    let memory = Arc::new(memory);
    let (server, events) = SnapshotServer::start(Arc::clone(&memory), listener, with, 1)
        .map_err(Failure::of("serve the memory file"))?;
    let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
    let server = FileServer { memory, _server: server, _events: events, _socket: socket.into() };
    Ok((Endpoint::Connect(Address::Unix(path.into())), server))
}
