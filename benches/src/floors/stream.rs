//! Floor 4: a stream into memory that nobody registered.

use std::sync::atomic::{AtomicU64, Ordering};

use super::anonymous;
use crate::error::{BenchError, Doing};
use crate::memory::{Memory, PAGE};
use crate::network::{Listener, Socket};
use crate::outcome::{Figure, Meter, Outcome};
use crate::unit::{Into, Wait};

/// Bytes sent in one call.
const SEND: usize = 1 << 20;
/// Bytes received in one go.
const RECEIVE: usize = 256 << 10;

/// Sends all memory once.
///
/// # Errors
/// If the connection breaks.
pub fn source(memory: &Memory, listener: &Listener) -> Result<Outcome, BenchError> {
    let socket = listener.accept()?;
    socket.keep_short()?;
    // The other side says when it is ready.
    let mut ready = [0];
    socket.receive(&mut ready, Wait::Blocking).doing("receiving a word")?;
    let meter = Meter::start();
    send_all(memory, &socket)?;
    Ok(Outcome::default().metered(meter.read()))
}

fn send_all(memory: &Memory, socket: &Socket) -> Result<(), BenchError> {
    for region in memory.ram().regions() {
        let start = region.host_base().as_ptr();
        for offset in (0..region.length()).step_by(SEND) {
            let length = (region.length() - offset).min(SEND as u64) as usize;
            // SAFETY: inside the region, and not written while it is served.
            let bytes = unsafe { std::slice::from_raw_parts(start.add(offset as usize), length) };
            socket.send(bytes).doing("sending a stream")?;
        }
    }
    Ok(())
}

/// Receives it.
///
/// # Errors
/// If the connection breaks, or what came is not what it must be.
pub fn destination(into: Into, bytes: u64, address: &str) -> Result<Outcome, BenchError> {
    let socket = Socket::connect(address)?;
    let fresh = (into == Into::Fresh).then(|| Memory::empty(anonymous(bytes))).transpose()?;
    let mut reused = vec![1; RECEIVE];
    let sum = AtomicU64::new(0);
    socket.send(&[1]).doing("sending a word")?;
    let meter = Meter::start();
    for offset in (0..bytes).step_by(RECEIVE) {
        let into = match &fresh {
            None => &mut reused[..],
            // SAFETY: inside one region (there is only one below 3 GiB), and nobody else's.
            Some(memory) => unsafe {
                std::slice::from_raw_parts_mut(memory.address(offset / PAGE), RECEIVE)
            },
        };
        if !socket.receive(into, Wait::Blocking).doing("receiving a stream")? {
            return Err(BenchError::Failed("the stream ended early".into()));
        }
        if fresh.is_none() {
            let first = u64::from_ne_bytes(into[..8].try_into().expect("eight bytes"));
            sum.fetch_add(first, Ordering::Relaxed);
        }
    }
    let reading = meter.read();
    match fresh {
        Some(memory) => memory.verify()?,
        None => verify_sum(bytes, sum.into_inner())?,
    }
    Ok(Outcome::default().metered(reading).with(Figure::Bytes, bytes as f64))
}

/// What went into one buffer is gone; the first word of each piece was added up.
fn verify_sum(bytes: u64, sum: u64) -> Result<(), BenchError> {
    let firsts = (0..bytes).step_by(RECEIVE).filter_map(|at| anonymous(bytes).content(at / PAGE));
    if firsts.fold(0u64, u64::wrapping_add) == sum {
        Ok(())
    } else {
        Err(BenchError::Wrong("the sum of a stream".into()))
    }
}
