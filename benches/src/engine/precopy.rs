//! A source's guest that works while its memory is sent, until it is stopped.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::dirty::{TrackedRegion, WriteProtectTracker};
use afterimage::{
    Events, GuestAddress, Passes, Precopy, RegisteredAddress, Source, SourceEvent, SwitchoverCause,
};
use afterimage_tools::ram::{Backing, Region};

use super::source::{LIMIT, next_event};
use crate::error::{BenchError, Doing};
use crate::guest::hot::{HotGuest, VCPUS};
use crate::memory::Memory;
use crate::unit::{MovingPlan, Precopied};

/// What a guest does before it is moved by postcopy alone.
const OPERATIONS: u64 = 200_000;
/// Between two looks how far a pass has come.
const EVERY: Duration = Duration::from_micros(500);

/// How memory is sent before the switchover, if it is.
pub(super) fn of(plan: MovingPlan, memory: &Memory) -> Result<Option<Precopy>, BenchError> {
    if plan.precopy == Precopied::Nothing {
        return Ok(None);
    }
    let mut precopy = Precopy::new(Box::new(tracker(memory)?));
    precopy.passes = Passes::Count(1);
    Ok(Some(precopy))
}

fn tracker(memory: &Memory) -> Result<WriteProtectTracker, BenchError> {
    let doing = "tracking the guest's writes";
    let regions = memory.ram().regions().iter();
    let regions = regions.map(|region| tracked(region, memory.ram().backing()));
    let regions = regions.collect::<std::io::Result<Vec<_>>>().doing(doing)?;
    WriteProtectTracker::new(regions).doing(doing)
}

fn tracked(region: &Region, backing: Backing) -> std::io::Result<TrackedRegion> {
    let guest = GuestAddress(region.guest_base().0);
    let start = RegisteredAddress(region.host_base().as_ptr() as u64);
    let length = region.length();
    Ok(match (backing, region.file()) {
        (Backing::Hugetlb, _) => TrackedRegion::hugetlb(guest, start, length),
        (_, Some((file, offset))) => {
            let file: OwnedFd = file.as_fd().try_clone_to_owned()?;
            TrackedRegion::shared(guest, start, length, file, offset)
        }
        (_, None) => TrackedRegion::private(guest, start, length),
    })
}

/// Lets the guest work until it is time to stop it; when this returns it is stopped.
pub(super) fn work(
    guest: &HotGuest<'_>,
    plan: MovingPlan,
    source: &Source,
    events: &Events<SourceEvent>,
) -> Result<(), BenchError> {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let goes_on = |number| match plan.precopy {
            Precopied::Nothing => number < OPERATIONS,
            _ => !is_over.load(Ordering::Relaxed),
        };
        let vcpus: Vec<_> =
            (0..VCPUS).map(|vcpu| scope.spawn(move || guest.run(vcpu, goes_on))).collect();
        let waited = match plan.precopy {
            Precopied::Nothing => Ok(()),
            Precopied::OnePass => wait_due(events),
            Precopied::HalfAPass => wait_bytes(source, plan.memory.bytes / 2),
        };
        is_over.store(true, Ordering::Relaxed);
        let worked = vcpus.into_iter().map(|vcpu| vcpu.join().expect("a vCPU does not panic"));
        worked.collect::<Result<Vec<_>, _>>()?;
        waited
    })
}

fn wait_due(events: &Events<SourceEvent>) -> Result<(), BenchError> {
    next_event(events, |event| match event {
        SourceEvent::SwitchoverDue(SwitchoverCause::PassesDone) => ControlFlow::Break(Ok(())),
        SourceEvent::SwitchoverDue(cause) => {
            ControlFlow::Break(Err(BenchError::Failed(format!("a pass ended as {cause:?}"))))
        }
        _ => ControlFlow::Continue(()),
    })?
}

/// Until so much has been sent.
fn wait_bytes(source: &Source, bytes: u64) -> Result<(), BenchError> {
    let started = Instant::now();
    while source.stats().bytes_sent < bytes {
        if started.elapsed() > LIMIT {
            return Err(BenchError::Failed("the first pass does not come to its half".into()));
        }
        thread::sleep(EVERY);
    }
    Ok(())
}
