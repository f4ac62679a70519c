//! Faults: reading events, and answering those whose page has arrived.

use super::Pages;
use super::hold::{Place, pass};
use crate::destination::memory::keep_forever;
use crate::sys::fill::{Fill, Stopped};
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::layout::{Backing, PageNumber, PageRange, RegionRun, RegisteredAddress};
use std::io;
use std::os::fd::AsFd;
use userfaultfd::{Event, EventBuffer, FaultKind};

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
}

/// What one look at a userfaultfd brought.
#[derive(Debug, Default)]
pub(crate) struct EventsRead {
    /// How many events.
    pub(crate) events: usize,
    /// Pages that were discarded.
    pub(crate) discarded: Vec<PageRange>,
}

impl Pages {
    /// Reads what events there are, without blocking, and appends the faults to `faults`.
    /// Discards are done when it returns; their pages are to be acknowledged. Must be called
    /// by one thread only, which may never zap, unmap or fork.
    pub(crate) fn read_events(
        &self,
        buffer: &mut EventBuffer,
        faults: &mut Vec<MissingPage>,
    ) -> io::Result<EventsRead> {
        let (mut discarded, mut count) = (Vec::new(), 0);
        {
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
            let events = self.memory.uffd().read_events(buffer).map_err(read_error)?;
            pass(Place::EventsRead);
            for event in events {
                count += 1;
                match event.map_err(read_error)? {
                    Event::Pagefault { kind, addr, .. } => self.push_fault(kind, addr, faults),
                    Event::Remove { start, end } | Event::Unmap { start, end } => {
                        let (start, end) = (start as u64, end as u64);
                        let runs = self
                            .layout()
                            .pages_at_registered(RegisteredAddress(start), end - start);
                        for run in runs {
                            if let Some(gate) = gate.as_mut() {
                                self.discard_locked(run.pages, gate);
                            }
                            discarded.push(run);
                        }
                    }
                    Event::Fork { uffd } => {
                        // The child's missing pages: nobody serves them, and they must not
                        // become zeros. A VMM keeps guest memory out of children
                        // (MADV_DONTFORK).
                        tracing::warn!("the VMM forked; guest memory in the child is not served");
                        // A duplicate: `into_raw_fd` of userfaultfd 0.9 closes what it returns.
                        keep_forever(uffd.as_fd().try_clone_to_owned()?);
                    }
                    Event::Remap { from, to, len } => {
                        tracing::error!(?from, ?to, len, "guest memory was moved by mremap");
                        return Err(io::Error::other(
                            "guest memory was moved by mremap while it was being served",
                        ));
                    }
                }
            }
        }
        for run in &discarded {
            self.wake(run);
        }
        let discarded = discarded.iter().map(|run| run.pages).collect();
        Ok(EventsRead { events: count, discarded })
    }

    fn push_fault(
        &self,
        kind: FaultKind,
        addr: *mut std::ffi::c_void,
        faults: &mut Vec<MissingPage>,
    ) {
        match self.layout().page_at_registered(RegisteredAddress(addr as u64)) {
            Some(page) => {
                self.note_fault(page);
                faults.push(MissingPage { page, is_minor: kind == FaultKind::Minor });
            }
            None => tracing::error!(?addr, "a fault outside of guest memory"),
        }
    }

    /// Answers a fault whose page has arrived, and says what to do about another.
    pub(crate) fn answer(&self, fault: MissingPage) -> FaultAnswer {
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
                if let Some(file) = self.file_of(run) {
                    // Where there is none to be had, the fault comes again.
                    if let Err(error) = file.alias.populate(run.offset, run.length) {
                        tracing::error!(%error, page = run.pages.start.0, "no huge page for zeros");
                    }
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

fn read_error(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::SystemError(errno) => errno.into(),
        other => io::Error::other(other),
    }
}

/// Whether there is an event to read.
fn is_readable(uffd: &userfaultfd::Uffd) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut fds, PollTimeout::ZERO)?;
    let has_failed = fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLERR));
    if has_failed {
        return Err(io::Error::other("the userfaultfd reports an error: is it blocking?"));
    }
    Ok(ready > 0)
}
