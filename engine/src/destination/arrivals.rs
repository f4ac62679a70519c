//! What the threads of a destination share: the pages, and what has to be told about them.

use super::driver::Input;
use super::pages::{InstallError, Pages};
use crate::agreed::AgreedCell;
use crate::inbox::Outlet;
use crate::stats::{DestinationCounters, DestinationStats};
use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::{Epoch, Generation, MAX_ACK_RUNS, Stamp};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many runs may wait to be acknowledged. If the control channel does not carry them
/// off, it is dead, and the source learns from the planes instead.
const MAX_WAITING_RUNS: usize = 1 << 16;

/// So many runs do not wait for the next look: a source remembers only so much that is under
/// way, and pauses then.
const MANY_RUNS: usize = 2048;

/// The pages of a destination and the news of them; as long as the destination lives.
#[derive(Debug)]
pub(crate) struct Arrived {
    pub(crate) pages: Pages,
    pub(crate) counters: DestinationCounters,
    started: Instant,
    acks: Mutex<Vec<PageRange>>,
    has_acks: AtomicBool,
    has_lost_acks: AtomicBool,
    /// Said once that everything is complete.
    said_complete: AtomicBool,
    driver: Outlet<Input>,
    attachments: AtomicU64,
    is_running: AtomicBool,
    pub(super) agreed: AgreedCell,
}

/// The same on one connection.
#[derive(Clone, Debug)]
pub(super) struct Arrivals {
    arrived: Arc<Arrived>,
    pub(super) epoch: Epoch,
    pub(super) checksums: bool,
    /// Both sides can do precopy.
    pub(super) precopy: bool,
}

impl std::ops::Deref for Arrivals {
    type Target = Arrived;

    fn deref(&self) -> &Arrived {
        &self.arrived
    }
}

impl Arrivals {
    pub(super) fn stamp(&self, generation: Generation) -> Stamp {
        Stamp { epoch: self.epoch, generation }
    }
}

impl Arrived {
    pub(super) fn new(pages: Pages, driver: Outlet<Input>) -> Self {
        Self {
            pages,
            counters: DestinationCounters::new(),
            started: Instant::now(),
            acks: Mutex::default(),
            has_acks: AtomicBool::new(false),
            has_lost_acks: AtomicBool::new(false),
            said_complete: AtomicBool::new(false),
            driver,
            attachments: AtomicU64::new(0),
            is_running: AtomicBool::new(false),
            agreed: AgreedCell::default(),
        }
    }

    pub(super) fn on(self: &Arc<Self>, epoch: Epoch, checksums: bool, precopy: bool) -> Arrivals {
        Arrivals { arrived: Arc::clone(self), epoch, checksums, precopy }
    }

    fn acks(&self) -> MutexGuard<'_, Vec<PageRange>> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages are complete. The source is told soon; whoever calls does not wait.
    pub(super) fn acknowledge(&self, run: PageRange) {
        let mut acks = self.acks();
        let has_room = acks.len() < MAX_WAITING_RUNS;
        let mut are_many = false;
        match acks.last_mut() {
            Some(last) if last.end() == Some(run.start) => last.count += run.count,
            _ if has_room => {
                acks.push(run);
                are_many = acks.len() == MANY_RUNS;
            }
            _ => self.has_lost_acks.store(true, Ordering::Release),
        }
        drop(acks);
        self.has_acks.store(true, Ordering::Release);
        if are_many {
            self.driver.send(Input::ManyAcks);
        }
        self.counters.page_arrived(self.started.elapsed());
        self.note_progress();
    }

    /// Those of a run that are complete; somebody else may still be busy with the rest.
    pub(super) fn acknowledge_complete(&self, run: PageRange) {
        self.pages.planes().complete_in(run, |complete| self.acknowledge(complete));
        self.note_progress();
    }

    /// Looks whether that was the last page.
    pub(super) fn note_progress(&self) {
        if self.pages.remaining() == 0 && !self.said_complete.swap(true, Ordering::AcqRel) {
            self.driver.send(Input::AllComplete);
        }
    }

    /// Whether acknowledgements wait.
    pub(super) fn has_acks(&self) -> bool {
        self.has_acks.load(Ordering::Acquire)
    }

    /// Whether some were dropped, so that the source must learn from the planes. Says so
    /// once.
    pub(super) fn take_lost_acks(&self) -> bool {
        self.has_lost_acks.swap(false, Ordering::AcqRel)
    }

    /// Takes acknowledgements for one frame.
    pub(super) fn take_acks(&self) -> Vec<PageRange> {
        let mut acks = self.acks();
        let most = acks.len().min(MAX_ACK_RUNS);
        let rest = acks.split_off(most);
        self.has_acks.store(!rest.is_empty(), Ordering::Release);
        std::mem::replace(&mut acks, rest)
    }

    /// A new connection: the planes say all there is to say.
    pub(super) fn forget_acks(&self) {
        let mut acks = self.acks();
        acks.clear();
        self.has_acks.store(false, Ordering::Release);
        self.has_lost_acks.store(false, Ordering::Release);
    }

    /// A channel broke in the middle of these pages, which are free again. The source may have
    /// sent them on another channel meanwhile, where they were dropped because they were
    /// claimed; for the source they are under way there. So they are asked for.
    pub(super) fn given_back(&self, pages: PageRange) {
        self.driver.send(Input::GivenBack(pages));
    }

    /// The source cannot read these pages: whoever touches one waits.
    pub(super) fn unreadable(&self, pages: PageRange) {
        // Told once, however often it is said: the VMM keeps what it is told.
        self.pages.unreadable().set(pages, |newly| {
            // Before anything follows from it.
            self.counters.unreadable.fetch_add(newly.count, Ordering::Relaxed);
            self.driver.send(Input::Unreadable(newly));
        });
    }

    /// A page could not be put in place: the VMM is told why. The channel ends with the error that is
    /// given back, unless whoever waits for that page alone is to wait.
    pub(super) fn failed(&self, error: InstallError) -> io::Error {
        self.driver.send(Input::InstallFailed(error));
        io::Error::other(error)
    }

    /// The other side has been attached once more; `true` if not for the first time.
    pub(super) fn note_attached(&self) {
        if self.attachments.fetch_add(1, Ordering::Relaxed) > 0 {
            self.counters.recoveries.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The guest may run here: the source's memory is final, and every request is answered.
    pub(super) fn note_running(&self) {
        self.is_running.store(true, Ordering::Release);
    }

    pub(super) fn is_running(&self) -> bool {
        self.is_running.load(Ordering::Acquire)
    }

    pub(super) fn stats(&self) -> DestinationStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let pages = &self.pages.counters;
        let total = self.pages.layout().page_count();
        let first_page = of(&self.counters.first_page);
        DestinationStats {
            pages_total: total,
            pages_complete: total - self.pages.remaining(),
            pages_requested: of(&pages.urgent),
            pages_background: of(&pages.background),
            pages_precopy: of(&pages.early),
            pages_zero: of(&pages.zero),
            pages_discarded: of(&pages.discarded),
            pages_duplicate: of(&pages.duplicate),
            pages_unreadable: of(&self.counters.unreadable),
            pages_poisoned: of(&pages.poisoned),
            bytes_received: of(&self.counters.bytes),
            frames_stale: of(&self.counters.stale),
            requests_retried: of(&self.counters.retried),
            recoveries: of(&self.counters.recoveries),
            first_page: (first_page > 0).then(|| Duration::from_micros(first_page)),
            fault_latency: self.counters.latency(),
        }
    }
}
