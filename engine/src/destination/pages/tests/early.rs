//! Early copies: what counts when memory is settled, and what lies where nothing counts.

use super::*;
use afterimage_protocol::bitmap::{Bitmap, Segment};

impl Guest {
    /// Brings an early piece, and returns what was acknowledged.
    pub(super) fn bring_early(
        &self,
        first: u64,
        count: u64,
        word: u64,
        pass: u16,
    ) -> Vec<PageRange> {
        let acknowledged = std::cell::RefCell::new(Vec::new());
        let tell = |run| acknowledged.borrow_mut().push(run);
        let claim = self.pages.claim_early(range(first, count), pass, true, tell);
        self.finish_early(claim, word, count, tell);
        acknowledged.into_inner()
    }

    pub(super) fn finish_early(
        &self,
        claim: Claim<'_>,
        word: u64,
        count: u64,
        tell: impl FnMut(PageRange),
    ) {
        let mut staging = Vec::new();
        if self.has_file() {
            self.receive(&claim, word, count);
        } else {
            staging = self.page_of(word).repeat(count as usize);
        }
        claim.finish(&staging, tell).unwrap();
    }

    pub(super) fn zero_early(&self, first: u64, count: u64, pass: u16) -> Vec<PageRange> {
        let mut acknowledged = Vec::new();
        self.pages.zero_early(range(first, count), pass, |run| acknowledged.push(run)).unwrap();
        acknowledged
    }

    pub(super) fn stale(&self, pages: &[u64]) {
        let all = self.pages.layout().page_count();
        let bitmap = Bitmap::new(all);
        for &page in pages {
            bitmap.set(range(page, 1), |_| ());
        }
        self.pages.stale(range(0, all), &Segment::encode(&bitmap, range(0, all)), || ()).unwrap();
    }

    /// Ends precopy, and shows everything that counts.
    pub(super) fn settle(&self) {
        self.pages.settle();
        self.pages.map_early();
    }

    /// Guests whose memory can keep early copies, in their first pass.
    fn each_taking(pages: u64) -> impl Iterator<Item = Self> {
        Self::each(pages, DiscardNotice::Called).inspect(|guest| {
            guest.pages.take_early().unwrap();
            guest.pages.begin_pass(1);
        })
    }
}

#[test]
fn what_is_current_at_the_end_is_complete_and_nothing_before() {
    for guest in Guest::each_taking(8) {
        assert_eq!(guest.bring_early(0, 4, 7, 1), [range(0, 4)]);
        assert_eq!(guest.zero_early(4, 2, 1), [range(4, 2)]);
        assert_eq!(guest.pages.remaining(), 8, "nothing is complete");
        if guest.has_file() {
            let touched = guest.touch(1);
            let faults = guest.faults();
            assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::Ask, "nobody is shown it");
            guest.settle();
            assert_eq!(guest.answer_until(&touched, 1), (7, 7));
        } else {
            guest.settle();
        }
        assert_eq!(guest.pages.remaining(), 2);
        for page in 0..4 {
            assert_eq!(testing::await_message(&guest.touch(page), "a page in place"), (7, 7));
        }
        assert_eq!(guest.read_answered(4), (0, 0));
        assert_eq!(guest.bring(4, 4, 9), [range(6, 2)], "the others are there");
        guest.assert_books_balance();
    }
}

#[test]
fn a_stale_page_is_brought_again_whatever_lies_there() {
    for guest in Guest::each_taking(8) {
        guest.bring_early(0, 6, 7, 1);
        guest.stale(&[0, 2, 4]);
        guest.pages.begin_pass(2);
        assert_eq!(guest.bring_early(0, 1, 8, 2), [range(0, 1)]);
        guest.stale(&[1]);
        guest.settle();
        assert_eq!(guest.urgent(1, 9), Urgent::Installed);
        // Where older content lies.
        assert_eq!(guest.pages.zero(range(2, 1)), 1);
        assert_eq!(guest.bring(4, 1, 9), [range(4, 1)]);
        let words: Vec<_> = (0..6).map(|page| guest.read_answered(page)).collect();
        assert_eq!(words, [(8, 8), (9, 9), (0, 0), (7, 7), (9, 9), (7, 7)]);
        guest.assert_books_balance();
    }
}

#[test]
fn a_copy_of_a_pass_that_has_gone_counts_never() {
    for guest in Guest::each_taking(4) {
        let late = guest.pages.claim_early(range(0, 2), 1, true, |_| ());
        guest.stale(&[0, 1]);
        guest.finish_early(late, 7, 2, |run| panic!("{run:?} is older than what is stale"));
        guest.pages.begin_pass(2);
        assert_eq!(guest.bring_early(0, 1, 7, 1), [], "of another pass");
        assert_eq!(guest.zero_early(2, 1, 1), []);
        assert_eq!(guest.bring_early(1, 1, 8, 2), [range(1, 1)]);
        let last = guest.pages.claim_early(range(2, 1), 2, true, |_| ());
        guest.settle();
        guest.finish_early(last, 7, 1, |run| panic!("{run:?} came after the end"));
        assert_eq!(guest.bring_early(3, 1, 7, 2), []);
        assert_eq!(guest.bring(0, 4, 9), [range(0, 1), range(2, 2)]);
        let words: Vec<_> = (0..4).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [9, 8, 9, 9]);
        guest.assert_books_balance();
    }
}

#[test]
fn a_current_page_is_not_written_again_and_told_again() {
    for guest in Guest::each_taking(4) {
        guest.bring_early(1, 2, 7, 1);
        assert_eq!(guest.bring_early(0, 4, 8, 1).iter().map(|run| run.count).sum::<u64>(), 4);
        guest.zero_early(1, 1, 1);
        guest.settle();
        let words: Vec<_> = (0..4).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [8, 7, 7, 8]);
        guest.assert_books_balance();
    }
}

#[test]
fn a_zero_page_takes_the_place_of_an_older_copy() {
    for guest in Guest::each_taking(4) {
        guest.bring_early(0, 4, 7, 1);
        guest.stale(&[0, 1]);
        guest.pages.begin_pass(2);
        assert_eq!(guest.zero_early(0, 2, 2), [range(0, 2)]);
        guest.settle();
        let words: Vec<_> = (0..4).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [0, 0, 7, 7]);
        guest.assert_books_balance();
    }
}

#[test]
fn half_an_early_page_is_never_seen() {
    for guest in Guest::each_taking(4).filter(Guest::has_file) {
        guest.bring_early(0, 1, 6, 1);
        guest.stale(&[0]);
        guest.pages.begin_pass(2);
        let broken = guest.pages.claim_early(range(0, 2), 2, true, |_| ());
        guest.receive(&broken, 9, 1);
        drop(broken);
        guest.settle();
        assert_eq!(guest.pages.zero(range(0, 4)), 4);
        let words: Vec<_> = (0..4).map(|page| guest.read_answered(page)).collect();
        assert_eq!(words, [(0, 0); 4]);
        guest.assert_books_balance();
    }
}

#[test]
fn what_is_discarded_before_the_end_is_zero() {
    for guest in Guest::each_taking(6) {
        guest.bring_early(0, 4, 7, 1);
        guest.stale(&[1]);
        guest.pages.begin_pass(2);
        let writing = guest.pages.claim_early(range(4, 2), 2, true, |_| ());
        guest.pages.discard(range(0, 3));
        guest.pages.discard(range(4, 1));
        guest.finish_early(writing, 9, 2, |_| ());
        guest.settle();
        guest.bring(0, 6, 5);
        let words: Vec<_> = (0..5).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [0, 0, 0, 7, 0]);
        assert_eq!(guest.pages.remaining(), 0);
        guest.assert_books_balance();
    }
}

#[test]
fn copies_that_are_forgotten_leave_nothing_behind() {
    for guest in Guest::each_taking(4) {
        guest.bring_early(0, 3, 7, 1);
        guest.stale(&[0]);
        guest.pages.forget_early().unwrap();
        assert_eq!(guest.pages.zero(range(0, 2)), 2);
        assert_eq!(guest.urgent(2, 9), Urgent::Installed);
        let words: Vec<_> = (0..3).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [0, 0, 9]);
        guest.assert_books_balance();
    }
}

#[test]
fn a_receiver_waits_for_another_that_writes_the_same_page() {
    for guest in Guest::each_taking(4) {
        let first = guest.pages.claim_early(range(1, 1), 1, true, |_| ());
        let (sender, receiver) = channel();
        let other = guest.clone();
        let second = std::thread::spawn(move || {
            sender.send(other.bring_early(0, 3, 8, 1)).unwrap();
        });
        drop(first);
        assert_eq!(testing::await_message(&receiver, "the second"), [range(0, 3)]);
        second.join().unwrap();
        guest.settle();
        let words: Vec<_> = (0..3).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [8; 3]);
        guest.assert_books_balance();
    }
}

#[test]
fn what_counts_is_complete_before_anybody_has_come_round_to_it() {
    for guest in Guest::each_taking(5) {
        guest.bring_early(0, 4, 7, 1);
        let touched = guest.has_file().then(|| {
            let touched = guest.touch(0);
            let faults = guest.faults();
            assert_eq!(guest.pages.answer(faults[0]), FaultAnswer::Ask);
            touched
        });
        // Nothing goes over all of memory here.
        guest.pages.settle();
        assert_eq!(guest.bring(1, 1, 9), [], "a piece");
        assert_eq!(guest.urgent(2, 9), Urgent::Late);
        assert_eq!(guest.pages.zero(range(3, 2)), 1, "a run of zeros");
        if let Some(touched) = touched {
            assert_eq!(guest.answer_until(&touched, 0), (7, 7), "whoever waited looks again");
        }
        let words: Vec<_> = (0..5).map(|page| guest.read_answered(page).0).collect();
        assert_eq!(words, [7, 7, 7, 7, 0]);
        guest.assert_books_balance();
    }
}
