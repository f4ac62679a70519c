//! Floor 6: receiving a stream and placing its pages, without any book-keeping.

use std::io;

use memmap2::{MmapOptions, MmapRaw};

use super::{register, stream};
use crate::error::{BenchError, Doing};
use crate::memory::{Memory, PAGE};
use crate::network::{Listener, Socket};
use crate::outcome::{Figure, Meter, Outcome};
use crate::sys::{FEATURES_MINOR, Uffd};
use crate::unit::{Mechanism, MemoryPlan, Shape, Wait};

/// Bytes placed in one go, where pages are no larger.
const RUN: u64 = 256 << 10;

/// What the source must have.
#[must_use]
pub const fn plan(mechanism: Mechanism, bytes: u64) -> MemoryPlan {
    MemoryPlan { backing: mechanism.backing(), bytes, shape: Shape::Dense }
}

/// Sends all memory once.
///
/// # Errors
/// If the connection breaks.
pub fn source(memory: &Memory, listener: &Listener) -> Result<Outcome, BenchError> {
    stream::source(memory, listener)
}

/// Receives and places it.
///
/// # Errors
/// If the connection breaks, the machine lacks the mechanism, or a page is not what it must
/// be.
pub fn destination(mechanism: Mechanism, bytes: u64, address: &str) -> Result<Outcome, BenchError> {
    let socket = Socket::connect(address)?;
    let memory = Memory::empty(plan(mechanism, bytes))?;
    let is_copied = matches!(mechanism, Mechanism::Copy);
    let uffd = Uffd::new(if is_copied { 0 } else { FEATURES_MINOR }).doing("userfaultfd")?;
    register(&uffd, &memory, !is_copied)?;
    let mut placing = Placing::of(&memory, mechanism)?;
    socket.send(&[1]).doing("sending a word")?;
    let meter = Meter::start();
    for offset in (0..bytes).step_by(placing.run as usize) {
        let into = placing.at(offset);
        if !socket.receive(into, Wait::Blocking).doing("receiving a stream")? {
            return Err(BenchError::Failed("the stream ended early".into()));
        }
        let target = memory.address(offset / PAGE) as u64;
        if is_copied {
            uffd.copy(target, into).doing("UFFDIO_COPY")?;
        } else {
            uffd.resume(target, placing.run).doing("UFFDIO_CONTINUE")?;
        }
    }
    let reading = meter.read();
    memory.verify()?;
    Ok(Outcome::default()
        .metered(reading)
        .with(Figure::Bytes, bytes as f64)
        .with(Figure::BackgroundBytes, bytes as f64))
}

/// Where content is received.
struct Placing {
    /// Bytes in one go.
    run: u64,
    staging: Vec<u8>,
    alias: Option<MmapRaw>,
}

impl Placing {
    fn of(memory: &Memory, mechanism: Mechanism) -> Result<Self, BenchError> {
        let run = RUN.max(memory.ram().backing().page_bytes());
        let alias = alias(memory, mechanism).doing("mapping the memory once more")?;
        let staging = if alias.is_some() { Vec::new() } else { vec![1; run as usize] };
        Ok(Self { run, staging, alias })
    }

    fn at(&mut self, offset: u64) -> &mut [u8] {
        match &self.alias {
            None => &mut self.staging,
            // SAFETY: inside the alias, which covers all memory; the pages are not mapped for
            // anybody else before they are placed.
            Some(alias) => unsafe {
                let start = alias.as_mut_ptr().add(offset as usize);
                std::slice::from_raw_parts_mut(start, self.run as usize)
            },
        }
    }
}

/// A second mapping of memory with a file; it has one region below 3 GiB.
pub(super) fn alias(memory: &Memory, mechanism: Mechanism) -> io::Result<Option<MmapRaw>> {
    if matches!(mechanism, Mechanism::Copy | Mechanism::ZeroPage | Mechanism::Move) {
        return Ok(None);
    }
    let region = &memory.ram().regions()[0];
    let (file, offset) = region.file().ok_or(io::ErrorKind::Unsupported)?;
    let length = region.length() as usize;
    MmapOptions::new().offset(offset).len(length).map_raw(&**file).map(Some)
}
