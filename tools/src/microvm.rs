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
//! MMIO hole: that needs no I/O privilege in ring 3 and carries 64 bits.
//!
//! Invariant: restoring builds everything from the [`MachineState`] and touches no
//! page of guest RAM before the vCPUs run; and an access to RAM that KVM hands out as
//! MMIO ends the vCPU as a memory error, since going on would read made-up zeros.

mod boot;
mod cpuid;
mod program;
mod runner;
mod vcpu_state;

use std::io;
use std::sync::Arc;

use kvm_bindings::{kvm_cpuid_entry2, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};

use crate::guest::{
    Guest, GuestError, GuestKind, GuestSpec, MachineState, Progress, Sections, VcpuProgress,
    install_control_pages,
};
use crate::ram::{GuestAddress, GuestRam};
use runner::{Exits, Running, Vcpu};

/// The doorbell: guest code writes here what it has to say. It lies in the MMIO hole.
pub(crate) const DOORBELL: u64 = 0xd000_0000;

/// Pages of KVM's own, near the end of the MMIO hole, where VMMs usually have them.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// A virtual machine without state: all that can be built before a state arrives, so
/// that restoring one takes little time. Touches no page of guest RAM.
#[derive(Debug)]
pub struct PreparedVm {
    vcpus: Vec<Vcpu>,
    supported: Vec<kvm_cpuid_entry2>,
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
        Self::with_memory_up_to(ram, vcpus, GuestAddress(u64::MAX))
    }

    fn with_memory_up_to(
        ram: Arc<GuestRam>,
        vcpus: u32,
        end: GuestAddress,
    ) -> Result<Self, GuestError> {
        let kvm = Kvm::new().map_err(refused("open /dev/kvm"))?;
        let supported = cpuid::supported(&kvm)?;
        let vm = kvm.create_vm().map_err(refused("create a VM"))?;
        // Intel CPUs without unrestricted guests want three pages below 4 GiB; others
        // ignore the call.
        vm.set_tss_address(TSS_ADDRESS).map_err(refused("set the TSS address"))?;
        vm.create_irq_chip().map_err(refused("create the interrupt controllers"))?;
        map_ram(&vm, &ram, end)?;
        let vcpus = (0..vcpus)
            .map(|id| {
                let fd = vm.create_vcpu(id.into());
                let fd = fd.map_err(refused(format!("create vCPU {id}")))?;
                let cpuid = Vec::new();
                Ok(Vcpu { id, fd, cpuid })
            })
            .collect::<Result<Vec<_>, GuestError>>()?;
        Ok(Self { vcpus, supported, vm, kvm, ram })
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
        let end = GuestAddress(u64::MAX);
        Self::with_memory_up_to(ram, spec, end)
    }

    /// As [`Self::new`], but RAM from `end` on is withheld from KVM, so that the guest
    /// meets a memory error there. For tests of how such errors are reported.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_memory_up_to(
        ram: Arc<GuestRam>,
        spec: GuestSpec,
        end: GuestAddress,
    ) -> Result<Self, GuestError> {
        spec.check(&ram)?;
        install_control_pages(&ram, &spec);
        boot::install_system_area(&ram);
        let mut machine = PreparedVm::with_memory_up_to(ram, spec.vcpus(), end)?;
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

    fn save(&self) -> Result<MachineState, GuestError> {
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
}

impl Guest for KvmGuest {
    fn start(&mut self) -> Result<(), GuestError> {
        if self.running.is_some() {
            return Err(GuestError::Already("running"));
        }
        if self.stopped.len() != self.spec.vcpus() as usize {
            return Err(GuestError::Failed("vCPUs were lost before".into()));
        }
        let exits = Exits { ram: self.ram.clone(), progress: self.progress.clone() };
        self.running = Some(runner::start(&mut self.stopped, &exits)?);
        Ok(())
    }

    fn stop(&mut self) -> Result<MachineState, GuestError> {
        let running = self.running.take();
        let running = running.ok_or(GuestError::Already("stopped"))?;
        let end = running.stop();
        self.stopped = end.vcpus;
        match end.crash {
            Some(what) => Err(GuestError::Failed(what)),
            None => self.save(),
        }
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
fn map_ram(vm: &VmFd, ram: &GuestRam, end: GuestAddress) -> Result<(), GuestError> {
    for (slot, region) in ram.regions().iter().enumerate() {
        let base = region.guest_base();
        let length = region.length().min(end.0.saturating_sub(base.0));
        if length == 0 {
            continue;
        }
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: base.0,
            memory_size: length,
            userspace_addr: region.host_base().as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping which the guest keeps alive until after
        // the VM is gone (see the order of its fields).
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(refused(format!("map guest RAM at {:#x}", base.0)))?;
    }
    Ok(())
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
