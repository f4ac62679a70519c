//! The guest at the destination: vCPUs that read, write and discard pages, and what each
//! page must read.

use crate::memory::{Memory, Removal};
use crate::world::World;
use afterimage_protocol::layout::PageNumber;
use afterimage_protocol::wire::{Incarnation, SessionKind};

pub(crate) const VCPUS: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vcpu {
    Idle,
    /// It waits in a fault.
    Waits(PageNumber),
    /// It was woken and looks again.
    Looks(PageNumber),
    /// It discards a page, and waits for the event to be read.
    Discards(PageNumber),
}

#[derive(Debug)]
pub(crate) struct Guest {
    /// What each page must read.
    pub(crate) truth: Vec<u64>,
    pub(crate) vcpus: [Vcpu; VCPUS],
    /// It ran in this memory, and the memory is gone.
    pub(crate) lost_in: Option<Incarnation>,
    /// Everything had arrived in this memory, and the memory is gone.
    pub(crate) lost_whole: Option<Incarnation>,
    next_value: u64,
}

impl Guest {
    pub(crate) fn new(source: &[Option<u64>]) -> Self {
        Self {
            truth: source.iter().map(|page| page.unwrap_or(0)).collect(),
            vcpus: [Vcpu::Idle; VCPUS],
            lost_in: None,
            lost_whole: None,
            next_value: 1 << 32,
        }
    }

    /// Another memory begins with what is at the source.
    pub(crate) fn begin_again(&mut self, source: &[Option<u64>]) {
        self.truth = source.iter().map(|page| page.unwrap_or(0)).collect();
        self.vcpus = [Vcpu::Idle; VCPUS];
    }

    pub(crate) fn waited_for(&self) -> impl Iterator<Item = PageNumber> + '_ {
        self.vcpus.iter().filter_map(|vcpu| match vcpu {
            Vcpu::Waits(page) => Some(*page),
            _ => None,
        })
    }

    pub(crate) fn somebody_waits(&self) -> bool {
        let waits = |vcpu: &Vcpu| matches!(vcpu, Vcpu::Waits(_) | Vcpu::Discards(_));
        self.vcpus.iter().any(waits)
    }

    pub(crate) const fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// Whoever waits for a page looks again.
    fn wake(&mut self, page: PageNumber) {
        for vcpu in &mut self.vcpus {
            if *vcpu == Vcpu::Waits(page) {
                *vcpu = Vcpu::Looks(page);
            }
        }
    }

    pub(crate) fn wake_all(&mut self) {
        for page in self.waited_for().collect::<Vec<_>>() {
            self.wake(page);
        }
    }
}

impl World {
    /// One vCPU does something, where the guest runs.
    pub(crate) fn guest_step(&mut self) {
        if self.source.vmm_runs {
            self.guest_step_at_source();
        }
        // It runs on without its handler, as far as it needs none.
        if !self.destination.runs {
            return;
        }
        let index = self.random.below(VCPUS as u64) as usize;
        let one_in = self.plan.touches_one_in;
        let page = PageNumber(self.random.below(self.plan.pages) / one_in * one_in);
        let rests = self.is_healed && self.plan.guest_rests;
        match self.guest.vcpus[index] {
            Vcpu::Idle if rests || !self.random.chance(self.plan.touches_per_mille) => {}
            Vcpu::Idle if self.random.chance(self.plan.discards_per_mille) => {
                self.discard(index, page);
            }
            Vcpu::Idle => self.access(index, page),
            Vcpu::Looks(page) => self.access(index, page),
            Vcpu::Waits(_) | Vcpu::Discards(_) => {}
        }
    }

    fn guest_step_at_source(&mut self) {
        let page = self.random.below(self.plan.pages) as usize;
        if self.plan.kind == SessionKind::Snapshot || self.random.chance(500) {
            return;
        }
        let value = if self.random.chance(250) { 0 } else { self.guest.fresh_value() };
        self.source.memory[page] = Some(value);
        self.source.passes.written.insert(PageNumber(page as u64));
        if !self.source.session.is_over() {
            // Before switchover: this is what the destination has to get.
            self.guest.truth[page] = value;
        }
    }

    fn access(&mut self, index: usize, page: PageNumber) {
        if self.destination.memory.visible(page).is_none() {
            self.note(|| format!("vCPU {index} waits for page {page}"));
            self.guest.vcpus[index] = Vcpu::Waits(page);
            self.destination.unread_faults.insert(page);
            return;
        }
        self.guest.vcpus[index] = Vcpu::Idle;
        if self.random.chance(500) {
            let value = self.guest.fresh_value();
            self.note(|| format!("vCPU {index} writes page {page}: {value:#x}"));
            self.destination.memory.write(page, value);
            self.guest.truth[page.0 as usize] = value;
        }
    }

    fn discard(&mut self, vcpu: usize, page: PageNumber) {
        // The most awkward page is one that is being written this moment, or was when that
        // broke off.
        let awkward = if self.random.chance(500) {
            self.destination.one_being_received()
        } else {
            self.destination.memory.interrupted.pop()
        };
        let page = awkward.filter(|_| self.random.chance(600)).unwrap_or(page);
        let can_call = self.destination.is_alive && !self.destination.memory.is_gated();
        if can_call && self.random.chance(300) {
            self.note(|| format!("the VMM discards page {page}"));
            self.destination.memory.discard(page);
            self.guest.truth[page.0 as usize] = 0;
            return;
        }
        let keeps = self.destination.memory.is_alias(page) && self.random.chance(400);
        self.note(|| format!("vCPU {vcpu} discards page {page}, keeps what arrived: {keeps}"));
        self.guest.vcpus[vcpu] = Vcpu::Discards(page);
        self.destination.memory.unread.push_back(Removal { page, keeps, vcpu });
    }

    /// Carries wakes from memory to vCPUs.
    pub(crate) fn spread_wakes(&mut self) {
        let memory: &mut Memory = &mut self.destination.memory;
        for page in std::mem::take(&mut memory.woken) {
            self.guest.wake(page);
            self.destination.faults.remove(&page);
            self.destination.unread_faults.remove(&page);
        }
    }
}
