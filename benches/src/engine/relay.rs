//! A relay between both sides, which counts what crosses it and can be cut.
//!
//! Invariant: from [`Relay::cut`] to [`Relay::restore`] nothing crosses it, and nobody can connect
//! to it.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crate::error::{BenchError, Doing};
use crate::network::Socket;
use crate::outcome::WireSample;
use crate::sys;

/// Bytes passed on in one go.
const BUFFER: usize = 64 << 10;

/// Listens in the source's place. Threads that pass bytes on end with their connections, and
/// these with the relay at the latest.
#[derive(Debug)]
pub(super) struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// `None` while it is cut.
    accepting: Option<Accepting>,
}

#[derive(Debug)]
struct Accepting {
    listener: Arc<TcpListener>,
    thread: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    source: String,
    /// What was passed on when.
    passed: Mutex<Vec<WireSample>>,
    connections: Mutex<Vec<Connection>>,
}

#[derive(Debug)]
struct Connection {
    came: Instant,
    ends: [Socket; 2],
}

impl Relay {
    /// Passes on what comes to [`address`](Self::address) to `source`.
    pub(super) fn start(source: &str) -> Result<Self, BenchError> {
        let listener = TcpListener::bind("127.0.0.1:0").doing("listening for the relay")?;
        let address = listener.local_addr().doing("the address of the relay")?;
        let shared = Shared {
            source: source.to_owned(),
            passed: Mutex::default(),
            connections: Mutex::default(),
        };
        let mut relay = Self { address, shared: Arc::new(shared), accepting: None };
        relay.accept(listener);
        Ok(relay)
    }

    /// Where to connect instead.
    pub(super) fn address(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Bytes in both directions.
    pub(super) fn bytes(&self) -> u64 {
        self.shared.passed().last().map_or(0, |sample| sample.bytes)
    }

    /// The same at each moment at which it grew.
    pub(super) fn samples(&self) -> Vec<WireSample> {
        self.shared.passed().clone()
    }

    /// Ends all connections; whoever wants to make one is refused.
    pub(super) fn cut(&mut self) -> Result<(), BenchError> {
        if let Some(Accepting { listener, thread }) = self.accepting.take() {
            let doing = "closing the relay";
            let fd = listener.as_raw_fd();
            // Ends the wait in `accept`, and refuses whoever comes from here on.
            nix::sys::socket::shutdown(fd, nix::sys::socket::Shutdown::Read).doing(doing)?;
            thread.join().map_err(|_| BenchError::Failed(format!("{doing}: its thread failed")))?;
        }
        for connection in self.shared.connections().drain(..) {
            connection.ends.iter().for_each(Socket::shut_down);
        }
        Ok(())
    }

    /// Is there again, and says since when.
    pub(super) fn restore(&mut self) -> Result<Instant, BenchError> {
        let listener = TcpListener::bind(self.address).doing("listening for the relay again")?;
        let since = Instant::now();
        self.accept(listener);
        Ok(since)
    }

    /// When connections that are there were made, in their order.
    pub(super) fn connected(&self) -> Vec<Instant> {
        self.shared.connections().iter().map(|connection| connection.came).collect()
    }

    fn accept(&mut self, listener: TcpListener) {
        let listener = Arc::new(listener);
        let (accepted, shared) = (listener.clone(), self.shared.clone());
        let thread = thread::spawn(move || {
            while let Ok((near, _)) = accepted.accept() {
                // What cannot be passed on ends; the engine says so.
                if shared.join(near).is_err() {
                    return;
                }
            }
        });
        self.accepting = Some(Accepting { listener, thread });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // What cannot be ended lasts as long as the process, and nobody uses it any more.
        let _ = self.cut();
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn passed(&self) -> MutexGuard<'_, Vec<WireSample>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, bytes: u64) {
        let mut passed = self.passed();
        let bytes = passed.last().map_or(0, |sample| sample.bytes) + bytes;
        // Under the lock, so that time grows too.
        passed.push(WireSample { at_ns: sys::now_ns(), bytes });
    }

    fn join(self: &Arc<Self>, near: TcpStream) -> Result<(), BenchError> {
        let came = Instant::now();
        let doing = "passing a connection on";
        near.set_nodelay(true).doing(doing)?;
        let (near, far) = (Socket::Tcp(near), Socket::connect(&self.source)?);
        let ends = [near.duplicate().doing(doing)?, far.duplicate().doing(doing)?];
        self.connections().push(Connection { came, ends });
        self.pass(near.duplicate().doing(doing)?, far.duplicate().doing(doing)?);
        self.pass(far, near);
        Ok(())
    }

    fn pass(self: &Arc<Self>, mut from: Socket, to: Socket) {
        let shared = self.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; BUFFER];
            while let Ok(length @ 1..) = std::io::Read::read(&mut from, &mut buffer) {
                shared.note(length as u64);
                if to.send(&buffer[..length]).is_err() {
                    break;
                }
            }
            to.end(Shutdown::Write);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Listener;
    use crate::unit::Wait;

    #[test]
    fn nothing_crosses_a_relay_that_is_cut_and_all_does_afterwards() {
        let source = Listener::bind("tcp:127.0.0.1:0").unwrap();
        let mut relay = Relay::start(&source.address().unwrap()).unwrap();
        for round in 1..=3 {
            let near = Socket::connect(&relay.address()).unwrap();
            let far = source.accept().unwrap();
            let mut got = [0; 4];
            near.send(b"ping").unwrap();
            assert!(far.receive(&mut got, Wait::Blocking).unwrap() && got == *b"ping");
            assert_eq!(relay.connected().len(), 1);
            relay.cut().unwrap();
            assert!(!near.receive(&mut got, Wait::Blocking).unwrap_or(false));
            assert!(!far.receive(&mut got, Wait::Blocking).unwrap_or(false));
            assert!(Socket::connect(&relay.address()).is_err());
            assert_eq!(relay.bytes(), 4 * round);
            relay.restore().unwrap();
        }
    }
}
