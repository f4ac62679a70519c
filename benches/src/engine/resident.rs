//! How much of its guest a source still has in memory while it frees what has arrived.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::Source;
use afterimage_tools::ram::Backing;

use crate::error::{BenchError, Doing};
use crate::memory::Memory;
use crate::outcome::ResidentSample;
use crate::sys;

/// Between two looks, each of which takes some microseconds.
const EVERY: Duration = Duration::from_millis(2);
/// What the kernel counts blocks of a file in, whatever blocks it has.
const BLOCK: u64 = 512;

/// Guest memory of this process, from the switchover on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Resident<'a> {
    memory: &'a Memory,
    before: u64,
}

impl<'a> Resident<'a> {
    /// What is there now is all that there will be.
    pub(super) fn start(memory: &'a Memory) -> Result<Self, BenchError> {
        Ok(Self { memory, before: bytes(memory)? })
    }

    /// Looks again and again until `is_over`, and once more then.
    pub(super) fn watch(
        self,
        source: &Source,
        is_over: &AtomicBool,
    ) -> Result<Vec<ResidentSample>, BenchError> {
        let started = Instant::now();
        let mut samples = Vec::new();
        loop {
            let is_last = is_over.load(Ordering::Acquire);
            samples.push(self.sample(source, started)?);
            if is_last {
                return Ok(samples);
            }
            thread::sleep(EVERY);
        }
    }

    fn sample(self, source: &Source, started: Instant) -> Result<ResidentSample, BenchError> {
        let seconds = started.elapsed().as_secs_f64();
        let stats = source.stats();
        let acknowledged = stats.pages_acknowledged as f64 / stats.pages_total.max(1) as f64;
        // Other memory of the process is as it was, but for what the engine needs itself.
        let freed = self.before.saturating_sub(bytes(self.memory)?) as f64;
        let resident = 1.0 - freed / self.memory.plan().bytes as f64;
        Ok(ResidentSample { seconds, acknowledged, resident })
    }
}

/// Bytes in memory that go with the guest's: those of its files, or all anonymous memory of this process.
fn bytes(memory: &Memory) -> Result<u64, BenchError> {
    if memory.ram().backing() == Backing::Anonymous {
        return sys::resident_anonymous().doing("the memory of this process");
    }
    let mut files: Vec<&Arc<fs::File>> = Vec::new();
    for (file, _) in memory.ram().regions().iter().filter_map(|region| region.file()) {
        if !files.iter().any(|known| Arc::ptr_eq(known, file)) {
            files.push(file);
        }
    }
    let blocks = |file: &Arc<fs::File>| file.metadata().map(|it| it.blocks() * BLOCK);
    let all: Result<Vec<u64>, _> = files.into_iter().map(blocks).collect();
    all.map(|all| all.into_iter().sum()).doing("the blocks of guest memory")
}
