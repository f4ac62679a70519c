//! Lines of text over a Unix socket that QEMU connects to, each wait with a limit.
//!
//! Whoever starts a QEMU listens first, and QEMU is the client, so that nobody has to try again
//! and again; a QEMU that others have started listens itself. That QEMU has ended is found out
//! as the end of the stream, or, before it has connected, by asking for its exit.

use std::fs;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::QmpError;

/// How often a starting QEMU is asked whether it has ended.
const STARTING: Duration = Duration::from_millis(100);

/// The end of a wait, and how long it was to begin with.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    end: Instant,
    limit: Duration,
}

impl Deadline {
    /// So long from now.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self { end: Instant::now() + limit, limit }
    }

    fn left(self) -> Option<Duration> {
        self.end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }
}

/// The host's wall clock, which QEMU's events carry too.
#[must_use]
pub fn unix_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Who speaks, and where what it prints beside is kept.
#[derive(Clone, Debug)]
pub struct Speaker {
    /// Its name in messages.
    pub name: String,
    /// What it prints goes there, if that can be seen.
    pub log: Option<PathBuf>,
}

impl Speaker {
    fn ended(&self) -> QmpError {
        QmpError::Ended { who: self.name.clone(), said: self.last_words() }
    }

    fn late(&self, awaited: &str, deadline: Deadline) -> QmpError {
        QmpError::Late {
            who: self.name.clone(),
            awaited: awaited.to_owned(),
            limit: deadline.limit,
            said: self.last_words(),
        }
    }

    fn io(&self, operation: &str, source: io::Error) -> QmpError {
        QmpError::Io { operation: format!("{operation} {}", self.name), source }
    }

    fn last_words(&self) -> String {
        let Some(log) = &self.log else { return "nothing that can be seen from here".into() };
        let text = fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = &lines[lines.len().saturating_sub(3)..];
        if last.is_empty() { "nothing".into() } else { last.join("; ") }
    }
}

/// One connection, read by the line.
#[derive(Debug)]
pub struct Lines {
    speaker: Speaker,
    stream: BufReader<UnixStream>,
    /// The beginning of a line whose end has not come.
    begun: Vec<u8>,
}

impl Lines {
    /// Takes the connection of a QEMU that has just been started.
    ///
    /// # Errors
    /// [`QmpError`] if it ends, or does not connect in time.
    pub fn accept(
        listener: &UnixListener,
        child: &mut Child,
        speaker: Speaker,
        deadline: Deadline,
    ) -> Result<Self, QmpError> {
        loop {
            let Some(left) = deadline.left() else {
                return Err(speaker.late("connection", deadline));
            };
            let mut waited = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left.min(STARTING)).unwrap_or(PollTimeout::ZERO);
            match poll(&mut waited, timeout) {
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => break,
                Err(error) => return Err(speaker.io("wait for", error.into())),
            }
            if child.try_wait().map_err(|error| speaker.io("wait for", error))?.is_some() {
                return Err(speaker.ended());
            }
        }
        let (stream, _) = listener.accept().map_err(|error| speaker.io("accept", error))?;
        Ok(Self::new(stream, speaker))
    }

    /// A connection that is there.
    #[must_use]
    pub fn new(stream: UnixStream, speaker: Speaker) -> Self {
        Self { speaker, stream: BufReader::new(stream), begun: Vec::new() }
    }

    /// Who speaks.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.speaker.name
    }

    /// Says a line.
    ///
    /// # Errors
    /// [`QmpError`] if nobody is there any more.
    pub fn send(&mut self, line: &str) -> Result<(), QmpError> {
        let mut line = line.to_owned();
        line.push('\n');
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => self.speaker.ended(),
            _ => self.speaker.io("write to", error),
        })
    }

    /// Says a line, and hands a descriptor over with it.
    ///
    /// # Errors
    /// [`QmpError`] if nobody is there any more.
    pub fn send_with(&mut self, line: &str, file: BorrowedFd<'_>) -> Result<(), QmpError> {
        let line = format!("{line}\n");
        let raw = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&raw)];
        let socket = self.stream.get_ref().as_raw_fd();
        let first = [IoSlice::new(line.as_bytes())];
        let sent = sendmsg::<()>(socket, &first, &rights, MsgFlags::MSG_NOSIGNAL, None);
        let sent = sent.map_err(|error| self.speaker.io("hand a descriptor to", error.into()))?;
        let rest = self.stream.get_mut().write_all(&line.as_bytes()[sent..]);
        rest.map_err(|error| self.speaker.io("write to", error))
    }

    /// The next line, without its end. `awaited` is named if it does not come.
    ///
    /// # Errors
    /// [`QmpError`] if it does not come, or the speaker ends.
    pub fn next(&mut self, awaited: &str, deadline: Deadline) -> Result<String, QmpError> {
        loop {
            let Some(left) = deadline.left() else {
                return Err(self.speaker.late(awaited, deadline));
            };
            let set = self.stream.get_ref().set_read_timeout(Some(left));
            set.map_err(|error| self.speaker.io("wait for", error))?;
            // What was read before a timeout stays in `begun`.
            match self.stream.read_until(b'\n', &mut self.begun) {
                Ok(_) if self.begun.last() == Some(&b'\n') => {
                    let line = String::from_utf8_lossy(&self.begun).trim().to_owned();
                    self.begun.clear();
                    return Ok(line);
                }
                Ok(_) => return Err(self.speaker.ended()),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::TimedOut
                    | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::ConnectionReset => return Err(self.speaker.ended()),
                    _ => return Err(self.speaker.io("read from", error)),
                },
            }
        }
    }

    /// The error for a line that is not what was `expected`.
    #[must_use]
    pub fn misunderstood(&self, line: &str, expected: &str) -> QmpError {
        let mut line = line.to_owned();
        if let Some((end, _)) = line.char_indices().nth(200) {
            line.truncate(end);
        }
        QmpError::Answer { who: self.name().to_owned(), line, expected: expected.to_owned() }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Lines, and the other end of their connection.
    pub(crate) fn pair() -> (Lines, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let speaker = Speaker { name: "a test".into(), log: Some(PathBuf::from("/dev/null")) };
        (Lines::new(ours, speaker), theirs)
    }

    #[test]
    fn the_beginning_of_a_line_is_kept_when_its_end_is_late() {
        let (mut lines, mut other) = pair();
        other.write_all(b"first\nsec").unwrap();
        let soon = || Deadline::after(Duration::from_millis(20));
        assert_eq!(lines.next("line", soon()).unwrap(), "first");
        let late = lines.next("line", soon()).unwrap_err();
        assert!(matches!(late, QmpError::Late { .. }), "{late}");
        other.write_all(b"ond\n").unwrap();
        let long = Deadline::after(Duration::from_mins(1));
        assert_eq!(lines.next("line", long).unwrap(), "second");
    }

    #[test]
    fn the_end_of_a_connection_is_the_end_of_the_speaker() {
        let (mut lines, other) = pair();
        drop(other);
        let error = lines.next("line", Deadline::after(Duration::from_mins(1))).unwrap_err();
        assert_eq!(error.to_string(), "a test ended: nothing");
    }
}
