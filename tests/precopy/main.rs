//! Guests whose memory is sent while they run: stopped at any instant, taken back at any
//! instant, and right to the last byte wherever they are then.
//!
//! Each run has a number. `AFTERIMAGE_SEED=N` runs that one alone, and `AFTERIMAGE_RUNS=N`
//! runs so many from 0 on.

mod plan;
mod session;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use afterimage::{
    Background, Destination, DestinationOptions, DiscardNotice, Endpoint, FaultScope, Listener,
    NoEvent, PassReport, Passes, Plaintext, Precopy, Source, SourceEvent, SourceOptions,
};
use afterimage_tools::guest::{Guest, GuestKind, GuestSpec, Workload, init_ram, verify};
use afterimage_tools::migrate;
use afterimage_tools::ram::{Backing, GuestRam, HUGE_PAGE_BYTES, HugePages};
use afterimage_tools::require;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use plan::{Ending, Plan};
use session::{Machine, Outcome, Session};

/// Guest memory: a huge page of the guest's own, and three to work in.
const RAM: u64 = 8 << 20;
/// Long enough for any wait on a busy machine, a million operations of a guest included; reached
/// only in failure.
const LIMIT: Duration = Duration::from_mins(5);
/// Runs of each test, where nobody says otherwise.
const RUNS: u64 = 100;
/// Sessions of a run that may be taken back.
const MOST_SESSIONS: usize = 4;

fn number_of(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

/// All runs of one kind of guest.
fn run_all(kind: GuestKind) {
    if !require::userfaultfd() || (kind == GuestKind::Kvm && !require::kvm()) {
        return;
    }
    // For both sides, one that was taken back, and two tests at once.
    let huge_pages = require::hugetlb(4 * RAM / HUGE_PAGE_BYTES);
    allow_many_descriptors();
    let runs = number_of("AFTERIMAGE_RUNS").unwrap_or(RUNS);
    let seeds = number_of("AFTERIMAGE_SEED").map_or(0..runs, |seed| seed..seed + 1);
    for seed in seeds {
        run_one(&Plan::of(kind, seed), huge_pages.as_ref());
    }
}

/// A destination whose guest was taken back leaves a userfaultfd behind, which the engine keeps
/// open as long as the process lives.
fn allow_many_descriptors() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

fn run_one(plan: &Plan, huge_pages: Option<&HugePages>) {
    if plan.backing == Backing::Hugetlb && huge_pages.is_none() {
        return;
    }
    println!("{plan:?}");
    let ram = Arc::new(GuestRam::allocate(RAM, plan.backing).unwrap());
    let spec = GuestSpec::new(&ram, plan.workload, plan.vcpus)
        .unwrap()
        .with_seed(plan.seed)
        .with_worked_fraction(plan.worked)
        .with_zero_fraction(plan.zero)
        .with_report_every(256);
    init_ram(&ram, &spec);
    let mut machine = Machine::new(plan, &ram, spec);
    // A bitmap must be there before its writers run.
    drop(machine.guest().tracker(plan.tracker).unwrap());
    machine.guest().start().unwrap();
    let mut random = plan.random.clone();
    let mut ending = plan.first;
    for _ in 0..MOST_SESSIONS {
        println!("{ending:?}");
        match Session::new(plan, ending).run(&mut machine) {
            Outcome::Moved(mut guest) => {
                println!("it moved");
                check_running(&mut *guest);
                return;
            }
            Outcome::Stayed => {
                println!("it stayed");
                check_running(machine.guest());
                machine.assert_untracked();
                machine.guest().start().unwrap();
            }
        }
        ending = Ending::at_random(&mut random);
    }
    let last = Session::new(plan, Ending::Due).run(&mut machine);
    let Outcome::Moved(mut guest) = last else { panic!("nobody has taken it back") };
    check_running(&mut *guest);
}

/// Lets a guest run for two rounds, stops it, and looks at every page.
fn check_running(guest: &mut dyn Guest) {
    let rounds = 2 * guest.spec().worked_pages() * u64::from(guest.spec().vcpus());
    let target = guest.operations() + rounds;
    assert!(guest.wait_for_operations(target, LIMIT), "it stands still: {:?}", guest.failure());
    let state = guest.stop().unwrap();
    assert_eq!(guest.failure(), None);
    verify(guest.ram(), &state).unwrap();
}

#[test]
fn guests_on_kvm_are_right_wherever_they_are() {
    run_all(GuestKind::Kvm);
}

#[test]
fn guests_on_threads_are_right_wherever_they_are() {
    run_all(GuestKind::Threads);
}

/// A guest that writes all of its memory over and over again, on a link of 16 MiB a second.
fn busy_plan() -> Plan {
    let mut plan = Plan::of(GuestKind::Threads, 0);
    (plan.backing, plan.workload) = (Backing::Anonymous, Workload::Sequential);
    (plan.worked, plan.holds, plan.rate) = (1.0, false, Some(16));
    plan.passes = Some(Passes::Automatic);
    plan
}

#[test]
fn a_guest_that_writes_faster_than_the_link_moves_but_never_converges() {
    if !require::userfaultfd() {
        return;
    }
    let plan = busy_plan();
    let ram = Arc::new(GuestRam::allocate(RAM, plan.backing).unwrap());
    let spec = GuestSpec::new(&ram, plan.workload, plan.vcpus).unwrap();
    init_ram(&ram, &spec);
    let mut machine = Machine::new(&plan, &ram, spec);
    drop(machine.guest().tracker(plan.tracker).unwrap());
    machine.guest().start().unwrap();

    let passes = passes_without_convergence(&plan, machine.guest());
    for pass in &passes {
        assert!(pass.bytes_written > pass.bytes_sent / 4, "it is a busy guest: {passes:?}");
    }
    machine.assert_untracked();

    let Outcome::Moved(mut guest) = Session::new(&plan, Ending::Due).run(&mut machine) else {
        panic!("nobody has taken it back");
    };
    check_running(&mut *guest);
}

/// Five passes of a guest that is to move only when what is left fits into 10 ms.
fn passes_without_convergence(plan: &Plan, guest: &mut dyn Guest) -> Vec<PassReport> {
    let mut precopy = Precopy::new(guest.tracker(plan.tracker).unwrap());
    precopy.passes = Passes::Converged;
    precopy.downtime = Duration::from_millis(10);
    let mut options = SourceOptions::default();
    options.precopy = Some(precopy);
    let bytes_per_second = NonZeroU64::new(16 << 20).expect("not zero");
    options.precopy_background = Some(Background::Limited { bytes_per_second });
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), Plaintext::LoopbackOnly);
    let listener = listener.unwrap();
    let address = listener.address().to_string();
    // SAFETY: the source is gone when this returns, and the guest is not; nothing switches over.
    let memory = unsafe { migrate::source_memory(guest.ram()) }.unwrap();
    let (source, events) =
        Source::start(Arc::new(memory), Endpoint::Listen(listener), options).unwrap();
    let ram = GuestRam::allocate(RAM, plan.backing).unwrap();
    // SAFETY: the RAM outlives the destination, and nobody touches it.
    let memory = unsafe {
        migrate::destination_memory(&ram, FaultScope::KernelAndUser, DiscardNotice::Called)
    };
    let endpoint = Endpoint::Connect(address.parse().unwrap());
    let options = DestinationOptions::default();
    let (_destination, _events) = Destination::start(memory.unwrap(), endpoint, options).unwrap();
    let mut passes = Vec::new();
    while passes.len() < 5 {
        match events.next_timeout(LIMIT) {
            Ok(SourceEvent::PassEnded(report)) => passes.push(report),
            Ok(SourceEvent::SwitchoverDue(cause)) => panic!("it is due, {cause:?}: {passes:?}"),
            Ok(_) => {}
            Err(NoEvent::NotInTime | NoEvent::Ended) => panic!("no further pass: {passes:?}"),
        }
    }
    source.reclaim().unwrap();
    let is_back = |event| matches!(event, Ok(SourceEvent::Reclaimed));
    // Passes and a reattachment at most may have been told before.
    assert!((0..100).any(|_| is_back(events.next_timeout(LIMIT))), "it was taken back");
    passes
}
