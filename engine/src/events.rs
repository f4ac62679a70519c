//! Events for the VMM: a channel and a pollable descriptor at once.

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The receiving end: blocks, polls, or waits in an event loop.
///
/// As a descriptor ([`AsFd`]) it is readable while an event waits; register it with epoll
/// and call [`try_next`](Self::try_next) until it returns `None`. One thread at a time
/// should take events.
#[derive(Debug)]
pub struct Events<T> {
    receiver: Receiver<Stamped<T>>,
    ready: Arc<EventFd>,
}

/// An event, and when it happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamped<T> {
    /// What happened.
    pub event: T,
    /// When; in the order of the events.
    pub at: Instant,
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct EventSender<T> {
    sender: Sender<Stamped<T>>,
    ready: Arc<EventFd>,
}

impl<T> Clone for EventSender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), ready: Arc::clone(&self.ready) }
    }
}

/// A pair of ends.
pub(crate) fn channel<T>() -> io::Result<(EventSender<T>, Events<T>)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_SEMAPHORE;
    let ready = Arc::new(EventFd::from_value_and_flags(0, flags)?);
    let (sender, receiver) = crossbeam_channel::unbounded();
    Ok((EventSender { sender, ready: Arc::clone(&ready) }, Events { receiver, ready }))
}

impl<T> EventSender<T> {
    /// Sends an event; dropped if nobody can receive it any more.
    pub(crate) fn send(&self, event: T) {
        if self.sender.send(Stamped { event, at: Instant::now() }).is_ok() {
            // Cannot fail short of 2^64 events.
            let _ = self.ready.write(1);
        }
    }
}

impl<T> Events<T> {
    /// Waits for the next event. Blocks. `None` once the sender is gone and all events are taken.
    #[must_use]
    pub fn next(&self) -> Option<T> {
        self.next_stamped().map(|stamped| stamped.event)
    }

    /// [`next`](Self::next) with its time.
    #[must_use]
    pub fn next_stamped(&self) -> Option<Stamped<T>> {
        let event = self.receiver.recv().ok()?;
        self.taken();
        Some(event)
    }

    /// The next event, if one is there.
    #[must_use]
    pub fn try_next(&self) -> Option<T> {
        self.try_next_stamped().map(|stamped| stamped.event)
    }

    /// [`try_next`](Self::try_next) with its time.
    #[must_use]
    pub fn try_next_stamped(&self) -> Option<Stamped<T>> {
        let event = self.receiver.try_recv().ok()?;
        self.taken();
        Some(event)
    }

    /// Waits for the next event, but not longer than `timeout`.
    ///
    /// # Errors
    /// Whether the time is over or the sender is gone.
    pub fn next_timeout(&self, timeout: Duration) -> Result<T, NoEvent> {
        match self.receiver.recv_timeout(timeout) {
            Ok(stamped) => {
                self.taken();
                Ok(stamped.event)
            }
            Err(RecvTimeoutError::Timeout) => Err(NoEvent::NotInTime),
            Err(RecvTimeoutError::Disconnected) => Err(NoEvent::Ended),
        }
    }

    /// One event less to be told of. The sender writes after it sends, so the count may come
    /// a moment after the event; it is waited for, or the descriptor would stay readable.
    fn taken(&self) {
        while self.ready.read().is_err() {
            std::hint::spin_loop();
        }
    }
}

impl<T> AsFd for Events<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// Why there is no event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEvent {
    /// None came in time.
    #[error("no event came in time")]
    NotInTime,
    /// None will come any more.
    #[error("no event will come any more")]
    Ended,
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn is_readable<T>(events: &Events<T>) -> bool {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_descriptor_is_readable_exactly_while_events_wait() {
        let (sender, events) = channel().unwrap();
        assert!(!is_readable(&events));
        sender.send(1);
        sender.send(2);
        assert!(is_readable(&events));
        let first = events.next_stamped().unwrap();
        assert_eq!(first.event, 1);
        assert!(is_readable(&events));
        let second = events.try_next_stamped().unwrap();
        assert!(second.event == 2 && second.at >= first.at);
        assert!(!is_readable(&events));
        assert_eq!(events.try_next(), None);
        drop(sender);
        assert_eq!(events.next(), None);
        assert_eq!(events.next_timeout(Duration::from_secs(1)), Err(NoEvent::Ended));
    }
}
