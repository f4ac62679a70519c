//! One round trip of a link, on a connection made for it: connect, 16 bytes there, 16 back.
//!
//! The destination also says here that it has measured enough. Each connection carries one
//! message.

use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::error::{BenchError, Doing};
use crate::network::{Listener, Socket};
use crate::unit::Wait;

const PING: [u8; 16] = [1; 16];
const ENOUGH: [u8; 16] = [2; 16];

/// Answers at the source until it is told that it is enough.
#[derive(Debug)]
pub struct Echo {
    address: String,
    enough: Receiver<()>,
}

impl Echo {
    /// Listens beside the engine, which listens at `listen`.
    ///
    /// # Errors
    /// If that is not to be had.
    pub fn start(listen: &str) -> Result<Self, BenchError> {
        let beside = match listen.strip_prefix("unix:") {
            Some(path) => format!("unix:{path}-echo"),
            // Port 0: any will do.
            None => listen.to_owned(),
        };
        let listener = Listener::bind(&beside)?;
        let address = listener.address()?;
        let (sender, enough) = bounded(1);
        thread::spawn(move || serve(&listener, &sender));
        Ok(Self { address, enough })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Waits until the destination has measured enough.
    pub(super) fn wait(&self, limit: Duration) -> Result<(), BenchError> {
        self.enough.recv_timeout(limit).doing("waiting for the destination to measure")
    }
}

fn serve(listener: &Listener, enough: &Sender<()>) {
    while let Ok(socket) = listener.accept() {
        let mut message = [0; 16];
        // Who goes away without a word is nobody's loss.
        if let Ok(true) = socket.receive(&mut message, Wait::Blocking) {
            let _ = socket.send(&message);
        }
        if message == ENOUGH {
            // If the source has given up, nobody waits.
            let _ = enough.send(());
            return;
        }
    }
}

/// How long one round trip takes.
pub(super) fn round_trip(address: &str) -> Result<Duration, BenchError> {
    let started = Instant::now();
    exchange(address, PING)?;
    Ok(started.elapsed())
}

/// Tells the source that it is enough.
pub(super) fn enough(address: &str) -> Result<(), BenchError> {
    exchange(address, ENOUGH)
}

fn exchange(address: &str, message: [u8; 16]) -> Result<(), BenchError> {
    let socket = Socket::connect(address)?;
    socket.send(&message).doing("sending a ping")?;
    let mut answer = [0; 16];
    if socket.receive(&mut answer, Wait::Blocking).doing("receiving a ping")? && answer == message {
        Ok(())
    } else {
        Err(BenchError::Failed("a ping came back wrong".into()))
    }
}
