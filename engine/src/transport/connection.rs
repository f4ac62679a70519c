//! The control connection: frames out of and into a socket that never makes its thread wait.

use super::Stream;
use crate::sys::socket::Wait;
use afterimage_protocol::wire::{ControlFrame, HEADER_BYTES, Header, Stamp, WireError};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// What came of reading.
#[derive(Debug)]
pub(crate) enum Received {
    Frame(ControlFrame),
    /// A frame of an older connection, dropped.
    Stale,
    /// An optional frame that this version does not know, dropped.
    Unknown,
    /// Nothing more at the moment.
    Nothing,
}

/// Why a control connection is at its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("the control connection broke")]
    Io(#[from] io::Error),
    #[error("the peer breaks the protocol")]
    Wire(#[from] WireError),
}

/// A greeted control connection.
#[derive(Debug)]
pub(crate) struct ControlConnection {
    stream: Stream,
    stamp: Stamp,
    checksums: bool,
    incoming: Vec<u8>,
    outgoing: VecDeque<u8>,
    interest: Interest,
    is_mute: bool,
    /// Bytes have come since somebody asked.
    has_heard: bool,
}

impl ControlConnection {
    /// Registers the stream with `registry` under `token`.
    pub(crate) fn new(
        stream: Stream,
        stamp: Stamp,
        checksums: bool,
        registry: &Registry,
        token: Token,
    ) -> io::Result<Self> {
        let raw = stream.as_fd().as_raw_fd();
        registry.register(&mut SourceFd(&raw), token, Interest::READABLE)?;
        Ok(Self {
            stream,
            stamp,
            checksums,
            incoming: Vec::new(),
            outgoing: VecDeque::new(),
            interest: Interest::READABLE,
            is_mute: false,
            has_heard: false,
        })
    }

    /// As [`Stream::watch`].
    pub(crate) fn watch(&self, silence: Duration) -> io::Result<()> {
        self.stream.watch(silence)
    }

    /// Queues a frame; [`flush`](Self::flush) sends it.
    pub(crate) fn push(&mut self, frame: &ControlFrame) {
        if self.is_mute {
            return;
        }
        self.outgoing.extend(frame.encode(self.stamp, self.checksums));
    }

    /// Nothing is sent any more: the connection is only read to its end.
    pub(crate) fn mute(&mut self) {
        self.is_mute = true;
        self.outgoing = VecDeque::new();
    }

    /// Whether nothing is sent any more.
    pub(crate) const fn is_mute(&self) -> bool {
        self.is_mute
    }

    /// Whether bytes have come since this was asked last.
    pub(crate) const fn take_heard(&mut self) -> bool {
        std::mem::replace(&mut self.has_heard, false)
    }

    /// Bytes queued and not sent.
    pub(crate) fn queued(&self) -> usize {
        self.outgoing.len()
    }

    /// Sends what goes without waiting, and asks to be told when more goes.
    pub(crate) fn flush(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            let (front, _) = self.outgoing.as_slices();
            match self.stream.send_some(front) {
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        let interest = if self.outgoing.is_empty() {
            Interest::READABLE
        } else {
            Interest::READABLE | Interest::WRITABLE
        };
        // Registered anew each time something is left: readiness is told once only.
        if interest != self.interest || interest.is_writable() {
            self.interest = interest;
            let raw = self.stream.as_fd().as_raw_fd();
            registry.reregister(&mut SourceFd(&raw), token, interest)?;
        }
        Ok(())
    }

    /// The next frame, if all of it is there.
    pub(crate) fn receive(&mut self) -> Result<Received, ControlError> {
        loop {
            let Some((header, _)) = self.incoming.split_first_chunk::<HEADER_BYTES>() else {
                if self.read_up_to(HEADER_BYTES)? {
                    continue;
                }
                return Ok(Received::Nothing);
            };
            let header = Header::from_bytes(*header);
            let whole = HEADER_BYTES + ControlFrame::payload_length(&header)?;
            if self.incoming.len() < whole {
                if self.read_up_to(whole)? {
                    continue;
                }
                return Ok(Received::Nothing);
            }
            let frame = std::mem::take(&mut self.incoming);
            let payload = &frame[HEADER_BYTES..];
            if self.checksums {
                header.verify([payload])?;
            }
            if !self.stamp.admits(header.stamp())? {
                return Ok(Received::Stale);
            }
            let frame = ControlFrame::decode(&header, payload)?;
            return Ok(frame.map_or(Received::Unknown, Received::Frame));
        }
    }

    /// Reads until there are `wanted` bytes; `false` if they are not there yet. Memory grows
    /// with what has arrived, not with what was announced.
    fn read_up_to(&mut self, wanted: usize) -> io::Result<bool> {
        let mut chunk = [0; 16 << 10];
        while self.incoming.len() < wanted {
            let most = chunk.len().min(wanted - self.incoming.len());
            match self.stream.receive(&mut chunk[..most], Wait::Never) {
                Ok(got) => {
                    self.has_heard = true;
                    self.incoming.extend_from_slice(&chunk[..got]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Ends it. What is queued is sent if that needs no waiting.
    pub(crate) fn close(mut self, registry: &Registry) {
        let raw = self.stream.as_fd().as_raw_fd();
        // Nothing can be done about a connection that cannot be told any more.
        let _ = self.stream.send_some(self.outgoing.make_contiguous());
        let _ = registry.deregister(&mut SourceFd(&raw));
        self.stream.shut_down();
    }
}
