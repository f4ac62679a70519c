//! What comes from VMMs, and from the one whose guest this is: threads that wait, and wake
//! the one that decides.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use mio::Waker;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};

use super::adapter::{Adapter, NoArrival};
use crate::attachment::{Arrival, Word};

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
    /// Somebody who cannot be served.
    Turned(NoArrival),
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
    /// Once it is open.
    entrance: OnceLock<Entrance>,
}

/// Where VMMs are accepted.
struct Entrance {
    listener: UnixListener,
    is_closed: Arc<AtomicBool>,
}

impl Door {
    pub(super) fn new(waker: Arc<Waker>) -> Self {
        let (sender, news) = crossbeam_channel::bounded(MAX_NEWS);
        Self { sender, news, waker, entrance: OnceLock::new() }
    }

    /// Accepts VMMs until the process ends. Each is heard by a thread of its own: one that is
    /// slow keeps no other waiting.
    pub(super) fn open(&self, listener: UnixListener, adapter: Arc<dyn Adapter>) -> io::Result<()> {
        let (sender, waker) = (self.sender.clone(), Arc::clone(&self.waker));
        let heard = Arc::new(AtomicUsize::new(0));
        let is_closed = Arc::new(AtomicBool::new(false));
        let (entrance, closed) = (listener.try_clone()?, Arc::clone(&is_closed));
        thread::Builder::new().name("attach".to_owned()).spawn(move || {
            loop {
                let socket = match listener.accept() {
                    Ok((socket, _)) => socket,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) if closed.load(Ordering::Acquire) => return,
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
                let adapter = Arc::clone(&adapter);
                let hearing = thread::Builder::new().name("arrival".to_owned()).spawn(move || {
                    let arrived = adapter.receive(socket);
                    tell(&to, &waker, arrived.map_or_else(News::Turned, News::Arrived));
                    done.fetch_sub(1, Ordering::AcqRel);
                });
                if let Err(error) = hearing {
                    tracing::warn!(%error, "a VMM cannot be heard");
                    heard.fetch_sub(1, Ordering::AcqRel);
                }
            }
        })?;
        // Opened once.
        let _ = self.entrance.set(Entrance { listener: entrance, is_closed });
        Ok(())
    }

    /// Accepts nobody any more: who connects from here on learns at once that nobody is there,
    /// and another process may listen in its place.
    pub(super) fn close(&self) {
        let Some(Entrance { listener, is_closed }) = self.entrance.get() else { return };
        is_closed.store(true, Ordering::Release);
        let address = listener.local_addr();
        if let Some(path) = address.as_ref().ok().and_then(SocketAddr::as_pathname)
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::info!(%error, path = %path.display(), "the socket cannot be removed");
        }
        // Wakes the thread that accepts.
        if let Err(error) = shutdown(listener.as_raw_fd(), Shutdown::Both) {
            tracing::warn!(%error, "the door stays open");
        }
    }

    /// Hears the VMM on a connection until it ends.
    pub(super) fn listen(
        &self,
        number: u64,
        socket: UnixStream,
        adapter: Arc<dyn Adapter>,
    ) -> io::Result<()> {
        let (sender, waker) = (self.sender.clone(), Arc::clone(&self.waker));
        socket.set_read_timeout(None)?;
        thread::Builder::new().name("vmm".to_owned()).spawn(move || {
            while let Ok(word) = adapter.hear(&socket) {
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
    use super::super::adapter::Native;
    use super::*;
    use crate::handoff::framing;
    use mio::{Poll, Token};

    #[test]
    fn a_vmm_that_talks_without_end_is_made_to_wait() {
        let poll = Poll::new().unwrap();
        let door = Door::new(Arc::new(Waker::new(poll.registry(), Token(0)).unwrap()));
        let (vmm, socket) = UnixStream::pair().unwrap();
        door.listen(1, socket, Arc::new(Native)).unwrap();
        vmm.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        // Far more than fit into the socket.
        let mut said = (0..100_000).map(|_| framing::send(&vmm, &Word::Ready));
        let refused = said.find_map(Result::err).expect("all of it is taken in");
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
    }
}
