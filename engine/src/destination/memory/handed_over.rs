//! Memory of one process that another serves: what a VMM hands over, and how it is taken.
//!
//! Invariant: the VMM's own descriptor of the userfaultfd stays open until every page has
//! arrived, so that the end of whoever serves it shows nobody a zero.

use super::{DestinationMemory, DestinationRegion, MemoryError};
use crate::destination::kept;
use crate::sys::presence::Presence;
use crate::sys::uffd::UffdError;
use afterimage_protocol::layout::GuestLayout;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use userfaultfd::Uffd;

impl DestinationMemory {
    /// Takes over memory that another process registered, with its userfaultfd. That
    /// process must have registered every region, with mode missing (and minor, where a
    /// file is given), and must not touch a page before it did. What the files hold in the
    /// regions' ranges is dropped: a page that is zero at the source is shown as the file has
    /// it, which must be as nothing.
    ///
    /// # Errors
    /// [`MemoryError`] where the regions are no layout or a file cannot be mapped or emptied.
    pub fn attach(
        descriptor: OwnedFd,
        regions: Vec<DestinationRegion>,
    ) -> Result<Self, MemoryError> {
        Self::attach_with(descriptor, regions, None)
    }

    /// The same for a process that another may succeed: what is known of the pages is kept
    /// in the file `planes` ([`planes_file`](Self::planes_file) makes one; a file on tmpfs
    /// will do too). Somebody who outlives this process must hold it, the userfaultfd, and
    /// the files of the regions.
    ///
    /// With an empty file this is as [`attach`](Self::attach). With a file that a process
    /// before this one has used, its memory is taken over: nothing is dropped that has
    /// arrived, and nothing arrives twice; what was being written when that process died is
    /// asked for again, what was discarded stays so, and whoever waited is woken and asks
    /// this process. Its record ([`DestinationRecord`]) must be kept too, and given in
    /// [`DestinationOptions::record`]. The process before this one must have ended: two at
    /// once would show a page twice.
    ///
    /// [`DestinationRecord`]: crate::DestinationRecord
    /// [`DestinationOptions::record`]: crate::DestinationOptions::record
    ///
    /// # Errors
    /// [`MemoryError`]; [`MemoryError::Planes`] if the file is of other memory.
    pub fn attach_kept(
        descriptor: OwnedFd,
        regions: Vec<DestinationRegion>,
        planes: OwnedFd,
    ) -> Result<Self, MemoryError> {
        Self::attach_with(descriptor, regions, Some(planes))
    }

    /// An empty file in memory for [`attach_kept`](Self::attach_kept): lives as long as
    /// anybody holds a descriptor of it. A duplicate goes to whoever outlives this process.
    ///
    /// # Errors
    /// What the system says.
    pub fn planes_file() -> io::Result<OwnedFd> {
        kept::new_file()
    }

    /// Says which process has this memory. Needed where huge pages were handed over without a file
    /// ([`Destination::start`](crate::Destination::start) fails otherwise): whether such a page is
    /// there, or there is no room for it, only the process's page map (`/proc/PID/pagemap`) tells.
    ///
    /// One that has ended is no error here: nothing can be put in place in its memory, whose number
    /// ever `process` may be by now.
    ///
    /// # Errors
    /// The page map cannot be opened: the process is another user's (root may, and the same user,
    /// unless the process forbids it by `PR_SET_DUMPABLE`).
    pub fn of_process(mut self, process: u32) -> io::Result<Self> {
        self.presence = Some(Presence::of(process)?);
        Ok(self)
    }

    /// Whether pages of this memory may have arrived by a process before this one.
    #[must_use]
    pub fn is_taken_over(&self) -> bool {
        self.is_taken_over
    }

    fn attach_with(
        descriptor: OwnedFd,
        regions: Vec<DestinationRegion>,
        planes: Option<OwnedFd>,
    ) -> Result<Self, MemoryError> {
        // SAFETY: whether it is a userfaultfd shows at the first call; ownership moves.
        let uffd = unsafe { Uffd::from_raw_fd(descriptor.into_raw_fd()) };
        crate::sys::set_nonblocking(&uffd)
            .map_err(|error| UffdError::system("make the userfaultfd non-blocking", error))?;
        // Which events the other process asked for cannot be told from the descriptor.
        let memory = Self::assemble(regions, uffd, true, planes)?;
        if !memory.is_taken_over {
            // A hole punched through a file raises no event, so nobody need read any. Memory
            // of the other process without a file cannot be emptied from here, and need not
            // be.
            memory.empty()?;
        }
        memory.kept.begin();
        Ok(memory)
    }

    /// The memory's regions, where they are registered, and their page sizes, in the order of
    /// guest addresses: with [`userfaultfd`](Self::userfaultfd) and [`file`](Self::file), what
    /// another process needs to serve this memory
    /// ([`DestinationRegion::handed_over`], [`attach`](Self::attach)). This process then
    /// starts no [`Destination`](crate::Destination) of its own, keeps this value as long as
    /// pages are missing, and says [`all_arrived`](Self::all_arrived) at the end.
    #[must_use]
    pub const fn layout(&self) -> &GuestLayout {
        &self.layout
    }

    /// The userfaultfd, duplicated.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn userfaultfd(&self) -> io::Result<OwnedFd> {
        self.uffd.as_fd().try_clone_to_owned()
    }

    /// The file behind a region, duplicated, and where in it the region begins; `None` where
    /// it has none.
    ///
    /// # Errors
    /// No descriptor is to be had.
    ///
    /// # Panics
    /// If the layout has no such region.
    pub fn file(&self, region: usize) -> io::Result<Option<(OwnedFd, u64)>> {
        let file = self.files[region].as_ref();
        file.map(|it| Ok((it.file.try_clone()?, it.offset))).transpose()
    }

    /// Whoever serves this memory has said that every page is in place. The userfaultfd is
    /// closed. Said too early, missing pages become zeros.
    pub fn all_arrived(self) {
        self.is_unregistered.store(true, Ordering::Release);
    }
}
