//! The guest itself: what it does survives a stop and a move, and what is wrong with
//! its memory is noticed. On real KVM and on threads, within one process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use afterimage_tools::guest::{
    Guest, GuestError, GuestKind, GuestSpec, MachineState, PatternError, SYSTEM_BYTES,
    ThreadsGuest, VerifyError, Workload, digest, init_ram, verify, verify_pattern,
};
use afterimage_tools::microvm::{KvmGuest, PreparedVm};
use afterimage_tools::ram::{Backing, GuestAddress, GuestRam, HUGE_PAGE_BYTES, PAGE_BYTES};
use afterimage_tools::require;

const RAM: u64 = 64 << 20;
/// Long enough for any wait to succeed on a busy machine; reached only in failure.
const LIMIT: Duration = Duration::from_mins(1);
const WORKLOADS: [Workload; 6] = [
    Workload::Pattern,
    Workload::Sequential,
    Workload::Random,
    Workload::HotSet,
    Workload::ReadMostly,
    Workload::Mixed,
];

fn fresh(
    kind: GuestKind,
    ram: &Arc<GuestRam>,
    spec: &GuestSpec,
) -> Result<Box<dyn Guest>, GuestError> {
    init_ram(ram, spec);
    Ok(match kind {
        GuestKind::Kvm => Box::new(KvmGuest::new(ram.clone(), spec.clone())?),
        GuestKind::Threads => Box::new(ThreadsGuest::new(ram.clone(), spec.clone())?),
    })
}

fn restored(ram: &Arc<GuestRam>, state: &MachineState) -> Result<Box<dyn Guest>, GuestError> {
    Ok(match state.kind() {
        GuestKind::Kvm => Box::new(KvmGuest::restore(ram.clone(), state)?),
        GuestKind::Threads => Box::new(ThreadsGuest::restore(ram.clone(), state)?),
    })
}

/// Runs a guest until it has done `operations` more, and stops it.
fn run(guest: &mut dyn Guest, operations: u64) -> MachineState {
    let target = guest.operations() + operations;
    guest.start().unwrap();
    let reached = guest.wait_for_operations(target, LIMIT);
    let state = guest.stop().unwrap();
    assert_eq!(guest.failure(), None);
    assert_eq!(guest.operations(), state.operations());
    assert!(reached, "{} of {target} operations", guest.operations());
    state
}

fn random_below(bound: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::from(now.subsec_nanos() / 64) % bound
}

fn ram_of(backing: Backing) -> Arc<GuestRam> {
    Arc::new(GuestRam::allocate(RAM, backing).unwrap())
}

fn stop_move_resume_verify(kind: GuestKind, workload: Workload, vcpus: u32, backing: Backing) {
    let ram = ram_of(backing);
    let spec = GuestSpec::new(&ram, workload, vcpus)
        .unwrap()
        .with_worked_fraction(0.5)
        .with_zero_fraction(0.5);
    let operations = 10_000 + random_below(60_000);
    println!("{kind:?} {workload:?} x{vcpus} {backing:?}, after {operations} operations");
    let mut source = fresh(kind, &ram, &spec).unwrap();
    let state = run(&mut *source, operations);
    verify(&ram, &state).unwrap();

    let copy = ram_of(backing);
    copy.copy_from(&ram);
    let constant = spec.worked_pages()..spec.geometry().pages;
    let before = digest(&ram, &spec, constant.clone());
    drop((source, ram));
    let state = MachineState::from_bytes(&state.to_bytes()).unwrap();
    let mut destination = restored(&copy, &state).unwrap();
    let after = run(&mut *destination, 50_000);
    assert!(after.operations() >= state.operations() + 50_000);
    let report = verify(&copy, &after).unwrap();
    assert_eq!(digest(&copy, &spec, constant), before);
    assert!(report.increments > 0, "{report}");
    assert!(report.zero_pages > report.pages / 8, "{report}");
    if workload == Workload::Pattern {
        verify_pattern(&copy, &spec).unwrap();
        assert_eq!(report.increments, after.operations() + in_flight(&after));
    }
}

fn in_flight(state: &MachineState) -> u64 {
    let vcpus = state.progress().iter();
    vcpus.map(|vcpu| u64::from(vcpu.in_flight)).sum()
}

#[test]
fn every_workload_goes_on_in_another_vm() {
    if !require::kvm() {
        return;
    }
    for workload in WORKLOADS {
        for vcpus in [1, 2, 4] {
            stop_move_resume_verify(GuestKind::Kvm, workload, vcpus, Backing::Anonymous);
        }
    }
}

#[test]
fn every_backing_carries_a_vm() {
    if !require::kvm() {
        return;
    }
    stop_move_resume_verify(GuestKind::Kvm, Workload::Pattern, 2, Backing::Memfd);
    stop_move_resume_verify(GuestKind::Kvm, Workload::Random, 8, Backing::Memfd);
    if let Some(_pages) = require::hugetlb(2 * RAM / HUGE_PAGE_BYTES) {
        stop_move_resume_verify(GuestKind::Kvm, Workload::Pattern, 2, Backing::Hugetlb);
    }
}

#[test]
fn every_workload_goes_on_on_other_threads() {
    for workload in WORKLOADS {
        for vcpus in [1, 2, 4] {
            stop_move_resume_verify(GuestKind::Threads, workload, vcpus, Backing::Memfd);
        }
    }
}

#[test]
fn ram_above_the_mmio_hole_is_worked_too() {
    if !require::kvm() {
        return;
    }
    let ram = Arc::new(GuestRam::allocate((3 << 30) + (16 << 20), Backing::Memfd).unwrap());
    // Random pages, so that both regions are reached without filling all of RAM; the
    // workload neither reads tags nor needs content.
    let spec = GuestSpec::new(&ram, Workload::Random, 2).unwrap();
    let mut guest = KvmGuest::new(ram.clone(), spec.clone()).unwrap();
    run(&mut guest, 30_000);
    let geometry = spec.geometry();
    let touched = (geometry.low_pages..geometry.pages)
        .filter(|page| ram.read_page(geometry.address(*page)) != [0; 512])
        .count();
    assert!(touched > 50, "{touched} pages above 4 GiB were touched");
}

#[test]
fn a_stop_at_any_moment_leaves_ram_and_state_in_step() {
    let mut kinds = vec![GuestKind::Threads];
    if require::kvm() {
        kinds.push(GuestKind::Kvm);
    }
    for (kind, workload) in
        kinds.iter().flat_map(|kind| WORKLOADS.map(|workload| (*kind, workload)))
    {
        let ram = Arc::new(GuestRam::allocate(4 << 20, Backing::Anonymous).unwrap());
        let spec = GuestSpec::new(&ram, workload, 2).unwrap().with_report_every(256);
        let mut guest = fresh(kind, &ram, &spec).unwrap();
        let mut in_flight_seen = 0;
        let mut before = 0;
        for round in 0..100 {
            guest.start().unwrap();
            // Every other stop comes while the vCPUs are still about to start.
            if round % 2 == 0 {
                assert!(guest.wait_for_operations(before + 64, LIMIT));
            }
            let state = guest.stop().unwrap();
            verify(&ram, &state).unwrap();
            assert!(state.operations() >= before);
            before = state.operations();
            in_flight_seen += in_flight(&state);
        }
        println!("{kind:?} {workload:?}: {before} operations, {in_flight_seen} stops in flight");
    }
}

#[test]
fn building_from_a_state_touches_no_page() {
    let mut kinds = vec![GuestKind::Threads];
    if require::kvm() {
        kinds.push(GuestKind::Kvm);
    }
    for kind in kinds {
        let ram = ram_of(Backing::Anonymous);
        let spec = GuestSpec::new(&ram, Workload::Mixed, 4).unwrap();
        let mut guest = fresh(kind, &ram, &spec).unwrap();
        let state = run(&mut *guest, 1000);
        let empty = ram_of(Backing::Anonymous);
        let destination = restored(&empty, &state).unwrap();
        assert!(destination.operations() > 0);
        assert_eq!(resident_pages(&empty), 0, "{kind:?}");
    }
}

fn resident_pages(ram: &GuestRam) -> usize {
    let region = &ram.regions()[0];
    let mut resident = vec![0u8; (region.length() / PAGE_BYTES) as usize];
    let start = region.host_base().as_ptr().cast();
    // SAFETY: the vector has a byte for each page of the mapped range.
    let result = unsafe { libc::mincore(start, region.length() as usize, resident.as_mut_ptr()) };
    assert_eq!(result, 0);
    resident.iter().filter(|page| **page & 1 == 1).count()
}

/// A stopped guest in the middle of its work, and a copy of its RAM from before.
struct Stopped {
    ram: Arc<GuestRam>,
    old: Arc<GuestRam>,
    state: MachineState,
}

fn stopped(workload: Workload) -> Stopped {
    let ram = ram_of(Backing::Anonymous);
    let spec = GuestSpec::new(&ram, workload, 2).unwrap().with_worked_fraction(0.5);
    let kind = if require::kvm() { GuestKind::Kvm } else { GuestKind::Threads };
    let mut guest = fresh(kind, &ram, &spec).unwrap();
    run(&mut *guest, 20_000);
    let old = ram_of(Backing::Anonymous);
    old.copy_from(&ram);
    let state = run(&mut *guest, 200_000);
    verify(&ram, &state).unwrap();
    verify_pattern(&ram, &spec).unwrap();
    Stopped { ram, old, state }
}

impl Stopped {
    /// Breaks one page by `change`, verifies, and mends the page.
    fn verify_broken(&self, page: u64, change: impl Fn(&mut [u64; 512])) -> VerifyError {
        let address = self.state.spec().geometry().address(page);
        let good = self.ram.read_page(address);
        let mut bad = good;
        change(&mut bad);
        assert_ne!(bad, good, "the change changes nothing");
        self.ram.write_page(address, &bad);
        let result = verify(&self.ram, &self.state);
        self.ram.write_page(address, &good);
        verify(&self.ram, &self.state).unwrap();
        result.expect_err("a broken page was not noticed")
    }

    fn old_page(&self, page: u64) -> [u64; 512] {
        let address = self.state.spec().geometry().address(page);
        self.old.read_page(address)
    }
}

#[test]
fn a_broken_pattern_page_is_noticed() {
    let guest = stopped(Workload::Pattern);
    let error = guest.verify_broken(4000, |page| *page = [0; 512]);
    assert!(matches!(error, VerifyError::Tag { page: 4000, .. }), "{error}");
    let error = guest.verify_broken(3000, |page| *page = guest.old_page(3000));
    let VerifyError::Pattern(error) = error else {
        panic!("{error}");
    };
    assert_eq!((error.page, error.lane), (3000, 0));
    let error = guest.verify_broken(77, |page| page[8] ^= 1);
    assert!(matches!(error, VerifyError::Pattern(PatternError { page: 77, lane: 1, .. })));
    // The tail of a worked page, and a page that nobody works in.
    for page in [78, 15_000] {
        let error = guest.verify_broken(page, |page| page[511] ^= 1 << 63);
        assert!(matches!(error, VerifyError::Content { offset: 4088, .. }), "{error}");
    }
    // A bit of a lane that belongs to no vCPU.
    let error = guest.verify_broken(5, |page| page[16] = 1);
    assert!(matches!(error, VerifyError::Content { page: 5, offset: 128, .. }));
}

#[test]
fn the_pattern_alone_shows_an_old_page() {
    let guest = stopped(Workload::Pattern);
    let spec = guest.state.spec();
    for page in [0, 1, 4242, spec.worked_pages() - 1] {
        let address = spec.geometry().address(page);
        let good = guest.ram.read_page(address);
        guest.ram.write_page(address, &guest.old_page(page));
        let error = verify_pattern(&guest.ram, spec).unwrap_err();
        // A wrong first page shows when the second does not follow from it.
        assert_eq!(error.page, page.max(1));
        guest.ram.write_page(address, &good);
    }
}

#[test]
fn a_broken_counter_page_is_noticed() {
    for workload in [Workload::Random, Workload::Mixed] {
        let guest = stopped(workload);
        let changed = (0..1000).find(|page| {
            let address = guest.state.spec().geometry().address(*page);
            guest.ram.read_page(address) != guest.old_page(*page)
        });
        let page = changed.expect("some page was written");
        let error = guest.verify_broken(page, |words| *words = guest.old_page(page));
        assert!(matches!(error, VerifyError::Total { .. }), "{error}");
        let error = guest.verify_broken(page, |words| *words = [0; 512]);
        assert!(matches!(error, VerifyError::Tag { .. }), "{error}");
        let other = guest.state.spec().geometry().address(page + 1);
        let error = guest.verify_broken(page, |words| *words = guest.ram.read_page(other));
        assert!(matches!(error, VerifyError::Tag { .. }), "{error}");
    }
}

#[test]
fn the_guest_itself_notices_a_wrong_tag() {
    let mut kinds = vec![GuestKind::Threads];
    if require::kvm() {
        kinds.push(GuestKind::Kvm);
    }
    for kind in kinds {
        let ram = ram_of(Backing::Anonymous);
        let spec = GuestSpec::new(&ram, Workload::ReadMostly, 2).unwrap();
        let mut guest = fresh(kind, &ram, &spec).unwrap();
        let page = spec.geometry().address(123);
        let tag = ram.word(GuestAddress(page.0 + 2048));
        let right = tag.swap(42, Ordering::Relaxed);
        guest.start().unwrap();
        let failure = guest.progress().wait_for_failure(LIMIT).unwrap();
        assert!(failure.ends_with("read a wrong tag on page 123"), "{failure}");
        let state = guest.stop().unwrap();
        tag.store(right, Ordering::Relaxed);
        let error = verify(&ram, &state).unwrap_err();
        assert!(matches!(error, VerifyError::Seen { .. }), "{error}");
    }
}

#[test]
fn ram_that_comes_out_as_mmio_is_a_memory_error() {
    if !require::kvm() {
        return;
    }
    for workload in [Workload::Pattern, Workload::ReadMostly] {
        let ram = ram_of(Backing::Anonymous);
        let spec = GuestSpec::new(&ram, workload, 1).unwrap();
        init_ram(&ram, &spec);
        let end = GuestAddress(RAM / 2);
        let mut guest = KvmGuest::with_memory_up_to(ram, spec, end).unwrap();
        guest.start().unwrap();
        let failure = guest.progress().wait_for_failure(LIMIT).unwrap();
        assert!(failure.starts_with("vCPU 0: memory error: read of RAM at 0x"), "{failure}");
        if workload == Workload::Pattern {
            assert!(failure.contains("at 0x2000000 came out"), "{failure}");
        }
        let error = guest.stop().unwrap_err();
        assert!(matches!(error, GuestError::Failed(_)), "{error}");
    }
}

#[test]
fn a_guest_that_crashes_is_reported() {
    if !require::kvm() {
        return;
    }
    let ram = ram_of(Backing::Anonymous);
    let spec = GuestSpec::new(&ram, Workload::Pattern, 1).unwrap();
    let mut guest = fresh(GuestKind::Kvm, &ram, &spec).unwrap();
    // The guest has no exception handlers: a page table of zeros ends it.
    ram.write_page(GuestAddress(0x1000), &[0; 512]);
    guest.start().unwrap();
    let failure = guest.progress().wait_for_failure(LIMIT).unwrap();
    assert!(failure.starts_with("vCPU 0: "), "{failure}");
    assert!(guest.stop().is_err());
}

#[test]
fn a_state_is_refused_where_it_does_not_fit() {
    if !require::kvm() {
        return;
    }
    let ram = ram_of(Backing::Anonymous);
    let spec = GuestSpec::new(&ram, Workload::Pattern, 1).unwrap();
    let mut guest = fresh(GuestKind::Kvm, &ram, &spec).unwrap();
    let state = run(&mut *guest, 1000);
    let error = ThreadsGuest::restore(ram.clone(), &state).unwrap_err();
    assert!(matches!(error, GuestError::State(_)), "{error}");
    let error = PreparedVm::new(ram, 2).unwrap().restore(&state).unwrap_err();
    assert_eq!(
        error.to_string(),
        "this machine cannot run the guest: it has 1 vCPUs, 2 were prepared"
    );
    let small = GuestRam::allocate(RAM - HUGE_PAGE_BYTES, Backing::Anonymous).unwrap();
    let error = KvmGuest::restore(Arc::new(small), &state).unwrap_err();
    let pages = (RAM - SYSTEM_BYTES) / PAGE_BYTES;
    assert_eq!(
        error.to_string(),
        format!("guest RAM has {} pages to work in, the guest was built with {pages}", pages - 512)
    );
}

#[test]
fn starting_twice_and_stopping_twice_are_errors() {
    let ram = ram_of(Backing::Anonymous);
    let spec = GuestSpec::new(&ram, Workload::Pattern, 1).unwrap();
    let mut guest = fresh(GuestKind::Threads, &ram, &spec).unwrap();
    assert!(matches!(guest.stop(), Err(GuestError::Already("stopped"))));
    guest.start().unwrap();
    assert!(matches!(guest.start(), Err(GuestError::Already("running"))));
    guest.stop().unwrap();
}

#[test]
fn dropping_a_running_guest_stops_it() {
    let mut kinds = vec![GuestKind::Threads];
    if require::kvm() {
        kinds.push(GuestKind::Kvm);
    }
    for kind in kinds {
        let ram = ram_of(Backing::Anonymous);
        let spec = GuestSpec::new(&ram, Workload::Pattern, 2).unwrap();
        let mut guest = fresh(kind, &ram, &spec).unwrap();
        guest.start().unwrap();
        assert!(guest.wait_for_operations(1, LIMIT));
        drop(guest);
        assert_eq!(Arc::strong_count(&ram), 1, "a thread still has the RAM");
    }
}
