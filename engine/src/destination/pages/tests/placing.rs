//! Background pieces, urgent copies and zero runs, in each order.

use super::*;

#[test]
fn a_piece_is_in_place_when_it_is_acknowledged() {
    for guest in Guest::each(8, DiscardNotice::Called) {
        assert_eq!(guest.pages.remaining(), 8);
        assert_eq!(guest.bring(2, 4, 7), [range(2, 4)]);
        assert_eq!(guest.pages.remaining(), 4);
        for page in 2..6 {
            // Nobody answers here: it must be there.
            assert_eq!(testing::await_message(&guest.touch(page), "a page in place"), (7, 7));
        }
        assert_eq!(guest.counted(), ([0, 4, 0, 0], 0));
        guest.assert_books_balance();
    }
}

#[test]
fn the_shares_of_parts_follow_what_arrives() {
    for guest in Guest::each(8, DiscardNotice::Called) {
        assert_eq!(guest.pages.complete_shares(4), [0.0; 4]);
        guest.bring(1, 4, 7);
        assert_eq!(guest.pages.complete_shares(4), [0.5, 1.0, 0.5, 0.0]);
        // Of 2, 3 and 3 pages; the first share is of pages 0 and 1.
        assert_eq!(guest.pages.complete_shares(3), [0.5, 1.0, 0.0]);
        assert_eq!(guest.pages.complete_shares(1), [0.5]);
        assert_eq!(guest.pages.complete_shares(1000).len(), 8, "no part without a page");
        assert_eq!(guest.pages.complete_shares(0), []);
    }
}

#[test]
fn a_piece_brings_only_what_nobody_else_brings() {
    for guest in Guest::each(8, DiscardNotice::Called) {
        guest.bring(1, 1, 5);
        assert_eq!(guest.urgent(3, 6), Urgent::Installed);
        let elsewhere = guest.pages.claim(range(5, 1));
        let rest = guest.pages.claim(range(0, 8));
        if guest.has_file() {
            let targets = rest.targets().unwrap().unwrap();
            let lengths: Vec<_> = targets
                .iter()
                .map(|target| match *target {
                    Target::Memory(run) => (run.length as u64 / guest.page_bytes(), 0),
                    Target::Nowhere(bytes) => (0, bytes / guest.page_bytes()),
                })
                .collect();
            assert_eq!(lengths, [(1, 0), (0, 1), (1, 0), (0, 1), (1, 0), (0, 1), (2, 0)]);
        } else {
            assert!(rest.targets().unwrap().is_none());
        }
        let expected = [range(0, 1), range(2, 1), range(4, 1), range(6, 2)];
        assert_eq!(guest.finish(rest, 7, 8), expected);
        assert_eq!(guest.finish(elsewhere, 8, 1), [range(5, 1)]);
        let words: Vec<u64> = (0..8).map(|page| guest.read(page).1).collect();
        assert_eq!(words, [7, 5, 7, 6, 7, 8, 7, 7]);
        assert_eq!(guest.counted(), ([1, 7, 0, 0], 3));
        guest.assert_books_balance();
    }
}

#[test]
fn pages_given_back_can_be_claimed_again() {
    for guest in Guest::each(8, DiscardNotice::Called) {
        drop(guest.pages.claim(range(0, 8)));
        assert_eq!(guest.pages.remaining(), 8);
        assert_eq!(guest.bring(0, 8, 3), [range(0, 8)]);
        guest.assert_books_balance();
    }
}

#[test]
fn half_a_page_that_was_given_back_is_never_seen() {
    for guest in Guest::each(8, DiscardNotice::Called).filter(Guest::has_file) {
        let claim = guest.pages.claim(range(0, 4));
        guest.receive(&claim, 9, 2);
        drop(claim);
        assert_eq!(guest.pages.zero(range(0, 3)), 3);
        for page in 0..3 {
            assert_eq!(guest.read_answered(page), (0, 0), "{:?} page {page}", guest.area.kind);
        }
        guest.assert_books_balance();
    }
}

#[test]
fn whoever_waits_for_a_page_given_back_is_asked_for_again() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        let claim = guest.pages.claim(range(0, 2));
        let waiting = guest.touch(1);
        let first = guest.faults();
        if guest.has_file() {
            assert_eq!(guest.pages.answer(first[0]), FaultAnswer::BeingWritten);
            assert_eq!(guest.urgent(1, 4), Urgent::BeingWritten);
        } else {
            assert_eq!(guest.pages.answer(first[0]), FaultAnswer::Ask);
        }
        drop(claim);
        let again = guest.faults();
        assert_eq!(guest.pages.answer(again[0]), FaultAnswer::Ask);
        assert_eq!(guest.urgent(1, 4), Urgent::Installed);
        assert_eq!(testing::await_message(&waiting, "the page asked for"), (4, 4));
        guest.assert_books_balance();
    }
}

#[test]
fn whoever_waits_for_a_page_being_written_gets_it_from_the_writer() {
    for guest in Guest::each(4, DiscardNotice::Called).filter(Guest::has_file) {
        let claim = guest.pages.claim(range(0, 4));
        guest.receive(&claim, 1, 1);
        let waiting = guest.touch(1);
        let faults = guest.faults();
        assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::BeingWritten);
        assert_eq!(guest.finish(claim, 2, 4), [range(0, 4)]);
        assert_eq!(testing::await_message(&waiting, "the writer's wake-up"), (2, 2));
    }
}

#[test]
fn an_urgent_copy_between_the_look_and_the_copy_stays() {
    let Some(guest) = Guest::new(Kind::Anonymous, 4, DiscardNotice::Called) else { return };
    let other = guest.clone();
    at(Place::Looked, move || {
        assert_eq!(other.urgent(2, 5), Urgent::Installed);
        other.area.word(2 * 4096).store(99, Ordering::Relaxed);
    });
    assert_eq!(guest.bring(0, 4, 7), [range(0, 2), range(3, 1)]);
    assert_eq!(guest.read(2), (99, 5));
    assert_eq!(guest.counted(), ([1, 3, 0, 0], 1));
    guest.assert_books_balance();
}

#[test]
fn a_late_urgent_copy_is_dropped_and_counted() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        guest.bring(0, 2, 7);
        guest.area.word(guest.page_bytes()).store(99, Ordering::Relaxed);
        assert_eq!(guest.urgent(1, 5), Urgent::Late);
        assert_eq!(guest.urgent(1, 5), Urgent::Late);
        assert_eq!(guest.read(1), (99, 7));
        assert_eq!(guest.counted(), ([0, 2, 0, 0], 2));
        guest.assert_books_balance();
    }
}

#[test]
fn a_zero_run_leaves_to_others_what_is_theirs() {
    for guest in Guest::each(8, DiscardNotice::Called) {
        guest.bring(0, 1, 7);
        let claim = guest.pages.claim(range(2, 2));
        assert_eq!(guest.pages.zero(range(0, 8)), 5);
        assert_eq!(guest.pages.remaining(), 2);
        assert_eq!(guest.finish(claim, 8, 2), [range(2, 2)]);
        let words: Vec<u64> = (0..8).map(|page| guest.read_answered(page).1).collect();
        assert_eq!(words, [7, 0, 8, 8, 0, 0, 0, 0]);
        assert_eq!(guest.urgent(5, 9), Urgent::Late);
        assert_eq!(guest.counted(), ([0, 3, 5, 0], 4));
        guest.assert_books_balance();
    }
}

#[test]
fn pages_become_complete_before_they_are_shown_and_after_they_are_copied() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        let (place, complete) =
            if guest.has_file() { (Place::Completed, true) } else { (Place::Copied, false) };
        for page in 0..2 {
            let other = guest.clone();
            let (sender, seen) = channel();
            at(place, move || {
                let pages = other.pages.planes();
                sender.send(pages.is_complete(PageNumber(page))).unwrap();
            });
            if page == 0 {
                guest.bring(0, 1, 1);
            } else {
                guest.urgent(1, 1);
            }
            assert_eq!(seen.try_recv(), Ok(complete), "{:?}", guest.area.kind);
        }
    }
}

#[test]
fn an_urgent_copy_overtakes_a_piece_in_staging_and_stays() {
    let Some(guest) = Guest::new(Kind::Anonymous, 4, DiscardNotice::Called) else { return };
    let claim = guest.pages.claim(range(0, 4));
    assert_eq!(guest.urgent(2, 5), Urgent::Installed);
    guest.area.word(2 * 4096).store(99, Ordering::Relaxed);
    assert_eq!(guest.finish(claim, 7, 4), [range(0, 2), range(3, 1)]);
    assert_eq!(guest.read(2), (99, 5));
    assert_eq!(guest.counted(), ([1, 3, 0, 0], 1));
    guest.assert_books_balance();
}

#[test]
fn an_acknowledgement_may_lead_to_a_discard() {
    for guest in Guest::each(4, DiscardNotice::Called) {
        let (sender, finished) = channel();
        std::thread::spawn(move || {
            let claim = guest.pages.claim(range(0, 4));
            let staging = guest.page_of(7).repeat(4);
            if guest.has_file() {
                guest.receive(&claim, 7, 4);
            }
            claim.finish(&staging, |run| guest.pages.discard(run)).unwrap();
            sender.send(()).unwrap();
        });
        testing::await_message(&finished, "a piece that is discarded when it is acknowledged");
    }
}

#[test]
fn a_page_with_nothing_behind_it_is_an_error_and_can_be_brought_later() {
    let Some(guest) = Guest::new(Kind::Memfd, 8, DiscardNotice::Called) else { return };
    let file = guest.area.file.as_ref().unwrap();
    let bytes = file.metadata().unwrap().len();
    // To write there would be SIGBUS.
    file.set_len(bytes / 2).unwrap();
    let claim = guest.pages.claim(range(2, 4));
    let refused = claim.targets().map(|_| ()).unwrap_err();
    assert!(matches!(refused, InstallError::NoMemory { page, .. } if page == PageNumber(2)));
    drop(claim);
    let content = guest.page_of(7);
    let refused = guest.pages.urgent(PageNumber(5), &content).unwrap_err();
    assert!(matches!(refused, InstallError::NoMemory { page, .. } if page == PageNumber(5)));
    file.set_len(bytes).unwrap();
    assert_eq!(guest.urgent(5, 7), Urgent::Installed);
    guest.bring(2, 1, 8);
    assert_eq!((guest.read(5).1, guest.read(2).1), (7, 8));
    guest.assert_books_balance();
}
