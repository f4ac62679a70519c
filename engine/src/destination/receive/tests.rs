//! What arrives in whatever pieces, and what breaks off.

use super::*;
use crate::destination::arrivals::Arrived;
use crate::destination::driver::Input;
use crate::destination::memory::{DestinationMemory, DiscardNotice, MemoryError};
use crate::destination::pages::Pages;
use crate::inbox::Inbox;
use crate::sys::testing::{self, Area, Kind};
use crate::sys::uffd::UffdError;
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::wire::Epoch;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

/// A destination's memory, and one background stream into it.
struct Line {
    kind: Kind,
    area: Area,
    arrived: Arc<Arrived>,
    inbox: Inbox<Input>,
    _poll: mio::Poll,
    source: UnixStream,
    receiver: JoinHandle<io::Result<()>>,
}

impl Line {
    fn new(kind: Kind, pages: u64) -> Option<Self> {
        let area = Area::new(kind, pages)?;
        let regions = vec![area.region()];
        let memory =
            match DestinationMemory::register(regions, testing::scope(), DiscardNotice::Called) {
                Err(MemoryError::Uffd(error @ UffdError::Unavailable(_))) => {
                    testing::skip("userfaultfd", error);
                    return None;
                }
                memory => memory.unwrap(),
            };
        let poll = mio::Poll::new().unwrap();
        let (inbox, driver) = Inbox::<Input>::new(&poll, mio::Token(0)).unwrap();
        let arrived = Arc::new(Arrived::new(Pages::new(memory).unwrap(), driver));
        let arrivals = arrived.on(Epoch(1), false, false);
        let (source, destination) = UnixStream::pair().unwrap();
        let receiver = std::thread::spawn(move || {
            let stream = Stream::new(destination.into(), false).unwrap();
            Receiver::new(&arrivals, stream, Generation(1)).run()
        });
        Some(Self { kind, area, arrived, inbox, _poll: poll, source, receiver })
    }

    fn content(&self, first: u64, count: u64) -> Vec<u8> {
        let pages = PageRange::new(PageNumber(first), count);
        let length = (count * self.kind.page_bytes()) as u32;
        let mut bytes = self.header(DataFrame::Content(pages, length));
        for page in pages.iter() {
            bytes.extend((page.0 + 1).to_le_bytes().repeat(self.kind.page_bytes() as usize / 8));
        }
        bytes
    }

    fn zero(&self, first: u64, count: u64) -> Vec<u8> {
        self.header(DataFrame::Zero(PageRange::new(PageNumber(first), count)))
    }

    fn header(&self, frame: DataFrame) -> Vec<u8> {
        let stamp = self.arrived.on(Epoch(1), false, false).stamp(Generation(1));
        frame.header(stamp).bytes().to_vec()
    }

    fn state(&self, page: u64) -> PageState {
        self.arrived.pages.planes().state(PageNumber(page))
    }

    fn await_complete(&self, page: u64) {
        testing::await_that(&format!("page {page} is complete"), || {
            self.state(page) == PageState::Complete
        });
    }

    /// Ends the stream, waits for the receiver, and checks that just the pages below `pages`
    /// are complete, acknowledged once, and hold what they should: nothing where `zero` says so.
    fn check(self, pages: u64, zero: impl Fn(u64) -> bool) {
        let Self { kind, area, arrived, source, receiver, .. } = self;
        drop(source);
        receiver.join().unwrap().unwrap_err();
        let (planes, total) = (arrived.pages.planes(), arrived.pages.planes().pages());
        for page in 0..total {
            let expected = if page < pages { PageState::Complete } else { PageState::Free };
            assert_eq!(planes.state(PageNumber(page)), expected, "page {page} of {total}");
            if page < pages && !zero(page) {
                let word = area.word((page + 1) * kind.page_bytes() - 8);
                let found = word.load(Ordering::Relaxed);
                assert_eq!(found, page + 1, "page {page} of {total}");
            }
        }
        assert_eq!(arrived.pages.remaining(), total - pages);
        assert_eq!(arrived.take_acks(), [PageRange::new(PageNumber(0), pages)], "in one run");
    }
}

/// Every fourth page has content, those between are zero.
fn is_zero(page: u64) -> bool {
    !page.is_multiple_of(4)
}

fn batch(line: &Line, pages: u64) -> Vec<u8> {
    (0..pages)
        .step_by(4)
        .flat_map(|page| [line.content(page, 1), line.zero(page + 1, 3)].concat())
        .collect()
}

fn small_kinds() -> impl Iterator<Item = Kind> {
    [Kind::Anonymous, Kind::Memfd].into_iter()
}

#[test]
fn pages_discarded_in_a_piece_that_breaks_off_are_acknowledged() {
    for kind in Kind::ALL {
        // One frame holds one huge page.
        let count = if kind == Kind::Hugetlb { 1 } else { 16 };
        let Some(mut line) = Line::new(kind, count) else { continue };
        let all = PageRange::new(PageNumber(0), count);
        let frame = line.content(0, count);
        line.source.write_all(&frame[..5000]).unwrap();
        testing::await_that(&format!("a piece of {kind:?} is claimed"), || {
            line.state(count - 1) != PageState::Free
        });
        let Line { arrived, inbox, source, receiver, .. } = line;
        arrived.pages.discard(all);
        arrived.acknowledge_complete(all);
        drop(source);
        receiver.join().unwrap().unwrap_err();
        assert_eq!(arrived.pages.remaining(), 0, "{kind:?}");
        let acknowledged: u64 = arrived.take_acks().iter().map(|run| run.count).sum();
        assert!(acknowledged >= count, "{kind:?}: {acknowledged}");
        let mut told = std::iter::from_fn(|| inbox.next());
        assert!(told.any(|input| matches!(input, Input::AllComplete)), "{kind:?}");
    }
}

#[test]
fn a_batch_cut_anywhere_loses_what_had_not_come_and_nothing_else() {
    for kind in small_kinds() {
        // In a header, in content, between frames, and just before the end.
        for cut in [1, 31, 32, 33, 4127, 4128, 4129, 4160, 4161, 8_000, 8_300, 16_639] {
            let Some(mut line) = Line::new(kind, 24) else { return };
            let bytes = batch(&line, 16);
            line.source.write_all(&bytes[..cut]).unwrap();
            // Frames of 4,128 and 32 bytes by turns.
            let (whole, rest) = (cut / 4160, cut % 4160);
            let pages = whole * 4 + usize::from(rest >= 4128);
            if pages == 0 {
                let Line { source, receiver, arrived, .. } = line;
                drop(source);
                receiver.join().unwrap().unwrap_err();
                assert_eq!(arrived.pages.remaining(), 24);
                assert_eq!(arrived.take_acks(), []);
                continue;
            }
            line.check(pages as u64, is_zero);
        }
    }
}

#[test]
fn frames_cut_anywhere_on_their_way_arrive_whole() {
    for kind in small_kinds() {
        for cut in [1, 40, 4100, 4128, 4140, 4159, 4160, 4170, 12_490] {
            let Some(mut line) = Line::new(kind, 24) else { return };
            let bytes = batch(&line, 24);
            line.source.write_all(&bytes[..cut]).unwrap();
            if cut >= 4128 {
                // By then the next receive waits in the middle of a frame, or before one.
                line.await_complete(0);
            }
            line.source.write_all(&bytes[cut..]).unwrap();
            line.await_complete(23);
            line.check(24, is_zero);
        }
    }
}

#[test]
fn large_and_small_content_by_turns_arrives_whole() {
    for kind in small_kinds() {
        let Some(mut line) = Line::new(kind, 400) else { return };
        // 9 pages are large, 7 are not; 100 are more than one piece, and than a buffer.
        let mut bytes = batch(&line, 100);
        for (first, count) in [(100, 9), (109, 7), (116, 1), (117, 100), (217, 7), (224, 170)] {
            bytes.extend(line.content(first, count));
        }
        bytes.extend(line.zero(394, 6));
        line.source.write_all(&bytes).unwrap();
        line.await_complete(399);
        line.check(400, |page| page >= 394 || page < 100 && is_zero(page));
    }
}

#[test]
fn what_came_before_a_hostile_header_counts_and_nothing_after_it() {
    for kind in small_kinds() {
        let outside = DataFrame::Zero(PageRange::new(PageNumber(20), 5));
        let huge = DataFrame::Content(PageRange::new(PageNumber(16), 1), u32::MAX);
        for hostile in [outside, huge, DataFrame::Request(PageRange::one(PageNumber(16)))] {
            let Some(mut line) = Line::new(kind, 24) else { return };
            let mut bytes = batch(&line, 16);
            bytes.extend(line.header(hostile));
            bytes.extend(line.content(16, 1));
            bytes.extend(line.zero(17, 7));
            // It may have gone already.
            let _ = line.source.write_all(&bytes);
            line.check(16, is_zero);
        }
    }
}
