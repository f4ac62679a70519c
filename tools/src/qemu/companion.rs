//! The destination's side on a thread of its own, where one process is both sides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use afterimage::Address;
use crossbeam_channel::{Receiver, Sender};
use mio::Waker;

use super::options::DestinationOptions;
use super::receive::{self, Ended, Heard, Observer};
use crate::page_server::Failure;

/// What the destination's side says to the source's.
#[derive(Debug)]
pub(super) enum News {
    Heard(Heard),
    /// Nothing follows.
    Ended(Result<Ended, Failure>),
}

/// The other side. Dropped, it is ended, and waited for.
#[derive(Debug)]
pub(super) struct Companion {
    pub(super) news: Receiver<News>,
    is_stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Companion {
    /// Starts it; `waker` is woken by each piece of news.
    pub(super) fn start(
        qmp: Address,
        options: DestinationOptions,
        waker: Arc<Waker>,
    ) -> Result<Self, Failure> {
        let (sender, news) = crossbeam_channel::unbounded();
        let is_stopped = Arc::new(AtomicBool::new(false));
        let mut relay = Relay { sender, waker, is_stopped: Arc::clone(&is_stopped) };
        let thread = thread::Builder::new().name("receive".to_owned()).spawn(move || {
            let ended = receive::run(&qmp, &options, &mut relay);
            relay.say(News::Ended(ended));
        });
        let thread = Some(thread.map_err(Failure::of("start a thread"))?);
        Ok(Self { news, is_stopped, thread })
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the destination's side has panicked");
        }
    }
}

struct Relay {
    sender: Sender<News>,
    waker: Arc<Waker>,
    is_stopped: Arc<AtomicBool>,
}

impl Relay {
    fn say(&self, news: News) {
        // Nobody listens once the source's side is over.
        let _ = self.sender.send(news);
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "the source's side cannot be woken");
        }
    }
}

impl Observer for Relay {
    fn hear(&mut self, heard: Heard) {
        self.say(News::Heard(heard));
    }

    fn is_stopped(&mut self) -> Result<bool, Failure> {
        Ok(self.is_stopped.load(Ordering::Acquire))
    }
}
