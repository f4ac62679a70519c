//! Receiving what nobody has asked for yet.

use super::arrivals::Arrivals;
use super::pages::{Claim, Target};
use crate::sys::mapping::RawRun;
use crate::transport::{Reader, Stream};
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{DataFrame, Generation, HEADER_BYTES, Header};
use std::io;
use std::sync::atomic::Ordering;

/// Bytes that are claimed and received in one go, where pages are no larger.
const PIECE_BYTES: u64 = 256 << 10;
/// Content of at least so many bytes is received straight to where it belongs. Of less, many
/// frames come in one call, and another copy costs less than calls of their own.
const LARGE_BYTES: usize = 32 << 10;

/// One background stream.
pub(super) struct Receiver<'a> {
    arrivals: &'a Arrivals,
    reader: Reader,
    generation: Generation,
    news: News<'a>,
    /// Where large content is copied from. Resident, because it is written over and over.
    staging: Vec<u8>,
}

/// Pages that have become complete and wait to be acknowledged: runs that follow one another
/// are told as one.
struct News<'a> {
    arrivals: &'a Arrivals,
    run: Option<PageRange>,
}

impl News<'_> {
    fn add(&mut self, run: PageRange) {
        match &mut self.run {
            Some(last) if last.end() == Some(run.start) => last.count += run.count,
            _ => {
                self.tell();
                self.run = Some(run);
            }
        }
    }

    /// Early copies are acknowledged at once: how their acknowledgement and the end of the
    /// passes follow each other matters.
    fn has_come(&mut self, run: PageRange, pass: Option<u16>) {
        match pass {
            None => self.add(run),
            Some(_) => self.arrivals.acknowledge(run),
        }
    }

    fn tell(&mut self) {
        if let Some(run) = self.run.take() {
            self.arrivals.acknowledge(run);
        }
    }
}

impl<'a> Receiver<'a> {
    pub(super) fn new(arrivals: &'a Arrivals, stream: Stream, generation: Generation) -> Self {
        let (reader, news) = (Reader::new(stream), News { arrivals, run: None });
        Self { arrivals, reader, generation, news, staging: Vec::new() }
    }

    /// Receives until the connection ends. The claims of a piece that broke off are given
    /// back, and whoever waits for one of its pages asks again.
    pub(super) fn run(mut self) -> io::Result<()> {
        loop {
            if let Err(error) = self.frame() {
                self.news.tell();
                return Err(error);
            }
        }
    }

    fn frame(&mut self) -> io::Result<()> {
        let header = Header::from_bytes(self.next_header()?);
        let arrivals = self.arrivals;
        if self.reader.here() < header.length() as usize {
            // Its content may keep this thread waiting.
            self.news.tell();
        }
        let stamp = arrivals.stamp(self.generation);
        if !stamp.admits(header.stamp()).map_err(io::Error::other)? {
            arrivals.counters.stale.fetch_add(1, Ordering::Relaxed);
            return self.reader.skip(header.length().into());
        }
        let layout = arrivals.pages.layout();
        let frame = DataFrame::parse(&header, layout, "background").map_err(io::Error::other)?;
        if arrivals.checksums && header.length() == 0 {
            header.verify([]).map_err(io::Error::other)?;
        }
        if let Some(pass) = header.pass() {
            return self.early_frame(&header, frame, pass);
        }
        if arrivals.pages.is_taking_early() {
            return Err(io::Error::other("pages came for good before memory was final"));
        }
        match frame {
            DataFrame::Content(pages, _) => return self.content(&header, pages),
            DataFrame::Zero(pages) => {
                arrivals.pages.zero(pages);
                arrivals.pages.planes().complete_in(pages, |run| self.news.add(run));
            }
            DataFrame::Unreadable(pages) => arrivals.unreadable(pages),
            DataFrame::Request(_) => {
                return Err(io::Error::other("a source may not send requests"));
            }
        }
        Ok(())
    }

    /// A frame of a precopy pass.
    fn early_frame(&mut self, header: &Header, frame: DataFrame, pass: u16) -> io::Result<()> {
        let arrivals = self.arrivals;
        if !arrivals.precopy {
            return Err(io::Error::other("early copies came that nobody has agreed on"));
        }
        match frame {
            DataFrame::Content(pages, _) => self.content(header, pages),
            DataFrame::Zero(pages) => {
                let was_taken = arrivals.pages.is_taking_early();
                let zeroed =
                    arrivals.pages.zero_early(pages, pass, |run| arrivals.acknowledge(run));
                if was_taken {
                    ask_again(arrivals, pages, Some(pass));
                }
                zeroed
            }
            DataFrame::Unreadable(_) | DataFrame::Request(_) => {
                Err(io::Error::other("no such frame belongs to a precopy pass"))
            }
        }
    }

    fn next_header(&mut self) -> io::Result<[u8; HEADER_BYTES]> {
        if self.reader.here() < HEADER_BYTES {
            self.news.tell();
        }
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(self.reader.next(HEADER_BYTES)?);
        Ok(header)
    }

    fn content(&mut self, header: &Header, pages: PageRange) -> io::Result<()> {
        let length = header.length() as usize;
        let is_large = length >= LARGE_BYTES;
        // The next frame is likely to be such a one too.
        self.reader.read_ahead(!is_large);
        if is_large && !self.arrivals.checksums {
            return self.large_content(pages, length as u64, header.pass());
        }
        let content = if is_large {
            self.staging.resize(self.staging.len().max(length), 0);
            self.reader.receive_exact(&mut self.staging[..length])?;
            &self.staging[..length]
        } else {
            self.reader.next(length)?
        };
        if self.arrivals.checksums {
            header.verify([content]).map_err(io::Error::other)?;
        }
        place(self.arrivals, &mut self.news, pages, content, header.pass())
    }

    fn large_content(
        &mut self,
        pages: PageRange,
        length: u64,
        pass: Option<u16>,
    ) -> io::Result<()> {
        let page_bytes = length / pages.count;
        let step = (PIECE_BYTES / page_bytes).max(1);
        let end = pages.start.0 + pages.count;
        let mut next = pages.start.0;
        while next < end {
            let piece = PageRange::new(PageNumber(next), step.min(end - next));
            if let Err(error) = self.piece(piece, piece.count * page_bytes, pass) {
                // Pages that were discarded meanwhile became complete when they were given
                // back, and whoever discarded them could not know.
                self.arrivals.acknowledge_complete(piece);
                return Err(error);
            }
            // The next piece may keep this thread waiting.
            self.news.tell();
            next += piece.count;
        }
        Ok(())
    }

    fn piece(&mut self, piece: PageRange, length: u64, pass: Option<u16>) -> io::Result<()> {
        let arrivals = self.arrivals;
        let claim = claim(arrivals, piece, pass);
        if let Err(error) = self.receive_piece(&claim, length) {
            drop(claim);
            ask_again(arrivals, piece, pass);
            return Err(error);
        }
        arrivals.counters.bytes.fetch_add(length, Ordering::Relaxed);
        let had_pages = !claim.is_empty();
        let finished = claim.finish(&self.staging, |run| self.news.has_come(run, pass));
        if pass.is_some() && had_pages {
            ask_again(arrivals, piece, pass);
        }
        finished.map_err(|error| arrivals.failed(error))
    }

    fn receive_piece(&mut self, claim: &Claim<'_>, length: u64) -> io::Result<()> {
        let targets = claim.targets().map_err(|error| self.arrivals.failed(error))?;
        let Some(targets) = targets else {
            self.staging.resize(self.staging.len().max(length as usize), 0);
            return self.reader.receive_exact(&mut self.staging[..length as usize]);
        };
        for target in targets {
            match target {
                // SAFETY: the alias is mapped as long as `pages` lives, and these pages are
                // claimed by this thread.
                Target::Memory(run) => unsafe { self.reader.receive_run(run) }?,
                Target::Nowhere(bytes) => self.reader.skip(bytes)?,
            }
        }
        Ok(())
    }
}

/// Pages were given back, and a copy for good may have come and gone while they were claimed.
/// Before memory is final none has, and early copies are not asked for.
fn ask_again(arrivals: &Arrivals, pages: PageRange, pass: Option<u16>) {
    if pass.is_none() || !arrivals.pages.is_taking_early() {
        arrivals.given_back(pages);
    }
}

/// What is to be written of a piece, which is an early one if it has a pass.
fn claim(arrivals: &Arrivals, piece: PageRange, pass: Option<u16>) -> Claim<'_> {
    match pass {
        None => arrivals.pages.claim(piece),
        Some(pass) => {
            arrivals.pages.claim_early(piece, pass, true, |run| arrivals.acknowledge(run))
        }
    }
}

/// Puts pages in place all of whose bytes are here, verified where they have a checksum. They
/// are claimed only now: a connection that breaks gives nothing back.
fn place(
    arrivals: &Arrivals,
    news: &mut News<'_>,
    pages: PageRange,
    content: &[u8],
    pass: Option<u16>,
) -> io::Result<()> {
    arrivals.counters.bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
    let claim = claim(arrivals, pages, pass);
    let targets = match claim.targets() {
        Ok(targets) => targets.unwrap_or_default(),
        Err(error) => {
            drop(claim);
            ask_again(arrivals, pages, pass);
            return Err(arrivals.failed(error));
        }
    };
    let mut at = 0;
    for target in targets {
        match target {
            Target::Memory(run) => {
                let RawRun { length, .. } = run;
                // SAFETY: the alias is mapped as long as the pages live, and these pages are
                // claimed by this thread.
                unsafe { run.write(&content[at..at + length]) };
                at += length;
            }
            Target::Nowhere(bytes) => at += bytes as usize,
        }
    }
    let had_pages = !claim.is_empty();
    let placed = claim.finish(content, |run| news.has_come(run, pass));
    if pass.is_some() && had_pages {
        ask_again(arrivals, pages, pass);
    }
    placed.map_err(|error| {
        // Some may be complete by another's hand, and be no news to him.
        arrivals.acknowledge_complete(pages);
        arrivals.failed(error)
    })
}

#[cfg(test)]
mod tests;
