//! Answering page requests. The latency of a fault hangs on this thread.

use super::hands::Hand;
use super::serving::{Serving, Underway};
use crate::polling::{AdaptivePolling, Idle};
use crate::steps;
use crate::sys::holes::Presence;
use crate::sys::mapping::{RawRun, Staging, is_zero};
use crate::sys::socket::{Piece, Wait};
use crate::transport::Stream;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{DataFrame, Generation, HEADER_BYTES, Header};
use std::io;
use std::sync::atomic::Ordering;

/// Requests read in one call.
const BATCH: usize = 64;

/// One request channel.
pub(super) struct Responder<'s> {
    serving: &'s Serving,
    stream: Stream,
    generation: Generation,
    underway: Underway,
    hand: Hand,
    polling: AdaptivePolling,
    buffer: Vec<u8>,
    filled: usize,
    staging: Staging,
}

impl<'s> Responder<'s> {
    pub(super) fn new(
        serving: &'s Serving,
        stream: Stream,
        generation: Generation,
        underway: Underway,
    ) -> Self {
        Self {
            hand: serving.hands.join(),
            polling: AdaptivePolling::new(serving.polling),
            buffer: vec![0; BATCH * HEADER_BYTES],
            filled: 0,
            staging: Staging::default(),
            serving,
            stream,
            generation,
            underway,
        }
    }

    /// Answers until the connection ends.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            self.read()?;
            let whole = self.filled / HEADER_BYTES;
            if whole == 0 {
                continue;
            }
            // Answers to requests that came before the switchover wait for it.
            if !self.serving.wait_final(&self.stream) {
                return Ok(());
            }
            self.serving.urgent.fetch_add(1, Ordering::AcqRel);
            let answered = self.answer(whole);
            self.serving.urgent.fetch_sub(1, Ordering::AcqRel);
            answered?;
            self.buffer.copy_within(whole * HEADER_BYTES..self.filled, 0);
            self.filled -= whole * HEADER_BYTES;
        }
    }

    fn read(&mut self) -> io::Result<()> {
        loop {
            let wait = match self.polling.idle() {
                Idle::Poll => Wait::Never,
                Idle::Block => Wait::Block,
            };
            match self.stream.receive(&mut self.buffer[self.filled..], wait) {
                Ok(got) => {
                    self.filled += got;
                    self.polling.busy();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.polling.pause(),
                Err(error) => return Err(error),
            }
        }
    }

    fn answer(&mut self, requests: usize) -> io::Result<()> {
        for index in 0..requests {
            let bytes = &self.buffer[index * HEADER_BYTES..][..HEADER_BYTES];
            let header = Header::from_bytes(bytes.try_into().expect("a whole header"));
            if self.serving.checksums {
                header.verify([]).map_err(io::Error::other)?;
            }
            let stamp = self.serving.stamp(self.generation);
            if !stamp.admits(header.stamp()).map_err(io::Error::other)? {
                self.serving.counters.stale.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            let frame = DataFrame::parse(&header, &self.serving.layout, "request")
                .map_err(io::Error::other)?;
            let DataFrame::Request(pages) = frame else {
                return Err(io::Error::other("a destination may only send requests"));
            };
            for page in pages.iter() {
                self.answer_page(page)?;
            }
        }
        Ok(())
    }

    fn answer_page(&mut self, page: PageNumber) -> io::Result<()> {
        let serving = self.serving;
        let pages = PageRange::one(page);
        steps::pass("source", "Answers");
        let taking = self.hand.take();
        // A request that crossed with the page's arrival, after which it may be freed.
        if !serving.book.take_urgent(page) {
            return Ok(());
        }
        serving.counters.requested.fetch_add(1, Ordering::Relaxed);
        self.remember(pages);
        serving.hint.store(page.0 + 1, Ordering::Relaxed);
        let run = serving.layout.split(pages).next().expect("checked by parse");
        let memory = &serving.memory;
        let length = run.length as usize;
        let is_file = memory.is_file(run.region);
        let end = run.offset + run.length;
        let mut presence = Presence::Unknown;
        if !is_file {
            let Some(data) = memory.next_data(run.region, run.offset, end) else {
                // Nothing of it is read: it may go, however long the peer takes.
                drop(taking);
                return self.send(DataFrame::Zero(pages), None);
            };
            if data.start == run.offset && data.end >= end {
                presence = data.presence;
            }
        }
        let mut staging = std::mem::take(&mut self.staging);
        let into = staging.bytes(if is_file { length } else { 0 });
        let content = memory.bring(run.region, run.offset, run.length, presence, into).run;
        // SAFETY: readable memory of a whole page, aligned to words.
        let is_zero = content.length == length && unsafe { is_zero(content) };
        let _sending = taking.sends(std::iter::once(pages));
        let sent = if content.length < length {
            serving.counters.unreadable.fetch_add(1, Ordering::Relaxed);
            tracing::error!(page = page.0, "the source's memory cannot be read here");
            self.underway.unreadable(pages);
            self.send(DataFrame::Unreadable(pages), None)
        } else if is_zero {
            self.send(DataFrame::Zero(pages), None)
        } else {
            self.send(DataFrame::Content(pages, run.length as u32), Some(content))
        };
        self.staging = staging;
        sent
    }

    /// Notes what would be lost with this channel. Where that is too much, because nothing is
    /// acknowledged, the page goes out in background too instead.
    fn remember(&self, pages: PageRange) {
        let Serving { book, signal, .. } = self.serving;
        if self.underway.is_full() {
            self.underway.settle(book);
        }
        if self.underway.is_full() {
            book.requeue(pages);
            signal.look_again();
        } else {
            self.underway.push(pages);
        }
    }

    fn send(&self, frame: DataFrame, content: Option<RawRun>) -> io::Result<()> {
        let mut header = frame.header(self.serving.stamp(self.generation));
        if self.serving.checksums {
            // SAFETY: memory is final, and staging is not touched before it has been sent.
            let bytes = content.map_or(&[][..], |run| unsafe { run.bytes() });
            header = header.sealed([bytes]);
        }
        let mut pieces = [Piece::bytes(header.bytes()), Piece::bytes(&[])];
        let mut count = 1;
        if let Some(run) = content {
            pieces[1] = Piece::memory(run);
            count = 2;
        }
        // SAFETY: the header lives here; memory was tested to be readable.
        unsafe { self.stream.send_pieces(&mut pieces[..count]) }
    }
}
