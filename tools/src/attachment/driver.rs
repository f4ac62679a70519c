//! The side of a process that drives a guest which another process holds.

use super::Hello;
use super::listening::{AttachError, AttachmentEvent, Line, connect, io_error};
use std::path::Path;
use std::time::Duration;

/// A guest that another process holds ([`Attachment::attach_driven`](super::Attachment)), and
/// that this one restores and starts. Methods may be called from any thread.
///
/// Dropped, it hangs up, and page-client waits for the next driver.
#[derive(Debug)]
pub struct Driver {
    line: Line,
}

impl Driver {
    /// Drives the guest `name` of the page-client that listens on the Unix socket `path`, in the
    /// place of any driver before. Neither the guest's memory nor its source need be there yet:
    /// [`AttachmentEvent::Attached`] says when the memory is, [`AttachmentEvent::Refused`] that
    /// there is another guest.
    ///
    /// What a driver before this one may have heard is told again.
    ///
    /// # Errors
    /// [`AttachError`].
    pub fn connect(path: &Path, name: &str) -> Result<Self, AttachError> {
        let hello = Hello::Drive { name: name.to_owned() };
        let socket = connect(path, &hello)
            .map_err(|source| AttachError::Connect { path: path.to_owned(), source })?;
        socket.set_read_timeout(None).map_err(io_error("wait for page-client without a limit"))?;
        let line = Line::start(socket, path.to_owned(), hello);
        Ok(Self { line: line.map_err(io_error("start a thread"))? })
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

    /// The guest runs, after [`AttachmentEvent::Run`], or stays paused as it was at its source.
    /// page-client waits for this word at the end, from this driver or the next: nobody else would
    /// start the guest. Said again to a successor of page-client without a call.
    pub fn started(&self) {
        self.line.started();
    }

    /// The guest cannot be restored here: its memory is let go of, and the source gets it back,
    /// even if it had given it already. Does nothing once it is on record that it may run.
    pub fn withdraw(&self) {
        self.line.withdraw();
    }
}
