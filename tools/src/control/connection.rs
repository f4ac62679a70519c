//! A client's connection: lines in, text out, both bounded.
//!
//! Invariant: nothing here waits.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

/// What is read in one go, so that nobody is kept from the others.
const MOST_AT_ONCE: usize = 64 << 10;
/// What a client may leave unread.
const MAX_UNREAD: usize = 1 << 20;

/// A stream that does not block.
pub(super) trait Socket: Read + Write + AsRawFd + Send {}
impl Socket for UnixStream {}
impl Socket for TcpStream {}

pub(super) struct Connection {
    socket: Box<dyn Socket>,
    input: Vec<u8>,
    /// How much of it was taken already.
    taken: usize,
    output: Vec<u8>,
    /// The rest of a line that was too long is thrown away.
    is_skipping: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("descriptor", &self.raw()).finish_non_exhaustive()
    }
}

/// What reading has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// There may be more at once.
    More,
    /// There is no more for now.
    Drained,
    /// The client says nothing any more.
    Ended,
}

/// A line, or where one was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    Whole(Vec<u8>),
    TooLong,
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("it has left more than {MAX_UNREAD} bytes unread")]
    Unread,
    #[error("its connection has failed")]
    Io(#[from] io::Error),
}

impl Connection {
    /// Over a socket that does not block.
    pub(super) const fn new(socket: Box<dyn Socket>) -> Self {
        Self { socket, input: Vec::new(), taken: 0, output: Vec::new(), is_skipping: false }
    }

    pub(super) fn raw(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Takes in some of what is there. To be called when what came before was taken: else the
    /// client decides how much is kept here.
    pub(super) fn read(&mut self) -> io::Result<Reading> {
        self.input.drain(..self.taken);
        self.taken = 0;
        let mut bytes = [0; 4096];
        let mut came = 0;
        while came < MOST_AT_ONCE {
            match self.socket.read(&mut bytes) {
                Ok(0) => return Ok(Reading::Ended),
                Ok(count) => {
                    came += count;
                    self.input.extend_from_slice(&bytes[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Reading::Drained);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Reading::More)
    }

    /// The next line of at most so many bytes, without its end.
    pub(super) fn line(&mut self, most: usize) -> Option<Line> {
        loop {
            let left = &self.input[self.taken..];
            let Some(end) = left.iter().position(|byte| *byte == b'\n') else {
                if left.len() <= most && !self.is_skipping {
                    return None;
                }
                self.forget();
                let is_news = !std::mem::replace(&mut self.is_skipping, true);
                return is_news.then_some(Line::TooLong);
            };
            self.taken += end + 1;
            if std::mem::take(&mut self.is_skipping) {
                continue;
            }
            return Some(if end > most {
                Line::TooLong
            } else {
                Line::Whole(left[..end].to_vec())
            });
        }
    }

    /// All that was read and not taken.
    pub(super) fn unparsed(&self) -> &[u8] {
        &self.input[self.taken..]
    }

    /// Throws away what was read and not taken.
    pub(super) fn forget(&mut self) {
        self.input.clear();
        self.taken = 0;
    }

    /// Says something, as far as there is room.
    pub(super) fn say(&mut self, text: &str) -> Result<(), Broken> {
        self.output.extend_from_slice(text.as_bytes());
        self.flush()?;
        if self.output.len() > MAX_UNREAD { Err(Broken::Unread) } else { Ok(()) }
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            if sent == self.output.len() {
                break Ok(());
            }
            match self.socket.write(&self.output[sent..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.output.drain(..sent);
        result
    }

    /// Whether something waits to be sent.
    pub(super) const fn has_unsent(&self) -> bool {
        !self.output.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UnixStream, Connection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, Connection::new(Box::new(theirs)))
    }

    #[test]
    fn a_line_that_is_too_long_is_told_once_and_the_next_is_read() {
        let (mut client, mut connection) = pair();
        client.write_all(&[b'x'; 60]).unwrap();
        assert_eq!(connection.read().unwrap(), Reading::Drained);
        assert_eq!(connection.line(50), Some(Line::TooLong));
        client.write_all(b"yyyy").unwrap();
        connection.read().unwrap();
        assert_eq!(connection.line(50), None);
        client.write_all(b"y\nhello\n").unwrap();
        connection.read().unwrap();
        assert_eq!(connection.line(50), Some(Line::Whole(b"hello".to_vec())));
        assert_eq!(connection.line(50), None);
        client.write_all(&[&[b'z'; 51][..], b"\nlast\n"].concat()).unwrap();
        connection.read().unwrap();
        assert_eq!(connection.line(50), Some(Line::TooLong));
        assert_eq!(connection.line(50), Some(Line::Whole(b"last".to_vec())));
        drop(client);
        assert_eq!(connection.read().unwrap(), Reading::Ended);
    }

    #[test]
    fn who_does_not_read_is_given_up_within_a_bound() {
        let (_client, mut connection) = pair();
        let text = "x".repeat(4096);
        let said = (0..10_000).find_map(|_| connection.say(&text).err());
        assert!(matches!(said, Some(Broken::Unread)), "{said:?}");
        assert!(connection.output.len() <= MAX_UNREAD + text.len());
    }
}
