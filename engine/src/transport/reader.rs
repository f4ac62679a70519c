//! Receiving frames: small ones many at a time, large ones straight to where they belong.

use super::Stream;
use crate::sys::mapping::RawRun;
use crate::sys::socket::Wait;
use std::io;

/// The most that one call brings before anybody knows what it is.
pub(crate) const READ_AHEAD: usize = 256 << 10;

/// The receiving side of a stream, with what has come and has not been used.
#[derive(Debug)]
pub(crate) struct Reader {
    stream: Stream,
    buffer: Vec<u8>,
    used: usize,
    filled: usize,
    reads_ahead: bool,
}

impl Reader {
    pub(crate) fn new(stream: Stream) -> Self {
        Self { stream, buffer: Vec::new(), used: 0, filled: 0, reads_ahead: false }
    }

    /// Whether [`next`](Self::next) shall bring all there is, up to [`READ_AHEAD`], or only
    /// what it was asked for. For large content the latter saves a copy.
    pub(crate) const fn read_ahead(&mut self, reads_ahead: bool) {
        self.reads_ahead = reads_ahead;
    }

    /// Bytes that are here: so many can be had without waiting.
    pub(crate) const fn here(&self) -> usize {
        self.filled - self.used
    }

    /// The next `length` bytes, at most [`READ_AHEAD`], waiting as long as it takes.
    pub(crate) fn next(&mut self, length: usize) -> io::Result<&[u8]> {
        self.bring(length)?;
        let start = self.used;
        self.used += length;
        Ok(&self.buffer[start..self.used])
    }

    fn bring(&mut self, length: usize) -> io::Result<()> {
        assert!(length <= READ_AHEAD, "{length} bytes are not read ahead");
        if self.here() >= length {
            return Ok(());
        }
        // What is here is part of one small thing: little is moved.
        self.buffer.copy_within(self.used..self.filled, 0);
        (self.used, self.filled) = (0, self.here());
        let end = if self.reads_ahead { READ_AHEAD } else { length };
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        while self.filled < length {
            self.filled += self.stream.receive(&mut self.buffer[self.filled..end], Wait::Block)?;
        }
        Ok(())
    }

    /// What is here of the next `most` bytes.
    fn take_here(&mut self, most: usize) -> &[u8] {
        let start = self.used;
        self.used += most.min(self.here());
        &self.buffer[start..self.used]
    }

    /// Fills `into`, waiting as long as it takes.
    pub(crate) fn receive_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        let had = self.take_here(into.len());
        let (first, rest) = into.split_at_mut(had.len());
        first.copy_from_slice(had);
        self.stream.receive_exact(rest)
    }

    /// Fills a run of memory, waiting as long as it takes.
    ///
    /// # Safety
    /// The run must be mapped writable, and nobody else may use its bytes during the call.
    pub(crate) unsafe fn receive_run(&mut self, run: RawRun) -> io::Result<()> {
        let had = self.take_here(run.length);
        // SAFETY: the caller's promise; the buffer is no guest memory.
        unsafe { run.write(had) };
        let had = had.len();
        // SAFETY: the caller's promise.
        unsafe { self.stream.receive_run(run.part(had, run.length - had)) }
    }

    /// Receives and drops bytes.
    pub(crate) fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let most = usize::try_from(bytes).unwrap_or(usize::MAX);
        let had = self.take_here(most).len() as u64;
        self.stream.skip(bytes - had)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Reader) {
        let (peer, stream) = UnixStream::pair().unwrap();
        (peer, Reader::new(Stream::new(stream.into(), false).unwrap()))
    }

    #[test]
    fn only_what_is_asked_for_is_read_unless_more_is_wanted() {
        let (mut peer, mut reader) = pair();
        peer.write_all(&[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(reader.next(2).unwrap(), [1, 2]);
        assert_eq!(reader.here(), 0);
        reader.read_ahead(true);
        assert_eq!(reader.next(2).unwrap(), [3, 4]);
        assert_eq!(reader.here(), 4);
        reader.read_ahead(false);
        assert_eq!(reader.next(3).unwrap(), [5, 6, 7]);
        assert_eq!(reader.here(), 1);
    }

    #[test]
    fn whatever_is_cut_wherever_comes_whole() {
        // In the middle of each thing the buffer ends once.
        for cut in 1..16 {
            let (mut peer, mut reader) = pair();
            reader.read_ahead(true);
            let bytes: Vec<u8> = (1..=16).collect();
            peer.write_all(&bytes[..cut]).unwrap();
            let rest = bytes[cut..].to_vec();
            assert_eq!(reader.next(1).unwrap(), [1]);
            assert_eq!(reader.here(), cut - 1);
            let writer = std::thread::spawn(move || peer.write_all(&rest).unwrap());
            assert_eq!(reader.next(4).unwrap(), [2, 3, 4, 5]);
            let mut four = [0_u8; 4];
            reader.receive_exact(&mut four).unwrap();
            assert_eq!(four, [6, 7, 8, 9]);
            reader.skip(3).unwrap();
            let mut three = [0_u8; 3];
            let run = RawRun { start: three.as_mut_ptr(), length: 3 };
            // SAFETY: an array of our own, used by this call alone.
            unsafe { reader.receive_run(run) }.unwrap();
            assert_eq!(three, [13, 14, 15]);
            assert_eq!(reader.next(1).unwrap(), [16]);
            writer.join().unwrap();
            let end = reader.next(1).unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn what_came_before_the_end_can_be_used() {
        let (mut peer, mut reader) = pair();
        reader.read_ahead(true);
        peer.write_all(&[1; 7]).unwrap();
        drop(peer);
        assert_eq!(reader.next(3).unwrap(), [1; 3]);
        assert_eq!(reader.next(3).unwrap(), [1; 3]);
        reader.next(3).unwrap_err();
    }
}
