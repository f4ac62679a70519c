//! Pieces that break off.

use super::*;
use crate::destination::arrivals::Arrived;
use crate::destination::driver::Input;
use crate::destination::memory::{DestinationMemory, DiscardNotice, MemoryError};
use crate::destination::pages::Pages;
use crate::inbox::Inbox;
use crate::sys::testing::{self, Area, Kind};
use crate::sys::uffd::UffdError;
use afterimage_protocol::wire::Epoch;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

#[test]
fn pages_discarded_in_a_piece_that_breaks_off_are_acknowledged() {
    for kind in Kind::ALL {
        // One frame holds one huge page.
        let count = if kind == Kind::Hugetlb { 1 } else { 4 };
        let Some(area) = Area::new(kind, count) else { continue };
        let regions = vec![area.region()];
        let memory =
            match DestinationMemory::register(regions, testing::scope(), DiscardNotice::Called) {
                Err(MemoryError::Uffd(error @ UffdError::Unavailable(_))) => {
                    return testing::skip("userfaultfd", error);
                }
                memory => memory.unwrap(),
            };
        let poll = mio::Poll::new().unwrap();
        let (inbox, driver) = Inbox::<Input>::new(&poll, mio::Token(0)).unwrap();
        let arrived = Arc::new(Arrived::new(Pages::new(memory).unwrap(), driver));
        let arrivals = arrived.on(Epoch(1), false);
        let (mut source, destination) = UnixStream::pair().unwrap();
        let receiver = std::thread::spawn(move || {
            let stream = Stream::new(destination.into(), false).unwrap();
            Receiver::new(&arrivals, stream, Generation(1)).run()
        });
        let all = PageRange::new(PageNumber(0), count);
        let frame = DataFrame::Content(all, (count * kind.page_bytes()) as u32);
        let stamp = arrived.on(Epoch(1), false).stamp(Generation(1));
        source.write_all(frame.header(stamp).bytes()).unwrap();
        source.write_all(&[1; 5000]).unwrap();
        let last = PageNumber(count - 1);
        testing::await_that(&format!("a piece of {kind:?} is claimed"), || {
            arrived.pages.planes().state(last) != afterimage_protocol::bitmap::PageState::Free
        });
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
