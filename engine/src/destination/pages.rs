//! Who puts which page of a destination in place, and how.
//!
//! Every thread that brings a page goes through [`Pages`]: background receivers through
//! [`Claim`], the fault thread through [`Pages::urgent`] and [`Pages::zero_urgent`], discards through
//! [`Pages::discard`]. The planes decide between them. Three rules keep invariants I1 (once)
//! and I8 (gone):
//!
//! - where pages are copied (anonymous, handed-over), the kernel arbitrates: a page may be
//!   copied by whoever has it first, and `complete` is set after the copy;
//! - where an alias is written, only the claimer writes, and `complete` is set before the
//!   page is shown with CONTINUE;
//! - looking at the planes and placing a page is one step under the gate, which a discard
//!   takes alone: after a discard no copy that looked before it can still arrive.

mod claim;
mod discarded;
mod early;
mod fault;
mod hold;
mod poison;
mod takeover;
#[cfg(test)]
mod tests;

pub(crate) use claim::{Claim, Target};
pub(crate) use fault::{FaultAnswer, MissingPage};

use super::memory::{DestinationMemory, RegionFile};
use crate::sys::fill::{self, Fill, Stopped};
use crate::sys::messages::Messages;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::{Bitmap, Planes};
use afterimage_protocol::layout::{
    GuestLayout, PageNumber, PageRange, RegionRun, RegisteredAddress,
};
use discarded::DiscardedInFlight;
use early::Early;
use hold::{Place, pass};
use nix::errno::Errno;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Zero pages that are marked in one go: a hole may be a terabyte, and whoever reads events
/// waits meanwhile.
const ZERO_STEP: u64 = 1 << 16;
/// The alias gives its page tables back after this many bytes were written through it.
const ALIAS_WINDOW: u64 = 32 << 20;

/// Why a page could not be put in place. The fault stays unanswered: the guest waits rather
/// than read something wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InstallError {
    /// The memory is not registered, or not mapped, where the layout says.
    #[error(
        "page {page} cannot be placed at {address}: the memory is not mapped or not registered \
         there any more"
    )]
    NotRegistered {
        /// The page.
        page: PageNumber,
        /// Its address.
        address: RegisteredAddress,
    },
    /// The process that runs the guest has ended.
    #[error("the process that runs the guest has ended")]
    ProcessGone,
    /// An event waits to be read, and nobody reads events any more.
    #[error("page {page} cannot be placed: an event waits, and faults are not served any more")]
    NoReader {
        /// The page.
        page: PageNumber,
    },
    /// There is no page there to write to.
    #[error(
        "page {page} cannot be written ({errno}): its file is cut short, or there is no room or no \
         huge page left for it; make room, and it is tried again"
    )]
    NoMemory {
        /// The first page of the run.
        page: PageNumber,
        /// What the kernel said.
        errno: io::ErrorKind,
    },
    /// The kernel refuses for another reason.
    #[error("page {page} cannot be placed at {address}: {errno}")]
    Kernel {
        /// The page.
        page: PageNumber,
        /// Its address.
        address: RegisteredAddress,
        /// What the kernel said.
        errno: io::ErrorKind,
    },
}

/// What became of an urgent copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgent {
    /// It is in place now.
    Installed,
    /// The page had arrived by another way; the copy was dropped.
    Late,
    /// The page was discarded while it was being written: it is complete now, and zero.
    Discarded,
    /// Somebody else is writing it this moment and will wake whoever waits; dropped.
    BeingWritten,
    /// An event must be read first; the caller keeps the copy and tries again.
    EventPending,
}

/// Pages by how they came to be: exact once nothing remains, but for duplicates, which are
/// exact once all threads have stopped.
#[derive(Debug, Default)]
pub(crate) struct PageCounters {
    pub(crate) urgent: AtomicU64,
    pub(crate) background: AtomicU64,
    pub(crate) zero: AtomicU64,
    pub(crate) discarded: AtomicU64,
    pub(crate) poisoned: AtomicU64,
    /// By an early copy.
    pub(crate) early: AtomicU64,
    pub(crate) duplicate: AtomicU64,
}

/// All pages of a destination, shared by its threads.
#[derive(Debug)]
pub(crate) struct Pages {
    memory: DestinationMemory,
    planes: Planes<LazyWords>,
    gate: RwLock<DiscardedInFlight>,
    early: Early,
    /// What was read from the userfaultfd last.
    messages: Messages,
    remaining: AtomicU64,
    alias_written: AtomicU64,
    /// What the source has said that it cannot read.
    unreadable: Bitmap<LazyWords>,
    /// Pages of which a fault has been read, ever: for others nobody waits whom only the engine
    /// can wake.
    faulted: Bitmap<LazyWords>,
    /// Nobody reads events any more.
    is_unread: AtomicBool,
    pub(crate) counters: PageCounters,
    /// How often any page became visible.
    #[cfg(test)]
    shown: AtomicU64,
}

impl Pages {
    /// All pages free, or as a process before this one has left them. In the second case
    /// nobody else may serve them, and whoever waits must be woken, or is forgotten.
    pub(crate) fn new(memory: DestinationMemory) -> io::Result<Self> {
        let pages = memory.layout.page_count();
        let kept = &memory.kept;
        let all = Self {
            planes: kept.planes(),
            gate: RwLock::new(DiscardedInFlight::over(kept.discards())),
            early: Early::new(kept.early(), pages)?,
            messages: kept.messages(),
            remaining: AtomicU64::new(0),
            alias_written: AtomicU64::new(0),
            unreadable: Bitmap::over(LazyWords::new(pages)?, pages),
            faulted: Bitmap::over(LazyWords::new(pages)?, pages),
            is_unread: AtomicBool::new(false),
            counters: PageCounters::default(),
            #[cfg(test)]
            shown: AtomicU64::new(0),
            memory,
        };
        let complete = if all.memory.is_taken_over() { all.planes.complete_count() } else { 0 };
        all.remaining.store(pages - complete, Ordering::Release);
        if all.memory.is_taken_over() {
            all.take_over()?;
        }
        Ok(all)
    }

    pub(crate) fn layout(&self) -> &GuestLayout {
        &self.memory.layout
    }

    pub(crate) fn planes(&self) -> &Planes<LazyWords> {
        &self.planes
    }

    /// What the source has said that it cannot read.
    pub(crate) fn unreadable(&self) -> &Bitmap<LazyWords> {
        &self.unreadable
    }

    pub(crate) fn memory(&self) -> &DestinationMemory {
        &self.memory
    }

    /// Pages that are not complete. Zero once, and then for good.
    pub(crate) fn remaining(&self) -> u64 {
        self.remaining.load(Ordering::Acquire)
    }

    /// The share of complete pages in each of `parts` parts of equal length, 0 to 1.
    pub(crate) fn complete_shares(&self, parts: usize) -> Vec<f64> {
        let pages = self.planes.pages();
        let parts = pages.min(parts as u64);
        // In 128 bits, because a guest of many pages in many parts passes 64.
        let border = |part| (u128::from(pages) * u128::from(part) / u128::from(parts)) as u64;
        let share = |part| {
            let (start, end) = (border(part), border(part + 1));
            let range = PageRange::new(PageNumber(start), end - start);
            self.planes.completed().count_in(range) as f64 / range.count as f64
        };
        (0..parts).map(share).collect()
    }

    /// The thread that reads events has ended: who waits for one to be read gives up.
    pub(crate) fn reading_ended(&self) {
        self.is_unread.store(true, Ordering::Release);
    }

    fn installing(&self) -> RwLockReadGuard<'_, DiscardedInFlight> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn discarding(&self) -> RwLockWriteGuard<'_, DiscardedInFlight> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one run that a range inside one region is.
    fn run_of(&self, pages: PageRange) -> RegionRun {
        self.layout().split(pages).next().expect("a page of this layout")
    }

    fn address_of(&self, run: &RegionRun) -> RegisteredAddress {
        let region = &self.layout().regions()[run.region];
        RegisteredAddress(region.registered.unwrap_or_default().0 + run.offset)
    }

    fn file_of(&self, run: &RegionRun) -> Option<&RegionFile> {
        self.memory.files[run.region].as_ref()
    }

    fn page_bytes(&self, run: &RegionRun) -> u64 {
        self.layout().regions()[run.region].page_size.bytes()
    }

    /// Marks pages complete, and counts those that were not before by how they came to be.
    fn mark_complete(
        &self,
        pages: PageRange,
        counter: &AtomicU64,
        newly: impl FnMut(PageRange),
    ) -> u64 {
        let count = self.planes.complete(pages, newly);
        // First: whoever learns that nothing remains finds every page counted.
        counter.fetch_add(count, Ordering::Relaxed);
        self.remaining.fetch_sub(count, Ordering::AcqRel);
        count
    }

    fn wake(&self, run: &RegionRun) {
        self.memory.wake(self.address_of(run), run.length);
    }

    fn fill(&self, fill: Fill<'_>, run: &RegionRun) -> fill::Filled {
        let (uffd, page_bytes) = (self.memory.uffd(), self.page_bytes(run));
        let (address, presence) = (self.address_of(run), self.memory.presence(run.region));
        let filled = fill::run(uffd, fill, address, run.length, page_bytes, presence);
        #[cfg(test)]
        self.shown.fetch_add(filled.installed / page_bytes, Ordering::Relaxed);
        filled
    }

    fn install_error(&self, run: &RegionRun, reached: u64, stopped: Stopped) -> InstallError {
        let page = PageNumber(run.pages.start.0 + reached / self.page_bytes(run));
        let address = RegisteredAddress(self.address_of(run).0 + reached);
        match stopped {
            Stopped::ProcessGone => InstallError::ProcessGone,
            Stopped::NotRegistered => InstallError::NotRegistered { page, address },
            Stopped::EventPending => {
                InstallError::Kernel { page, address, errno: io::ErrorKind::WouldBlock }
            }
            Stopped::Failed(Errno::ENOMEM) => {
                InstallError::NoMemory { page, errno: io::ErrorKind::OutOfMemory }
            }
            Stopped::Failed(errno) => {
                InstallError::Kernel { page, address, errno: io::Error::from(errno).kind() }
            }
        }
    }

    /// Puts a page in place that was asked for. `content` is the whole page.
    pub(crate) fn urgent(&self, page: PageNumber, content: &[u8]) -> Result<Urgent, InstallError> {
        if self.early.is_taking() {
            // Asked for before anything is settled; it is asked for again then.
            return Ok(Urgent::BeingWritten);
        }
        self.promote(PageRange::one(page));
        let run = self.run_of(PageRange::one(page));
        let outcome = match self.file_of(&run) {
            Some(file) => self.urgent_through_alias(&run, file, content)?,
            None => self.urgent_by_copy(&run, content)?,
        };
        if matches!(outcome, Urgent::Late | Urgent::BeingWritten | Urgent::Discarded) {
            self.counters.duplicate.fetch_add(1, Ordering::Relaxed);
        }
        Ok(outcome)
    }

    fn urgent_by_copy(&self, run: &RegionRun, content: &[u8]) -> Result<Urgent, InstallError> {
        let gate = self.installing();
        if self.planes.is_complete(run.pages.start) {
            drop(gate);
            self.wake(run);
            return Ok(Urgent::Late);
        }
        pass(Place::Looked);
        let filled = self.fill(Fill::Copy(content), run);
        match filled.stopped {
            Some(Stopped::EventPending) => return Ok(Urgent::EventPending),
            Some(stopped) => return Err(self.install_error(run, filled.reached(), stopped)),
            None => {}
        }
        pass(Place::Copied);
        let is_first = self.mark_complete(run.pages, &self.counters.urgent, |_| ()) == 1;
        drop(gate);
        if filled.present > 0 {
            self.wake(run);
        }
        Ok(if is_first { Urgent::Installed } else { Urgent::Late })
    }

    fn urgent_through_alias(
        &self,
        run: &RegionRun,
        file: &RegionFile,
        content: &[u8],
    ) -> Result<Urgent, InstallError> {
        let page = run.pages.start;
        if !self.planes.claim_one(page) {
            if !self.planes.is_complete(page) {
                // Whoever has claimed it wakes the waiting thread when it has finished or
                // given up; in the second case the thread faults again and is asked for.
                return Ok(Urgent::BeingWritten);
            }
            self.wake(run);
            return Ok(Urgent::Late);
        }
        if let Err(error) = populate(run, file) {
            self.give_back_file_pages(run.pages, file);
            self.wake(run);
            return Err(error);
        }
        // SAFETY: the page is claimed by this thread, so nobody else writes its alias.
        unsafe { file.alias.run(run.offset, run.length).write(content) };
        pass(Place::Written);
        Ok(match self.show(run, file, &self.counters.urgent) {
            0 => Urgent::Installed,
            _ => Urgent::Discarded,
        })
    }

    /// Shows a claimed run that has been written through the alias: complete first, then
    /// CONTINUE. Returns how many pages were discarded meanwhile and are zero instead; the
    /// others are counted by `counter`.
    fn show(&self, run: &RegionRun, file: &RegionFile, counter: &AtomicU64) -> u64 {
        let gate = self.installing();
        let gone: Vec<PageNumber> = if gate.is_empty() {
            Vec::new()
        } else {
            run.pages.iter().filter(|page| gate.contains(*page)).collect()
        };
        for &page in &gone {
            self.empty_file_pages(PageRange::one(page), file);
            self.mark_complete(PageRange::one(page), &self.counters.discarded, |_| ());
        }
        self.mark_complete(run.pages, counter, |_| ());
        pass(Place::Completed);
        let filled = self.fill(Fill::Continue, run);
        drop(gate);
        // The pages are complete: a thread that still waits for one looks again, faults
        // again, and is answered from the planes. That is right whatever stopped the run,
        // and for pages that hold nothing (discarded) or that somebody else has shown.
        if filled.stopped.is_some() || filled.holes > 0 || filled.present > 0 {
            self.wake(run);
        }
        if !gone.is_empty() {
            let mut gate = self.discarding();
            for page in gone.iter().copied() {
                gate.remove(page);
            }
        }
        self.note_alias_written(run.length);
        gone.len() as u64
    }

    /// Makes pages of a file read as zeros, whatever was written through the alias.
    fn empty_file_pages(&self, pages: PageRange, file: &RegionFile) {
        let run = self.run_of(pages);
        self.early.note_empty(pages);
        if let Err(error) =
            crate::sys::mapping::punch_hole(&file.file, file.offset + run.offset, run.length)
        {
            // A file system without holes: write the zeros.
            tracing::debug!(%error, "no hole punched, zeros written instead");
            let zeros = vec![0; run.length as usize];
            // SAFETY: the caller has claimed the pages, so nobody else writes their alias.
            unsafe { file.alias.run(run.offset, run.length).write(&zeros) };
        }
    }

    fn note_alias_written(&self, bytes: u64) {
        let before = self.alias_written.fetch_add(bytes, Ordering::Relaxed);
        if before / ALIAS_WINDOW != (before + bytes) / ALIAS_WINDOW {
            for file in self.memory.files.iter().flatten() {
                file.alias.drop_page_tables();
            }
        }
    }

    /// Marks pages complete that are zero at the source, and wakes whoever waits for them.
    /// Those that somebody has claimed are left to him. Returns how many were marked.
    pub(crate) fn zero(&self, pages: PageRange) -> u64 {
        let (mut marked, mut done) = (0, 0);
        while done < pages.count {
            let count = ZERO_STEP.min(pages.count - done);
            let step = PageRange::new(PageNumber(pages.start.0 + done), count);
            done += count;
            self.promote(step);
            // A discard that saw the claim and not yet its end would wait for a writer to
            // empty the page, and there is none.
            let gate = self.installing();
            self.planes.claim(step, |run| {
                pass(Place::ZeroClaimed);
                if !self.empty_for_zero(run) {
                    self.planes.give_back(run);
                    return;
                }
                marked += self.mark_complete(run, &self.counters.zero, |_| ());
                self.wake_faulted(run);
            });
            drop(gate);
        }
        self.counters.duplicate.fetch_add(pages.count - marked, Ordering::Relaxed);
        marked
    }

    /// Wakes whoever may wait for pages that the caller has just made complete, without
    /// showing them: an answer to its fault may have seen the claim and relied on its owner,
    /// or the page has been asked for, and the source knows by now that it has arrived.
    ///
    /// Where no fault has been read, a system call a run is saved: a fault that is still to be
    /// read is answered by the thread that reads it. Each of the two looks only after it has
    /// left its own mark (there `faulted`, then a look at `complete`; here the other way
    /// round), and the fences put one of them first: the later one sees the mark of the other.
    fn wake_faulted(&self, pages: PageRange) {
        fence(Ordering::SeqCst);
        if self.faulted.first_set_in(pages).is_some() {
            for run in self.layout().split(pages) {
                self.wake(&run);
            }
        }
    }

    /// A fault of this page has been read, and whoever waits in it hangs on the engine. Comes
    /// before any look at the planes for it: see [`wake_faulted`](Self::wake_faulted).
    fn note_fault(&self, page: PageNumber) {
        self.faulted.set_one(page);
        fence(Ordering::SeqCst);
    }

    /// As [`zero`](Self::zero), where pages were asked for: wakes whoever waits for any of them,
    /// also for one that had arrived by another way.
    pub(crate) fn zero_urgent(&self, pages: PageRange) -> u64 {
        if self.early.is_taking() {
            return 0;
        }
        let marked = self.zero(pages);
        for run in self.layout().split(pages) {
            self.wake(&run);
        }
        marked
    }
}

/// Makes sure that a claimed run can be written through the alias.
fn populate(run: &RegionRun, file: &RegionFile) -> Result<(), InstallError> {
    let page = run.pages.start;
    let populated = file.alias.populate(run.offset, run.length);
    populated.map_err(|error| InstallError::NoMemory { page, errno: error.kind() })
}
