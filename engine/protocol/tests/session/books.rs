//! The source's books against a model that keeps a list of pages.

use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{Book, InFlight, MAX_IN_FLIGHT_RUNS};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

const PAGES: u64 = 200;
const CHANNELS: usize = 3;

type Words = Box<[AtomicU64]>;

fn book(pages: u64) -> Book<Words> {
    let words = || (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    Book::over(words(), words(), pages)
}

/// Takes the next pages the way a background stream does.
fn take(book: &Book<Words>, from: PageNumber, limit: u64) -> Option<PageRange> {
    book.take_in(PageRange::new(book.peek(from)?, limit))
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Take { channel: usize, from: u64, limit: u64 },
    Urgent { channel: usize, page: u64 },
    Acknowledge(PageRange),
    Settle(usize),
    Die(usize),
    Reset,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = (0..PAGES, 1..40_u64)
        .prop_map(|(start, count)| PageRange::new(PageNumber(start), count.min(PAGES - start)));
    let step = prop_oneof![
        4 => (0..CHANNELS, 0..PAGES, 1..40_u64)
            .prop_map(|(channel, from, limit)| Step::Take { channel, from, limit }),
        2 => (0..CHANNELS, 0..PAGES).prop_map(|(channel, page)| Step::Urgent { channel, page }),
        4 => range.prop_map(Step::Acknowledge),
        2 => (0..CHANNELS).prop_map(Step::Settle),
        1 => (0..CHANNELS).prop_map(Step::Die),
        1 => Just(Step::Reset),
    ];
    prop::collection::vec(step, 0..80)
}

/// Pages by number, in sets and lists.
#[derive(Default)]
struct Model {
    sent: BTreeSet<u64>,
    acked: BTreeSet<u64>,
    in_flight: [Vec<u64>; CHANNELS],
}

impl Model {
    fn take(&mut self, channel: usize, from: u64, limit: u64) -> Option<PageRange> {
        let start = (from..PAGES).find(|page| !self.sent.contains(page))?;
        let count = (start..PAGES).take_while(|page| !self.sent.contains(page)).count() as u64;
        let run = PageRange::new(PageNumber(start), count.min(limit));
        self.sent.extend(run.iter().map(|page| page.0));
        self.in_flight[channel].extend(run.iter().map(|page| page.0));
        Some(run)
    }

    fn settle(&mut self, channel: usize) {
        let open = self.in_flight[channel].iter().position(|page| !self.acked.contains(page));
        let settled = open.unwrap_or(self.in_flight[channel].len());
        self.in_flight[channel].drain(..settled);
    }

    fn die(&mut self, channel: usize) {
        for page in std::mem::take(&mut self.in_flight[channel]) {
            if !self.acked.contains(&page) {
                self.sent.remove(&page);
            }
        }
    }
}

fn run_step(
    step: Step,
    book: &Book<Words>,
    channels: &mut [InFlight; CHANNELS],
    model: &mut Model,
) -> Result<(), TestCaseError> {
    match step {
        Step::Take { channel, from, limit } => {
            let run = take(book, PageNumber(from), limit);
            if let Some(run) = run {
                prop_assert!(run.iter().all(|page| !book.is_acked(page)));
                channels[channel].push(run);
            }
            prop_assert_eq!(run, model.take(channel, from, limit));
        }
        Step::Urgent { channel, page } => {
            let is_wanted = book.take_urgent(PageNumber(page));
            prop_assert_eq!(is_wanted, !model.acked.contains(&page));
            if is_wanted {
                channels[channel].push(PageRange::one(PageNumber(page)));
                model.sent.insert(page);
                model.in_flight[channel].push(page);
            }
        }
        Step::Acknowledge(range) => {
            let before = model.acked.len() as u64;
            model.acked.extend(range.iter().map(|page| page.0));
            model.sent.extend(range.iter().map(|page| page.0));
            prop_assert_eq!(book.acknowledge(range), model.acked.len() as u64 - before);
        }
        Step::Settle(channel) => {
            channels[channel].settle(book);
            model.settle(channel);
        }
        Step::Die(channel) => {
            channels[channel].requeue(book);
            model.die(channel);
        }
        Step::Reset => {
            for channel in channels {
                channel.requeue(book);
            }
            book.reset();
            *model = Model::default();
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn books_do_what_lists_of_pages_do(steps in steps()) {
        let book = book(PAGES);
        let mut channels: [InFlight; CHANNELS] = Default::default();
        let mut model = Model::default();
        for step in steps {
            run_step(step, &book, &mut channels, &mut model)?;
            prop_assert_eq!(book.acked_pages(), model.acked.len() as u64);
            prop_assert_eq!(book.unsent(), PAGES - model.sent.len() as u64);
            for (channel, pages) in channels.iter().zip(&model.in_flight) {
                prop_assert_eq!(channel.is_empty(), pages.is_empty());
            }
        }
        // Whatever happened: when all channels die, what has not arrived is handed out again.
        for channel in &mut channels {
            channel.requeue(&book);
        }
        let mut again = BTreeSet::new();
        while let Some(run) = take(&book, PageNumber(0), 7) {
            prop_assert!(run.count <= 7 && !run.is_empty());
            again.extend(run.iter().map(|page| page.0));
        }
        let missing: BTreeSet<u64> =
            (0..PAGES).filter(|page| !model.acked.contains(page)).collect();
        prop_assert_eq!(again, missing);
    }
}

#[test]
fn a_channel_is_full_at_its_bound_and_has_room_when_its_front_has_arrived() {
    let pages = 2 * MAX_IN_FLIGHT_RUNS as u64 + 2;
    let book = book(pages);
    let mut channel = InFlight::default();
    for index in 0..MAX_IN_FLIGHT_RUNS as u64 {
        assert!(!channel.is_full());
        assert!(book.take_urgent(PageNumber(2 * index)));
        channel.push(PageRange::one(PageNumber(2 * index)));
    }
    assert!(channel.is_full());
    book.acknowledge(PageRange::new(PageNumber(0), 2));
    channel.settle(&book);
    assert!(!channel.is_full());
}

/// As where there is no room for it: it is asked for, and sent, again and again.
#[test]
fn a_page_that_never_arrives_does_not_fill_a_channel_with_what_has() {
    let pages = 4 * MAX_IN_FLIGHT_RUNS as u64;
    let book = book(pages);
    let mut channel = InFlight::default();
    let (stuck, mut sent) = (PageRange::one(PageNumber(0)), 2);
    while sent + 2 < pages {
        let arrives = PageRange::one(PageNumber(sent));
        for run in [stuck, arrives] {
            book.take_urgent(run.start);
            channel.push(run);
        }
        book.acknowledge(arrives);
        channel.settle(&book);
        assert!(!channel.is_full(), "after {sent}");
        sent += 2;
    }
    assert_eq!(channel.first(), Some(PageNumber(0)));
    book.acknowledge(stuck);
    channel.settle(&book);
    assert!(channel.is_empty());
}

#[test]
fn pages_that_are_sent_again_and_again_fill_no_channel_by_themselves() {
    let book = book(64);
    let mut channel = InFlight::default();
    for round in 0..MAX_IN_FLIGHT_RUNS as u64 {
        // Not one behind the other, which would be one run.
        channel.push(PageRange::one(PageNumber(round % 8 * 2)));
        channel.settle(&book);
        assert!(!channel.is_full(), "after {round}");
    }
    assert!(channel.runs() >= 8, "all of them are under way");
}

#[test]
fn threads_share_a_book_without_handing_a_page_out_twice() {
    let book = book(4096);
    let taken: Vec<Vec<PageRange>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|index| {
                let book = &book;
                scope.spawn(move || {
                    let mut runs = Vec::new();
                    while let Some(run) = take(book, PageNumber(0), 1 + index * 13) {
                        runs.push(run);
                    }
                    runs
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let total: u64 = taken.iter().flatten().map(|run| run.count).sum();
    let distinct: BTreeSet<u64> =
        taken.iter().flatten().flat_map(|run| run.iter().map(|page| page.0)).collect();
    assert_eq!((total, distinct.len()), (4096, 4096));
}

/// A page that may have been freed was acknowledged: however channels die, and whatever is asked
/// for, it must not be handed out.
#[test]
fn what_was_acknowledged_is_not_handed_out_while_channels_die() {
    const PAGES: u64 = 20_000;
    let (book, acked) = (book(PAGES), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..PAGES {
                book.acknowledge(PageRange::one(PageNumber(page)));
                acked.store(page + 1, Ordering::Release);
            }
        });
        for limit in [1, 64, 300] {
            let (book, acked) = (&book, &acked);
            scope.spawn(move || {
                loop {
                    let before = acked.load(Ordering::Acquire);
                    if before == PAGES {
                        return;
                    }
                    book.requeue(PageRange::new(PageNumber(0), PAGES));
                    // From the start, where pages have been acknowledged.
                    if let Some(run) = take(book, PageNumber(before.saturating_sub(limit)), limit) {
                        assert!(run.start.0 >= before, "{run} of {before} acknowledged");
                    }
                    if let Some(last) = before.checked_sub(1) {
                        assert!(!book.take_urgent(PageNumber(last)));
                    }
                }
            });
        }
    });
    assert_eq!(take(&book, PageNumber(0), PAGES), None);
}

#[test]
fn what_is_withdrawn_is_waited_for_no_more_and_all_else_is() {
    let range = |start, count| PageRange::new(PageNumber(start), count);
    let book = book(100);
    let mut channel = InFlight::default();
    for run in [range(0, 10), range(20, 10), range(40, 10)] {
        assert_eq!(book.take_in(run), Some(run));
        channel.push(run);
    }
    channel.withdraw(range(30, 10));
    assert_eq!(channel.runs(), 3, "that was not under way");
    channel.withdraw(range(43, 2));
    channel.withdraw(range(20, 10));
    assert_eq!(channel.runs(), 3);
    for run in [range(0, 10), range(40, 3)] {
        book.acknowledge(run);
    }
    channel.settle(&book);
    assert_eq!((channel.runs(), channel.first()), (1, Some(PageNumber(45))));
    channel.requeue(&book);
    assert_eq!(book.unsent(), 70 + 5);
}
