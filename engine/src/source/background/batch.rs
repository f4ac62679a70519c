//! Frames that leave together.

use crate::sys::mapping::{RawRun, Staging};
use crate::sys::socket::Piece;
use crate::transport::Stream;
use afterimage_protocol::layout::PageRange;
use afterimage_protocol::wire::{DataFrame, HEADER_BYTES, MAX_FRAME_PAGES, Stamp};
use std::io;

/// Frames and what follows each: sent in one call.
#[derive(Default)]
pub(super) struct Batch {
    frames: Vec<(DataFrame, Option<RawRun>)>,
    headers: Vec<u8>,
    bytes: u64,
    staging: Staging,
    /// Bytes of the staging that frames lie in.
    staged: usize,
}

impl Batch {
    /// Starts anew, with nothing in it.
    pub(super) fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
        self.staged = 0;
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The pages whose content will leave.
    pub(super) fn content(&self) -> impl Iterator<Item = PageRange> {
        self.frames.iter().filter_map(|(frame, _)| match frame {
            DataFrame::Content(pages, _) => Some(*pages),
            _ => None,
        })
    }

    /// Bytes that will leave.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is free of a staging of `capacity` bytes. It stays in place, and nothing of the
    /// batch lies in it.
    ///
    /// A batch must be cleared before it is asked for another capacity.
    pub(super) fn room(&mut self, capacity: usize) -> RawRun {
        self.staging.run(capacity).part(self.staged, capacity - self.staged)
    }

    /// So many bytes at the start of the room belong to frames of the batch.
    pub(super) const fn keep(&mut self, bytes: usize) {
        self.staged += bytes;
    }

    /// Adds a frame. Zero pages that follow zero pages become one frame with them.
    pub(super) fn push(&mut self, frame: DataFrame, content: Option<RawRun>) {
        if let DataFrame::Zero(pages) = frame
            && let Some((DataFrame::Zero(last), _)) = self.frames.last_mut()
            && last.end() == Some(pages.start)
            && last.count + pages.count <= MAX_FRAME_PAGES
        {
            *last = PageRange::new(last.start, last.count + pages.count);
            return;
        }
        self.bytes += (HEADER_BYTES + content.map_or(0, |content| content.length)) as u64;
        self.frames.push((frame, content));
    }

    /// Sends everything, as of a precopy pass if there is one. Content must lie in the staging, or in memory that stays mapped.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        stamp: Stamp,
        pass: Option<u16>,
        seals: bool,
    ) -> io::Result<()> {
        self.headers.clear();
        for (frame, content) in &self.frames {
            let mut header = frame.header(stamp);
            if let Some(pass) = pass {
                header = header.of_pass(pass);
            }
            if seals {
                // SAFETY: memory is final or was copied to staging, and staging is not touched before it has been sent.
                let bytes = content.map_or(&[][..], |run| unsafe { run.bytes() });
                header = header.sealed([bytes]);
            }
            self.headers.extend_from_slice(header.bytes());
        }
        let mut pieces = Vec::with_capacity(2 * self.frames.len());
        let mut headers = &self.headers[..];
        let mut waiting = 0;
        for (_, content) in &self.frames {
            waiting += HEADER_BYTES;
            if let Some(content) = content {
                // Headers of frames without content leave with the next that has some.
                let (before, after) = headers.split_at(waiting);
                pieces.extend([Piece::bytes(before), Piece::memory(*content)]);
                (headers, waiting) = (after, 0);
            }
        }
        if waiting > 0 {
            pieces.push(Piece::bytes(headers));
        }
        // SAFETY: headers live in the batch; content lies in its staging, or in memory that
        // the VMM keeps mapped.
        unsafe { stream.send_pieces(&mut pieces) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_protocol::layout::PageNumber;

    fn zero(first: u64, count: u64) -> DataFrame {
        DataFrame::Zero(PageRange::new(PageNumber(first), count))
    }

    #[test]
    fn zero_pages_in_a_row_are_one_frame_as_long_as_it_can_name_them() {
        let mut batch = Batch::default();
        let unreadable = DataFrame::Unreadable(PageRange::one(PageNumber(9)));
        batch.push(zero(0, 4), None);
        batch.push(zero(4, 5), None);
        batch.push(unreadable, None);
        batch.push(zero(10, 1), None);
        batch.push(zero(12, 1), None);
        batch.push(zero(13, MAX_FRAME_PAGES - 1), None);
        batch.push(zero(12 + MAX_FRAME_PAGES, 1), None);
        let frames: Vec<_> = batch.frames.iter().map(|(frame, _)| *frame).collect();
        let last = [zero(12, MAX_FRAME_PAGES), zero(12 + MAX_FRAME_PAGES, 1)];
        assert_eq!(frames, [zero(0, 9), unreadable, zero(10, 1), last[0], last[1]]);
        assert_eq!(batch.bytes(), 5 * HEADER_BYTES as u64);
        batch.clear();
        assert!(batch.is_empty() && batch.bytes() == 0);
    }
}
