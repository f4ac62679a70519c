//! A snapshot's memory that lies on this machine too: who waits for a page gets it from there.
//!
//! Invariants: only what is there already is taken, because this thread waits for nothing but faults
//! and answers; everything else is asked for, and not looked for here again (a page that cannot be
//! put in place would be tried for ever, at each fault of whoever it wakes). Memory of a guest that
//! moves is never taken: it changes, and only its source knows when it is final.

use super::{Asked, FaultThread};
use crate::source::SourceMemory;
use crate::sys::mapping::{RawRun, Staging, is_zero};
use afterimage_protocol::layout::{PageNumber, PageRange};
use std::sync::Arc;

/// Where pages are taken from, and put on the way.
#[derive(Debug)]
pub(in crate::destination) struct Image {
    memory: Arc<SourceMemory>,
    staging: Staging,
}

impl Image {
    /// Of the same regions as the destination's memory, which the caller has compared.
    pub(in crate::destination) fn new(memory: Arc<SourceMemory>) -> Self {
        Self { memory, staging: Staging::default() }
    }
}

impl FaultThread {
    /// Takes pages from this image from now on, and those that are asked for already.
    pub(super) fn take_from(&mut self, image: Image) {
        self.image = Some(image);
        let pages: Vec<_> = self.asked.keys().copied().collect();
        for page in pages {
            self.take_from_image(page);
        }
    }

    /// Brings a page that somebody waits for.
    pub(super) fn take_or_ask(&mut self, page: PageNumber) {
        // What was asked for once is not there, or cannot be put in place.
        let is_new = !self.asked.contains_key(&page) && !self.roomless.contains(page);
        if is_new && self.take_from_image(page) {
            return;
        }
        self.ask(page);
        if self.image.is_some() {
            // What is taken for other faults may take its time.
            self.flush();
        }
    }

    /// Puts a page in place that somebody waits for, if it can be had at once.
    fn take_from_image(&mut self, page: PageNumber) -> bool {
        let Some(mut image) = self.image.take() else { return false };
        let is_taken = self.try_image(&mut image, page);
        self.image = Some(image);
        is_taken
    }

    fn try_image(&mut self, image: &mut Image, page: PageNumber) -> bool {
        let since = self.read_at;
        let pages = PageRange::one(page);
        let Some(run) = self.arrived.pages.layout().split(pages).next() else { return false };
        let content = image.staging.bytes(run.length as usize);
        if !image.memory.bring_at_once(run.region, run.offset, content) {
            return false;
        }
        // Another vCPU may have asked for it before it was in memory.
        let asked = Asked { since: Some(since), last: since, first: since };
        self.asked.entry(page).or_insert(asked).since.get_or_insert(since);
        let raw = RawRun { start: content.as_mut_ptr(), length: content.len() };
        // SAFETY: all of the staging, which begins at a word.
        if unsafe { is_zero(raw) } {
            self.take_zeros(pages);
        } else if let Err(error) = self.place(page, content) {
            // Told by then; it is asked for with the next connection.
            self.lose_line(&error);
        }
        true
    }
}
