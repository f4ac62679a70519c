//! A guest of plain threads: the same work as on KVM, where there is no KVM.
//!
//! Each vCPU is a thread that works in guest RAM by atomic operations. Invariant: it
//! stops between two operations, so its [`Worker`] and RAM describe it wholly. Where a bitmap
//! is wanted, a page is marked after each write to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use afterimage::dirty::{DirtyBitmap, DirtyTracker, WriteProtectTracker};
use serde::{Deserialize, Serialize};

use super::spec::{
    COMPUTE_STEPS, COUNTER_OFFSET, HOT_STRIDE, LANE_BYTES, TAG_OFFSET, choose, xorshift,
};
use super::state::{GuestKind, MachineState, Sections, StateError, VcpuProgress};
use super::{
    Guest, GuestError, GuestSpec, Progress, TrackerKind, Workload, control, tag_of, tracked_regions,
};
use crate::ram::{GuestAddress, GuestRam};

const SECTION_VERSION: u32 = 1;

/// Operations between two looks at the stop flag by random and other workloads.
const STOP_CHECK: u64 = 16;

/// A guest on plain threads. See [`Guest`].
///
/// A thread that touches a poisoned page gets SIGBUS, which ends the process.
#[derive(Debug)]
pub struct ThreadsGuest {
    ram: Arc<GuestRam>,
    spec: GuestSpec,
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
    stopped: Vec<Worker>,
    running: Vec<JoinHandle<Worker>>,
    /// Where the workers mark what they write, if anybody wants to know.
    marks: Option<Arc<DirtyBitmap>>,
}

/// RAM, as a worker reaches it.
struct Memory {
    ram: Arc<GuestRam>,
    marks: Option<Arc<DirtyBitmap>>,
}

/// All state of one vCPU that is not in RAM.
#[derive(Debug, Serialize, Deserialize)]
struct Worker {
    vcpu: u32,
    cursor: u64,
    random: u64,
    operations: u64,
}

impl ThreadsGuest {
    /// A new guest in `ram`, which [`super::init_ram`] has filled for the same spec.
    /// Writes the system area.
    ///
    /// # Errors
    /// If the spec is for another size of RAM.
    pub fn new(ram: Arc<GuestRam>, spec: GuestSpec) -> Result<Self, GuestError> {
        spec.check(&ram)?;
        install_control_pages(&ram, &spec);
        let workers = (0..spec.vcpus()).map(|vcpu| Worker {
            vcpu,
            cursor: 0,
            random: spec.vcpu_seed(vcpu),
            operations: 0,
        });
        let workers = workers.collect();
        Ok(Self::stopped(ram, spec, workers))
    }

    /// A guest that goes on where `state` was taken. Touches no page of `ram`.
    ///
    /// # Errors
    /// If the state is of another kind or damaged, or the RAM has another size.
    pub fn restore(ram: Arc<GuestRam>, state: &MachineState) -> Result<Self, GuestError> {
        state.expect_kind(GuestKind::Threads)?;
        let spec = state.spec().clone();
        spec.check(&ram)?;
        let workers = (0..spec.vcpus())
            .map(|vcpu| Worker::restore(state, vcpu))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self::stopped(ram, spec, workers))
    }

    fn stopped(ram: Arc<GuestRam>, spec: GuestSpec, workers: Vec<Worker>) -> Self {
        let progress: Vec<_> = workers.iter().map(Worker::progress).collect();
        Self {
            progress: Arc::new(Progress::new(&spec, &progress)),
            ram,
            spec,
            stop: Arc::new(AtomicBool::new(false)),
            stopped: workers,
            running: Vec::new(),
            marks: None,
        }
    }

    fn join(&mut self) -> Result<(), GuestError> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.running.drain(..) {
            match thread.join() {
                Ok(worker) => self.stopped.push(worker),
                Err(_) => return Err(GuestError::Failed("a vCPU thread panicked".into())),
            }
        }
        Ok(())
    }
}

impl Guest for ThreadsGuest {
    fn start(&mut self) -> Result<(), GuestError> {
        if !self.running.is_empty() {
            return Err(GuestError::Already("running"));
        }
        if self.stopped.len() != self.spec.vcpus() as usize {
            return Err(GuestError::Failed("vCPUs were lost before".into()));
        }
        self.stop.store(false, Ordering::Relaxed);
        for mut worker in std::mem::take(&mut self.stopped) {
            let vcpu = worker.vcpu;
            let memory = Memory { ram: self.ram.clone(), marks: self.marks.clone() };
            let spec = self.spec.clone();
            let (progress, stop) = (self.progress.clone(), self.stop.clone());
            let thread = thread::Builder::new()
                .name(format!("vcpu{vcpu}"))
                .spawn(move || {
                    worker.run(&memory, &spec, &progress, &stop);
                    worker
                })
                .map_err(|source| GuestError::Thread { vcpu, source })?;
            self.running.push(thread);
        }
        Ok(())
    }

    fn halt(&mut self) -> Result<(), GuestError> {
        if self.running.is_empty() {
            return Err(GuestError::Already("stopped"));
        }
        self.join()
    }

    fn save(&self) -> Result<MachineState, GuestError> {
        if !self.running.is_empty() {
            return Err(GuestError::Already("running"));
        }
        let mut sections = Sections::default();
        for worker in &self.stopped {
            sections.put_json(&section_name(worker.vcpu), SECTION_VERSION, worker);
        }
        let progress = self.stopped.iter().map(Worker::progress).collect();
        Ok(MachineState::new(GuestKind::Threads, self.spec.clone(), progress, sections))
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        kind.check(GuestKind::Threads)?;
        let refused = |error| kind.refused(error);
        if kind == TrackerKind::Pagemap {
            let regions = tracked_regions(&self.ram).map_err(refused)?;
            return Ok(Box::new(WriteProtectTracker::new(regions).map_err(refused)?));
        }
        if let Some(marks) = &self.marks {
            return Ok(Box::new(marks.clone()));
        }
        if !self.running.is_empty() {
            // Its workers mark nothing.
            return Err(GuestError::Already("running"));
        }
        let regions = self.ram.regions().iter();
        let ranges = regions
            .map(|region| (afterimage::GuestAddress(region.guest_base().0), region.length()));
        let marks = DirtyBitmap::new(&ranges.collect::<Vec<_>>()).map_err(refused)?;
        Ok(Box::new(self.marks.insert(Arc::new(marks)).clone()))
    }

    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }
}

impl Drop for ThreadsGuest {
    fn drop(&mut self) {
        // A panicked thread has said so already.
        let _ = self.join();
    }
}

/// Writes the parameters of all vCPUs to their control pages, counters at 0.
pub(crate) fn install_control_pages(ram: &GuestRam, spec: &GuestSpec) {
    for vcpu in 0..spec.vcpus() {
        ram.write_page(control::address(vcpu, 0), &[0; 512]);
        for (offset, value) in spec.control_words(vcpu) {
            ram.word(control::address(vcpu, offset)).store(value, Ordering::Relaxed);
        }
    }
}

impl Memory {
    /// Nobody else writes this word: no locked operation is needed.
    fn increment(&self, address: GuestAddress) {
        let word = self.ram.word(address);
        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.mark(address);
    }

    /// The same, of a byte.
    fn increment_byte(&self, address: GuestAddress) {
        let byte = self.ram.byte(address);
        byte.store(byte.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        self.mark(address);
    }

    fn mark(&self, written: GuestAddress) {
        if let Some(marks) = &self.marks {
            marks.mark(afterimage::GuestAddress(written.0), 1);
        }
    }
}

fn section_name(vcpu: u32) -> String {
    format!("vcpu{vcpu}/worker")
}

impl Worker {
    fn restore(state: &MachineState, vcpu: u32) -> Result<Self, StateError> {
        let name = section_name(vcpu);
        let worker: Self = state.sections().json(&name, SECTION_VERSION)?;
        let in_bounds = worker.cursor < state.spec().worked_pages() && worker.random != 0;
        if worker.vcpu != vcpu || !in_bounds {
            let reason = format!("{worker:?} is not a state of vCPU {vcpu}");
            return Err(StateError::Content { name, reason });
        }
        Ok(worker)
    }

    fn progress(&self) -> VcpuProgress {
        VcpuProgress { operations: self.operations, in_flight: false }
    }

    fn run(&mut self, memory: &Memory, spec: &GuestSpec, progress: &Progress, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..STOP_CHECK {
                self.operation(memory, spec, progress);
            }
            progress.report(self.vcpu, self.operations);
        }
    }

    fn operation(&mut self, memory: &Memory, spec: &GuestSpec, progress: &Progress) {
        let pages = spec.worked_pages();
        match spec.workload() {
            Workload::Pattern => {
                let page = self.next_page(pages);
                memory.increment_byte(self.lane(spec, page, 0));
            }
            Workload::Sequential => {
                let page = self.next_page(pages);
                self.count(memory, spec, page);
            }
            Workload::Random => {
                let page = choose(self.next_random(), pages);
                self.count(memory, spec, page);
            }
            Workload::HotSet => {
                let random = self.next_random();
                let page = if random.is_multiple_of(16) {
                    choose(random, pages)
                } else {
                    choose(random, spec.hot_pages()) * HOT_STRIDE
                };
                self.count(memory, spec, page);
            }
            Workload::ReadMostly => {
                let random = self.next_random();
                let page = choose(random, pages);
                self.check_tag(memory, spec, page, progress);
                if random.is_multiple_of(32) {
                    self.count(memory, spec, page);
                }
            }
            Workload::Mixed => {
                for _ in 0..COMPUTE_STEPS {
                    self.next_random();
                }
                let page = choose(self.random, pages);
                self.check_tag(memory, spec, page, progress);
                self.count(memory, spec, page);
            }
        }
        self.operations += 1;
    }

    fn next_page(&mut self, pages: u64) -> u64 {
        let page = self.cursor;
        self.cursor = if page + 1 == pages { 0 } else { page + 1 };
        page
    }

    fn next_random(&mut self) -> u64 {
        self.random = xorshift(self.random);
        self.random
    }

    fn lane(&self, spec: &GuestSpec, page: u64, offset: u64) -> GuestAddress {
        let lane = u64::from(self.vcpu) * LANE_BYTES;
        GuestAddress(spec.geometry().address(page).0 + lane + offset)
    }

    fn count(&self, memory: &Memory, spec: &GuestSpec, page: u64) {
        memory.increment(self.lane(spec, page, COUNTER_OFFSET));
        memory.increment(control::address(self.vcpu, control::WRITES));
    }

    fn check_tag(&self, memory: &Memory, spec: &GuestSpec, page: u64, progress: &Progress) {
        let address = GuestAddress(spec.geometry().address(page).0 + TAG_OFFSET);
        if memory.ram.word(address).load(Ordering::Relaxed) != tag_of(page) {
            memory.increment(control::address(self.vcpu, control::ERRORS));
            progress.fail(format!("vCPU {} read a wrong tag on page {page}", self.vcpu));
        }
    }
}
