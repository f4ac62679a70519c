//! The thread that frees pages: on nobody's way, in batches, each noted before it goes.
//!
//! What has arrived is told in chunks of 8 MiB; a pass looks through those only. A page is
//! freed when no channel can be reading it any more: each took it before it was acknowledged,
//! if at all, and what is still being sent is left for later
//! ([`Hands`](crate::source::hands::Hands)). So nobody ever reads a freed page.
//!
//! A connection that ends waits for the step of freeing that is under way, and not for a disk
//! that is slow to note pages. Those are noted then and not freed: whoever comes next frees
//! them. Of all releasers of a ledger one works at a time, so that nothing is freed that another
//! has not noted to the end.

use super::{PAGE_BYTES, Released, overlapping};
use crate::source::serving::Serving;
use afterimage_protocol::bitmap::Bitmap;
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How long pages gather before they are freed.
const PAUSE: Duration = Duration::from_millis(250);
/// The same while the ledger's disk fails.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(2);
/// Pages of the source in a chunk: 8 MiB.
const CHUNK_PAGES: u64 = 2048;
/// What is noted, and freed, in one go.
const BATCH_PAGES: u64 = 4096;
/// Separate runs in one go.
const BATCH_RUNS: usize = 4096;
/// Bytes freed before requests are let go first.
const STEP_BYTES: u64 = 1 << 20;

/// Where pages have arrived since somebody looked.
#[derive(Clone, Debug)]
pub(in crate::source) struct Arrived(Arc<Bitmap>);

impl Arrived {
    /// For a guest of so many pages of the source: everything is to be looked at.
    pub(in crate::source) fn everything(pages: u64) -> Self {
        let chunks = Bitmap::new(pages.div_ceil(CHUNK_PAGES));
        chunks.set(PageRange::new(PageNumber(0), chunks.pages()), |_| ());
        Self(Arc::new(chunks))
    }

    /// Pages have arrived, numbered as the destination does.
    pub(in crate::source) fn add(&self, serving: &Serving, pages: PageRange) {
        let own = serving.memory.layout();
        for run in serving.layout.split(pages) {
            let first = own.pages_of(run.region).start.0 + run.offset / PAGE_BYTES;
            self.mark(PageRange::new(PageNumber(first), run.length / PAGE_BYTES));
        }
    }

    /// Pages of the source are to be looked at.
    fn mark(&self, pages: PageRange) {
        let first = pages.start.0 / CHUNK_PAGES;
        let last = (pages.start.0 + pages.count.max(1) - 1) / CHUNK_PAGES;
        self.0.set(PageRange::new(PageNumber(first), last - first + 1), |_| ());
    }

    /// The pages of the next chunk at or after `from` in which some have arrived.
    fn take(&self, from: u64) -> Option<PageRange> {
        let chunk = self.0.next_set(PageNumber(from / CHUNK_PAGES), 1)?;
        // Before its pages are looked at: what arrives later marks it again.
        self.0.clear(chunk, |_| ());
        Some(PageRange::new(PageNumber(chunk.start.0 * CHUNK_PAGES), CHUNK_PAGES))
    }
}

/// Frees pages as long as one connection lasts.
pub(in crate::source) struct Releaser {
    serving: Arc<Serving>,
    released: Arc<Released>,
    arrived: Arrived,
    batch: Vec<PageRange>,
    batch_pages: u64,
    /// A failure has been told.
    has_failed: bool,
}

impl Releaser {
    pub(in crate::source) fn new(
        serving: Arc<Serving>,
        released: Arc<Released>,
        arrived: Arrived,
    ) -> Self {
        let (batch, batch_pages, has_failed) = (Vec::new(), 0, false);
        Self { serving, released, arrived, batch, batch_pages, has_failed }
    }

    /// Until the connection ends, after every earlier releaser of this ledger.
    pub(in crate::source) fn run(mut self) {
        let released = Arc::clone(&self.released);
        let _turn = released.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if self.released.is_in_doubt.load(Ordering::Acquire) && !self.free_again() {
            return;
        }
        let mut pause = PAUSE;
        while self.serving.pause(pause) {
            pause = if self.pass() { PAUSE } else { PAUSE_AFTER_FAILURE };
        }
    }

    /// Frees what an earlier process or connection noted, and perhaps no more than that. All of it has been
    /// acknowledged: that was compared when the destination attached. `false` if it is time to
    /// stop.
    fn free_again(&self) -> bool {
        for run in self.released.bitmap.runs() {
            if !self.free(run) {
                return false;
            }
        }
        self.released.freed.store(self.released.noted(), Ordering::Relaxed);
        self.released.is_in_doubt.store(false, Ordering::Release);
        true
    }

    /// Frees what has arrived since the last pass; `false` if that could not be noted.
    pub(super) fn pass(&mut self) -> bool {
        let mut from = 0;
        while let Some(chunk) = self.arrived.take(from) {
            from = chunk.start.0 + chunk.count;
            self.gather(chunk);
            if self.batch_pages >= BATCH_PAGES || self.batch.len() >= BATCH_RUNS {
                if !self.serving.wait_for_hands() {
                    return true;
                }
                if !self.release() {
                    return false;
                }
            }
        }
        self.batch.is_empty() || !self.serving.wait_for_hands() || self.release()
    }

    /// Adds to the batch what may be freed of some pages of the source.
    fn gather(&mut self, pages: PageRange) {
        let serving = Arc::clone(&self.serving);
        let (memory, served) = (&serving.memory, &serving.layout);
        for piece in memory.layout().split(pages) {
            let region = memory.layout().regions()[piece.region];
            let grain = memory.grain(piece.region);
            let (start, end) = grain.around(piece.offset, piece.offset + piece.length);
            let (start, end) = (start, end.min(grain.before(region.length)));
            if start >= end {
                continue;
            }
            let shift = served.regions()[piece.region].page_size.shift();
            let first = served.pages_of(piece.region).start.0;
            let mut rest = overlapping(served, piece.region, start, end - start);
            let rest_end = rest.start.0 + rest.count;
            while let Some(acked) = serving.book.first_acked_in(rest) {
                let next = acked.start.0 + acked.count;
                rest = PageRange::new(PageNumber(next), rest_end - next);
                let from = ((acked.start.0 - first) << shift).max(start);
                let to = ((next - first) << shift).min(end);
                // Only whole pages of what is behind it.
                self.gather_bytes(piece.region, grain.after(from), grain.before(to));
            }
        }
    }

    fn gather_bytes(&mut self, region: usize, from: u64, to: u64) {
        let first = self.serving.memory.layout().pages_of(region).start.0;
        let (mut page, end) = (first + from / PAGE_BYTES, first + to / PAGE_BYTES);
        while page < end {
            let rest = PageRange::new(PageNumber(page), end - page);
            let Some(run) = self.released.bitmap.first_clear_in(rest) else { return };
            self.batch_pages += run.count;
            self.batch.push(run);
            page = run.start.0 + run.count;
        }
    }

    /// Notes the batch and frees it; `false` if it could not be noted, and nothing is freed.
    fn release(&mut self) -> bool {
        let mut batch = std::mem::take(&mut self.batch);
        self.batch_pages = 0;
        self.leave_sending(&mut batch);
        if batch.is_empty() {
            return true;
        }
        batch.sort_unstable_by_key(|run| run.start.0);
        match self.released.note(&batch) {
            Ok(news) => {
                self.has_failed = false;
                if batch.into_iter().all(|run| self.free(run)) {
                    self.released.freed.fetch_add(news, Ordering::Relaxed);
                } else {
                    self.released.is_in_doubt.store(true, Ordering::Release);
                }
                true
            }
            Err(error) => {
                if !self.has_failed {
                    tracing::error!(%error, "the release ledger cannot be written: no page is freed");
                }
                self.has_failed = true;
                for run in batch {
                    self.arrived.mark(run);
                }
                false
            }
        }
    }

    /// Leaves what is being sent for the next pass.
    fn leave_sending(&self, batch: &mut Vec<PageRange>) {
        let Serving { memory, layout, hands, .. } = &*self.serving;
        for run in hands.sending().into_iter().flat_map(|it| layout.split(it).collect::<Vec<_>>()) {
            let (start, end) = memory.grain(run.region).around(run.offset, run.offset + run.length);
            let first = memory.layout().pages_of(run.region).start.0;
            let sent = PageRange::new(
                PageNumber(first + start / PAGE_BYTES),
                (end - start).div_ceil(PAGE_BYTES),
            );
            if cut_out(batch, sent) {
                self.arrived.mark(sent);
            }
        }
    }

    /// Frees pages that are noted. If that fails they take memory, and are lost nevertheless.
    /// `false` if the connection ended before.
    fn free(&self, pages: PageRange) -> bool {
        let memory = &self.serving.memory;
        for piece in memory.layout().split(pages) {
            let step = STEP_BYTES.max(memory.grain(piece.region).bytes);
            let mut done = 0;
            while done < piece.length {
                let length = step.min(piece.length - done);
                self.serving.stand_back();
                let free = || memory.free(piece.region, piece.offset + done, length);
                let Some(freed) = self.serving.while_open(free) else { return false };
                if let Err(error) = freed
                    && !self.released.has_failed.swap(true, Ordering::Relaxed)
                {
                    tracing::error!(%error, region = piece.region, "pages could not be freed");
                }
                done += length;
            }
        }
        true
    }
}

/// Takes pages out of runs; whether there were any.
fn cut_out(runs: &mut Vec<PageRange>, out: PageRange) -> bool {
    let (out_start, out_end) = (out.start.0, out.start.0 + out.count);
    let mut kept = Vec::with_capacity(runs.len() + 1);
    let mut is_cut = false;
    for run in runs.drain(..) {
        let (start, end) = (run.start.0, run.start.0 + run.count);
        if end <= out_start || out_end <= start {
            kept.push(run);
            continue;
        }
        is_cut = true;
        if start < out_start {
            kept.push(PageRange::new(run.start, out_start - start));
        }
        if out_end < end {
            kept.push(PageRange::new(PageNumber(out_end), end - out_end));
        }
    }
    *runs = kept;
    is_cut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_out_of_runs_is_gone_and_nothing_else() {
        let range = |start, end| PageRange::new(PageNumber(start), end - start);
        let cut = |out| {
            let mut runs = vec![range(10, 20), range(25, 26), range(30, 40)];
            let is_cut = cut_out(&mut runs, out);
            (is_cut, runs)
        };
        let all = vec![range(10, 20), range(25, 26), range(30, 40)];
        assert_eq!(cut(range(0, 10)), (false, all.clone()));
        assert_eq!(cut(range(20, 25)), (false, all));
        let middle = vec![range(10, 12), range(14, 20), range(25, 26), range(30, 40)];
        assert_eq!(cut(range(12, 14)), (true, middle));
        assert_eq!(cut(range(15, 35)), (true, vec![range(10, 15), range(35, 40)]));
        assert_eq!(cut(range(0, 50)), (true, vec![]));
    }
}
