//! What is told to the destination to be out of date, and reopened in the book before.

use super::super::Driver;
use crate::source::precopy::Written;
use crate::sys::words::LazyWords;
use afterimage_protocol::bitmap::{Bitmap, MAX_SEGMENT_PAGES, Segment};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::Book;
use afterimage_protocol::wire::ControlFrame;
use std::io;
use std::sync::Arc;

impl Driver {
    /// Tells what counts no more of what the destination has.
    pub(in crate::source::driver) fn tell_stale(&mut self) {
        let (Some(passing), Some(book)) = (&mut self.passing, self.shared.book()) else {
            return;
        };
        let (is_fresh, vouched) = (std::mem::take(&mut passing.is_fresh), passing.vouched.take());
        let tracking = Arc::clone(&passing.tracking);
        let is_frozen = self.session.is_frozen();
        let told = tracking.tell(|written| {
            // First what the destination has said that it has, then what is written of it.
            let fresh = if is_fresh {
                Some(stale_after_attach(&book, vouched.as_deref(), written)?)
            } else {
                None
            };
            written.latest.runs().for_each(|run| book.reopen(run));
            if !is_frozen {
                written.told();
            }
            let told = Arc::clone(written);
            match fresh {
                Some(stale) => self.link.send_first(segments(stale, |stale| stale)),
                None if is_frozen => self.link.send_first(segments(told, |told| &told.latest)),
                // It stays as it is until the next pass, which comes after the last of these.
                None => self.link.send_first(segments(told, |told| &told.before)),
            }
            Ok(Arc::clone(written))
        });
        match told {
            Ok(written) => {
                if let Some(passing) = self.passing.as_mut().filter(|_| is_frozen) {
                    passing.unsettled = Some(written);
                }
            }
            Err(error) => {
                let error: io::Error = error;
                tracing::error!(%error, "no memory to say what is out of date");
                self.session.disconnected();
            }
        }
    }
}

/// `Stale` frames for a bitmap, each made when there is room for it.
fn segments<T: Send + 'static>(
    of: T,
    bitmap: impl Fn(&T) -> &Bitmap<LazyWords> + Send + 'static,
) -> impl Iterator<Item = ControlFrame> + Send + 'static {
    let mut from = PageNumber(0);
    std::iter::from_fn(move || {
        let stale = bitmap(&of);
        let start = stale.next_set(from, 1)?.start.0 / 64 * 64;
        let range = PageRange::new(PageNumber(start), MAX_SEGMENT_PAGES.min(stale.pages() - start));
        from = PageNumber(start + range.count);
        Some(ControlFrame::Stale { range, segment: Segment::encode(stale, range) })
    })
}

/// What the destination has said that it has, and this side does not vouch for. It is reopened
/// in the book.
fn stale_after_attach(
    book: &Book<LazyWords>,
    vouched: Option<&Book<LazyWords>>,
    written: &Written,
) -> io::Result<Bitmap<LazyWords>> {
    let pages = book.pages();
    let stale = Bitmap::over(LazyWords::new(pages)?, pages);
    if let Some(vouched) = vouched {
        // It may have been written and nobody was told yet.
        written.latest.runs().for_each(|run| vouched.reopen(run));
    }
    let mut from = 0;
    while from < pages {
        let rest = PageRange::new(PageNumber(from), pages - from);
        let Some(said) = book.first_acked_in(rest) else { break };
        let (mut next, end) = (said.start.0, said.start.0 + said.count);
        while next < end {
            let open = PageRange::new(PageNumber(next), end - next);
            let doubted = match vouched {
                Some(vouched) => vouched.first_missing_in(open),
                None => Some(open),
            };
            let Some(doubted) = doubted else { break };
            stale.set(doubted, |_| ());
            next = doubted.start.0 + doubted.count;
        }
        from = end;
    }
    for run in stale.runs() {
        book.reopen(run);
    }
    Ok(stale)
}
