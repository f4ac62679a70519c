//! Messages to a thread that waits in a poll.

use crossbeam_channel::{Receiver, Sender};
use mio::{Poll, Token, Waker};
use std::io;
use std::sync::Arc;

/// The receiving end, with the poll that it wakes.
#[derive(Debug)]
pub(crate) struct Inbox<T> {
    receiver: Receiver<T>,
}

/// A sending end.
#[derive(Debug)]
pub(crate) struct Outlet<T> {
    sender: Sender<T>,
    waker: Arc<Waker>,
}

impl<T> Clone for Outlet<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), waker: Arc::clone(&self.waker) }
    }
}

impl<T> Inbox<T> {
    /// An inbox whose messages wake `poll` with `token`.
    pub(crate) fn new(poll: &Poll, token: Token) -> io::Result<(Self, Outlet<T>)> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let waker = Arc::new(Waker::new(poll.registry(), token)?);
        Ok((Self { receiver }, Outlet { sender, waker }))
    }

    /// The next message, if there is one.
    pub(crate) fn next(&self) -> Option<T> {
        self.receiver.try_recv().ok()
    }

    /// Whether there is no message now.
    pub(crate) fn is_empty(&self) -> bool {
        self.receiver.is_empty()
    }
}

impl<T> Outlet<T> {
    /// Wakes the receiving thread without a message.
    pub(crate) fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "a thread could not be woken");
        }
    }

    /// Sends a message; `false` if nobody receives any more.
    pub(crate) fn send(&self, message: T) -> bool {
        let is_received = self.sender.send(message).is_ok();
        if is_received {
            self.wake();
        }
        is_received
    }
}
