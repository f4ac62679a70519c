//! All state of a vCPU, out of KVM and back into it, each part a section of its own.
//!
//! Saved are CPUID, general and special registers, XSAVE, XCRs, MSRs, the LAPIC, debug
//! registers, events, the MP state and the TSC's frequency. Not saved: what the guest
//! cannot have, such as nested virtualisation, and the page directory pointers of
//! `KVM_GET_SREGS2`, which long mode does not use.
//!
//! Invariant: parts are restored in the order in which they depend on each other:
//! CPUID before what it allows, sregs before the LAPIC (its base), the LAPIC before
//! MSRs (the deadline timer), events last.

use kvm_bindings::{
    Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::runner::Vcpu;
use super::{cpuid, refused};
use crate::guest::{GuestError, Sections, StateError};

/// Version of all sections: each is the kernel's structure, or an array of them.
const VERSION: u32 = 1;
/// Bytes of the XSAVE area that every KVM has.
const XSAVE_BYTES: usize = 4096;

/// The numbers of all MSRs that KVM lets be saved.
pub(super) fn msr_numbers(kvm: &Kvm) -> Result<Vec<u32>, GuestError> {
    let list = kvm.get_msr_index_list();
    let list = list.map_err(refused("list the MSRs"))?;
    Ok(list.as_slice().to_vec())
}

/// Adds the state of a stopped vCPU to `sections`; returns its registers.
pub(super) fn save(
    vm: &VmFd,
    vcpu: &Vcpu,
    msrs: &[u32],
    sections: &mut Sections,
) -> Result<kvm_regs, GuestError> {
    let fd = &vcpu.fd;
    let failed = |part: &str| refused(format!("read the {part} of vCPU {}", vcpu.id));
    let mut put = |part: &str, bytes: Vec<u8>| sections.put(&name(vcpu, part), VERSION, bytes);

    // The MP state first: reading it lets KVM settle what is still pending.
    let mp_state = fd.get_mp_state().map_err(failed("MP state"))?;
    put("mp_state", bytes_of(&mp_state));
    let regs = fd.get_regs().map_err(failed("registers"))?;
    put("regs", bytes_of(&regs));
    let sregs = fd.get_sregs().map_err(failed("special registers"))?;
    put("sregs", bytes_of(&sregs));
    put("xsave", save_xsave(vm, vcpu)?);
    let xcrs = fd.get_xcrs().map_err(failed("XCRs"))?;
    put("xcrs", bytes_of(&xcrs));
    let debug = fd.get_debug_regs().map_err(failed("debug registers"))?;
    put("debugregs", bytes_of(&debug));
    let lapic = fd.get_lapic().map_err(failed("LAPIC"))?;
    put("lapic", bytes_of(&lapic));
    let tsc_khz = fd.get_tsc_khz().map_err(failed("TSC frequency"))?;
    put("tsc_khz", tsc_khz.to_le_bytes().to_vec());
    put("cpuid", vcpu.cpuid.as_bytes().to_vec());
    put("cpuid_seen", cpuid::seen(fd)?.as_bytes().to_vec());
    put("msrs", save_msrs(vcpu, msrs)?.as_bytes().to_vec());
    let events = fd.get_vcpu_events().map_err(failed("events"))?;
    put("events", bytes_of(&events));
    Ok(regs)
}

/// Gives a new vCPU the state in `sections`.
pub(super) fn restore(
    vm: &VmFd,
    vcpu: &mut Vcpu,
    supported: &[kvm_cpuid_entry2],
    sections: &Sections,
) -> Result<(), GuestError> {
    vcpu.cpuid = list_from(part_of(vcpu, "cpuid", sections)?)?;
    let vcpu = &*vcpu;
    cpuid::check(&vcpu.cpuid, supported)?;
    cpuid::set(&vcpu.fd, &vcpu.cpuid)?;
    let fd = &vcpu.fd;
    let failed = |part: &str| refused(format!("set the {part} of vCPU {}", vcpu.id));
    let part = |part| part_of(vcpu, part, sections);

    restore_tsc_khz(vcpu, from_bytes(part("tsc_khz")?)?)?;
    let mp_state: kvm_mp_state = from_bytes(part("mp_state")?)?;
    fd.set_mp_state(mp_state).map_err(failed("MP state"))?;
    let sregs: kvm_sregs = from_bytes(part("sregs")?)?;
    fd.set_sregs(&sregs).map_err(failed("special registers"))?;
    let regs: kvm_regs = from_bytes(part("regs")?)?;
    fd.set_regs(&regs).map_err(failed("registers"))?;
    restore_xsave(vm, vcpu, part("xsave")?.1)?;
    let xcrs: kvm_xcrs = from_bytes(part("xcrs")?)?;
    fd.set_xcrs(&xcrs).map_err(failed("XCRs"))?;
    let debug: kvm_debugregs = from_bytes(part("debugregs")?)?;
    fd.set_debug_regs(&debug).map_err(failed("debug registers"))?;
    let lapic: kvm_lapic_state = from_bytes(part("lapic")?)?;
    fd.set_lapic(&lapic).map_err(failed("LAPIC"))?;
    restore_msrs(vcpu, &list_from(part("msrs")?)?)?;
    let events: kvm_vcpu_events = from_bytes(part("events")?)?;
    fd.set_vcpu_events(&events).map_err(failed("events"))?;
    // Last, since some bits follow the control registers.
    cpuid::check(&list_from(part("cpuid_seen")?)?, &cpuid::seen(fd)?)
}

/// Reads all MSRs that can be read. Some that KVM lists it refuses, according to what
/// the guest's CPUID has: those the guest does not have either.
fn save_msrs(vcpu: &Vcpu, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>, GuestError> {
    let mut saved = Vec::with_capacity(numbers.len());
    let mut left = numbers;
    while !left.is_empty() {
        let wanted: Vec<_> = left.iter().map(|index| msr(*index)).collect();
        let mut msrs = msr_list(&wanted)?;
        let read = vcpu.fd.get_msrs(&mut msrs);
        let read = read.map_err(refused(format!("read the MSRs of vCPU {}", vcpu.id)))?;
        saved.extend_from_slice(&msrs.as_slice()[..read]);
        if let Some(refused) = left.get(read) {
            tracing::trace!(vcpu = vcpu.id, msr = *refused, "MSR cannot be read");
        }
        left = left.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

/// Writes all MSRs that can be written. KVM stops at the first that it refuses: that
/// one is left out if it has its value already, or was 0 and is not there.
fn restore_msrs(vcpu: &Vcpu, saved: &[kvm_msr_entry]) -> Result<(), GuestError> {
    let mut left = saved;
    while !left.is_empty() {
        let written = vcpu.fd.set_msrs(&msr_list(left)?);
        let written = written.map_err(refused(format!("set the MSRs of vCPU {}", vcpu.id)))?;
        if let Some(entry) = left.get(written) {
            let (index, value) = (entry.index, entry.data);
            tracing::debug!(vcpu = vcpu.id, index, value, "MSR cannot be written");
        }
        left = left.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

fn msr(index: u32) -> kvm_msr_entry {
    kvm_msr_entry { index, ..kvm_msr_entry::default() }
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, GuestError> {
    Msrs::from_entries(entries)
        .map_err(|error| GuestError::Incompatible(format!("{} MSRs: {error:?}", entries.len())))
}

fn save_xsave(vm: &VmFd, vcpu: &Vcpu) -> Result<Vec<u8>, GuestError> {
    let mut xsave = xsave_area(vm)?;
    // SAFETY: the area is as large as this VM says that it must be.
    unsafe { vcpu.fd.get_xsave2(&mut xsave) }
        .map_err(refused(format!("read the XSAVE area of vCPU {}", vcpu.id)))?;
    let mut bytes = xsave.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend(xsave.as_slice().as_bytes());
    Ok(bytes)
}

fn restore_xsave(vm: &VmFd, vcpu: &Vcpu, bytes: &[u8]) -> Result<(), GuestError> {
    let mut xsave = xsave_area(vm)?;
    let here = XSAVE_BYTES + size_of_val(xsave.as_slice());
    if bytes.len() < XSAVE_BYTES || bytes.len() > here {
        return Err(GuestError::Incompatible(format!(
            "its XSAVE area has {} bytes, here there are {here}",
            bytes.len()
        )));
    }
    let (legacy, extended) = bytes.split_at(XSAVE_BYTES);
    xsave.as_mut_slice().as_mut_bytes()[..extended.len()].copy_from_slice(extended);
    // SAFETY: the number of entries, all that could go wrong, is not touched.
    let area = unsafe { xsave.as_mut_fam_struct() };
    area.xsave.region.as_mut_bytes().copy_from_slice(legacy);
    // SAFETY: the area is as large as this VM says that it must be.
    unsafe { vcpu.fd.set_xsave2(&xsave) }
        .map_err(refused(format!("set the XSAVE area of vCPU {}", vcpu.id)))
}

/// An XSAVE area of the size that this VM's vCPUs have.
fn xsave_area(vm: &VmFd) -> Result<Xsave, GuestError> {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let more = bytes.saturating_sub(XSAVE_BYTES).div_ceil(size_of::<u32>());
    Xsave::new(more).map_err(|error| {
        GuestError::Incompatible(format!("XSAVE area of {bytes} bytes: {error:?}"))
    })
}

fn restore_tsc_khz(vcpu: &Vcpu, wanted: u32) -> Result<(), GuestError> {
    if vcpu.fd.get_tsc_khz().is_ok_and(|here| here == wanted) {
        return Ok(());
    }
    vcpu.fd.set_tsc_khz(wanted).map_err(|error| {
        GuestError::Incompatible(format!(
            "its TSC runs at {wanted} kHz, which cannot be set here: {error}"
        ))
    })
}

fn part_of<'a>(
    vcpu: &Vcpu,
    part: &str,
    sections: &'a Sections,
) -> Result<(String, &'a [u8]), StateError> {
    let name = name(vcpu, part);
    let bytes = sections.get(&name, VERSION)?;
    Ok((name, bytes))
}

fn name(vcpu: &Vcpu, part: &str) -> String {
    format!("vcpu{}/{part}", vcpu.id)
}

fn bytes_of<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}

fn from_bytes<T: FromBytes>((name, bytes): (String, &[u8])) -> Result<T, StateError> {
    T::read_from_bytes(bytes).map_err(|_| wrong_length(name, bytes, size_of::<T>()))
}

fn list_from<T: FromBytes>((name, bytes): (String, &[u8])) -> Result<Vec<T>, StateError> {
    let chunks = bytes.chunks_exact(size_of::<T>());
    if !chunks.remainder().is_empty() {
        return Err(wrong_length(name, bytes, size_of::<T>()));
    }
    let items = chunks.map(|chunk| T::read_from_bytes(chunk).ok());
    // Every chunk is as long as a T, so none can be refused.
    Ok(items.flatten().collect())
}

fn wrong_length(name: String, bytes: &[u8], unit: usize) -> StateError {
    let reason = format!("it has {} bytes, an item has {unit}", bytes.len());
    StateError::Content { name, reason }
}
