//! Faults: reading events, and answering those whose page has arrived.

use super::hold::{Place, pass};
use super::{DiscardedInFlight, InstallError, Pages, populate};
use crate::destination::memory::keep_forever;
use crate::sys::fill::{Fill, Stopped};
use crate::sys::messages::{Message, Messages, child_of};
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::layout::{Backing, PageNumber, PageRange, RegionRun, RegisteredAddress};
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

/// Between two looks for an event that is pending and not there yet.
const LAST_EVENT_RETRY: Duration = Duration::from_micros(100);

/// A fault that somebody waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MissingPage {
    pub(crate) page: PageNumber,
    /// Whether the page cache has something at this place. Whether it is the page's content
    /// is said by the planes alone.
    pub(super) is_minor: bool,
}

/// What is to be done about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultAnswer {
    /// Nothing more: whoever waited has been woken.
    Answered,
    /// The page must be asked for.
    Ask,
    /// Somebody is writing it and will wake whoever waits.
    BeingWritten,
    /// An event must be read first; try again.
    EventPending,
    /// There is no room for the zeros that it is to get; try again in a while.
    NoRoom(InstallError),
}

/// What one look at a userfaultfd brought.
#[derive(Debug, Default)]
pub(crate) struct EventsRead {
    /// How many events.
    pub(crate) events: usize,
    /// More may be there than one look takes.
    pub(crate) may_be_more: bool,
    /// Pages that were discarded.
    pub(crate) discarded: Vec<PageRange>,
}

impl Pages {
    /// Reads what events there are, without blocking, and appends the faults to `faults`.
    /// Discards are done when it returns; their pages are to be acknowledged. Must be called
    /// by one thread only, which may never zap, unmap or fork.
    pub(crate) fn read_events(&self, faults: &mut Vec<MissingPage>) -> io::Result<EventsRead> {
        let mut discarded = Vec::new();
        let events = {
            // Between the reading of a discard and its entry in the planes no copy may be
            // placed: whoever discards goes on as soon as it has been read.
            let mut gate = if self.memory.has_events {
                if !is_readable(self.memory.uffd())? {
                    return Ok(EventsRead::default());
                }
                Some(self.discarding())
            } else {
                None
            };
            let events = self.messages.read(self.memory.uffd())?;
            pass(Place::EventsRead);
            for index in 0..events {
                match self.messages.get(index) {
                    Message::Fault { address, is_minor } => {
                        self.push_fault(address, is_minor, faults);
                    }
                    Message::Gone { start, end } => {
                        if let Some(gate) = gate.as_mut() {
                            discarded.extend(self.gone(start, end, gate));
                        }
                    }
                    Message::Forked(child) => {
                        // The child's missing pages: nobody serves them, and they must not
                        // become zeros. A VMM keeps guest memory out of children
                        // (MADV_DONTFORK).
                        tracing::warn!("the VMM forked; guest memory in the child is not served");
                        keep_forever(child_of(child));
                    }
                    Message::Moved { from, to, length } => return Err(moved(from, to, length)),
                    Message::Unknown(event) => tracing::warn!(event, "an unknown event"),
                }
            }
            pass(Place::EventsDone);
            self.messages.wipe(events);
            events
        };
        for run in &discarded {
            self.wake(run);
        }
        let discarded = discarded.iter().map(|run| run.pages).collect();
        Ok(EventsRead { may_be_more: Messages::are_full(events), events, discarded })
    }

    /// Reads to the end what was being told when everything had arrived and the memory was
    /// unregistered. Whoever discards looks whether memory is registered, and then waits to be
    /// read: he would wait for as long as anybody holds the userfaultfd open, and a VMM may.
    pub(crate) fn read_last_events(&self) -> io::Result<()> {
        while self.memory.has_event_pending() {
            self.read_events(&mut Vec::new())?;
            // What is pending may be a moment away from being there.
            std::thread::sleep(LAST_EVENT_RETRY);
        }
        Ok(())
    }

    /// Memory of the guest that was given up: discards its pages.
    pub(super) fn gone(
        &self,
        start: u64,
        end: u64,
        gate: &mut DiscardedInFlight,
    ) -> Vec<RegionRun> {
        let length = end.saturating_sub(start);
        let runs = self.layout().pages_at_registered(RegisteredAddress(start), length);
        runs.inspect(|run| self.discard_locked(run.pages, gate)).collect()
    }

    fn push_fault(&self, address: u64, is_minor: bool, faults: &mut Vec<MissingPage>) {
        match self.layout().page_at_registered(RegisteredAddress(address)) {
            Some(page) => {
                self.note_fault(page);
                faults.push(MissingPage { page, is_minor });
            }
            None => tracing::error!(address, "a fault outside of guest memory"),
        }
    }

    /// Answers a fault whose page has arrived, and says what to do about another.
    pub(crate) fn answer(&self, fault: MissingPage) -> FaultAnswer {
        self.promote(PageRange::one(fault.page));
        let run = self.run_of(PageRange::one(fault.page));
        match self.planes.state(fault.page) {
            PageState::Complete => self.answer_complete(&run, fault.is_minor),
            PageState::Claimed if self.file_of(&run).is_some() => FaultAnswer::BeingWritten,
            // Where pages are copied, an urgent copy may overtake the one under way.
            PageState::Claimed | PageState::Free => FaultAnswer::Ask,
        }
    }

    /// A complete page that faults was not shown yet (minor) or is zero (missing). The page
    /// cache may change between the fault and the answer, so each failure leads to the other
    /// way, and a page that is there to a wake-up.
    fn answer_complete(&self, run: &RegionRun, is_minor: bool) -> FaultAnswer {
        let backing = self.layout().regions()[run.region].backing;
        let mut continues = is_minor;
        for _ in 0..4 {
            if !continues && backing == Backing::Hugetlb {
                // No ZEROPAGE there; an allocated huge page is zero.
                if let Some(file) = self.file_of(run)
                    && let Err(error) = populate(run, file)
                {
                    return FaultAnswer::NoRoom(error);
                }
                continues = true;
            }
            let filled = match (continues, backing) {
                (true, _) => self.fill(Fill::Continue, run),
                // It may be hugetlbfs, which knows no ZEROPAGE.
                (false, Backing::Opaque) if self.page_bytes(run) > 4096 => {
                    self.fill(Fill::Copy(&vec![0; run.length as usize]), run)
                }
                (false, _) => self.fill(Fill::Zero, run),
            };
            match filled.stopped {
                Some(Stopped::EventPending) => return FaultAnswer::EventPending,
                // The last page has arrived and nothing is registered any more: whoever comes
                // again is answered by the kernel.
                Some(_) if self.remaining() == 0 => break,
                Some(stopped) => {
                    let error = self.install_error(run, filled.reached(), stopped);
                    if matches!(error, InstallError::NoMemory { .. }) {
                        return FaultAnswer::NoRoom(error);
                    }
                    tracing::error!(%error, "a fault stays unanswered");
                    return FaultAnswer::Answered;
                }
                None if filled.installed > 0 => return FaultAnswer::Answered,
                None if filled.holes > 0 => continues = false,
                // EEXIST: mapped already, or (ZEROPAGE on shared memory) in the page cache.
                None if continues || self.file_of(run).is_none() => break,
                None => continues = true,
            }
        }
        self.wake(run);
        FaultAnswer::Answered
    }
}

/// Guest memory that is served was moved: nobody knows any more which page lies where.
pub(super) fn moved(from: u64, to: u64, length: u64) -> io::Error {
    io::Error::other(format!(
        "guest memory was moved by mremap while it was being served: {length:#x} bytes from \
         {from:#x} to {to:#x}"
    ))
}

/// Whether there is an event to read.
pub(super) fn is_readable(uffd: &userfaultfd::Uffd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut fds, PollTimeout::ZERO)?;
    let has_failed = fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLERR));
    if has_failed {
        return Err(io::Error::other("the userfaultfd reports an error: is it blocking?"));
    }
    Ok(ready > 0)
}
