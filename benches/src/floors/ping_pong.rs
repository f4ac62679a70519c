//! Floor 1: 16 bytes to the source, 4 KiB back.

use std::time::Instant;

use super::anonymous;
use crate::error::{BenchError, Doing};
use crate::latency::Latencies;
use crate::memory::{self, Memory, PAGE};
use crate::network::{Listener, Socket};
use crate::outcome::Outcome;
use crate::unit::{MemoryPlan, Wait};

const BYTES: u64 = 16 << 20;

/// What the source must have.
#[must_use]
pub const fn plan() -> MemoryPlan {
    anonymous(BYTES)
}

/// Answers until the other side ends.
///
/// # Errors
/// If the connection breaks.
pub fn source(memory: &Memory, wait: Wait, listener: &Listener) -> Result<Outcome, BenchError> {
    let socket = listener.accept()?;
    answer(memory, wait, &socket, || {}, || {})?;
    Ok(Outcome::default())
}

/// Answers requests of 16 bytes, the first 8 of which are an offset.
pub(super) fn answer(
    memory: &Memory,
    wait: Wait,
    socket: &Socket,
    before: impl Fn(),
    after: impl Fn(),
) -> Result<(), BenchError> {
    let mut request = [0; 16];
    while socket.receive(&mut request, wait).doing("receiving a request")? {
        before();
        let offset = u64::from_le_bytes(request[..8].try_into().expect("eight bytes"));
        // SAFETY: a floor's source is not written while it serves.
        let page = unsafe { memory::bytes(memory, offset, PAGE as usize) }?;
        socket.send(page).doing("sending a page")?;
        after();
    }
    Ok(())
}

/// Asks for each page once.
///
/// # Errors
/// If the connection breaks, or a page is not what it must be.
pub fn destination(wait: Wait, address: &str) -> Result<Outcome, BenchError> {
    let socket = Socket::connect(address)?;
    let mut latencies = Latencies::default();
    let mut content = [0; PAGE as usize];
    for page in memory::shuffled(BYTES / PAGE) {
        let started = Instant::now();
        ask(&socket, page * PAGE, &mut content, wait)?;
        latencies.record(started.elapsed());
        let first = u64::from_ne_bytes(content[..8].try_into().expect("eight bytes"));
        if Some(first) != plan().content(page) {
            return Err(BenchError::Wrong(format!("page {page} of the ping-pong")));
        }
    }
    socket.shut_down();
    Ok(Outcome::of(latencies))
}

/// One request and its answer.
pub(super) fn ask(
    socket: &Socket,
    offset: u64,
    into: &mut [u8; PAGE as usize],
    wait: Wait,
) -> Result<(), BenchError> {
    let mut request = [0; 16];
    request[..8].copy_from_slice(&offset.to_le_bytes());
    socket.send(&request).doing("sending a request")?;
    if socket.receive(into, wait).doing("receiving a page")? {
        Ok(())
    } else {
        Err(BenchError::Failed("the source ended before its answer".into()))
    }
}
