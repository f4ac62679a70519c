//! Who is reading guest memory at the moment.
//!
//! A channel holds its hand while it takes pages from the book and looks at them, and says
//! which of them it sends before it does so. Whoever wants to free pages that are acknowledged
//! waits until each hand that was held was let go or says what is in it, and leaves that alone.
//! Invariant: then nobody reads the others, and nobody will. A page that is acknowledged is not
//! taken from the book; and of a hand that is taken and a look at the hands, each with a fence
//! behind it, one sees the other.
//!
//! Sending may take as long as the network likes, looking does not: so nobody is waited for
//! who waits for the other side.

use afterimage_protocol::layout::PageRange;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// The hands of all channels of a connection.
#[derive(Debug, Default)]
pub(super) struct Hands(Mutex<Vec<Weak<Inside>>>);

/// Of one channel.
#[derive(Debug)]
pub(super) struct Hand(Arc<Inside>);

#[derive(Debug, Default)]
struct Inside {
    /// Odd while pages are being taken and looked at.
    takings: AtomicU64,
    /// Pages that are being sent from where they lie.
    sending: Mutex<Vec<PageRange>>,
}

/// Pages are being taken, until this is dropped or [sends](Self::sends) them.
#[derive(Debug)]
pub(super) struct Taking(Arc<Inside>);

/// What was taken is being sent, until this is dropped.
#[derive(Debug)]
pub(super) struct Sending(Arc<Inside>);

/// Hands that were taking when somebody looked.
#[derive(Debug)]
pub(super) struct Busy(Vec<(Arc<Inside>, u64)>);

impl Hands {
    /// One more channel.
    pub(super) fn join(&self) -> Hand {
        let hand = Arc::new(Inside::default());
        let mut hands = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hands.retain(|hand| hand.strong_count() > 0);
        hands.push(Arc::downgrade(&hand));
        Hand(hand)
    }

    fn live(&self) -> Vec<Arc<Inside>> {
        let hands = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        hands.iter().filter_map(Weak::upgrade).collect()
    }

    /// Those that are taking now. It is over soon.
    pub(super) fn busy(&self) -> Busy {
        // What the caller saw acknowledged is seen so by whoever takes after this.
        fence(Ordering::SeqCst);
        let counted = self.live().into_iter().map(|hand| {
            let count = hand.takings.load(Ordering::Acquire);
            (hand, count)
        });
        Busy(counted.filter(|(_, count)| count % 2 == 1).collect())
    }

    /// What is being sent. Of pages that were acknowledged before a [look](Self::busy) that is
    /// over, nothing else is being read.
    pub(super) fn sending(&self) -> Vec<PageRange> {
        self.live().iter().flat_map(|hand| hand.sending().clone()).collect()
    }
}

impl Inside {
    fn sending(&self) -> MutexGuard<'_, Vec<PageRange>> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hand {
    /// Before pages are taken from the book.
    pub(super) fn take(&self) -> Taking {
        self.0.takings.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        Taking(Arc::clone(&self.0))
    }
}

impl Taking {
    /// Nothing more is taken, and of what was, nothing but these pages is looked at again.
    pub(super) fn sends(self, pages: impl Iterator<Item = PageRange>) -> Sending {
        self.0.sending().extend(pages);
        // Dropped after the pages are there to be seen.
        Sending(Arc::clone(&self.0))
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        self.0.takings.fetch_add(1, Ordering::Release);
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.sending().clear();
    }
}

impl Busy {
    /// Whether all have stopped taking since.
    pub(super) fn is_over(&mut self) -> bool {
        self.0.retain(|(hand, count)| hand.takings.load(Ordering::Acquire) == *count);
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_protocol::layout::PageNumber;
    use std::sync::atomic::AtomicBool;

    fn page(number: u64) -> PageRange {
        PageRange::one(PageNumber(number))
    }

    #[test]
    fn a_hand_that_takes_is_waited_for_and_one_that_sends_says_what() {
        let hands = Hands::default();
        let (one, two) = (hands.join(), hands.join());
        assert!(hands.busy().is_over());
        let taking = one.take();
        let mut busy = hands.busy();
        assert!(!busy.is_over());
        let later = two.take();
        let sending = taking.sends([page(7)].into_iter());
        assert!(busy.is_over());
        assert_eq!(hands.sending(), [page(7)]);
        drop(later);
        assert!(hands.busy().is_over(), "who sends is not waited for");
        drop(sending);
        assert!(hands.sending().is_empty());
        let _again = one.take();
        drop(one);
        assert!(!hands.busy().is_over());
    }

    /// Readers look at a flag under their hand, then read and read again; the other side sets
    /// the flag, waits for the hands and spoils what is not being sent.
    #[test]
    fn nobody_reads_what_is_freed_after_the_hands_were_waited_for() {
        const ROUNDS: usize = 20_000;
        let hands = Arc::new(Hands::default());
        let rounds: Arc<Vec<(AtomicBool, AtomicU64)>> =
            Arc::new((0..ROUNDS).map(|_| (AtomicBool::new(false), AtomicU64::new(1))).collect());
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let (hand, rounds) = (hands.join(), Arc::clone(&rounds));
                std::thread::spawn(move || {
                    for (number, (is_acked, content)) in rounds.iter().enumerate() {
                        for turn in 1_u64.. {
                            let taking = hand.take();
                            if is_acked.load(Ordering::Acquire) {
                                break;
                            }
                            assert_eq!(content.load(Ordering::Relaxed), 1, "taken when freed");
                            let sending = taking.sends([page(number as u64)].into_iter());
                            assert_eq!(content.load(Ordering::Relaxed), 1, "sent when freed");
                            drop(sending);
                            // Where there are fewer processors than threads, the others come to
                            // a turn only at the end of a slice otherwise.
                            if turn.is_multiple_of(64) {
                                std::thread::yield_now();
                            }
                        }
                    }
                })
            })
            .collect();
        for (number, (is_acked, content)) in rounds.iter().enumerate() {
            is_acked.store(true, Ordering::Release);
            let mut busy = hands.busy();
            while !busy.is_over() {
                std::thread::yield_now();
            }
            while hands.sending().contains(&page(number as u64)) {
                std::thread::yield_now();
            }
            content.store(0, Ordering::Relaxed);
        }
        for reader in readers {
            reader.join().unwrap();
        }
    }
}
