//! A handler that dies at any point of its work, and its successor.
//!
//! A handler "dies" here by staying at a place that it passes by until the test is over:
//! nothing of what it holds is given back before, as with a process that was killed.

use super::super::hold::{Place, held};
use super::{Guest, range};
use crate::destination::memory::{
    DestinationMemory, DestinationRegion, DiscardNotice, MemoryError,
};
use crate::destination::pages::{Pages, Urgent};
use crate::sys::testing::{self, Area, Kind};
use afterimage_protocol::layout::{GuestAddress, PageNumber, RegisteredAddress};
use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};

const PAGES: u64 = 8;
const OLD: u64 = 0x01d;
const NEW: u64 = 0x4e3;

/// A guest whose memory outlives its handlers.
struct Vmm {
    registered: DestinationMemory,
    area: Arc<Area>,
    planes: OwnedFd,
    /// Those who have died, until the end.
    dead: RefCell<Vec<Sender<()>>>,
}

impl Vmm {
    fn new(kind: Kind) -> Option<Self> {
        let area = Arc::new(Area::new(kind, PAGES)?);
        let regions = vec![area.region()];
        let notice = DiscardNotice::Events;
        let registered = DestinationMemory::register(regions, testing::scope(), notice).unwrap();
        let planes = DestinationMemory::planes_file().unwrap();
        Some(Self { registered, area, planes, dead: RefCell::default() })
    }

    fn each() -> impl Iterator<Item = Self> {
        Kind::ALL.into_iter().filter_map(Self::new)
    }

    fn attach(&self, length: u64) -> Result<DestinationMemory, MemoryError> {
        let file = self.area.file.as_ref().map(|file| (file.try_clone().unwrap().into(), 0));
        let region = DestinationRegion::handed_over(
            GuestAddress(0),
            RegisteredAddress(self.area.address()),
            length,
            self.area.kind.page_size(),
            file,
        );
        let uffd = self.registered.uffd().as_fd().try_clone_to_owned().unwrap();
        DestinationMemory::attach_kept(uffd, vec![region], self.planes.try_clone().unwrap())
    }

    /// A process that serves it.
    fn handler(&self) -> Guest {
        let memory = self.attach(self.area.length).unwrap();
        memory.wake_all();
        let pages = Arc::new(Pages::new(memory).unwrap());
        Guest { pages, area: Arc::clone(&self.area) }
    }

    /// A handler that dies at `place`, in the middle of `work`.
    fn dies_at(&self, place: Place, work: impl FnOnce(&Guest) + Send + 'static) {
        let handler = self.handler();
        self.thread_dies_at(place, move || work(&handler));
    }

    fn thread_dies_at(&self, place: Place, work: impl FnOnce() + Send + 'static) {
        let (died, death) = channel();
        let (end, until) = channel();
        self.dead.borrow_mut().push(end);
        std::thread::spawn(move || {
            held::hold(move |passed| {
                if passed == place {
                    died.send(()).unwrap();
                    // The test is over when nobody can say anything any more.
                    let _: Result<(), _> = until.recv();
                    std::panic::resume_unwind(Box::new("dead"));
                }
            });
            work();
        });
        death.recv_timeout(testing::DEADLINE).unwrap_or_else(|_| {
            panic!("{:?}: {place:?} is not passed by", self.area.kind);
        });
    }

    /// The guest gives pages up, by a thread that waits until somebody has read of it.
    fn gives_up(&self, first: u64, count: u64) -> std::thread::JoinHandle<()> {
        let area = Arc::clone(&self.area);
        std::thread::spawn(move || {
            let bytes = area.page_bytes();
            area.advise(first * bytes, count * bytes, libc::MADV_DONTNEED).unwrap();
        })
    }
}

/// The rest arrives, and everything is as it must be: NEW, but for these.
fn finishes(vmm: &Vmm, handler: &Guest, but: &[(u64, u64)]) {
    let kind = vmm.area.kind;
    handler.bring(0, PAGES, NEW);
    assert_eq!(handler.pages.remaining(), 0, "{kind:?}");
    assert_eq!(handler.pages.discarding().pages(), [], "{kind:?}");
    for page in 0..PAGES {
        let special = but.iter().find(|(number, _)| *number == page);
        let wanted = special.map_or(NEW, |(_, word)| *word);
        assert_eq!(handler.read_answered(page), (wanted, wanted), "{kind:?} page {page}");
    }
}

#[test]
fn what_had_arrived_stays_and_the_rest_comes() {
    for vmm in Vmm::each() {
        let first = vmm.handler();
        first.bring(0, 3, OLD);
        drop(first);
        let second = vmm.handler();
        assert_eq!(second.pages.remaining(), PAGES - 3);
        finishes(&vmm, &second, &[(0, OLD), (1, OLD), (2, OLD)]);
    }
}

#[test]
fn half_a_piece_is_forgotten_and_asked_for_again() {
    for vmm in Vmm::each() {
        let first = vmm.handler();
        let claim = first.pages.claim(range(2, 3));
        if first.has_file() {
            // A page and a half.
            first.receive(&claim, OLD, 1);
        }
        std::mem::forget(claim);
        drop(first);
        let second = vmm.handler();
        assert_eq!(second.pages.remaining(), PAGES);
        // What was zero at the source is shown as the file has it.
        assert_eq!(second.pages.zero(range(2, 3)), 3);
        finishes(&vmm, &second, &[(2, 0), (3, 0), (4, 0)]);
    }
}

#[test]
fn a_page_that_was_complete_and_not_shown_is_there() {
    for vmm in Vmm::each().filter(|vmm| vmm.area.file.is_some()) {
        vmm.dies_at(Place::Completed, |first| drop(first.bring(3, 2, OLD)));
        let second = vmm.handler();
        assert_eq!(second.pages.remaining(), PAGES - 2);
        finishes(&vmm, &second, &[(3, OLD), (4, OLD)]);
    }
}

#[test]
fn a_page_that_was_copied_and_not_noted_is_not_replaced() {
    let vmm = Vmm::new(Kind::Anonymous).unwrap();
    vmm.dies_at(Place::Copied, |first| {
        first.urgent(3, OLD);
    });
    // The guest has it already, and goes on.
    for word in [0, vmm.area.page_bytes() - 8] {
        vmm.area.word(3 * vmm.area.page_bytes() + word).store(77, Ordering::Relaxed);
    }
    let second = vmm.handler();
    assert_eq!(second.pages.remaining(), PAGES);
    // Nobody has noted it, so it counts as new; but it is not written.
    assert_eq!(second.urgent(3, NEW), Urgent::Installed);
    finishes(&vmm, &second, &[(3, 77)]);
}

#[test]
fn a_discard_that_was_read_and_not_noted_is_not_undone() {
    for place in [Place::EventsRead, Place::EventsDone] {
        for vmm in Vmm::each() {
            let discards = vmm.gives_up(3, 2);
            vmm.dies_at(place, |first| {
                testing::await_that("the discard is read", || {
                    first.pages.read_events(&mut Vec::new()).unwrap().events > 0
                });
            });
            // Whoever gave them up has gone on: nobody will say so again.
            discards.join().unwrap();
            let second = vmm.handler();
            assert_eq!(second.pages.remaining(), PAGES - 2, "{:?} {place:?}", vmm.area.kind);
            finishes(&vmm, &second, &[(3, 0), (4, 0)]);
        }
    }
}

#[test]
fn what_was_discarded_while_it_was_written_stays_discarded() {
    for vmm in Vmm::each() {
        let first = vmm.handler();
        let claim = first.pages.claim(range(2, 3));
        if first.has_file() {
            first.receive(&claim, OLD, 2);
        }
        let discards = vmm.gives_up(3, 1);
        testing::await_that("the discard is read", || {
            first.pages.read_events(&mut Vec::new()).unwrap().events > 0
        });
        discards.join().unwrap();
        std::mem::forget(claim);
        drop(first);
        let second = vmm.handler();
        assert_eq!(second.pages.remaining(), PAGES - 1, "{:?}", vmm.area.kind);
        finishes(&vmm, &second, &[(3, 0)]);
    }
}

#[test]
fn a_successor_may_die_while_it_takes_over() {
    for vmm in Vmm::each() {
        let discards = vmm.gives_up(3, 1);
        vmm.dies_at(Place::EventsRead, |first| {
            std::mem::forget(first.pages.claim(range(2, 4)));
            testing::await_that("the discard is read", || {
                first.pages.read_events(&mut Vec::new()).unwrap().events > 0
            });
        });
        discards.join().unwrap();
        let memory = vmm.attach(vmm.area.length).unwrap();
        vmm.thread_dies_at(Place::Replayed, move || drop(Pages::new(memory)));
        let third = vmm.handler();
        assert_eq!(third.pages.remaining(), PAGES - 1, "{:?}", vmm.area.kind);
        finishes(&vmm, &third, &[(3, 0)]);
    }
}

#[test]
fn zeros_that_were_claimed_and_not_noted_come_again() {
    for vmm in Vmm::each() {
        vmm.dies_at(Place::ZeroClaimed, |first| {
            first.pages.zero(range(0, 4));
        });
        let second = vmm.handler();
        assert_eq!(second.pages.remaining(), PAGES);
        second.pages.zero(range(0, 2));
        finishes(&vmm, &second, &[(0, 0), (1, 0)]);
    }
}

#[test]
fn faults_that_a_dead_handler_has_read_come_again() {
    for vmm in Vmm::each() {
        let first = vmm.handler();
        let touched = first.touch(5);
        let read = first.faults();
        assert_eq!(read.len(), 1);
        drop(first);
        let second = vmm.handler();
        let again = second.faults();
        assert_eq!(again[0].page, PageNumber(5), "{:?}", vmm.area.kind);
        second.urgent(5, NEW);
        assert_eq!(second.answer_until(&touched, 5), (NEW, NEW));
        finishes(&vmm, &second, &[]);
    }
}

#[test]
fn who_discards_while_memory_is_unregistered_goes_on() {
    for vmm in Vmm::each() {
        let handler = vmm.handler();
        handler.bring(0, PAGES, NEW);
        let discards = vmm.gives_up(3, 1);
        testing::await_that("the discard is told", || handler.has_event());
        handler.pages.memory().unregister();
        handler.pages.read_last_events().unwrap();
        // The VMM still holds the userfaultfd, and nobody reads it any more.
        testing::await_that("the discard is over", || discards.is_finished());
        discards.join().unwrap();
        assert!(!handler.pages.memory().has_event_pending());
    }
}

#[test]
fn planes_of_other_memory_are_refused_and_kept() {
    let Some(vmm) = Vmm::new(Kind::Memfd) else { return };
    let first = vmm.handler();
    first.bring(0, 3, OLD);
    drop(first);
    let error = vmm.attach(vmm.area.length / 2).unwrap_err();
    assert!(matches!(error, MemoryError::Planes(_)), "{error}");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("another layout"), "{source}");

    let stranger = tempfile::tempfile().unwrap();
    stranger
        .set_len(File::from(vmm.planes.try_clone().unwrap()).metadata().unwrap().len())
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&stranger, b"something", 0).unwrap();
    let with_stranger = Vmm { planes: stranger.into(), ..vmm };
    let error = with_stranger.attach(with_stranger.area.length).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("does not hold planes"), "{source}");

    let short = tempfile::tempfile().unwrap();
    short.set_len(5000).unwrap();
    let with_short = Vmm { planes: short.into(), ..with_stranger };
    let error = with_short.attach(with_short.area.length).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("5000 bytes"), "{source}");
}

impl Vmm {
    /// Those whose memory can keep early copies.
    fn each_with_file() -> impl Iterator<Item = Self> {
        Self::each().filter(|vmm| vmm.area.file.is_some())
    }

    /// A handler in the first pass.
    fn taking(&self) -> Guest {
        let handler = self.handler();
        handler.pages.take_early().unwrap();
        handler.pages.begin_pass(1);
        handler
    }
}

#[test]
fn a_successor_forgets_early_copies_and_shows_none_of_them() {
    for vmm in Vmm::each_with_file() {
        let kind = vmm.area.kind;
        let before = vmm.taking();
        assert_eq!(before.bring_early(0, 4, OLD, 1), [range(0, 4)]);
        drop(before);

        let handler = vmm.handler();
        handler.pages.take_early().unwrap();
        assert_eq!(handler.pages.present().count(), 0, "{kind:?}: it has none");
        handler.pages.begin_pass(1);
        assert_eq!(handler.bring_early(1, 1, NEW, 1), [range(1, 1)]);
        // What lay there before must be emptied.
        assert_eq!(handler.zero_early(2, 1, 1), [range(2, 1)]);
        handler.settle();
        handler.pages.zero(range(3, 1));
        finishes(&vmm, &handler, &[(2, 0), (3, 0)]);
    }
}

#[test]
fn what_was_settled_is_complete_for_a_successor() {
    for vmm in Vmm::each_with_file() {
        let kind = vmm.area.kind;
        let before = vmm.taking();
        before.bring_early(0, 4, NEW, 1);
        before.bring_early(4, 2, OLD, 1);
        before.stale(&[4, 5]);
        before.pages.settle();
        // It dies before it has gone over all of them.
        before.pages.promote(range(2, 1));
        drop(before);

        let handler = vmm.handler();
        assert_eq!(handler.pages.remaining(), PAGES - 4, "{kind:?}");
        handler.pages.zero(range(4, 1));
        finishes(&vmm, &handler, &[(4, 0)]);
    }
}

/// It was not recorded that the guest runs, so that the source goes through its last pass again.
#[test]
fn what_is_complete_stays_if_a_successor_takes_early_copies_again() {
    for vmm in Vmm::each_with_file() {
        let kind = vmm.area.kind;
        let before = vmm.taking();
        before.bring_early(0, 3, NEW, 1);
        before.pages.settle();
        drop(before);

        let handler = vmm.taking();
        assert_eq!(handler.pages.present().count(), 3, "{kind:?}: they are said to be here");
        handler.stale(&[1]);
        handler.pages.begin_pass(2);
        assert_eq!(handler.bring_early(0, 4, OLD, 2), [range(0, 3), range(3, 1)]);
        handler.stale(&[3]);
        handler.settle();
        finishes(&vmm, &handler, &[]);
    }
}

#[test]
fn a_writer_that_dies_with_a_page_that_counts_loses_nothing_of_it() {
    for vmm in Vmm::each_with_file() {
        let handler = vmm.taking();
        let pages = Arc::clone(&handler.pages);
        vmm.thread_dies_at(Place::EarlyCounts, move || drop(handler.bring_early(2, 1, NEW, 1)));
        pages.settle();

        let successor = vmm.handler();
        assert_eq!(successor.pages.remaining(), PAGES - 1, "{:?}", vmm.area.kind);
        assert_eq!(successor.read_answered(2), (NEW, NEW));
        finishes(&vmm, &successor, &[]);
    }
}
