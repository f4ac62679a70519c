//! The CPU that a guest sees: what this KVM supports, and whether that is enough.
//!
//! KVM need not show a guest just what it was told to: software virtualisation shows
//! the machine's own leaves. So two tables move with a guest, the one that was set and
//! the one that KVM says the guest sees, and both are checked.
//!
//! Invariant: a restored guest finds all features that it found before, or is
//! refused with the leaf and the bits that this machine lacks.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};

use super::refused;
use crate::guest::GuestError;

/// All leaves that this machine's KVM supports.
pub(super) fn supported(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>, GuestError> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let cpuid = cpuid.map_err(refused("read the supported CPUID"))?;
    Ok(cpuid.as_slice().to_vec())
}

/// The supported leaves with the APIC id of one vCPU.
pub(super) fn for_vcpu(supported: &[kvm_cpuid_entry2], vcpu: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (vcpu << 24),
            0xb | 0x1f => entry.edx = vcpu,
            _ => {}
        }
    }
    entries
}

pub(super) fn set(fd: &VcpuFd, entries: &[kvm_cpuid_entry2]) -> Result<(), GuestError> {
    let cpuid = CpuId::from_entries(entries).map_err(|error| {
        GuestError::Incompatible(format!("{} CPUID leaves: {error:?}", entries.len()))
    })?;
    fd.set_cpuid2(&cpuid).map_err(refused("set CPUID"))
}

/// What KVM says that a vCPU sees.
pub(super) fn seen(fd: &VcpuFd) -> Result<Vec<kvm_cpuid_entry2>, GuestError> {
    let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
    let cpuid = cpuid.map_err(refused("read CPUID"))?;
    Ok(cpuid.as_slice().to_vec())
}

/// Checks that a guest that saw `wanted` can run where `supported` is what there is:
/// same vendor, and all feature bits that it saw.
pub(super) fn check(
    wanted: &[kvm_cpuid_entry2],
    supported: &[kvm_cpuid_entry2],
) -> Result<(), GuestError> {
    for entry in wanted {
        let (function, index) = (entry.function, entry.index);
        let here = supported
            .iter()
            .find(|other| (other.function, other.index) == (function, index))
            .copied()
            .unwrap_or_default();
        let refuse = |what: String| {
            let message = format!("CPUID leaf {function:#x}.{index}: {what}");
            Err(GuestError::Incompatible(message))
        };
        if function == 0 && (entry.ebx, entry.ecx, entry.edx) != (here.ebx, here.ecx, here.edx) {
            return refuse("the guest was built on a CPU of another vendor".into());
        }
        let registers = [
            ("eax", entry.eax, here.eax),
            ("ebx", entry.ebx, here.ebx),
            ("ecx", entry.ecx, here.ecx),
            ("edx", entry.edx, here.edx),
        ];
        for ((name, had, has), mask) in registers.into_iter().zip(feature_mask(function, index)) {
            let lacking = had & !has & mask;
            if lacking != 0 {
                return refuse(format!(
                    "the guest had bits {lacking:#x} of {name}, which this machine lacks"
                ));
            }
        }
    }
    Ok(())
}

/// Which bits of eax, ebx, ecx and edx of a leaf are features.
fn feature_mask(function: u32, index: u32) -> [u32; 4] {
    const ALL: u32 = u32::MAX;
    /// MONITOR and OSXSAVE follow what the guest has turned on.
    const DYNAMIC_1: u32 = 1 << 3 | 1 << 27;
    /// And so does OSPKE.
    const DYNAMIC_7: u32 = 1 << 4;
    match (function, index) {
        (1, _) => [0, 0, !DYNAMIC_1, ALL],
        (7, 0) => [0, ALL, !DYNAMIC_7, ALL],
        (7, _) => [ALL, ALL, ALL, ALL],
        (0xd, 0) => [ALL, 0, 0, ALL],
        (0xd, 1) => [ALL, 0, ALL, ALL],
        (0x4000_0001, _) => [ALL, 0, 0, 0],
        (0x8000_0001, _) => [0, 0, ALL, ALL],
        (0x8000_0008, _) => [0, ALL, 0, 0],
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, ecx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, ..kvm_cpuid_entry2::default() }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let error = check(&[leaf(1, 0b110)], &[leaf(1, 0b010)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "this machine cannot run the guest: CPUID leaf 0x1.0: the guest had bits 0x4 of ecx, which this machine lacks"
        );
        let error = check(&[leaf(0x8000_0001, 1)], &[]).unwrap_err();
        assert!(error.to_string().contains("0x80000001"), "{error}");
    }

    #[test]
    fn another_vendor_is_refused_and_more_features_are_not() {
        let error = check(&[leaf(0, 1)], &[leaf(0, 2)]).unwrap_err();
        assert!(error.to_string().contains("vendor"), "{error}");
        check(&[leaf(1, 0b010)], &[leaf(1, 0b110)]).unwrap();
        check(&[leaf(0x8000_0004, 7)], &[leaf(0x8000_0004, 8)]).unwrap();
    }
}
