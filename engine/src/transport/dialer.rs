//! A thread that connects, so that the session's thread need not wait for it.

use super::attempt::{Attempt, Wanted};
use super::greet::connect;
use super::{Address, ConnectError, Plaintext, Stream};
use crate::threads::{self, ThreadHook, ThreadRole};
use afterimage_protocol::wire::{Channel, Hello};
use crossbeam_channel::Sender;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// After a failed attempt at a data channel the next outcome is told only after a pause, which
/// doubles. For a control connection it is told at once: the session makes pauses of its own.
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LAST_PAUSE: Duration = Duration::from_millis(500);

/// The outcome of one attempt.
#[derive(Debug)]
pub(crate) struct Dialed {
    wish: u64,
    /// What this side said.
    pub(crate) hello: Hello,
    /// The connection, and what the peer said.
    pub(crate) outcome: Result<(Stream, Hello), ConnectError>,
}

/// Connects to one address, one connection after the other. Dropped, it calls its attempt off
/// and joins its thread, which does not wait then; but a thread that looks up a name is left
/// behind, and ends when the look-up does.
#[derive(Debug)]
pub(crate) struct Dialer {
    jobs: Option<Sender<(u64, Hello)>>,
    wanted: Arc<Wanted>,
    thread: Option<JoinHandle<()>>,
}

impl Dialer {
    /// Hands the outcome of each attempt to `deliver`, on the dialer's thread.
    pub(crate) fn start(
        address: Address,
        plaintext: Plaintext,
        hook: &ThreadHook,
        deliver: impl Fn(Dialed) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, todo) = crossbeam_channel::unbounded::<(u64, Hello)>();
        let wanted = Arc::new(Wanted::new()?);
        let present = Arc::clone(&wanted);
        let thread = threads::spawn(hook, ThreadRole::Acceptor, 1, move || {
            let mut pause = FIRST_PAUSE;
            for (wish, hello) in todo {
                let attempt = Attempt { wanted: &present, wish };
                if !attempt.is_wanted() {
                    continue;
                }
                let outcome = connect(&address, plaintext, hello, attempt);
                if outcome.is_ok() {
                    pause = FIRST_PAUSE;
                } else if hello.channel != Channel::Control {
                    // Whoever asked will ask again.
                    attempt.pause(pause);
                    pause = (pause * 2).min(LAST_PAUSE);
                }
                if attempt.is_wanted() {
                    deliver(Dialed { wish, hello, outcome });
                } else {
                    // What is wanted now is not made to wait for what failed before.
                    pause = FIRST_PAUSE;
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), wanted, thread: Some(thread) })
    }

    /// Makes a connection and says this hello on it. A session begins anew with its control
    /// connection: whatever else was asked for before is forgotten then.
    pub(crate) fn dial(&self, hello: Hello) {
        if hello.channel == Channel::Control {
            self.forget();
        }
        if let Some(jobs) = &self.jobs {
            // The thread ends only after `jobs` is dropped.
            let _ = jobs.send((self.wanted.present(), hello));
        }
    }

    /// Calls off whatever was asked for.
    pub(crate) fn forget(&self) {
        self.wanted.forget();
    }

    /// Whether this outcome is still wanted: it may have been under way when it was forgotten.
    pub(crate) fn wants(&self, dialed: &Dialed) -> bool {
        dialed.wish == self.wanted.present()
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        self.forget();
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && !self.wanted.is_resolving()
        {
            threads::join(thread);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_protocol::wire::{Capabilities, Incarnation, Role, SessionId, Stamp};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::time::Instant;

    /// Guards against hanging alone.
    const PATIENCE: Duration = Duration::from_secs(40);

    fn hello() -> Hello {
        Hello {
            role: Role::Source,
            channel: Channel::Control,
            stamp: Stamp::default(),
            capabilities: Capabilities::default(),
            session: SessionId([1; 16]),
            incarnation: Incarnation::default(),
        }
    }

    fn dialer(address: Address) -> (Dialer, mpsc::Receiver<Dialed>) {
        let (sender, outcomes) = mpsc::channel();
        let deliver = move |dialed| drop(sender.send(dialed));
        let hook = ThreadHook::default();
        let dialer = Dialer::start(address, Plaintext::LoopbackOnly, &hook, deliver).unwrap();
        (dialer, outcomes)
    }

    #[test]
    fn a_peer_that_does_not_answer_holds_up_neither_the_next_attempt_nor_the_end() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (dialer, outcomes) = dialer(Address::Tcp(listener.local_addr().unwrap().to_string()));
        let (started, mut silent) = (Instant::now(), Vec::new());
        for _ in 0..3 {
            dialer.dial(hello());
            // It is connected, and waits for a greeting.
            silent.push(listener.accept().unwrap());
        }
        drop(dialer);
        assert!(started.elapsed() < super::super::greet::GREETING_TIME);
        assert!(outcomes.recv().is_err(), "nobody wants to hear of any of them");
    }

    #[test]
    fn a_unix_listener_with_a_full_queue_does_not_hold_the_dialer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("full");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut waiting = Vec::new();
        loop {
            let address = nix::sys::socket::UnixAddr::new(&path).unwrap();
            let fd = nix::sys::socket::socket(
                nix::sys::socket::AddressFamily::Unix,
                nix::sys::socket::SockType::Stream,
                nix::sys::socket::SockFlag::SOCK_NONBLOCK,
                None,
            )
            .unwrap();
            match nix::sys::socket::connect(fd.as_raw_fd(), &address) {
                Ok(()) => waiting.push(fd),
                Err(errno) => {
                    assert_eq!(errno, nix::errno::Errno::EAGAIN);
                    break;
                }
            }
        }
        let (dialer, outcomes) = dialer(Address::Unix(path.clone()));
        dialer.dial(hello());
        let outcome = outcomes.recv_timeout(PATIENCE).unwrap().outcome;
        assert!(outcome.unwrap_err().to_string().contains("could not connect"));
        // Nor does it look like a socket that was left behind.
        let error = crate::transport::Listener::bind(&Address::Unix(path), Plaintext::LoopbackOnly);
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
