//! Sending what nobody has asked for yet.

use super::serving::{NO_HINT, Serving, Underway};
use crate::sys::holes::Extent;
use crate::sys::mapping::is_zero;
use crate::sys::socket::Piece;
use crate::transport::Stream;
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use afterimage_protocol::wire::{DataFrame, Generation, Header};
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Bytes of content taken, looked through and sent in one go: small enough that an urgent
/// page does not wait long behind it.
const CHUNK_BYTES: u64 = 256 << 10;
/// How long a stream stands back for requests before each piece.
const STAND_BACK_FOR: Duration = Duration::from_millis(5);
/// A mapped file's page tables are given back after this many bytes were read through them.
const MAPPED_WINDOW: u64 = 64 << 20;
/// The most pages in one zero frame.
const MAX_ZERO_PAGES: u64 = 1 << 31;

/// One background stream.
pub(super) struct Streamer<'s> {
    serving: &'s Serving,
    stream: Stream,
    generation: Generation,
    underway: Underway,
    cursor: PageNumber,
    /// The piece with content that the cursor was last found in, by region.
    extent: Option<(usize, Extent)>,
    frames: Vec<(Header, Option<RegionRun>)>,
}

impl<'s> Streamer<'s> {
    pub(super) fn new(
        serving: &'s Serving,
        stream: Stream,
        slot: u16,
        streams: u16,
        generation: Generation,
        underway: Underway,
    ) -> Self {
        // Streams begin apart; they meet when little is left.
        let pages = serving.layout.page_count();
        let cursor = PageNumber(pages / u64::from(streams.max(1)) * u64::from(slot));
        Self { serving, stream, generation, underway, cursor, extent: None, frames: Vec::new() }
    }

    /// Sends until the connection ends.
    pub(super) fn run(mut self) -> io::Result<()> {
        if !self.serving.wait_final(&self.stream) {
            return Ok(());
        }
        while !self.serving.is_closing() {
            let seen = self.serving.signal.changes();
            self.stand_back();
            if self.underway.is_full() {
                self.underway.settle(&self.serving.book);
                if self.underway.is_full() && !self.serving.wait_change(&self.stream, seen) {
                    return Ok(());
                }
                continue;
            }
            match self.take() {
                Some((run, is_hole)) => self.send_run(&run, is_hole)?,
                None if self.serving.wait_change(&self.stream, seen) => {}
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Lets requests go first, but not for ever: their answers may be stuck.
    fn stand_back(&self) {
        let mut since = None;
        while self.serving.urgent.load(Ordering::Acquire) > 0
            && !self.serving.is_closing()
            && since.get_or_insert_with(Instant::now).elapsed() < STAND_BACK_FOR
        {
            std::thread::yield_now();
        }
    }

    /// Takes the next pages to send: near the last request, else where this stream is, else
    /// from the start again.
    fn take(&mut self) -> Option<(RegionRun, bool)> {
        let hint = self.serving.hint.swap(NO_HINT, Ordering::Relaxed);
        if hint < self.serving.layout.page_count() {
            self.cursor = PageNumber(hint);
        }
        self.take_from(self.cursor).or_else(|| self.take_from(PageNumber(0)))
    }

    fn take_from(&mut self, from: PageNumber) -> Option<(RegionRun, bool)> {
        let serving = self.serving;
        // A look first, to know what kind of memory is next; the taking may get another
        // thread's leavings further on, which then are looked at again.
        let next = serving.book.peek(from)?;
        let run = serving.layout.split(PageRange::one(next)).next()?;
        let region_length = serving.layout.regions()[run.region].length;
        let data = self.extent_at(run.region, run.offset, region_length);
        let page_bytes = run.length;
        let (is_hole, end) = match data {
            None => (true, region_length),
            // A page that is partly data is data.
            Some(extent) if extent.start >= run.offset + page_bytes => {
                (true, extent.start / page_bytes * page_bytes)
            }
            Some(extent) => (false, extent.end.min(run.offset + CHUNK_BYTES.max(page_bytes))),
        };
        let pages = (end - run.offset).div_ceil(page_bytes).min(MAX_ZERO_PAGES);
        let taken = serving.book.take_in(PageRange::new(next, pages))?;
        self.cursor = PageNumber(taken.start.0 + taken.count);
        let run = serving.layout.split(taken).next()?;
        debug_assert_eq!(run.pages, taken, "within one region");
        Some((run, is_hole))
    }

    fn extent_at(&mut self, region: usize, offset: u64, end: u64) -> Option<Extent> {
        if let Some((known, extent)) = self.extent
            && known == region
            && extent.start <= offset
            && offset < extent.end
        {
            return Some(extent);
        }
        let extent = self.serving.memory.next_data(region, offset, end)?;
        self.extent = Some((region, extent));
        Some(extent)
    }

    fn send_run(&mut self, run: &RegionRun, is_hole: bool) -> io::Result<()> {
        self.underway.push(run.pages);
        self.frames.clear();
        let serving = self.serving;
        if is_hole {
            self.push_frame(DataFrame::Zero(run.pages), None);
        } else if serving.memory.is_readable(run.region, run.offset, run.length) {
            self.push_content(run);
        } else {
            self.push_readable(run);
        }
        let mut pieces = Vec::with_capacity(2 * self.frames.len());
        for (header, content) in &self.frames {
            pieces.push(Piece::bytes(header.bytes()));
            if let Some(run) = content {
                pieces.push(Piece::memory(serving.memory.run(run.region, run.offset, run.length)));
            }
        }
        // SAFETY: headers live in `self.frames`; memory was tested to be readable.
        unsafe { self.stream.send_pieces(&mut pieces) }?;
        if !is_hole {
            let before = serving.counters.bytes.fetch_add(run.length, Ordering::Relaxed);
            if before / MAPPED_WINDOW != (before + run.length) / MAPPED_WINDOW {
                serving.memory.drop_page_tables();
            }
        }
        Ok(())
    }

    /// Frames for a run of which a part cannot be read.
    fn push_readable(&mut self, run: &RegionRun) {
        let serving = self.serving;
        let part_of = |start: u64, count: u64| {
            let pages = PageRange::new(PageNumber(run.pages.start.0 + start), count);
            serving.layout.split(pages).next().expect("part of a run")
        };
        let is_readable_at = |page: u64| {
            let part = part_of(page, 1);
            serving.memory.is_readable(part.region, part.offset, part.length)
        };
        let mut start = 0;
        while start < run.pages.count {
            let is_readable = is_readable_at(start);
            let mut end = start + 1;
            while end < run.pages.count && is_readable_at(end) == is_readable {
                end += 1;
            }
            let part = part_of(start, end - start);
            if is_readable {
                self.push_content(&part);
            } else {
                tracing::error!(pages = %part.pages, "the source's memory cannot be read here");
                self.push_frame(DataFrame::Unreadable(part.pages), None);
            }
            start = end;
        }
    }

    /// Frames for a run with content: pages that are zero by runs, the others by runs.
    fn push_content(&mut self, run: &RegionRun) {
        let serving = self.serving;
        let page_bytes = run.length / run.pages.count;
        let mut start = 0;
        while start < run.pages.count {
            let is_zero_at = |page: u64| {
                let offset = run.offset + page * page_bytes;
                // SAFETY: tested to be readable; pages are aligned.
                unsafe { is_zero(serving.memory.run(run.region, offset, page_bytes)) }
            };
            let zero = is_zero_at(start);
            let mut end = start + 1;
            while end < run.pages.count && is_zero_at(end) == zero {
                end += 1;
            }
            let pages = PageRange::new(PageNumber(run.pages.start.0 + start), end - start);
            if zero {
                self.push_frame(DataFrame::Zero(pages), None);
            } else {
                let part = serving.layout.split(pages).next().expect("part of a run");
                let frame = DataFrame::Content(pages, part.length as u32);
                self.push_frame(frame, Some(part));
            }
            start = end;
        }
    }

    fn push_frame(&mut self, frame: DataFrame, content: Option<RegionRun>) {
        let serving = self.serving;
        let mut header = frame.header(serving.stamp(self.generation));
        if serving.checksums {
            let bytes = content.map_or(&[][..], |run| {
                // SAFETY: memory is final and was tested to be readable.
                unsafe { serving.memory.run(run.region, run.offset, run.length).bytes() }
            });
            header = header.sealed([bytes]);
        }
        let counter = match frame {
            DataFrame::Content(..) => &serving.counters.background,
            DataFrame::Unreadable(..) => &serving.counters.unreadable,
            _ => &serving.counters.zero,
        };
        let (DataFrame::Content(pages, _)
        | DataFrame::Zero(pages)
        | DataFrame::Unreadable(pages)
        | DataFrame::Request(pages)) = frame;
        counter.fetch_add(pages.count, Ordering::Relaxed);
        self.frames.push((header, content));
    }
}
