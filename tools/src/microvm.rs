//! A small real virtual machine on KVM: one to eight vCPUs, RAM, no devices.
//!
//! Responsible for running guest code on KVM, for stopping it at once, and for taking
//! all of a vCPU's state out and putting it back. What the guest does is decided in
//! [`crate::guest`]; its code is in `program`.
//!
//! The guest runs in ring 3 from its first instruction, in long mode with its RAM
//! mapped one to one: so it runs natively even where KVM emulates kernel-mode code
//! (nested software virtualisation). It has no interrupts and no exception handlers:
//! a fault of its own ends it. It reports by writing to a doorbell, an address in the
//! MMIO hole: that needs no I/O privilege in ring 3 and carries 64 bits. The VMM notes in RAM
//! what it has heard, as a device would that writes guest memory.
//!
//! Invariant: restoring builds everything from the [`MachineState`] and touches no
//! page of guest RAM before the vCPUs run; and an access to RAM that KVM hands out as
//! MMIO ends the vCPU as a memory error, since going on would read made-up zeros.

mod boot;
mod cpuid;
mod program;
mod runner;
mod tracking;
mod vcpu_state;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use afterimage::dirty::DirtyTracker;
use kvm_bindings::{kvm_cpuid_entry2, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};

use crate::guest::{
    Guest, GuestError, GuestKind, GuestSpec, MachineState, Progress, Sections, TrackerKind,
    VcpuProgress, install_control_pages,
};
use crate::ram::{GuestAddress, GuestRam};
use runner::{Exits, Running, Vcpu};
use tracking::Written;

/// The doorbell: guest code writes here what it has to say. It lies in the MMIO hole.
pub(crate) const DOORBELL: u64 = 0xd000_0000;

/// Pages of KVM's own, near the end of the MMIO hole, where VMMs usually have them.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What a machine is built with that cannot be changed later.
#[derive(Clone, Copy, Debug)]
struct Features {
    /// RAM from here on is withheld.
    memory_end: GuestAddress,
    /// Entries of each vCPU's dirty ring; 0 for none.
    ring_entries: u32,
}

impl Default for Features {
    fn default() -> Self {
        Self { memory_end: GuestAddress(u64::MAX), ring_entries: 0 }
    }
}

/// A virtual machine without state: all that can be built before a state arrives, so
/// that restoring one takes little time. Touches no page of guest RAM.
#[derive(Debug)]
pub struct PreparedVm {
    vcpus: Vec<Vcpu>,
    /// The same once more, if they have dirty rings; else none.
    ring_vcpus: Vec<OwnedFd>,
    written: Written,
    supported: Vec<kvm_cpuid_entry2>,
    slots: Vec<kvm_userspace_memory_region>,
    features: Features,
    // Dropped after the vCPUs, and the mappings after the VM that refers to them.
    vm: VmFd,
    kvm: Kvm,
    ram: Arc<GuestRam>,
}

impl PreparedVm {
    /// Builds a machine of `vcpus` vCPUs with all of `ram`.
    ///
    /// # Errors
    /// If KVM refuses something.
    pub fn new(ram: Arc<GuestRam>, vcpus: u32) -> Result<Self, GuestError> {
        Self::with_features(ram, vcpus, Features::default())
    }

    fn with_features(
        ram: Arc<GuestRam>,
        vcpus: u32,
        features: Features,
    ) -> Result<Self, GuestError> {
        let kvm = Kvm::new().map_err(refused("open /dev/kvm"))?;
        let supported = cpuid::supported(&kvm)?;
        let vm = kvm.create_vm().map_err(refused("create a VM"))?;
        // Intel CPUs without unrestricted guests want three pages below 4 GiB; others
        // ignore the call.
        vm.set_tss_address(TSS_ADDRESS).map_err(refused("set the TSS address"))?;
        vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
        let slots = map_ram(&vm, &ram, features.memory_end)?;
        if features.ring_entries > 0 {
            tracking::enable_rings(&vm, features.ring_entries)?;
        }
        let vcpus = (0..vcpus)
            .map(|id| {
                let fd = vm.create_vcpu(id.into());
                let fd = fd.map_err(refused(format!("create vCPU {id}")))?;
                let cpuid = Vec::new();
                Ok(Vcpu { id, fd, cpuid })
            })
            .collect::<Result<Vec<_>, GuestError>>()?;
        let ring_vcpus =
            if features.ring_entries > 0 { tracking::duplicates(&vcpus)? } else { Vec::new() };
        let written = Written::new()?;
        Ok(Self { vcpus, ring_vcpus, written, supported, slots, features, vm, kvm, ram })
    }

    /// Turns the machine into a guest that goes on where `state` was taken.
    ///
    /// # Errors
    /// If the state is of another kind, damaged, or of another size or number of
    /// vCPUs, or this machine cannot offer the guest the CPU that it had.
    pub fn restore(mut self, state: &MachineState) -> Result<KvmGuest, GuestError> {
        state.expect_kind(GuestKind::Kvm)?;
        let spec = state.spec();
        spec.check(&self.ram)?;
        if self.vcpus.len() != spec.vcpus() as usize {
            return Err(GuestError::Incompatible(format!(
                "it has {} vCPUs, {} were prepared",
                spec.vcpus(),
                self.vcpus.len()
            )));
        }
        for vcpu in &mut self.vcpus {
            vcpu_state::restore(&self.vm, vcpu, &self.supported, state.sections())?;
        }
        Ok(self.into_guest(spec.clone(), state.progress()))
    }

    fn into_guest(self, spec: GuestSpec, progress: &[VcpuProgress]) -> KvmGuest {
        KvmGuest {
            progress: Arc::new(Progress::new(&spec, progress)),
            spec,
            stopped: self.vcpus,
            running: None,
            ring_vcpus: self.ring_vcpus,
            ring_entries: self.features.ring_entries,
            written: self.written,
            slots: self.slots,
            vm: self.vm,
            kvm: self.kvm,
            ram: self.ram,
        }
    }
}

/// A guest on KVM. See [`Guest`].
#[derive(Debug)]
pub struct KvmGuest {
    spec: GuestSpec,
    progress: Arc<Progress>,
    stopped: Vec<Vcpu>,
    running: Option<Running>,
    /// The vCPUs' descriptors once more, if they have dirty rings; else none.
    ring_vcpus: Vec<OwnedFd>,
    ring_entries: u32,
    written: Written,
    slots: Vec<kvm_userspace_memory_region>,
    // Dropped after the vCPUs, and the mappings after the VM that refers to them.
    vm: VmFd,
    kvm: Kvm,
    ram: Arc<GuestRam>,
}

impl KvmGuest {
    /// A new guest in `ram`, which [`crate::guest::init_ram`] has filled for the same
    /// spec. Writes the system area: page tables, code, control pages.
    ///
    /// # Errors
    /// If the spec is for another size of RAM, or KVM refuses something.
    pub fn new(ram: Arc<GuestRam>, spec: GuestSpec) -> Result<Self, GuestError> {
        Self::with_features(ram, spec, Features::default())
    }

    /// As [`Self::new`], with a dirty ring of so many entries for each vCPU, a power of two of
    /// at least 1,024: the guest can be tracked by rings then, and not by the log.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_dirty_rings(
        ram: Arc<GuestRam>,
        spec: GuestSpec,
        ring_entries: u32,
    ) -> Result<Self, GuestError> {
        Self::with_features(ram, spec, Features { ring_entries, ..Features::default() })
    }

    /// As [`Self::new`], but RAM from `end` on is withheld from KVM, so that the guest
    /// meets a memory error there. For tests of how such errors are reported.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_memory_up_to(
        ram: Arc<GuestRam>,
        spec: GuestSpec,
        memory_end: GuestAddress,
    ) -> Result<Self, GuestError> {
        Self::with_features(ram, spec, Features { memory_end, ..Features::default() })
    }

    fn with_features(
        ram: Arc<GuestRam>,
        spec: GuestSpec,
        features: Features,
    ) -> Result<Self, GuestError> {
        spec.check(&ram)?;
        install_control_pages(&ram, &spec);
        boot::install_system_area(&ram);
        let mut machine = PreparedVm::with_features(ram, spec.vcpus(), features)?;
        for vcpu in &mut machine.vcpus {
            vcpu.cpuid = cpuid::for_vcpu(&machine.supported, vcpu.id);
            cpuid::set(&vcpu.fd, &vcpu.cpuid)?;
            boot::set_initial_state(&vcpu.fd, vcpu.id)?;
        }
        let nothing = VcpuProgress { operations: 0, in_flight: false };
        let progress = vec![nothing; spec.vcpus() as usize];
        Ok(machine.into_guest(spec, &progress))
    }

    /// A guest that goes on where `state` was taken. Touches no page of `ram`.
    ///
    /// # Errors
    /// As [`PreparedVm::restore`].
    pub fn restore(ram: Arc<GuestRam>, state: &MachineState) -> Result<Self, GuestError> {
        PreparedVm::new(ram, state.spec().vcpus())?.restore(state)
    }
}

impl Guest for KvmGuest {
    fn start(&mut self) -> Result<(), GuestError> {
        if self.running.is_some() {
            return Err(GuestError::Already("running"));
        }
        if self.stopped.len() != self.spec.vcpus() as usize {
            return Err(GuestError::Failed("vCPUs were lost before".into()));
        }
        let exits = Exits {
            ram: self.ram.clone(),
            progress: self.progress.clone(),
            written: self.written.clone(),
        };
        self.running = Some(runner::start(&mut self.stopped, &exits)?);
        Ok(())
    }

    fn halt(&mut self) -> Result<(), GuestError> {
        let running = self.running.take();
        let running = running.ok_or(GuestError::Already("stopped"))?;
        let end = running.stop();
        self.stopped = end.vcpus;
        end.crash.map_or(Ok(()), |what| Err(GuestError::Failed(what)))
    }

    fn save(&self) -> Result<MachineState, GuestError> {
        if self.running.is_some() {
            return Err(GuestError::Already("running"));
        }
        let msrs = vcpu_state::msr_numbers(&self.kvm)?;
        let mut sections = Sections::default();
        let mut progress = Vec::new();
        for vcpu in &self.stopped {
            let regs = vcpu_state::save(&self.vm, vcpu, &msrs, &mut sections)?;
            let stopped_at = program::progress(self.spec.workload(), &regs);
            self.progress.report(vcpu.id, stopped_at.operations);
            progress.push(stopped_at);
        }
        Ok(MachineState::new(GuestKind::Kvm, self.spec.clone(), progress, sections))
    }

    fn tracker(&mut self, kind: TrackerKind) -> Result<Box<dyn DirtyTracker>, GuestError> {
        self.build_tracker(kind)
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

/// Gives KVM all RAM below `end`, a memory slot for each region.
fn map_ram(
    vm: &VmFd,
    ram: &GuestRam,
    end: GuestAddress,
) -> Result<Vec<kvm_userspace_memory_region>, GuestError> {
    let mut slots = Vec::new();
    for (number, region) in ram.regions().iter().enumerate() {
        let base = region.guest_base();
        let length = region.length().min(end.0.saturating_sub(base.0));
        if length == 0 {
            continue;
        }
        let slot = kvm_userspace_memory_region {
            slot: number as u32,
            flags: 0,
            guest_phys_addr: base.0,
            memory_size: length,
            userspace_addr: region.host_base().as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping which the guest keeps alive until after
        // the VM is gone (see the order of its fields).
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(refused(format!("map guest RAM at {:#x}", base.0)))?;
        slots.push(slot);
    }
    Ok(slots)
}

/// Turns an error of kvm-ioctls into ours, with what was being done.
fn refused(operation: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> GuestError {
    move |error| GuestError::Kvm {
        operation: operation.into(),
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

#[cfg(test)]
mod tests;
