//! What one channel has under way, and since when nothing of it has been acknowledged.

use crate::sys::words::LazyWords;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{Book, InFlight};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Separate runs of unreadable pages that are remembered: more become one that covers them.
const MAX_UNREADABLE_RUNS: usize = 1024;

/// What one channel has under way, shared with the driver, which settles and requeues it.
#[derive(Clone, Debug, Default)]
pub(in crate::source) struct Underway(Arc<Mutex<Sent>>);

#[derive(Debug, Default)]
struct Sent {
    in_flight: InFlight,
    /// Sent as unreadable: said again if the channel dies, and acknowledged by hardly anybody,
    /// so that nothing waits for it.
    unreadable: Vec<PageRange>,
    /// Since when something has been under way and nothing of it was acknowledged.
    since: Option<Instant>,
    /// The longest pause before an acknowledgement since this was asked for last.
    pause: Option<Duration>,
}

impl Underway {
    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages are about to be sent.
    pub(in crate::source) fn push(&self, pages: PageRange) {
        let mut sent = self.lock();
        if sent.in_flight.is_empty() {
            // What left before has been acknowledged, perhaps before it was said to have left.
            sent.since = None;
        }
        sent.in_flight.push(pages);
    }

    /// Of what was pushed, these pages cannot be read: that is all that is sent of them.
    pub(in crate::source) fn unreadable(&self, pages: PageRange) {
        let mut sent = self.lock();
        sent.in_flight.withdraw(pages);
        if sent.in_flight.is_empty() {
            sent.since = None;
        }
        match sent.unreadable.last_mut() {
            Some(last) if last.end() == Some(pages.start) => last.count += pages.count,
            _ => sent.unreadable.push(pages),
        }
        if sent.unreadable.len() > MAX_UNREADABLE_RUNS {
            sent.unreadable = vec![covering(&sent.unreadable)];
        }
    }

    /// What has been pushed leaves now. Reading it may have taken a while.
    pub(in crate::source) fn leaves(&self) {
        let mut sent = self.lock();
        if !sent.in_flight.is_empty() {
            sent.since.get_or_insert_with(Instant::now);
        }
    }

    pub(in crate::source) fn is_full(&self) -> bool {
        self.lock().in_flight.is_full()
    }

    pub(in crate::source) fn settle(&self, book: &Book<LazyWords>) {
        let mut sent = self.lock();
        let before = sent.in_flight.first();
        sent.in_flight.settle(book);
        let present = sent.in_flight.first();
        if present == before {
            return;
        }
        let since = sent.since.take();
        sent.pause = sent.pause.max(since.map(|since| since.elapsed()));
        if present.is_some() && since.is_some() {
            sent.since = Some(Instant::now());
        }
    }

    /// Whether nothing is under way that is not acknowledged.
    pub(in crate::source) fn is_settled(&self, book: &Book<LazyWords>) -> bool {
        self.settle(book);
        self.lock().in_flight.is_empty()
    }

    pub(in crate::source) fn requeue(&self, book: &Book<LazyWords>) {
        let mut sent = self.lock();
        sent.in_flight.requeue(book);
        for pages in sent.unreadable.drain(..) {
            book.requeue(pages);
        }
    }

    /// Since when nothing of what is under way has been acknowledged.
    pub(in crate::source) fn waits_since(&self) -> Option<Instant> {
        let sent = self.lock();
        sent.since.filter(|_| !sent.in_flight.is_empty())
    }

    /// How long the longest wait for an acknowledgement was since this was asked last; `None`
    /// if there was none.
    pub(in crate::source) fn take_pause(&self) -> Option<Duration> {
        self.lock().pause.take()
    }
}

/// The least run that holds all of these. What else is in it is sent once more, perhaps.
fn covering(runs: &[PageRange]) -> PageRange {
    let start = runs.iter().map(|run| run.start.0).min().unwrap_or(0);
    let end = runs.iter().map(|run| run.start.0 + run.count).max().unwrap_or(0);
    PageRange::new(PageNumber(start), end - start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, count: u64) -> PageRange {
        PageRange::new(PageNumber(start), count)
    }

    fn book(pages: u64) -> Book<LazyWords> {
        let words = || LazyWords::new(pages).expect("memory");
        Book::over(words(), words(), pages)
    }

    #[test]
    fn unreadable_pages_are_waited_for_by_nobody_and_said_again_when_the_channel_dies() {
        let (book, underway) = (book(100), Underway::default());
        assert_eq!(book.take_in(range(0, 20)), Some(range(0, 20)));
        underway.push(range(0, 20));
        underway.unreadable(range(0, 3));
        underway.unreadable(range(10, 1));
        underway.leaves();
        assert!(underway.waits_since().is_some(), "the others are under way");
        for run in [range(3, 7), range(11, 9)] {
            book.acknowledge(run);
        }
        underway.settle(&book);
        assert!(underway.waits_since().is_none(), "the others have arrived");
        underway.leaves();
        assert!(underway.waits_since().is_none());
        assert_eq!(book.unsent(), 80);
        underway.requeue(&book);
        assert_eq!(book.unsent(), 84);
        assert_eq!(book.peek(PageNumber(0)), Some(PageNumber(0)));
        assert_eq!(book.peek(PageNumber(3)), Some(PageNumber(10)));
    }

    #[test]
    fn any_number_of_unreadable_pages_takes_little_memory_and_none_is_forgotten() {
        let pages = 8 * MAX_UNREADABLE_RUNS as u64;
        let (book, underway) = (book(pages), Underway::default());
        for page in 0..pages / 2 {
            let page = PageRange::one(PageNumber(2 * page));
            assert_eq!(book.take_in(page), Some(page));
            underway.push(page);
            underway.unreadable(page);
            assert!(underway.lock().unreadable.len() <= MAX_UNREADABLE_RUNS);
        }
        assert_eq!(book.unsent(), pages / 2);
        underway.requeue(&book);
        assert_eq!(book.unsent(), pages);
    }
}
