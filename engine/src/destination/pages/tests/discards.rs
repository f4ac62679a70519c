//! What the guest gives up before it has arrived is gone for good (I8).

use super::*;
use std::sync::mpsc::Sender;

/// How the guest gives pages up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The VMM calls the engine, then frees the pages.
    Call,
    /// By `madvise`, which raises an event.
    Event,
}

impl Way {
    const BOTH: [Self; 2] = [Self::Call, Self::Event];

    const fn notice(self) -> DiscardNotice {
        match self {
            Self::Call => DiscardNotice::Called,
            Self::Event => DiscardNotice::Events,
        }
    }
}

impl Guest {
    /// Gives up pages and waits until that is done.
    fn give_up(&self, way: Way, first: u64, count: u64) {
        let (start, length) = (first * self.page_bytes(), count * self.page_bytes());
        let advice = if self.has_file() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        match (way, &self.area.file) {
            (Way::Call, Some(file)) => {
                self.pages.discard(range(first, count));
                crate::sys::mapping::punch_hole(file, start, length).unwrap();
            }
            (Way::Call, None) => {
                self.pages.discard(range(first, count));
                self.area.advise(start, length, advice).unwrap();
            }
            (Way::Event, _) => {
                let area = Arc::clone(&self.area);
                let (sender, done) = channel();
                std::thread::spawn(move || sender.send(area.advise(start, length, advice)));
                self.answer_until(&done, first).unwrap();
            }
        }
    }

    fn each_way(pages: u64) -> impl Iterator<Item = (Way, Self)> {
        let with = move |way: Way| Self::each(pages, way.notice()).map(move |guest| (way, guest));
        Way::BOTH.into_iter().flat_map(with)
    }
}

#[test]
fn pages_that_were_free_are_zero_and_every_copy_is_late() {
    for (way, guest) in Guest::each_way(8) {
        guest.give_up(way, 2, 4);
        assert_eq!(guest.pages.remaining(), 4, "{way:?} {:?}", guest.area.kind);
        assert_eq!(guest.urgent(3, 7), Urgent::Late);
        assert_eq!(guest.bring(0, 8, 7), [range(0, 2), range(6, 2)]);
        let words: Vec<u64> = (0..8).map(|page| guest.read_answered(page).1).collect();
        assert_eq!(words, [7, 7, 0, 0, 0, 0, 7, 7], "{way:?} {:?}", guest.area.kind);
        assert_eq!(guest.counted(), ([0, 4, 0, 4], 5));
        guest.assert_books_balance();
    }
}

#[test]
fn pages_being_written_and_given_back_are_zero_once_discarded() {
    for (way, guest) in Guest::each_way(8).filter(|(_, guest)| guest.has_file()) {
        let claim = guest.pages.claim(range(0, 4));
        guest.receive(&claim, 7, 2);
        guest.give_up(way, 1, 2);
        drop(claim);
        assert_eq!(guest.pages.remaining(), 6);
        assert_eq!(guest.bring(0, 8, 5), [range(0, 1), range(3, 5)]);
        let words: Vec<u64> = (0..8).map(|page| guest.read_answered(page).1).collect();
        assert_eq!(words, [5, 0, 0, 5, 5, 5, 5, 5], "{way:?} {:?}", guest.area.kind);
        guest.assert_books_balance();
    }
}

#[test]
fn a_discard_between_emptying_and_giving_back_counts() {
    for (way, guest) in Guest::each_way(4).filter(|(_, guest)| guest.has_file()) {
        let claim = guest.pages.claim(range(0, 4));
        guest.receive(&claim, 7, 4);
        let other = guest.clone();
        at(Place::Emptied, move || other.give_up(way, 1, 2));
        drop(claim);
        assert_eq!(guest.pages.remaining(), 2);
        assert_eq!(guest.read_answered(1), (0, 0));
        guest.assert_books_balance();
    }
}

#[test]
fn pages_that_have_arrived_go_as_the_guest_says() {
    for (way, guest) in Guest::each_way(4) {
        guest.bring(0, 4, 7);
        guest.give_up(way, 1, 2);
        let words: Vec<u64> = (0..4).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [7, 0, 0, 7], "{way:?} {:?}", guest.area.kind);
        guest.area.word(guest.page_bytes()).store(99, Ordering::Relaxed);
        assert_eq!(guest.urgent(1, 7), Urgent::Late);
        assert_eq!(guest.read(1), (99, 0));
        assert_eq!(guest.counted(), ([0, 4, 0, 0], 1));
        guest.assert_books_balance();
    }
}

#[test]
fn what_shared_memory_holds_survives_advice_that_it_is_not_needed() {
    for guest in Guest::each(4, DiscardNotice::Events).filter(Guest::has_file) {
        guest.bring(0, 1, 7);
        let (area, length) = (Arc::clone(&guest.area), guest.page_bytes() * 2);
        let (sender, done) = channel();
        std::thread::spawn(move || sender.send(area.advise(0, length, libc::MADV_DONTNEED)));
        guest.answer_until(&done, 0).unwrap();
        assert_eq!(guest.read_answered(0), (7, 7), "it had arrived: {:?}", guest.area.kind);
        assert_eq!(guest.read_answered(1), (0, 0), "it had not: {:?}", guest.area.kind);
        guest.assert_books_balance();
    }
}

#[test]
fn a_discard_waits_for_a_copy_that_has_looked() {
    for way in Way::BOTH {
        for urgent in [true, false] {
            let Some(guest) = Guest::new(Kind::Anonymous, 4, way.notice()) else { return };
            let (sender, discarded) = channel();
            let (tell, copied) = channel();
            let (placing, discarding) = (guest.clone(), guest.clone());
            std::thread::spawn(move || {
                at(Place::Looked, move || discard_meanwhile(discarding, way, sender));
                if urgent {
                    // With events, the kernel may refuse first.
                    while placing.urgent(1, 7) == Urgent::EventPending {}
                } else {
                    placing.bring(1, 1, 7);
                }
                tell.send(()).unwrap();
            });
            testing::await_message(&copied, "the copy");
            testing::await_message(&discarded, "the discard");
            assert_eq!(guest.read_answered(1), (0, 0), "{way:?} urgent {urgent}");
            guest.assert_books_balance();
        }
    }
}

/// Another thread begins to discard, and has every chance to end if nothing holds it.
fn discard_meanwhile(guest: Guest, way: Way, done: Sender<()>) {
    let (told, begun) = channel();
    std::thread::spawn(move || {
        told.send(()).unwrap();
        guest.give_up(way, 1, 1);
        done.send(()).unwrap();
    });
    begun.recv().unwrap();
    for _ in 0..200 {
        std::thread::yield_now();
    }
}

#[test]
fn a_page_that_is_just_becoming_zero_is_not_remembered_as_discarded() {
    for guest in Guest::each(4, DiscardNotice::Called).filter(Guest::has_file) {
        let other = guest.clone();
        let (sender, discarded) = channel();
        at(Place::ZeroClaimed, move || {
            std::thread::spawn(move || {
                other.pages.discard(range(0, 4));
                sender.send(()).unwrap();
            });
            for _ in 0..200 {
                std::thread::yield_now();
            }
        });
        guest.pages.zero(range(1, 1));
        testing::await_message(&discarded, "the discard");
        assert_eq!(guest.counted(), ([0, 0, 1, 3], 0));
        guest.assert_books_balance();
    }
}

#[test]
fn an_urgent_page_that_is_discarded_while_it_is_written_is_zero() {
    for (way, guest) in Guest::each_way(4).filter(|(_, guest)| guest.has_file()) {
        let other = guest.clone();
        at(Place::Written, move || other.give_up(way, 1, 2));
        assert_eq!(guest.urgent(1, 7), Urgent::Discarded);
        assert_eq!(guest.read_answered(1), (0, 0), "{way:?} {:?}", guest.area.kind);
        assert_eq!(guest.counted(), ([0, 0, 0, 2], 1));
        guest.assert_books_balance();
    }
}

#[test]
fn pages_being_written_are_emptied_before_they_are_seen() {
    for (way, guest) in Guest::each_way(8).filter(|(_, guest)| guest.has_file()) {
        let claim = guest.pages.claim(range(0, 8));
        guest.receive(&claim, 7, 4);
        guest.give_up(way, 2, 4);
        guest.give_up(way, 3, 1);
        let waiting = guest.touch(3);
        let faults = guest.faults();
        assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::BeingWritten);
        assert_eq!(guest.finish(claim, 7, 8), [range(0, 8)]);
        assert_eq!(guest.answer_until(&waiting, 3), (0, 0));
        let words: Vec<u64> = (0..8).map(|page| guest.read_answered(page).1).collect();
        assert_eq!(words, [7, 7, 0, 0, 0, 0, 7, 7], "{way:?} {:?}", guest.area.kind);
        assert_eq!(guest.counted(), ([0, 4, 0, 4], 4), "{way:?} {:?}", guest.area.kind);
        guest.assert_books_balance();
    }
}

#[test]
fn pages_in_staging_are_not_copied_any_more() {
    for way in Way::BOTH {
        let Some(guest) = Guest::new(Kind::Anonymous, 8, way.notice()) else { return };
        let claim = guest.pages.claim(range(0, 8));
        guest.give_up(way, 2, 4);
        assert_eq!(guest.finish(claim, 7, 8), [range(0, 2), range(6, 2)]);
        let words: Vec<u64> = (0..8).map(|page| guest.read_answered(page).1).collect();
        assert_eq!(words, [7, 7, 0, 0, 0, 0, 7, 7], "{way:?}");
        assert_eq!(guest.counted(), ([0, 4, 0, 4], 4));
        guest.assert_books_balance();
    }
}

#[test]
fn whoever_waits_for_a_page_that_is_discarded_is_woken() {
    for (way, guest) in Guest::each_way(4) {
        let waiting = guest.touch(1);
        let faults = guest.faults();
        assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::Ask);
        // The answer never comes.
        guest.give_up(way, 0, 4);
        assert_eq!(guest.answer_until(&waiting, 1), (0, 0), "{way:?} {:?}", guest.area.kind);
        guest.assert_books_balance();
    }
}
