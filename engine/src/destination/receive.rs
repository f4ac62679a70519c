//! Receiving what nobody has asked for yet.

use super::arrivals::Arrivals;
use super::pages::{Claim, Target};
use crate::sys::mapping::RawRun;
use crate::transport::Stream;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{DataFrame, Generation, HEADER_BYTES, Header};
use std::io;
use std::sync::atomic::Ordering;

/// Bytes that are claimed and received in one go, where pages are no larger.
const PIECE_BYTES: u64 = 256 << 10;

/// One background stream.
pub(super) struct Receiver<'a> {
    arrivals: &'a Arrivals,
    stream: Stream,
    generation: Generation,
    /// Where pages are copied from. Resident, because it is written over and over.
    staging: Vec<u8>,
}

impl<'a> Receiver<'a> {
    pub(super) fn new(arrivals: &'a Arrivals, stream: Stream, generation: Generation) -> Self {
        Self { arrivals, stream, generation, staging: Vec::new() }
    }

    /// Receives until the connection ends. The claims of a piece that broke off are given
    /// back, and whoever waits for one of its pages asks again.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            let mut header = [0; HEADER_BYTES];
            self.stream.receive_exact(&mut header)?;
            let header = Header::from_bytes(header);
            let stamp = self.arrivals.stamp(self.generation);
            if !stamp.admits(header.stamp()).map_err(io::Error::other)? {
                self.arrivals.counters.stale.fetch_add(1, Ordering::Relaxed);
                self.stream.skip(header.length().into())?;
                continue;
            }
            let layout = self.arrivals.pages.layout();
            let frame =
                DataFrame::parse(&header, layout, "background").map_err(io::Error::other)?;
            if self.arrivals.checksums && header.length() == 0 {
                header.verify([]).map_err(io::Error::other)?;
            }
            match frame {
                DataFrame::Content(pages, _) if self.arrivals.checksums => {
                    self.checked_content(&header, pages)?;
                }
                DataFrame::Content(pages, length) => self.content(pages, length.into())?,
                DataFrame::Zero(pages) => {
                    self.arrivals.pages.zero(pages);
                    self.arrivals.acknowledge_complete(pages);
                }
                DataFrame::Unreadable(pages) => self.arrivals.unreadable(pages),
                DataFrame::Request(_) => {
                    return Err(io::Error::other("a source may not send requests"));
                }
            }
        }
    }

    fn content(&mut self, pages: PageRange, length: u64) -> io::Result<()> {
        let page_bytes = length / pages.count;
        let step = (PIECE_BYTES / page_bytes).max(1);
        let end = pages.start.0 + pages.count;
        let mut next = pages.start.0;
        while next < end {
            let piece = PageRange::new(PageNumber(next), step.min(end - next));
            if let Err(error) = self.piece(piece, piece.count * page_bytes) {
                // Pages that were discarded meanwhile became complete when they were given
                // back, and whoever discarded them could not know.
                self.arrivals.acknowledge_complete(piece);
                return Err(error);
            }
            next += piece.count;
        }
        Ok(())
    }

    fn piece(&mut self, piece: PageRange, length: u64) -> io::Result<()> {
        let arrivals = self.arrivals;
        let claim = arrivals.pages.claim(piece);
        if let Err(error) = self.receive_piece(&claim, length) {
            drop(claim);
            arrivals.given_back(piece);
            return Err(error);
        }
        arrivals.counters.bytes.fetch_add(length, Ordering::Relaxed);
        claim
            .finish(&self.staging, |run| arrivals.acknowledge(run))
            .map_err(|error| arrivals.failed(error))
    }

    fn receive_piece(&mut self, claim: &Claim<'_>, length: u64) -> io::Result<()> {
        let Some(targets) = claim.targets() else {
            self.staging.resize(self.staging.len().max(length as usize), 0);
            return self.stream.receive_exact(&mut self.staging[..length as usize]);
        };
        for target in targets {
            match target {
                // SAFETY: the alias is mapped as long as `pages` lives, and these pages are
                // claimed by this thread.
                Target::Memory(run) => unsafe { self.stream.receive_run(run) }?,
                Target::Nowhere(bytes) => self.stream.skip(bytes)?,
            }
        }
        Ok(())
    }

    /// Content with a checksum: received as a whole, verified, and only then placed.
    fn checked_content(&mut self, header: &Header, pages: PageRange) -> io::Result<()> {
        let length = header.length() as usize;
        self.staging.resize(self.staging.len().max(length), 0);
        self.stream.receive_exact(&mut self.staging[..length])?;
        header.verify([&self.staging[..length]]).map_err(io::Error::other)?;
        let arrivals = self.arrivals;
        arrivals.counters.bytes.fetch_add(length as u64, Ordering::Relaxed);
        let claim = arrivals.pages.claim(pages);
        let mut at = 0;
        for target in claim.targets().unwrap_or_default() {
            match target {
                Target::Memory(run) => {
                    let RawRun { length, .. } = run;
                    // SAFETY: as in `piece`.
                    unsafe { run.write(&self.staging[at..at + length]) };
                    at += length;
                }
                Target::Nowhere(bytes) => at += bytes as usize,
            }
        }
        claim
            .finish(&self.staging, |run| arrivals.acknowledge(run))
            .map_err(|error| arrivals.failed(error))
    }
}

#[cfg(test)]
mod tests;
