//! A guest of some vCPUs with a hot set, which works all the time, on both sides of a migration.
//!
//! Invariant: what a page must contain follows from the plan and [`HotGuest::added`]; the counts
//! move with the guest.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use crate::error::{BenchError, Doing};
use crate::latency::Latencies;
use crate::memory::{Memory, PAGE, mix};
use crate::sys::PageMap;

/// As many as there are processors at least.
pub const VCPUS: u64 = 2;
/// One page in so many is hot, and one operation in so many is elsewhere.
const HOT: u64 = 10;
/// Hot pages lie together by so many, as what a program uses does.
const CLUSTER: u64 = 16;

/// Lets the guest that `state` is of work in `memory` until `done`; returns how long its vCPUs
/// waited for missing pages, and what was added to the first word of each page, on both sides.
///
/// # Errors
/// If the state is of another guest, or the page map cannot be read.
pub fn work(
    memory: &Memory,
    state: &[u8],
    done: &AtomicBool,
) -> Result<(Latencies, Vec<u64>), BenchError> {
    let guest = HotGuest::restored(memory, state)?;
    let all = thread::scope(|scope| {
        let guest = &guest;
        let goes_on = |_| !done.load(Ordering::Relaxed);
        let vcpus: Vec<_> =
            (0..VCPUS).map(|vcpu| scope.spawn(move || guest.run(vcpu, goes_on))).collect();
        let waits = vcpus.into_iter().map(|vcpu| vcpu.join().expect("a vCPU does not panic"));
        waits.collect::<Result<Vec<_>, _>>()
    })?;
    let mut waits = Latencies::default();
    for vcpu in &all {
        waits.add(vcpu);
    }
    let pages = memory.plan().bytes / PAGE;
    Ok((waits, (0..pages).map(|page| guest.added(page)).collect()))
}

/// The guest. Nine operations in ten are in the hot set, every second of these a write; the
/// others read any page.
#[derive(Debug)]
pub struct HotGuest<'a> {
    memory: &'a Memory,
    /// In ascending order.
    hot: Vec<u64>,
    /// What was added to the first word of each of them.
    added: Vec<AtomicU64>,
}

impl<'a> HotGuest<'a> {
    /// Has not written anything yet.
    #[must_use]
    pub fn new(memory: &'a Memory) -> Self {
        let pages = 0..memory.plan().bytes / PAGE;
        let hot: Vec<u64> = pages.filter(|page| mix(page / CLUSTER).is_multiple_of(HOT)).collect();
        let added = hot.iter().map(|_| AtomicU64::new(0)).collect();
        Self { memory, hot, added }
    }

    /// The guest that [`state`](Self::state) is of, in other memory of the same plan.
    ///
    /// # Errors
    /// If it is of another plan.
    pub fn restored(memory: &'a Memory, state: &[u8]) -> Result<Self, BenchError> {
        let guest = Self::new(memory);
        let (counts, rest) = state.as_chunks::<8>();
        if counts.len() != guest.added.len() || !rest.is_empty() {
            return Err(BenchError::Failed(format!("a state of {} bytes", state.len())));
        }
        for (added, count) in guest.added.iter().zip(counts) {
            added.store(u64::from_le_bytes(*count), Ordering::Relaxed);
        }
        Ok(guest)
    }

    /// What moves with it beside its memory. Once no vCPU runs.
    #[must_use]
    pub fn state(&self) -> Vec<u8> {
        self.added.iter().flat_map(|added| added.load(Ordering::Relaxed).to_le_bytes()).collect()
    }

    /// What was added to the first word of a page.
    #[must_use]
    pub fn added(&self, page: u64) -> u64 {
        let index = self.hot.binary_search(&page);
        index.map_or(0, |index| self.added[index].load(Ordering::Relaxed))
    }

    /// Works as one vCPU as long as `goes_on` says of the number of the next operation, and
    /// measures its waits for pages that are missing.
    ///
    /// # Errors
    /// If the page map cannot be read.
    pub fn run(&self, vcpu: u64, goes_on: impl Fn(u64) -> bool) -> Result<Latencies, BenchError> {
        let map = PageMap::open().doing("/proc/self/pagemap")?;
        let mut waits = Latencies::default();
        let mut met = vec![false; (self.memory.plan().bytes / PAGE) as usize];
        let mut number = 0;
        while goes_on(number) {
            let operation = self.operation(mix(number * VCPUS + vcpu));
            let page = operation.page();
            if met[page as usize] || map.is_present(self.memory.address(page) as u64) {
                self.carry_out(operation);
            } else {
                let before = Instant::now();
                self.carry_out(operation);
                waits.record(before.elapsed());
            }
            met[page as usize] = true;
            number += 1;
        }
        Ok(waits)
    }

    fn operation(&self, chance: u64) -> Operation {
        // Different bits for each choice.
        let (kind, writes, place) = (chance & 0xffff, chance >> 16 & 1, chance >> 20);
        if self.hot.is_empty() || kind.is_multiple_of(HOT) {
            return Operation::Read { page: place % (self.memory.plan().bytes / PAGE) };
        }
        let index = (place % self.hot.len() as u64) as usize;
        let page = self.hot[index];
        if writes == 1 { Operation::Write { page, index } } else { Operation::Read { page } }
    }

    fn carry_out(&self, operation: Operation) {
        match operation {
            Operation::Read { page } => {
                black_box(self.memory.word(page).load(Ordering::Relaxed));
            }
            Operation::Write { page, index } => {
                self.memory.word(page).fetch_add(1, Ordering::Relaxed);
                self.added[index].fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Read { page: u64 },
    Write { page: u64, index: usize },
}

impl Operation {
    const fn page(self) -> u64 {
        match self {
            Self::Read { page } | Self::Write { page, .. } => page,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::floors::anonymous;

    #[test]
    fn what_it_writes_is_accounted_for_and_moves_with_it() {
        let memory = Memory::filled(anonymous(4 << 20)).unwrap();
        let guest = HotGuest::new(&memory);
        guest.run(0, |number| number < 50_000).unwrap();
        assert!(memory.verify().is_err());
        memory.verify_except(|page| guest.added(page)).unwrap();
        let moved = HotGuest::restored(&memory, &guest.state()).unwrap();
        moved.run(1, |number| number < 50_000).unwrap();
        memory.verify_except(|page| moved.added(page)).unwrap();
        assert!(memory.verify_except(|page| guest.added(page)).is_err());
        assert!(HotGuest::restored(&memory, &guest.state()[8..]).is_err());
    }

    #[test]
    fn a_tenth_of_its_memory_is_hot_and_every_hot_page_is_written() {
        let memory = Memory::filled(anonymous(64 << 20)).unwrap();
        let guest = HotGuest::new(&memory);
        let hot = guest.hot.len() as u64;
        assert!((8..=12).contains(&(hot * 100 / (memory.plan().bytes / PAGE))), "{hot}");
        guest.run(0, |number| number < 40 * hot).unwrap();
        assert!(guest.hot.iter().all(|page| guest.added(*page) > 0));
    }
}
