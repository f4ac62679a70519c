//! The smallest guest on KVM that writes random pages: two vCPUs in protected mode, flat, no
//! paging, no devices.

use crate::common::memory::PAGE;
use crate::common::{self, Kind, Memory, Random};
use afterimage::GuestAddress;
use afterimage::dirty::{KvmSlot, RingReaper};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_EXIT_DIRTY_RING_FULL,
    kvm_enable_cap, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Pages that the guest writes; a power of two.
pub(crate) const PAGES: u64 = 1024;
const VCPUS: u64 = 2;
const SLOT: u32 = 3;
/// Behind the pages: where the code is.
const CODE: u64 = PAGES * PAGE;

/// Writes ecx random pages of those from esi, edi + 1 in number, and says so.
const PROGRAM: [u8; 38] = [
    0x89, 0xd8, // again: mov eax, ebx: one step of xorshift32
    0xc1, 0xe0, 13, // shl eax, 13
    0x31, 0xc3, // xor ebx, eax
    0x89, 0xd8, // mov eax, ebx
    0xc1, 0xe8, 17, // shr eax, 17
    0x31, 0xc3, // xor ebx, eax
    0x89, 0xd8, // mov eax, ebx
    0xc1, 0xe0, 5, // shl eax, 5
    0x31, 0xc3, // xor ebx, eax
    0x89, 0xd8, // mov eax, ebx
    0x21, 0xf8, // and eax, edi
    0xc1, 0xe0, 12, // shl eax, 12
    0xff, 0x04, 0x06, // inc dword ptr [esi + eax]
    0x49, // dec ecx
    0x75, 0xde, // jnz again
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xda, // jmp again
];

/// A VM whose memory is a [`Memory`] of one region at guest address 0.
pub(crate) struct Machine {
    pub(crate) memory: Arc<Memory>,
    // Dropped before the memory's last owner goes.
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
}

/// `None`, after saying so, without KVM, or where it lacks rings of a size that is asked for.
pub(crate) fn machine(kind: Kind, ring_bytes: Option<u64>) -> Option<Machine> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            common::skip("kvm", &error.to_string());
            return None;
        }
    };
    let vm = kvm.create_vm().expect("a VM");
    if let Some(bytes) = ring_bytes
        && !enable_ring(&vm, bytes)
    {
        common::skip("kvm_dirty_ring", "the kernel has none");
        return None;
    }
    let memory = Memory::new(&[(kind, CODE + PAGE)]);
    for (index, eight) in PROGRAM.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..eight.len()].copy_from_slice(eight);
        memory.word(PAGES, index as u64).store(u64::from_le_bytes(word), Ordering::Relaxed);
    }
    let slot = kvm_userspace_memory_region {
        slot: SLOT,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: CODE + PAGE,
        userspace_addr: memory.word(0, 0).as_ptr() as u64,
    };
    // SAFETY: a mapping that lives as long as the VM.
    unsafe { vm.set_user_memory_region(slot) }.expect("memory for the VM");
    let vcpus = (0..VCPUS).map(|id| vcpu(&vm, id)).collect();
    Some(Machine { memory, vcpus, vm })
}

fn enable_ring(vm: &VmFd, bytes: u64) -> bool {
    [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].into_iter().any(|cap| {
        vm.enable_cap(&kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() }).is_ok()
    })
}

fn vcpu(vm: &VmFd, id: u64) -> VcpuFd {
    let vcpu = vm.create_vcpu(id).expect("a vCPU");
    let mut sregs = vcpu.get_sregs().expect("sregs");
    let flat = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 0x3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cr0 |= 1;
    sregs.cs = kvm_segment { selector: 0x8, type_: 0xb, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    vcpu.set_sregs(&sregs).expect("sregs");
    vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..kvm_regs::default() }).expect("regs");
    vcpu
}

/// The engine takes descriptors, whatever crate made them.
fn duplicate(fd: &impl AsRawFd) -> OwnedFd {
    // SAFETY: borrowed for as long as it is duplicated.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned().expect("a descriptor")
}

impl Machine {
    pub(crate) fn vm(&self) -> OwnedFd {
        duplicate(&self.vm)
    }

    pub(crate) fn vcpus(&self) -> Vec<OwnedFd> {
        self.vcpus.iter().map(duplicate).collect()
    }

    pub(crate) fn slots(&self) -> Vec<KvmSlot> {
        let address = self.memory.word(0, 0).as_ptr() as u64;
        // SAFETY: this is the slot that the VM was made with.
        vec![unsafe { KvmSlot::new(SLOT, GuestAddress(0), CODE + PAGE, address, 0) }]
    }

    /// Whether KVM keeps a log of the slot.
    pub(crate) fn is_logged(&self) -> bool {
        self.vm.get_dirty_log(SLOT, (CODE + PAGE) as usize).is_ok()
    }

    /// Runs every vCPU on a thread until it has written so many pages; `meanwhile` runs here.
    /// Exits because of full rings, of which the answer is the number, go to `reaper`.
    pub(crate) fn run(
        &mut self,
        writes: u64,
        random: &mut Random,
        reaper: Option<&RingReaper>,
        meanwhile: impl FnOnce(),
    ) -> u64 {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .vcpus
                .iter_mut()
                .map(|vcpu| {
                    let seed = random.next() | 1;
                    scope.spawn(move || run(vcpu, writes, seed, reaper))
                })
                .collect();
            meanwhile();
            threads.into_iter().map(|thread| thread.join().expect("a vCPU")).sum()
        })
    }
}

fn run(vcpu: &mut VcpuFd, writes: u64, seed: u64, reaper: Option<&RingReaper>) -> u64 {
    let mut full = 0;
    let mut regs = kvm_regs { rbx: seed & 0xffff_ffff | 1, rdi: PAGES - 1, ..kvm_regs::default() };
    for _ in 0..writes / AT_ONCE {
        let at_start = kvm_regs { rip: CODE, rflags: 2, rcx: AT_ONCE, ..regs };
        vcpu.set_regs(&at_start).expect("regs");
        full += run_once(vcpu, reaper);
        regs = vcpu.get_regs().expect("regs");
    }
    full
}

/// Until the guest says that it has written; how often the ring was full.
fn run_once(vcpu: &mut VcpuFd, reaper: Option<&RingReaper>) -> u64 {
    let mut full = 0;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => return full,
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {
                full += 1;
                reaper.expect("no ring fills without a tracker").reap().expect("reaped");
            }
            Ok(exit) => panic!("a vCPU left with {exit:?}"),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => panic!("a vCPU does not run: {error}"),
        }
    }
}

/// Writes from exit to exit. Where KVM emulates the guest it does not look in between whether
/// a ring is full, and only 64 entries are kept free.
const AT_ONCE: u64 = 25;
