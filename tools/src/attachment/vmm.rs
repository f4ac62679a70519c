//! The VMM's side: attach, and hear what page-client says.

use super::listening::{AttachError, AttachmentEvent, Line, connect, io_error, is_attached};
use super::{DrivenBy, Hello, RegionOfVmm, Word};
use crate::handoff::framing;
use afterimage::DestinationMemory;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Guest memory that a page-client serves. Methods may be called from any thread.
///
/// Dropped, it hangs up; page-client serves on, for the VMM may come back.
#[derive(Debug)]
pub struct Attachment {
    line: Line,
}

impl Attachment {
    /// Hands memory over to the page-client that listens on the Unix socket `path`. `name`
    /// says whose it is, the same after a restart of page-client. When this returns, faults
    /// are answered as soon as the source has given the guest. Keep `memory` until
    /// [`AttachmentEvent::AllArrived`].
    ///
    /// Blocks until page-client has taken it, 30 s at most.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach(
        path: &Path,
        name: &str,
        memory: &DestinationMemory,
    ) -> Result<Self, AttachError> {
        Self::hand_over(path, name, memory, DrivenBy::Vmm)
    }

    /// The same, where another process restores the guest and starts its vCPUs: this one is not
    /// told [`AttachmentEvent::State`], and never says that it is ready.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn attach_driven(
        path: &Path,
        name: &str,
        memory: &DestinationMemory,
    ) -> Result<Self, AttachError> {
        Self::hand_over(path, name, memory, DrivenBy::Driver)
    }

    fn hand_over(
        path: &Path,
        name: &str,
        memory: &DestinationMemory,
        driven: DrivenBy,
    ) -> Result<Self, AttachError> {
        let wrap = io_error("duplicate descriptors of guest memory");
        let (regions, descriptors) = describe(memory).map_err(wrap)?;
        let (name, files) = (name.to_owned(), descriptors.len() - 1);
        let hello = Hello::Attach { name: name.clone(), files, regions, driven };
        let socket = connect(path, &hello)
            .map_err(|source| AttachError::Connect { path: path.to_owned(), source })?;
        let ending = socket.try_clone().map_err(io_error("duplicate the connection"))?;
        let attached = hand_over(&socket, &descriptors).and_then(|()| {
            let line = Line::start(socket, path.to_owned(), Hello::Return { name });
            line.map_err(io_error("start a thread"))
        });
        if attached.is_err() {
            // Or page-client would serve memory that nobody comes back for. It may be gone.
            let _ = framing::send(&ending, &Word::Withdrawn);
        }
        Ok(Self { line: attached? })
    }

    /// Waits for the next event, for `most` at most; `None` if none came or none will come.
    #[must_use]
    pub fn next(&self, most: Duration) -> Option<AttachmentEvent> {
        self.line.next(most)
    }

    /// The device state is restored: [`AttachmentEvent::Run`] follows when the source has
    /// given the guest away. Said again to a successor of page-client without a call.
    pub fn ready(&self) {
        self.line.ready();
    }
}

/// The regions, and the userfaultfd and the files behind them.
fn describe(memory: &DestinationMemory) -> io::Result<(Vec<RegionOfVmm>, Vec<OwnedFd>)> {
    let mut descriptors = vec![memory.userfaultfd()?];
    let regions = memory.layout().regions().iter().enumerate().map(|(index, region)| {
        let file = memory.file(index)?.map(|(file, offset)| {
            descriptors.push(file);
            (descriptors.len() - 2, offset)
        });
        Ok(RegionOfVmm {
            guest_address: region.guest_address.0,
            address: region.registered.unwrap_or_default().0,
            length: region.length,
            page_size: region.page_size.bytes(),
            file,
        })
    });
    let regions = regions.collect::<io::Result<_>>()?;
    Ok((regions, descriptors))
}

/// Waits until page-client has taken it.
fn hand_over(socket: &UnixStream, descriptors: &[OwnedFd]) -> Result<(), AttachError> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    if let Err(source) = framing::send_files(socket, &borrowed) {
        // It may have said why it stopped listening.
        return Err(match framing::receive(socket) {
            Ok(Word::Refused { reason }) => AttachError::Refused { reason },
            _ => AttachError::Io { operation: "hand guest memory over", source },
        });
    }
    is_attached(socket, "hear whether memory was taken")?;
    socket.set_read_timeout(None).map_err(io_error("wait for page-client without a limit"))
}
