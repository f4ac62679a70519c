//! Sending what nobody has asked for yet.

use super::pacing::Permit;
use super::serving::{NO_HINT, Serving, Underway};
use crate::sys::holes::Extent;
use crate::sys::mapping::{RawRun, Staging, is_zero};
use crate::sys::socket::Piece;
use crate::transport::Stream;
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use afterimage_protocol::wire::{DataFrame, Generation, HEADER_BYTES, Header};
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Bytes of content taken, looked through and sent in one go: small enough that an urgent
/// page does not wait long behind it.
const CHUNK_BYTES: u64 = 256 << 10;
/// The least of it, where a file turns out to be full of holes.
const LEAST_CHUNK_BYTES: u64 = 16 << 10;
/// How far one look for content goes: dense memory takes as long to look at as it is long.
const LOOK_AHEAD: u64 = 64 << 20;
/// How long a stream stands back for requests before each piece.
const STAND_BACK_FOR: Duration = Duration::from_millis(5);
/// The most pages in one zero frame.
const MAX_ZERO_PAGES: u64 = 1 << 31;

/// A header and what follows it.
type Frame = (Header, Option<RawRun>);

/// One background stream.
pub(super) struct Streamer<'s> {
    serving: &'s Serving,
    stream: Stream,
    generation: Generation,
    underway: Underway,
    cursor: PageNumber,
    /// The piece with content that the cursor was last found in, by region.
    extent: Option<(usize, Extent)>,
    frames: Vec<Frame>,
    /// Bytes taken in one go: fewer where the last were mostly zeros, because of a file it is
    /// not known where its holes begin.
    step: u64,
    staging: Staging,
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
        Self {
            serving,
            stream,
            generation,
            underway,
            cursor,
            extent: None,
            frames: Vec::new(),
            step: CHUNK_BYTES,
            staging: Staging::default(),
        }
    }

    /// Sends until the connection ends.
    pub(super) fn run(mut self) -> io::Result<()> {
        if !self.serving.wait_final(&self.stream) {
            return Ok(());
        }
        while !self.serving.is_closing() {
            let seen = self.serving.signal.changes();
            if self.underway.is_full() {
                self.underway.settle(&self.serving.book);
                if self.underway.is_full() && !self.serving.wait_change(&self.stream, seen) {
                    return Ok(());
                }
                continue;
            }
            let Some(permit) = self.serving.permit(&self.stream, self.step) else {
                return Ok(());
            };
            self.stand_back();
            match self.take(permit.bytes) {
                Some((run, is_hole)) => self.send_run(&run, is_hole, &permit)?,
                None => {
                    self.serving.pace.leaves(&permit, 0);
                    if !self.serving.wait_change(&self.stream, seen) {
                        return Ok(());
                    }
                }
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
    fn take(&mut self, most: u64) -> Option<(RegionRun, bool)> {
        let hint = self.serving.hint.swap(NO_HINT, Ordering::Relaxed);
        if hint < self.serving.layout.page_count() {
            self.cursor = PageNumber(hint);
        }
        self.take_from(self.cursor, most).or_else(|| self.take_from(PageNumber(0), most))
    }

    fn take_from(&mut self, from: PageNumber, most: u64) -> Option<(RegionRun, bool)> {
        let serving = self.serving;
        // A look first, to know what kind of memory is next; the taking may get another
        // thread's leavings further on, which then are looked at again.
        let next = serving.book.peek(from)?;
        let run = serving.layout.split(PageRange::one(next)).next()?;
        let region_length = serving.layout.regions()[run.region].length;
        let look_end = region_length.min(run.offset + run.length.max(LOOK_AHEAD));
        let data = self.extent_at(run.region, run.offset, look_end);
        let page_bytes = run.length;
        let (is_hole, end) = match data {
            None => (true, look_end),
            // A page that is partly data is data.
            Some(extent) if extent.start >= run.offset + page_bytes => {
                (true, extent.start / page_bytes * page_bytes)
            }
            Some(extent) => (false, extent.end.min(run.offset + most.max(page_bytes))),
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
        // Of a file only the beginning of its content is known.
        self.extent = Some((region, extent)).filter(|_| !self.serving.memory.is_file(region));
        Some(extent)
    }

    fn send_run(&mut self, run: &RegionRun, is_hole: bool, permit: &Permit) -> io::Result<()> {
        self.underway.push(run.pages);
        self.frames.clear();
        let mut staging = std::mem::take(&mut self.staging);
        if is_hole {
            self.push_frame(DataFrame::Zero(run.pages), None);
        } else {
            self.push_run(run, &mut staging);
            self.adapt(run);
        }
        let bytes: usize = self.frames.iter().map(frame_bytes).sum();
        self.serving.pace.leaves(permit, bytes as u64);
        let mut pieces = Vec::with_capacity(2 * self.frames.len());
        for (header, content) in &self.frames {
            pieces.push(Piece::bytes(header.bytes()));
            pieces.extend(content.map(Piece::memory));
        }
        // SAFETY: headers live in `self.frames`; content lies in `staging` or in memory that
        // the VMM keeps mapped.
        let sent = unsafe { self.stream.send_pieces(&mut pieces) };
        self.staging = staging;
        sent
    }

    /// Takes less the next time if this was mostly zeros, more if it was not.
    fn adapt(&mut self, run: &RegionRun) {
        let content: usize = self.frames.iter().filter_map(|(_, it)| it.map(|it| it.length)).sum();
        self.step = if (content as u64) < run.length / 2 {
            (self.step / 2).max(LEAST_CHUNK_BYTES)
        } else {
            (self.step * 2).min(CHUNK_BYTES)
        };
    }

    /// Frames for a run of which not everything may be readable.
    fn push_run(&mut self, run: &RegionRun, staging: &mut Staging) {
        let memory = &self.serving.memory;
        let page_bytes = run.length / run.pages.count;
        let length = if memory.is_file(run.region) { run.length as usize } else { 0 };
        let staging = staging.bytes(length);
        let pages = |from: u64, count| PageRange::new(PageNumber(run.pages.start.0 + from), count);
        let mut done = 0;
        while done < run.pages.count {
            let at = done * page_bytes;
            let into = &mut staging[(at as usize).min(length)..];
            let brought = memory.bring(run.region, run.offset + at, run.length - at, into);
            let whole = brought.run.length as u64 / page_bytes;
            self.push_content(pages(done, whole), brought.run, page_bytes);
            done += whole;
            if done < run.pages.count {
                let lost = if brought.is_cut { run.pages.count - done } else { 1 };
                let lost = pages(done, lost);
                tracing::error!(pages = %lost, "the source's memory cannot be read here");
                self.push_frame(DataFrame::Unreadable(lost), None);
                done += lost.count;
            }
        }
    }

    /// Frames for pages with content: those that are zero by runs, the others by runs.
    fn push_content(&mut self, pages: PageRange, content: RawRun, page_bytes: u64) {
        let part = |from: u64, count: u64| {
            content.part((from * page_bytes) as usize, (count * page_bytes) as usize)
        };
        // SAFETY: readable memory of whole pages, aligned to words.
        let is_zero_at = |page| unsafe { is_zero(part(page, 1)) };
        let mut start = 0;
        while start < pages.count {
            let zero = is_zero_at(start);
            let mut end = start + 1;
            while end < pages.count && is_zero_at(end) == zero {
                end += 1;
            }
            let count = end - start;
            let range = PageRange::new(PageNumber(pages.start.0 + start), count);
            if zero {
                self.push_frame(DataFrame::Zero(range), None);
            } else {
                let content = part(start, count);
                let frame = DataFrame::Content(range, content.length as u32);
                self.push_frame(frame, Some(content));
            }
            start = end;
        }
    }

    fn push_frame(&mut self, frame: DataFrame, content: Option<RawRun>) {
        let serving = self.serving;
        let mut header = frame.header(serving.stamp(self.generation));
        if serving.checksums {
            // SAFETY: memory is final, and staging is not touched before it has been sent.
            let bytes = content.map_or(&[][..], |run| unsafe { run.bytes() });
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

fn frame_bytes((_, content): &Frame) -> usize {
    HEADER_BYTES + content.map_or(0, |content| content.length)
}
