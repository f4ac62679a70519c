//! A discard against one piece, or one urgent copy, that is under way: many short races.

use super::*;
use std::sync::Barrier;

#[test]
fn what_is_discarded_while_it_is_under_way_never_comes_back() {
    let seed = testing::seed();
    println!("AFTERIMAGE_SEED={seed}");
    let mut random = Random(seed);
    let mut total = 0;
    for kind in Kind::ALL {
        for notice in [DiscardNotice::Called, DiscardNotice::Events] {
            let pages = if kind == Kind::Hugetlb { 24 } else { 4 * 200 };
            let Some(guest) = Guest::new(kind, pages, notice) else { continue };
            let (sender, done) = channel();
            let (racer, mut seeds) = (guest.clone(), Random(random.next()));
            std::thread::spawn(move || {
                let each = if kind == Kind::Hugetlb { 1 } else { 4 };
                for first in (0..pages).step_by(each as usize) {
                    race(&racer, first, each, notice, &mut seeds);
                    let _ = sender.send(first + each);
                }
            });
            total += serve_until(&guest, &done, pages, seed);
            guest.assert_books_balance();
        }
    }
    println!("{total} pages raced");
}

/// Answers faults; the pages that were not discarded have all arrived by themselves.
fn serve_until(guest: &Guest, done: &Receiver<u64>, pages: u64, seed: u64) -> u64 {
    let mut faults = Vec::new();
    let mut reached = 0;
    testing::await_that(&format!("all races are run (AFTERIMAGE_SEED={seed})"), || {
        guest.pages.read_events(&mut faults).unwrap();
        faults.retain(|&fault| guest.pages.answer(fault) == FaultAnswer::EventPending);
        match done.try_recv() {
            Ok(now) => reached = now,
            Err(std::sync::mpsc::TryRecvError::Empty) => {}
            Err(error) => assert_eq!(reached, pages, "AFTERIMAGE_SEED={seed}: {error}"),
        }
        reached == pages
    });
    pages
}

fn race(guest: &Guest, first: u64, count: u64, notice: DiscardNotice, random: &mut Random) {
    let victim = first + random.below(count);
    let (urgent, delays) = (random.one_in(3), [random.below(60), random.below(60)]);
    let gate = Arc::new(Barrier::new(2));
    let (other, start) = (guest.clone(), Arc::clone(&gate));
    let copier = std::thread::spawn(move || {
        start.wait();
        spin(Duration::from_micros(delays[0]));
        if urgent {
            for page in first..first + count {
                while other.urgent(page, 7) == Urgent::EventPending {}
            }
        } else {
            other.bring(first, count, 7);
        }
    });
    gate.wait();
    spin(Duration::from_micros(delays[1]));
    let (start, length) = (victim * guest.page_bytes(), guest.page_bytes());
    let call = notice == DiscardNotice::Called;
    if call {
        guest.pages.discard(range(victim, 1));
    }
    match &guest.area.file {
        Some(file) if call => crate::sys::mapping::punch_hole(file, start, length).unwrap(),
        Some(_) => guest.area.advise(start, length, libc::MADV_REMOVE).unwrap(),
        None => guest.area.advise(start, length, libc::MADV_DONTNEED).unwrap(),
    }
    // At once, and again when whatever was under way has come.
    assert_eq!(guest.read(victim), (0, 0), "{:?} {notice:?} page {victim}", guest.area.kind);
    copier.join().unwrap();
    for page in first..first + count {
        let expected = if page == victim { 0 } else { 7 };
        let got = guest.read(page);
        assert_eq!(got, (expected, expected), "{:?} {notice:?} page {page}", guest.area.kind);
    }
}
