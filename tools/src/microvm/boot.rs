//! The guest's first moments: its system area in RAM and the registers it starts with.
//!
//! Invariant: page tables have their accessed and dirty bits set, so that the system
//! area changes only where guest code writes.

use std::sync::atomic::Ordering;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{DOORBELL, program, refused};
use crate::guest::{GuestError, control};
use crate::ram::{GuestAddress, GuestRam, HUGE_PAGE_BYTES, PAGE_BYTES};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
/// Page directories, one for each GiB of guest physical memory.
const DIRECTORIES: u64 = 0x3000;
const GIB: u64 = 1 << 30;

/// Present, writable, for ring 3, accessed.
const TABLE: u64 = 0x27;
/// The same for a 2 MiB page, dirty.
const LARGE_PAGE: u64 = TABLE | 0xc0;

const CR0: u64 = 0x8005_0033; // PG AM WP NE ET MP PE
const CR4: u64 = 0x620; // OSXMMEXCPT OSFXSR PAE
const EFER: u64 = 0xd01; // NXE LMA LME SCE
const RFLAGS: u64 = 2; // the bit that is always set; interrupts off

/// Writes page tables, which map RAM and the doorbell one to one, and the program.
pub(super) fn install_system_area(ram: &GuestRam) {
    let store = |address: u64, value: u64| {
        let word = ram.word(GuestAddress(address));
        word.store(value, Ordering::Relaxed);
    };
    store(PML4, PDPT | TABLE);
    let map = |address: u64| {
        let directory = DIRECTORIES + address / GIB * PAGE_BYTES;
        store(PDPT + address / GIB * 8, directory | TABLE);
        let entry = address % GIB / HUGE_PAGE_BYTES;
        store(directory + entry * 8, address | LARGE_PAGE);
    };
    for region in ram.regions() {
        let base = region.guest_base().0;
        let pages = (0..region.length()).step_by(HUGE_PAGE_BYTES as usize);
        pages.for_each(|offset| map(base + offset));
    }
    map(DOORBELL);
    ram.write(program::ADDRESS, program::code());
}

/// Puts a vCPU at the first instruction of the program, in long mode and ring 3.
pub(super) fn set_initial_state(fd: &VcpuFd, vcpu: u32) -> Result<(), GuestError> {
    let failed = |what: &str| refused(format!("set {what} of vCPU {vcpu}"));
    let control_page = control::address(vcpu, 0).0;
    let mut sregs = fd.get_sregs().map_err(failed("sregs"))?;
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    // The selectors of Linux's user segments: software virtualisation runs the guest
    // on the host's own.
    sregs.cs = segment(0x33, 0xb);
    sregs.cs.l = 1;
    sregs.ss = segment(0x2b, 0x3);
    sregs.ss.db = 1;
    (sregs.ds, sregs.es, sregs.gs) = (sregs.ss, sregs.ss, sregs.ss);
    sregs.fs = kvm_segment { base: control_page, ..sregs.ss };
    sregs.ldt.unusable = 1;
    fd.set_sregs(&sregs).map_err(failed("sregs"))?;
    let regs = kvm_regs {
        rip: program::ADDRESS.0,
        rsp: control_page + PAGE_BYTES,
        rbx: control_page,
        rflags: RFLAGS,
        ..kvm_regs::default()
    };
    fd.set_regs(&regs).map_err(failed("regs"))?;
    // All but vCPU 0 would wait for a start-up interrupt.
    let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
    fd.set_mp_state(runnable).map_err(failed("MP state"))
}

/// A flat segment for ring 3.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}
