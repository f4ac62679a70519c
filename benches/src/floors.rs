//! The floors: for each job the smallest loop that does it, without protocol or books.
//!
//! They say what the machine can do at this moment. Invariant: what a floor moves is
//! verified like everything else.

pub mod fill;
pub mod local_fault;
pub mod ping_pong;
pub mod place;
pub mod remote_fault;
pub mod stream;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{BenchError, Doing};
use crate::memory::Memory;
use crate::sys::Uffd;
use crate::unit::{FaultPlan, MemoryPlan, POLLING, Shape, Unit, Wait};
use afterimage_tools::ram::Backing;

/// Dense anonymous memory.
#[must_use]
pub const fn anonymous(bytes: u64) -> MemoryPlan {
    MemoryPlan { backing: Backing::Anonymous, bytes, shape: Shape::Dense }
}

/// What the source of a floor must have; `None` if the unit is no floor with a source.
#[must_use]
pub const fn source_plan(unit: Unit) -> Option<MemoryPlan> {
    match unit {
        Unit::PingPong(_) => Some(ping_pong::plan()),
        Unit::RemoteFault(FaultPlan { bytes, .. }) | Unit::Stream(_, bytes) => {
            Some(anonymous(bytes))
        }
        Unit::Place(mechanism, bytes) => Some(place::plan(mechanism, bytes)),
        _ => None,
    }
}

/// Memory of a floor's destination, registered as a whole.
fn register(uffd: &Uffd, memory: &Memory, minor: bool) -> Result<(), BenchError> {
    for region in memory.ram().regions() {
        let start = region.host_base().as_ptr();
        // Huge pages would make one fault of many.
        crate::sys::advise_huge(start, region.length(), false);
        // SAFETY: mapped as long as `memory` lives; its readers wait for this descriptor.
        unsafe { uffd.register(start, region.length(), minor) }.doing("UFFDIO_REGISTER")?;
    }
    Ok(())
}

/// Waits for the next fault; `None` when `done`, for which somebody must cause one more.
fn next_fault(uffd: &Uffd, wait: Wait, done: &AtomicBool) -> Result<Option<u64>, BenchError> {
    let started = Instant::now();
    loop {
        if let Some(address) = uffd.next_fault().doing("reading a fault")? {
            return Ok(Some(address));
        }
        if done.load(Ordering::Acquire) {
            return Ok(None);
        }
        if wait == Wait::Polling && started.elapsed() < POLLING {
            std::thread::yield_now();
            continue;
        }
        let mut waiting = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
        // The limit is for `done` only; a fault ends the waiting at once.
        poll(&mut waiting, PollTimeout::from(100u8)).doing("waiting for a fault")?;
    }
}
