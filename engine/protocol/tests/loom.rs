//! Every interleaving, and every order that the memory model allows, of two or three
//! threads on the planes and on a bitmap.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p afterimage-protocol --release --test loom
//! ```
//!
//! What is proved here about a page:
//!
//! - P1: of the claims between two give-backs one wins;
//! - P2: a claimer sees what those before it wrote who gave the page back, and never
//!   writes it while another does;
//! - P3: `complete` reports it to one caller, whoever else completes it;
//! - P4: who sees it complete sees what its claimer wrote;
//! - P5: complete stays, and a claim that begins after somebody saw it complete is lost,
//!   even if it became complete unclaimed while its claimer gave it back;
//! - P6: where every installer claims first (an alias is written), none that wins finds it
//!   complete, and none writes it afterwards.
//!
//! What does **not** hold: where the kernel arbitrates (`UFFDIO_COPY`) and somebody
//! completes a page without a claim, whoever has claimed it before may find it complete,
//! and so may a claim that runs at the same time. Its copy then fails with `EEXIST`, which
//! is why an alias may never be written by somebody who has not claimed the page.
//!
//! loom 0.7 remembers only the last access to an atomic when it decides which order to
//! try next, so that a thread which looks and then changes hides the looks of others
//! before it: hence each model is run with its threads started in every order, readers
//! are threads of their own, and what a model is about must have happened at least once.
#![cfg(loom)]

use afterimage_protocol::bitmap::{Bitmap, PageState, Planes};
use afterimage_protocol::layout::{PageNumber, PageRange};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::atomic::{AtomicBool as Seen, Ordering as SeenOrdering};

const PAGE: PageNumber = PageNumber(0);
const ONE: PageRange = PageRange::one(PAGE);

/// Planes of one page with its content.
type Shared = (Planes, Content);

fn planes_of_one_page() -> Shared {
    (Planes::new(1), Content::new())
}

/// P1, over two words and three threads whose ranges overlap in part.
#[test]
fn each_page_is_won_by_one_of_the_claims() {
    fn claim(planes: &Planes, wanted: PageRange) -> Vec<PageNumber> {
        let mut won = Vec::new();
        let pages = planes.claim(wanted, |run| won.extend(run.iter()));
        assert_eq!(pages, won.len() as u64);
        won
    }
    explore(
        || Planes::new(70),
        [
            |planes: &Planes| claim(planes, range(61, 4)),
            |planes: &Planes| claim(planes, range(62, 2)),
            |planes: &Planes| claim(planes, range(64, 6)),
        ],
        |_, won| {
            let mut won = won.concat();
            won.sort_unstable();
            assert_eq!(won, range(61, 9).iter().collect::<Vec<_>>());
        },
    );
}

/// P1 and P2: three threads claim, write and give back; each that wins has the page to
/// itself and after the others.
#[test]
fn a_page_given_back_is_won_again_and_written_by_one_at_a_time() {
    static TWICE: Outcome = Outcome::new();
    fn install((planes, content): &Shared) -> bool {
        let won = planes.claim_one(PAGE);
        if won {
            content.write();
            planes.give_back(ONE);
        }
        won
    }
    explore(planes_of_one_page, [install, install, install], |(planes, _), won| {
        let wins = won.iter().filter(|won| **won).count();
        assert!(wins >= 1);
        TWICE.met_if(wins > 1);
        assert_eq!(planes.state(PAGE), PageState::Free);
    });
    TWICE.assert_met();
}

/// P3, over two words.
#[test]
fn a_page_is_reported_complete_once() {
    fn complete(planes: &Planes, pages: PageRange) -> Vec<PageNumber> {
        let mut newly = Vec::new();
        planes.complete(pages, |run| newly.extend(run.iter()));
        newly
    }
    explore(
        || Planes::new(70),
        [
            |planes: &Planes| complete(planes, range(63, 1)),
            |planes: &Planes| complete(planes, range(63, 2)),
        ],
        |planes, newly| {
            let mut newly = newly.concat();
            newly.sort_unstable();
            assert_eq!(newly, [PageNumber(63), PageNumber(64)]);
            assert_eq!(planes.complete_count(), 2);
        },
    );
}

/// P4, while another page of the same word becomes complete in between.
#[test]
fn whoever_sees_a_page_complete_sees_its_content() {
    static SEEN: Outcome = Outcome::new();
    explore(
        || (Planes::new(2), Content::new()),
        [
            |(planes, content): &Shared| {
                assert!(planes.claim_one(PAGE));
                content.write();
                assert_eq!(planes.complete(ONE, |_| ()), 1);
            },
            |(planes, _): &Shared| assert_eq!(planes.complete(range(1, 1), |_| ()), 1),
            |(planes, content): &Shared| {
                if planes.is_complete(PAGE) {
                    SEEN.met_if(true);
                    content.read();
                }
            },
        ],
        |(planes, _), _| assert_eq!(planes.complete_count(), 2),
    );
    SEEN.assert_met();
}

/// P4 for whoever learns it from the plane, as acks and bitmaps do.
#[test]
fn whoever_finds_a_page_among_the_completed_sees_its_content() {
    static SEEN: Outcome = Outcome::new();
    explore(
        planes_of_one_page,
        [
            |(planes, content): &Shared| {
                planes.claim_one(PAGE);
                content.write();
                planes.complete(ONE, |_| ());
            },
            |(planes, content): &Shared| {
                if planes.completed().next_set(PAGE, 1).is_some() {
                    SEEN.met_if(true);
                    content.read();
                }
            },
        ],
        |_, _| (),
    );
    SEEN.assert_met();
}

/// A page of anonymous memory: the kernel takes the first copy and refuses the others.
struct Arbitrated {
    planes: Planes,
    installed: AtomicBool,
}

impl Arbitrated {
    fn new() -> Self {
        Self { planes: Planes::new(1), installed: AtomicBool::new(false) }
    }

    /// `UFFDIO_COPY`, then `complete`, whether it succeeded or failed with `EEXIST`. Says
    /// whether the kernel took the copy, and how many pages became complete.
    fn copy(&self) -> (bool, u64) {
        let taken = !self.installed.swap(true, Ordering::AcqRel);
        (taken, self.planes.complete(ONE, |_| ()))
    }
}

/// P3 and P5: a background thread gives its claim back while an urgent copy makes the page
/// complete without one; a third claims again.
#[test]
fn a_page_completed_while_its_claim_is_given_back_is_lost_to_later_claims() {
    static LOST: Outcome = Outcome::new();
    static WON: Outcome = Outcome::new();
    explore(
        || {
            let page = Arbitrated::new();
            assert!(page.planes.claim_one(PAGE));
            page
        },
        [
            |page: &Arbitrated| page.planes.give_back(ONE),
            |page| assert_eq!(page.copy(), (true, 1)),
            |page| {
                let complete = page.planes.is_complete(PAGE);
                let won = page.planes.claim_one(PAGE);
                assert!(!(complete && won), "won a page that was seen complete");
                LOST.met_if(complete);
                // Nobody had seen it complete; the kernel would refuse the copy.
                WON.met_if(won);
            },
        ],
        |page, _| {
            assert_eq!(page.planes.state(PAGE), PageState::Complete);
            assert!(!page.planes.claim_one(PAGE), "won a page that is complete");
        },
    );
    LOST.assert_met();
    WON.assert_met();
}

/// P3 and P5: one copies under a claim, another without; both tell the planes, and a third
/// watches.
#[test]
fn of_two_copies_the_kernel_keeps_one_and_the_planes_report_one() {
    static REFUSED: Outcome = Outcome::new();
    explore(
        Arbitrated::new,
        [
            |page: &Arbitrated| if page.planes.claim_one(PAGE) { page.copy() } else { (false, 0) },
            Arbitrated::copy,
            |page| {
                let before = page.planes.is_complete(PAGE);
                assert!(page.planes.state(PAGE) == PageState::Complete || !before);
                (false, 0)
            },
        ],
        |page, outcomes| {
            assert_eq!(outcomes.iter().filter(|(taken, _)| *taken).count(), 1);
            assert_eq!(outcomes.iter().map(|(_, reported)| reported).sum::<u64>(), 1);
            assert_eq!(page.planes.state(PAGE), PageState::Complete);
            REFUSED.met_if(outcomes[0].0);
        },
    );
    REFUSED.assert_met();
}

/// P6: every installer claims; one of them fails half way and gives back.
#[test]
fn an_alias_is_never_written_once_its_page_is_complete() {
    static AFTER_FAILURE: Outcome = Outcome::new();
    fn install((planes, content): &Shared) -> u64 {
        if !planes.claim_one(PAGE) {
            return 0;
        }
        assert!(!planes.is_complete(PAGE), "won a page that is complete");
        content.write();
        assert!(!planes.is_complete(PAGE), "another completed a page while its claimer wrote");
        planes.complete(ONE, |_| ())
    }
    fn fail((planes, content): &Shared) -> u64 {
        let won = planes.claim_one(PAGE);
        if won {
            content.write();
            planes.give_back(ONE);
        }
        u64::from(won)
    }
    explore(planes_of_one_page, [fail, install, install], |(planes, content), outcomes| {
        let completed = outcomes[1] + outcomes[2];
        assert!(completed <= 1);
        AFTER_FAILURE.met_if(outcomes[0] == 1 && completed == 1);
        if completed == 1 {
            content.read();
            assert!(!planes.claim_one(PAGE));
        }
    });
    AFTER_FAILURE.assert_met();
}

/// A dirty bitmap: whoever writes marks afterwards, whoever sends clears before it reads.
/// A mark that finds the bit set already must not be lost.
#[test]
fn a_mark_is_cleared_by_somebody_who_sees_the_write_or_is_still_set() {
    explore(
        || {
            let dirty = Bitmap::new(1);
            assert!(dirty.set_one(PAGE));
            (dirty, AtomicUsize::new(0))
        },
        [
            |(dirty, page): &(Bitmap, AtomicUsize)| {
                page.store(1, Ordering::Relaxed);
                dirty.set_one(PAGE);
                1
            },
            |(dirty, page): &(Bitmap, AtomicUsize)| {
                assert!(dirty.clear_one(PAGE));
                page.load(Ordering::Relaxed)
            },
        ],
        |(dirty, _), [_, sent]| {
            assert!(sent == 1 || dirty.test(PAGE), "written, not sent, and not marked");
        },
    );
}

/// A page that is set throughout is found, whatever happens to those before it.
#[test]
fn the_next_set_page_is_found_while_one_before_it_is_cleared() {
    static CLEARED: Outcome = Outcome::new();
    explore(
        || {
            let bitmap = Bitmap::new(3);
            bitmap.set(range(0, 1), |_| ());
            bitmap.set(range(2, 1), |_| ());
            bitmap
        },
        [
            |bitmap: &Bitmap| {
                assert!(bitmap.clear_one(PAGE));
                None
            },
            |bitmap: &Bitmap| bitmap.next_set(PAGE, u64::MAX),
        ],
        |_, [_, found]| {
            assert!(found == Some(range(0, 1)) || found == Some(range(2, 1)), "{found:?}");
            CLEARED.met_if(found == Some(range(2, 1)));
        },
    );
    CLEARED.assert_met();
}

/// The same for clear bits: a source that looks for what is not acknowledged, or not sent.
#[test]
fn the_next_clear_page_is_found_while_one_before_it_is_set() {
    static SET: Outcome = Outcome::new();
    fn look(find: fn(&Bitmap) -> Option<PageRange>) {
        loom::model(move || {
            let bitmap = Arc::new(Bitmap::new(3));
            bitmap.set(range(1, 1), |_| ());
            let marker = Arc::clone(&bitmap);
            let marker = loom::thread::spawn(move || assert!(marker.set_one(PAGE)));
            let seeker = Arc::clone(&bitmap);
            let seeker = loom::thread::spawn(move || find(&seeker));
            marker.join().unwrap();
            let found = seeker.join().unwrap();
            assert!(found == Some(range(0, 1)) || found == Some(range(2, 1)), "{found:?}");
            SET.met_if(found == Some(range(2, 1)));
        });
        SET.assert_met();
    }
    look(|bitmap| bitmap.next_clear(PAGE, 1));
    look(|bitmap| bitmap.next_clear(PAGE, u64::MAX));
    look(|bitmap| bitmap.first_clear_in(range(0, 3)));
}

/// Runs the threads on what `make` makes, started in every order, and `check` after them
/// with what each returned, in the order of the list.
fn explore<S, R, const N: usize>(make: fn() -> S, threads: [fn(&S) -> R; N], check: fn(&S, [R; N]))
where
    S: Send + Sync + 'static,
    R: Send + 'static,
{
    for order in orders::<N>() {
        let mut model = loom::model::Builder::new();
        // Two threads are explored wholly; of three, what two preemptions can bring about.
        model.preemption_bound = (N > 2).then_some(2);
        model.check(move || {
            let shared = Arc::new(make());
            let mut running = [const { None }; N];
            for index in order {
                let (shared, work) = (Arc::clone(&shared), threads[index]);
                running[index] = Some(loom::thread::spawn(move || work(&shared)));
            }
            let results = running.map(|thread| thread.unwrap().join().unwrap());
            check(&shared, results);
        });
    }
}

/// Every order of the numbers below `N`.
fn orders<const N: usize>() -> Vec<[usize; N]> {
    let all = (0..N.pow(N as u32)).map(|code| {
        let digit = |place: usize| code / N.pow(place as u32) % N;
        std::array::from_fn(digit)
    });
    all.filter(|order: &[usize; N]| (0..N).all(|index| order.contains(&index))).collect()
}

fn range(start: u64, count: u64) -> PageRange {
    PageRange::new(PageNumber(start), count)
}

/// A page's bytes. Two accesses of which one writes and neither happens before the other
/// fail the model.
struct Content(UnsafeCell<()>);

// SAFETY: nothing is behind the cell; loom only keeps the record of who touched it when,
// under its own lock.
unsafe impl Sync for Content {}

impl Content {
    fn new() -> Self {
        Self(UnsafeCell::new(()))
    }

    fn write(&self) {
        self.0.with_mut(|_| ());
    }

    fn read(&self) {
        self.0.with(|_| ());
    }
}

/// What a model must have met at least once, or it proves nothing.
struct Outcome(Seen);

impl Outcome {
    const fn new() -> Self {
        Self(Seen::new(false))
    }

    fn met_if(&self, met: bool) {
        self.0.fetch_or(met, SeenOrdering::Relaxed);
    }

    fn assert_met(&self) {
        assert!(self.0.load(SeenOrdering::Relaxed), "the model never came to what it is about");
    }
}
