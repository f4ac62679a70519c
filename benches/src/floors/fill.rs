//! Floor 5: placing pages whose content is there already.

use super::place::{alias, plan};
use super::register;
use crate::error::{BenchError, Doing};
use crate::memory::{self, Memory, PAGE};
use crate::outcome::{Figure, Meter, Outcome};
use crate::sys::{self, FEATURE_MOVE, FEATURES_MINOR, Uffd};
use crate::unit::{Mechanism, MemoryPlan, Shape};

const BYTES: u64 = 256 << 20;
/// Bytes placed in one call, where pages are no larger.
const RUN: u64 = 256 << 10;

/// Places all memory in runs.
///
/// # Errors
/// If the machine lacks the mechanism, or a page is not what it must be.
pub fn run(mechanism: Mechanism) -> Result<Outcome, BenchError> {
    let shape = if mechanism == Mechanism::ZeroPage { Shape::Empty } else { Shape::Dense };
    let memory = Memory::empty(MemoryPlan { shape, ..plan(mechanism, BYTES) })?;
    let features = match mechanism {
        Mechanism::Copy | Mechanism::ZeroPage => 0,
        Mechanism::Move => FEATURE_MOVE,
        Mechanism::ContinueMemfd | Mechanism::ContinueHugetlb => FEATURES_MINOR,
    };
    let uffd = Uffd::new(features)
        .map_err(|error| BenchError::Lacking(format!("this kernel has no {mechanism}: {error}")))?;
    let content = content(mechanism, &memory)?;
    register(&uffd, &memory, features == FEATURES_MINOR)?;
    let run = RUN.max(memory.ram().backing().page_bytes());
    let meter = Meter::start();
    for offset in (0..BYTES).step_by(run as usize) {
        let target = memory.address(offset / PAGE) as u64;
        let placed = match (mechanism, &content) {
            (Mechanism::Copy, Some(content)) => {
                // SAFETY: nobody writes the content.
                let bytes = unsafe { memory::bytes(content, offset, run as usize) }?;
                uffd.copy(target, bytes)
            }
            // SAFETY: nobody uses the content any more.
            (Mechanism::Move, Some(content)) => unsafe {
                uffd.take(target, content.address(offset / PAGE), run)
            },
            (Mechanism::ZeroPage, _) => uffd.zero(target, run),
            _ => uffd.resume(target, run),
        };
        placed.doing(&format!("placing by {mechanism}"))?;
    }
    let reading = meter.read();
    memory.verify()?;
    Ok(Outcome::default().metered(reading).with(Figure::Bytes, BYTES as f64))
}

/// The content: memory of its own, or what an alias has written to the file.
fn content(mechanism: Mechanism, memory: &Memory) -> Result<Option<Memory>, BenchError> {
    match mechanism {
        Mechanism::ZeroPage => Ok(None),
        Mechanism::Copy => Memory::filled(plan(mechanism, BYTES)).map(Some),
        Mechanism::Move => {
            let content = Memory::empty(plan(mechanism, BYTES))?;
            sys::advise_huge(content.address(0), BYTES, false);
            content.fill();
            Ok(Some(content))
        }
        Mechanism::ContinueMemfd | Mechanism::ContinueHugetlb => {
            let alias = alias(memory, mechanism).doing("mapping the memory once more")?;
            let alias = alias.ok_or_else(|| BenchError::Failed("memory without a file".into()))?;
            for page in 0..BYTES / PAGE {
                let words = memory::page_content(&memory.plan(), page);
                let from = words.as_ptr().cast::<u8>();
                // SAFETY: a page of the alias, which nobody else writes.
                unsafe {
                    let to = alias.as_mut_ptr().add((page * PAGE) as usize);
                    from.copy_to_nonoverlapping(to, PAGE as usize);
                }
            }
            Ok(None)
        }
    }
}
