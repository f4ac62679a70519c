//! What comes from VMMs, and from the one whose guest this is: threads that wait, and wake
//! the one that decides.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use mio::Waker;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::attachment::{self, Arrival, Word};
use crate::handoff::framing;

/// VMMs that are heard at a time.
const MAX_HEARD: usize = 16;
/// News that wait to be taken; whoever has more waits too, so that nobody fills memory.
const MAX_NEWS: usize = 64;
/// After a VMM that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What came.
pub(super) enum News {
    /// A VMM has connected.
    Arrived(Arrival),
    /// One that could not be understood.
    Turned(String),
    /// The VMM on the connection of this number says something.
    Said(u64, Word),
    /// That connection has ended.
    HungUp(u64),
    /// The process that runs the guest has ended.
    Died,
}

/// Where news come in.
pub(super) struct Door {
    sender: Sender<News>,
    pub(super) news: Receiver<News>,
    waker: Arc<Waker>,
}

impl Door {
    pub(super) fn new(waker: Arc<Waker>) -> Self {
        let (sender, news) = crossbeam_channel::bounded(MAX_NEWS);
        Self { sender, news, waker }
    }

    /// Accepts VMMs until the process ends. Each is heard by a thread of its own: one that is
    /// slow keeps no other waiting.
    pub(super) fn open(&self, listener: UnixListener) -> io::Result<()> {
        let (sender, waker) = (self.sender.clone(), Arc::clone(&self.waker));
        let heard = Arc::new(AtomicUsize::new(0));
        thread::Builder::new().name("attach".to_owned()).spawn(move || {
            loop {
                let socket = match listener.accept() {
                    Ok((socket, _)) => socket,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        // No descriptors, perhaps: there may be some later.
                        tracing::warn!(%error, "a VMM cannot be accepted");
                        thread::sleep(ACCEPT_PAUSE);
                        continue;
                    }
                };
                if heard.load(Ordering::Acquire) >= MAX_HEARD {
                    // A real VMM comes back.
                    continue;
                }
                heard.fetch_add(1, Ordering::AcqRel);
                let (to, waker, done) = (sender.clone(), Arc::clone(&waker), Arc::clone(&heard));
                let hearing = thread::Builder::new().name("arrival".to_owned()).spawn(move || {
                    tell(&to, &waker, hear(socket));
                    done.fetch_sub(1, Ordering::AcqRel);
                });
                if let Err(error) = hearing {
                    tracing::warn!(%error, "a VMM cannot be heard");
                    heard.fetch_sub(1, Ordering::AcqRel);
                }
            }
        })?;
        Ok(())
    }

    /// Hears the VMM on a connection until it ends.
    pub(super) fn listen(&self, number: u64, socket: UnixStream) -> io::Result<()> {
        let (sender, waker) = (self.sender.clone(), Arc::clone(&self.waker));
        socket.set_read_timeout(None)?;
        thread::Builder::new().name("vmm".to_owned()).spawn(move || {
            while let Ok(word) = framing::receive(&socket) {
                tell(&sender, &waker, News::Said(number, word));
            }
            tell(&sender, &waker, News::HungUp(number));
        })?;
        Ok(())
    }

    /// Waits for the end of a process.
    pub(super) fn watch(&self, process: OwnedFd) -> io::Result<()> {
        let (sender, waker) = (self.sender.clone(), Arc::clone(&self.waker));
        thread::Builder::new().name("watch".to_owned()).spawn(move || {
            let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            while !matches!(poll(&mut fds, PollTimeout::NONE), Ok(ready) if ready > 0) {}
            tell(&sender, &waker, News::Died);
        })?;
        Ok(())
    }
}

fn hear(socket: UnixStream) -> News {
    match attachment::receive(socket) {
        Ok(arrival) => News::Arrived(arrival),
        Err(error) => News::Turned(format!("a VMM was turned away: {error}")),
    }
}

fn tell(sender: &Sender<News>, waker: &Waker, news: News) {
    // Whoever waits may have gone, with the process.
    if sender.send(news).is_ok()
        && let Err(error) = waker.wake()
    {
        tracing::error!(%error, "news of a VMM wake nobody");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::{Poll, Token};

    #[test]
    fn a_vmm_that_talks_without_end_is_made_to_wait() {
        let poll = Poll::new().unwrap();
        let door = Door::new(Arc::new(Waker::new(poll.registry(), Token(0)).unwrap()));
        let (vmm, socket) = UnixStream::pair().unwrap();
        door.listen(1, socket).unwrap();
        vmm.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        // Far more than fit into the socket.
        let mut said = (0..100_000).map(|_| framing::send(&vmm, &Word::Ready));
        let refused = said.find_map(Result::err).expect("all of it is taken in");
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
