//! Sending what nobody has asked for yet.
//!
//! A stream takes run after run from the book until it has enough to send, or has looked
//! through enough memory, and sends all of it in one call.

mod batch;
mod hot;
mod sight;

use super::hands::Hand;
use super::serving::{LOOK_AFTER, Mode, NO_HINT, Serving, Underway};
use crate::sys::holes::Presence;
use crate::sys::mapping::{RawRun, is_zero};
use crate::transport::Stream;
use afterimage_protocol::layout::{PageNumber, PageRange, RegionRun};
use afterimage_protocol::wire::{DataFrame, Generation};
use batch::Batch;
use hot::Hot;
use sight::Sight;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Bytes sent in one go: small enough that an urgent page does not wait long behind them.
const CHUNK_BYTES: u64 = 256 << 10;
/// The least that is read of a file in one go, where it turns out to be full of holes.
const LEAST_READ_BYTES: u64 = 16 << 10;
/// Bytes of memory that are looked through before what they hold is sent: zeros that were
/// written cost time, and nothing on the wire.
const LOOKED_BYTES: u64 = 1 << 20;
/// Of a hole, its page tables are looked through: 8 bytes for each page of 4 KiB.
const PAGE_TABLE_SHARE: u64 = 512;
/// Runs taken before they are sent.
const MAX_RUNS: usize = 512;
/// Content read from files for one batch, and the zeros between: more only for a larger page.
const STAGING_BYTES: u64 = 2 * CHUNK_BYTES;
/// The most pages in one run of zeros.
const MAX_ZERO_PAGES: u64 = 1 << 31;

/// One background stream.
pub(super) struct Streamer<'s> {
    serving: &'s Serving,
    stream: Stream,
    generation: Generation,
    underway: Underway,
    hand: Hand,
    cursor: PageNumber,
    sight: Sight,
    batch: Batch,
    /// Bytes that are read of a file in one go: fewer where the last were mostly zeros, because
    /// of a file it is not known where its holes begin.
    step: u64,
    /// The precopy pass of what is gathered.
    pass: Option<u16>,
    /// How far it has looked for what the guest has written last.
    hot: Hot,
    /// When it looked last whether its connection has ended.
    looked: Instant,
}

/// What a stream would send next.
struct Next {
    pages: PageRange,
    is_hole: bool,
    bytes: u64,
    /// Bytes of staging that it needs.
    staging: u64,
    /// Whether all of it is in memory.
    presence: Presence,
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
            hand: serving.hands.join(),
            serving,
            stream,
            generation,
            underway,
            cursor,
            sight: Sight::default(),
            batch: Batch::default(),
            step: CHUNK_BYTES,
            pass: None,
            hot: Hot::default(),
            looked: Instant::now(),
        }
    }

    /// Sends until the connection ends.
    pub(super) fn run(mut self) -> io::Result<()> {
        while !self.serving.is_closing() {
            let seen = self.serving.signal.changes();
            if self.underway.is_full() {
                self.underway.settle(&self.serving.book);
                if self.underway.is_full() && !self.waits(seen) {
                    return Ok(());
                }
                continue;
            }
            if !matches!(*self.serving.mode(), Mode::Early(_) | Mode::Final) {
                if !self.waits(seen) {
                    return Ok(());
                }
                continue;
            }
            self.serving.signal.wait_for_state(|| self.serving.is_closing());
            let Some(permit) = self.serving.permit(&self.stream, CHUNK_BYTES) else {
                return Ok(());
            };
            self.serving.stand_back();
            let taking = self.hand.take();
            let mode = self.serving.mode();
            self.pass = match *mode {
                Mode::Early(pass) => Some(pass),
                _ => None,
            };
            if matches!(*mode, Mode::Early(_) | Mode::Final) {
                self.sight.enter(*mode);
                self.gather(permit.bytes);
            } else {
                self.batch.clear();
            }
            drop(mode);
            self.serving.pace.leaves(&permit, self.batch.bytes());
            if self.batch.is_empty() {
                drop(taking);
                if !self.waits(seen) {
                    return Ok(());
                }
                continue;
            }
            let _sending = taking.sends(self.batch.content());
            self.serving.stand_back();
            self.underway.leaves();
            let stamp = self.serving.stamp(self.generation);
            self.batch.send(&self.stream, stamp, self.pass, self.serving.checksums)?;
        }
        Ok(())
    }

    /// Waits until something has changed since `seen`; `false` if the connection has ended.
    /// Acknowledgements of others change something all the time, so it looks for itself too.
    fn waits(&mut self, seen: u64) -> bool {
        if !self.serving.wait_change(&self.stream, seen) {
            return false;
        }
        if self.looked.elapsed() < LOOK_AFTER {
            return true;
        }
        self.looked = Instant::now();
        !self.stream.has_ended()
    }

    /// Takes pages until about `most` bytes are to be sent: no more than that and a page.
    fn gather(&mut self, most: u64) {
        self.batch.clear();
        let (mut looked, mut runs) = (0, 0);
        while looked < LOOKED_BYTES && runs < MAX_RUNS && !self.underway.is_full() {
            let left = most.saturating_sub(self.batch.bytes());
            // What is left of the last pages is not worth a small run.
            if left <= most / 8 {
                return;
            }
            let Some(next) = self.next(left) else { return };
            if next.staging > 0 && next.staging > self.room().length as u64 {
                return;
            }
            runs += 1;
            // Another stream may have been quicker, also with a part of it.
            let Some(pages) = self.serving.book.take_in(next.pages) else { continue };
            self.cursor = PageNumber(pages.start.0 + pages.count);
            self.underway.push(pages);
            if next.is_hole {
                looked += next.bytes / PAGE_TABLE_SHARE;
                self.push(DataFrame::Zero(pages), None);
            } else if let Some(run) = self.serving.layout.split(pages).next() {
                debug_assert_eq!(run.pages, pages, "within one region");
                looked += run.length;
                self.push_run(&run, next.presence);
            }
        }
    }

    /// The next pages to send: near the last request, else where this stream is, else from the
    /// start again. They lie in one region.
    fn next(&mut self, most: u64) -> Option<Next> {
        let Serving { hint, layout, book, memory, .. } = self.serving;
        let hint = hint.swap(NO_HINT, Ordering::Relaxed);
        if hint < layout.page_count() {
            self.cursor = PageNumber(hint);
        }
        let is_near = hint < layout.page_count();
        let hot = if is_near { None } else { self.hot.next(self.serving) };
        let first = match hot {
            Some(hot) => hot.start,
            None => book.peek(self.cursor).or_else(|| book.peek(PageNumber(0)))?,
        };
        let RegionRun { region, offset, length: page_bytes, .. } =
            layout.split(PageRange::one(first)).next()?;
        let length = layout.regions()[region].length;
        let seen = self.sight.at(memory, (region, length), offset, page_bytes);
        // A larger page may hold what another look would find too.
        let presence = seen.content.filter(|_| page_bytes == 4096).map(|extent| extent.presence);
        let whole = |end: u64| end / page_bytes * page_bytes;
        let (is_hole, end) = match seen.content {
            None => (true, whole(seen.end)),
            // A page that is partly data is data.
            Some(extent) if extent.start >= offset + page_bytes => (true, whole(extent.start)),
            Some(extent) => {
                let most = if memory.is_file(region) { most.min(self.step) } else { most };
                (false, extent.end.min(offset + most.max(page_bytes)))
            }
        };
        let most = hot.map_or(MAX_ZERO_PAGES, |hot| hot.count.min(MAX_ZERO_PAGES));
        let pages = (end - offset).div_ceil(page_bytes).min(most);
        let is_read = !is_hole && memory.is_file(region);
        let bytes = pages * page_bytes;
        let is_copied = !is_hole && self.pass.is_some() && self.serving.checksums;
        let staging = if is_read || is_copied { bytes } else { 0 };
        let (pages, presence) =
            (PageRange::new(first, pages), presence.unwrap_or(Presence::Unknown));
        Some(Next { pages, is_hole, bytes, staging, presence })
    }

    /// Where content of files is read to.
    fn room(&mut self) -> RawRun {
        let regions = self.serving.layout.regions().iter();
        let largest = regions.map(|region| region.page_size.bytes()).max().unwrap_or(0);
        self.batch.room(largest.max(STAGING_BYTES) as usize)
    }

    /// Frames for a run of which not everything may be readable.
    fn push_run(&mut self, run: &RegionRun, presence: Presence) {
        let memory = &self.serving.memory;
        let is_file = memory.is_file(run.region);
        let page_bytes = run.length / run.pages.count;
        let pages = |from: u64, count| PageRange::new(PageNumber(run.pages.start.0 + from), count);
        let before = self.batch.bytes();
        // What the guest may write meanwhile has no checksum.
        let is_copied = !is_file && self.pass.is_some() && self.serving.checksums;
        let (mut done, mut first_zero, mut ends_in_content) = (0, None, false);
        while done < run.pages.count {
            let (at, mut into) = (done * page_bytes, &mut [][..]);
            let length = run.length - at;
            if is_file {
                // SAFETY: the rest of the batch's staging, which nobody else uses.
                into = unsafe { self.room().part(0, length as usize).bytes_mut() };
            }
            let mut brought = memory.bring(run.region, run.offset + at, length, presence, into);
            if is_copied {
                let copy = self.room().part(0, brought.run.length);
                // SAFETY: readable memory; the rest of the batch's staging is nobody else's.
                unsafe { copy.copy_from(brought.run) };
                brought.run = copy;
            }
            let whole = brought.run.length as u64 / page_bytes;
            let (zero, kept) = self.push_content(pages(done, whole), brought.run, page_bytes);
            first_zero = first_zero.or_else(|| zero.map(|zero| at + zero * page_bytes));
            if is_file || is_copied {
                self.batch.keep((kept * page_bytes) as usize);
            }
            done += whole;
            ends_in_content = kept == whole;
            if done < run.pages.count {
                let lost = if brought.is_cut { run.pages.count - done } else { 1 };
                let lost = pages(done, lost);
                tracing::error!(pages = %lost, "the source's memory cannot be read here");
                self.underway.unreadable(lost);
                if self.pass.is_some() {
                    // It is tried again once memory is final.
                    self.serving.unreadable_early.fetch_add(lost.count, Ordering::AcqRel);
                } else {
                    self.push(DataFrame::Unreadable(lost), None);
                }
                done += lost.count;
            }
        }
        if is_file {
            self.adapt(run, first_zero, self.batch.bytes() - before);
            if !ends_in_content {
                // Perhaps a hole begins there.
                self.sight.forget();
            }
        }
    }

    /// Reads less of a file the next time if much of this was a hole, more if it was not.
    fn adapt(&mut self, run: &RegionRun, first_zero: Option<u64>, sent: u64) {
        if sent < run.length / 4
            && let Some(zero) = first_zero
        {
            // Zeros that were written take no longer to read than to look for.
            let (from, end) = (run.offset + zero, run.offset + run.length);
            let data = self.serving.memory.next_data(run.region, from, end);
            if data.is_none_or(|data| data.start > from) {
                self.step = (self.step / 2).max(LEAST_READ_BYTES);
                return;
            }
        }
        if sent >= run.length / 2 {
            self.step = (self.step * 2).min(CHUNK_BYTES);
        }
    }

    /// Frames for pages with content: those that are zero by runs, the others by runs. Returns
    /// the first that is zero, and how many there are up to the last that is not.
    fn push_content(
        &mut self,
        pages: PageRange,
        content: RawRun,
        page_bytes: u64,
    ) -> (Option<u64>, u64) {
        let part = |from: u64, count: u64| {
            content.part((from * page_bytes) as usize, (count * page_bytes) as usize)
        };
        // SAFETY: readable memory of whole pages, aligned to words.
        let is_zero_at = |page| unsafe { is_zero(part(page, 1)) };
        let (mut start, mut first_zero, mut kept) = (0, None, 0);
        let mut zero = pages.count > 0 && is_zero_at(0);
        while start < pages.count {
            let mut end = start + 1;
            let mut next = zero;
            while end < pages.count {
                next = is_zero_at(end);
                if next != zero {
                    break;
                }
                end += 1;
            }
            let count = end - start;
            let range = PageRange::new(PageNumber(pages.start.0 + start), count);
            if zero {
                first_zero.get_or_insert(start);
                self.push(DataFrame::Zero(range), None);
            } else {
                let content = part(start, count);
                let frame = DataFrame::Content(range, content.length as u32);
                self.push(frame, Some(content));
                kept = end;
            }
            (start, zero) = (end, next);
        }
        (first_zero, kept)
    }

    fn push(&mut self, frame: DataFrame, content: Option<RawRun>) {
        let counters = &self.serving.counters;
        let counter = match frame {
            DataFrame::Content(..) | DataFrame::Zero(..) if self.pass.is_some() => &counters.early,
            DataFrame::Content(..) => &counters.background,
            DataFrame::Unreadable(..) => &counters.unreadable,
            _ => &counters.zero,
        };
        let (DataFrame::Content(pages, _)
        | DataFrame::Zero(pages)
        | DataFrame::Unreadable(pages)
        | DataFrame::Request(pages)) = frame;
        counter.fetch_add(pages.count, Ordering::Relaxed);
        let bytes = content.map_or(0, |content| content.length as u64);
        counters.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.batch.push(frame, content);
    }
}
