//! A source's limits of background, and from when to when each of them held.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage::dirty::DirtyBitmap;
use afterimage::{Background, GuestAddress, Passes, Precopy, Source, SourceOptions};

use super::source::LIMIT;
use crate::error::{BenchError, Doing};
use crate::memory::Memory;
use crate::outcome::RateWindow;
use crate::sys;
use crate::unit::MemoryPlan;

/// How long each limit is watched.
const WINDOW: Duration = Duration::from_secs(1);
/// Between two looks whether anything is sent.
const EVERY: Duration = Duration::from_micros(200);

/// Limits in bytes a second, so that an eighth of the memory is left when all have been watched.
#[derive(Clone, Copy, Debug)]
struct Limits {
    before: NonZeroU64,
    after: NonZeroU64,
    changed: NonZeroU64,
}

impl Limits {
    fn of(memory: MemoryPlan) -> Self {
        let part = |parts| NonZeroU64::new(memory.bytes / parts).unwrap_or(NonZeroU64::MIN);
        Self { before: part(8), after: part(2), changed: part(4) }
    }
}

/// With the limits before and after the switchover; nobody writes.
pub(super) fn limit(options: &mut SourceOptions, memory: &Memory) -> Result<(), BenchError> {
    let regions = memory.ram().regions().iter();
    let ranges: Vec<_> =
        regions.map(|region| (GuestAddress(region.guest_base().0), region.length())).collect();
    let tracker = DirtyBitmap::new(&ranges).doing("a bitmap of what is written")?;
    let mut precopy = Precopy::new(Box::new(Arc::new(tracker)));
    // Longer than it is watched.
    precopy.passes = Passes::Count(1);
    let limits = Limits::of(memory.plan());
    options.precopy = Some(precopy);
    options.precopy_background = Some(Background::Limited { bytes_per_second: limits.before });
    options.background = Background::Limited { bytes_per_second: limits.after };
    Ok(())
}

/// While the first pass is under way.
pub(super) fn before(source: &Source, plan: MemoryPlan) -> Result<RateWindow, BenchError> {
    wait_sent(source, 0)?;
    Ok(watch(Limits::of(plan).before))
}

/// After the switchover, by which `sent` bytes had been sent; then another limit, then none.
pub(super) fn after(
    source: &Source,
    plan: MemoryPlan,
    sent: u64,
) -> Result<[RateWindow; 2], BenchError> {
    let limits = Limits::of(plan);
    wait_sent(source, sent)?;
    let after = watch(limits.after);
    source.set_background(Background::Limited { bytes_per_second: limits.changed });
    let changed = watch(limits.changed);
    source.set_background(Background::Unlimited);
    Ok([after, changed])
}

fn watch(bytes_per_second: NonZeroU64) -> RateWindow {
    let from_ns = sys::now_ns();
    // Not to wait for anything: this is the time over which the rate is taken.
    thread::sleep(WINDOW);
    RateWindow { from_ns, until_ns: sys::now_ns(), bytes_per_second: bytes_per_second.get() }
}

/// Until more has been sent than `bytes`.
fn wait_sent(source: &Source, bytes: u64) -> Result<(), BenchError> {
    let started = Instant::now();
    while source.stats().bytes_sent <= bytes {
        if started.elapsed() > LIMIT {
            return Err(BenchError::Failed("the background sends nothing".into()));
        }
        thread::sleep(EVERY);
    }
    Ok(())
}
