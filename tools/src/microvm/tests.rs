use super::*;
use crate::guest::{Workload, init_ram};
use crate::ram::Backing;
use crate::require;
use std::time::Duration;

/// Sections of which a part moves on by itself.
const MOVING: [&str; 2] = ["msrs", "lapic"];
/// The time stamp counter, which never stops.
const MSR_TSC: u32 = 0x10;

fn stopped_guest(vcpus: u32) -> Option<MachineState> {
    if !require::kvm() {
        return None;
    }
    let ram = Arc::new(GuestRam::allocate(16 << 20, Backing::Anonymous).unwrap());
    let spec = GuestSpec::new(&ram, Workload::Pattern, vcpus).unwrap();
    init_ram(&ram, &spec);
    let mut guest = KvmGuest::new(ram, spec).unwrap();
    guest.start().unwrap();
    assert!(guest.wait_for_operations(50_000, Duration::from_mins(1)));
    Some(guest.stop().unwrap())
}

fn restored(state: &MachineState) -> Result<KvmGuest, GuestError> {
    let ram = Arc::new(GuestRam::allocate(16 << 20, Backing::Anonymous).unwrap());
    KvmGuest::restore(ram, state)
}

fn msrs(bytes: &[u8]) -> Vec<(u32, u64)> {
    let entries = bytes.chunks_exact(16).map(|entry| {
        let index = u32::from_le_bytes(entry[..4].try_into().unwrap());
        (index, u64::from_le_bytes(entry[8..].try_into().unwrap()))
    });
    entries.filter(|(index, _)| *index != MSR_TSC).collect()
}

#[test]
fn a_restored_vcpu_has_the_state_that_was_saved() {
    let Some(state) = stopped_guest(2) else {
        return;
    };
    let again = restored(&state).unwrap().save().unwrap();
    assert_eq!(again.progress(), state.progress());
    let parts = ["cpuid", "cpuid_seen", "regs", "sregs", "xsave", "xcrs"];
    let more = ["debugregs", "mp_state", "tsc_khz", "events", "msrs", "lapic"];
    for vcpu in 0..2 {
        for part in parts.iter().chain(&more) {
            let name = format!("vcpu{vcpu}/{part}");
            let before = state.sections().get(&name, 1).unwrap();
            let after = again.sections().get(&name, 1).unwrap();
            assert_eq!(before.len(), after.len(), "{name}");
            if !MOVING.contains(part) {
                assert_eq!(before, after, "{name}");
            }
        }
        let list = |state: &MachineState| {
            let name = format!("vcpu{vcpu}/msrs");
            msrs(state.sections().get(&name, 1).unwrap())
        };
        assert_eq!(list(&again), list(&state));
        assert!(list(&state).len() > 10, "{} MSRs", list(&state).len());
    }
}

#[test]
fn a_state_without_a_part_or_with_half_of_one_is_refused() {
    let Some(state) = stopped_guest(1) else {
        return;
    };
    for part in ["regs", "xsave", "msrs", "lapic", "cpuid", "tsc_khz"] {
        let name = format!("vcpu0/{part}");
        let error = restored(&state.clone().without(&name)).unwrap_err();
        let missing = format!("machine state has no section {name:?}");
        assert_eq!(error.to_string(), missing);
        let error = restored(&state.clone().with_half_of(&name)).unwrap_err();
        assert!(matches!(error, GuestError::State(_) | GuestError::Incompatible(_)), "{error}");
    }
}
