//! I1: each page becomes visible once, whoever brings it how often.

use super::*;
use crate::destination::pages::hold::held;
use crate::sys::testing::Random;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const WORD: u64 = 7;
const OWN: u64 = 99;

/// Delays this thread, every other time, wherever it passes by a place between looking at a
/// page and having put it in place.
fn dawdle_everywhere(seed: u64) {
    let mut random = Random(seed);
    held::hold(move |_| {
        if random.one_in(2) {
            let until = Instant::now() + Duration::from_micros(random.below(60));
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    });
}

/// Brings random pieces in background, then everything.
fn copier(guest: &Guest, pages: u64, seed: u64) -> JoinHandle<()> {
    let guest = guest.clone();
    std::thread::spawn(move || {
        dawdle_everywhere(seed);
        let mut random = Random(seed);
        for _ in 0..pages / 2 {
            let first = random.below(pages);
            guest.bring(first, (1 + random.below(16)).min(pages - first), WORD);
        }
        guest.bring(0, pages, WORD);
    })
}

/// Brings every page as if it had been asked for, in an order of its own.
fn responder(guest: &Guest, pages: u64, seed: u64) -> JoinHandle<()> {
    let guest = guest.clone();
    std::thread::spawn(move || {
        dawdle_everywhere(seed);
        let mut random = Random(seed);
        let turn = random.below(pages);
        for page in 0..pages {
            guest.urgent((page * 5 + turn) % pages, WORD);
        }
    })
}

/// Touches every page, and writes its own word into it.
fn toucher(guest: &Guest, pages: u64) -> JoinHandle<()> {
    let guest = guest.clone();
    std::thread::spawn(move || {
        for page in 0..pages {
            assert_eq!(guest.read(page), (WORD, WORD), "page {page}");
            guest.area.word(page * guest.page_bytes()).store(OWN, Ordering::Relaxed);
        }
    })
}

#[test]
fn each_page_becomes_visible_once_however_often_it_comes() {
    let seed = testing::seed();
    let mut random = Random(seed);
    let mut late = 0;
    for _ in 0..12 {
        for kind in Kind::ALL {
            let pages = if kind == Kind::Hugetlb { 7 } else { 251 };
            let Some(guest) = Guest::new(kind, pages, DiscardNotice::Called) else { continue };
            let threads = [
                toucher(&guest, pages),
                copier(&guest, pages, random.next()),
                copier(&guest, pages, random.next()),
                responder(&guest, pages, random.next()),
                responder(&guest, pages, random.next()),
            ];
            for thread in threads {
                testing::await_that("everything is brought", || thread.is_finished());
                thread.join().unwrap();
            }
            // Each was seen by the toucher, so as many in all means each once.
            let shown = guest.pages.shown.load(Ordering::Relaxed);
            assert_eq!(shown, pages, "{kind:?}, AFTERIMAGE_SEED={seed}");
            for page in 0..pages {
                assert_eq!(guest.read(page), (OWN, WORD), "{kind:?} page {page}");
            }
            guest.assert_books_balance();
            late += guest.counted().1;
        }
    }
    assert!(late > 0, "no copy came late: nothing was tried");
}
