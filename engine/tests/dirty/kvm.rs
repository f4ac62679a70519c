//! KVM's trackers, and write protection, against vCPUs that write.

use crate::common::{Kind, Random};
use crate::copying::{Copy, collected};
use crate::machine::{Machine, PAGES, machine};
use crate::prologue;
use crate::write_protect::tracker_of;
use afterimage::GuestAddress;
use afterimage::dirty::{
    DirtyBitmap, DirtyTracker, KvmDirtyLog, KvmDirtyRing, RingReaper, Trackers,
};
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// 1,024 entries, of which some are reserved: less than the guest writes in a run.
const SMALL_RING: u64 = 16 << 10;
const WRITES: u64 = 3000;

fn log_of(machine: &Machine) -> KvmDirtyLog {
    KvmDirtyLog::new(machine.vm(), machine.slots()).expect("a dirty log")
}

fn ring_of(machine: &Machine) -> KvmDirtyRing {
    KvmDirtyRing::new(machine.vm(), &machine.vcpus(), machine.slots()).expect("dirty rings")
}

/// Two vCPUs write while what they wrote is collected and copied; how often a ring was full.
fn no_write_is_lost(
    machine: &mut Machine,
    tracker: &mut dyn DirtyTracker,
    reaper: Option<&RingReaper>,
    random: &mut Random,
) -> u64 {
    tracker.start().expect("started");
    let memory = Arc::clone(&machine.memory);
    let mut copy = Copy::of(&memory);
    let full = machine.run(WRITES, random, reaper, || {
        for _ in 0..8 {
            copy.round(tracker);
        }
    });
    copy.round(tracker);
    copy.check();
    assert_eq!(copy.round(tracker), 0, "nobody writes any more");
    // Armed again: the same pages once more.
    machine.run(500, random, reaper, || ());
    assert!(copy.round(tracker) > 0, "nothing was reported");
    copy.check();
    tracker.stop().expect("stopped");
    full
}

#[test]
fn the_dirty_log_loses_no_write_of_a_vcpu() {
    prologue!("the_dirty_log");
    let Some(mut machine) = machine(Kind::Anonymous, None) else { return };
    let mut random = Random::seeded("the_dirty_log");
    let mut tracker = log_of(&machine);
    for _ in 0..50 {
        no_write_is_lost(&mut machine, &mut tracker, None, &mut random);
        assert!(!machine.is_logged());
    }
}

#[test]
fn the_dirty_ring_loses_no_write_of_a_vcpu_even_if_it_is_full() {
    prologue!("the_dirty_ring");
    let Some(mut machine) = machine(Kind::Memfd, Some(SMALL_RING)) else { return };
    let mut random = Random::seeded("the_dirty_ring");
    let mut tracker = ring_of(&machine);
    let reaper = tracker.reaper();
    let mut full = 0;
    for _ in 0..50 {
        full += no_write_is_lost(&mut machine, &mut tracker, Some(&reaper), &mut random);
    }
    assert!(full > 0, "no ring was ever full");
}

#[test]
fn a_second_tracker_finds_its_place_in_rings_that_were_used() {
    prologue!("a_second_tracker");
    let Some(mut machine) = machine(Kind::Anonymous, Some(SMALL_RING)) else { return };
    let mut random = Random::seeded("a_second_tracker");
    for _ in 0..5 {
        let mut tracker = ring_of(&machine);
        let reaper = tracker.reaper();
        no_write_is_lost(&mut machine, &mut tracker, Some(&reaper), &mut random);
    }
}

/// Does nothing: its coming is what matters.
extern "C" fn kicked(_: libc::c_int) {}

#[test]
fn a_thread_that_is_kicked_while_it_empties_rings_takes_it_for_no_overflow() {
    prologue!("kicked");
    let Some(mut machine) = machine(Kind::Anonymous, Some(SMALL_RING)) else { return };
    let action = SigAction::new(SigHandler::Handler(kicked), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, and nobody else uses this signal.
    unsafe { sigaction(Signal::SIGUSR2, &action) }.expect("a handler");
    let mut random = Random::seeded("kicked");
    let mut tracker = ring_of(&machine);
    let reaper = tracker.reaper();
    let this = pthread_self();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                pthread_kill(this, Signal::SIGUSR2).expect("it lives as long as this thread");
            }
        });
        // Set also if this panics: the scope waits for the other.
        let _over = Over(&is_over);
        for _ in 0..10 {
            no_write_is_lost(&mut machine, &mut tracker, Some(&reaper), &mut random);
        }
    });
}

struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn write_protection_loses_no_write_of_a_vcpu() {
    prologue!("write_protection");
    for kind in [Kind::Anonymous, Kind::Memfd] {
        let Some(mut machine) = machine(kind, None) else { return };
        let Some(mut tracker) = tracker_of(&machine.memory) else { return };
        let mut random = Random::seeded("write_protection");
        for _ in 0..25 {
            no_write_is_lost(&mut machine, &mut tracker, None, &mut random);
        }
    }
}

#[test]
fn kvms_trackers_leave_no_slot_logged() {
    prologue!("no_slot_logged");
    let Some(mut machine) = machine(Kind::Anonymous, None) else { return };
    let mut tracker = log_of(&machine);
    assert!(!machine.is_logged());
    tracker.collect(&mut |_, _| ()).expect_err("not started");
    tracker.start().expect("started");
    assert!(machine.is_logged());
    let error = tracker.start().expect_err("started twice");
    assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
    tracker.stop().expect("stopped");
    tracker.stop().expect("stopped twice");
    assert!(!machine.is_logged());
    tracker.start().expect("started again");
    drop(tracker);
    assert!(!machine.is_logged());

    let error = KvmDirtyRing::new(machine.vm(), &machine.vcpus(), machine.slots());
    let error = error.expect_err("a VM without rings");
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    machine.run(25, &mut Random::new(1), None, || ());
}

#[test]
fn rings_stay_empty_once_their_tracker_has_stopped() {
    prologue!("rings_stay_empty");
    let Some(mut machine) = machine(Kind::Anonymous, Some(SMALL_RING)) else { return };
    let mut random = Random::seeded("rings_stay_empty");
    let mut tracker = ring_of(&machine);
    let reaper = tracker.reaper();
    tracker.start().expect("started");
    // Full when it stops.
    machine.run(5 * PAGES, &mut random, Some(&reaper), || ());
    drop(tracker);
    // A ring that fills has no reaper now.
    assert_eq!(machine.run(5 * PAGES, &mut random, None, || ()), 0);
    reaper.reap().expect("may be called still");
    let mut log = log_of(&machine);
    log.start().expect("flags can be set");
    log.collect(&mut |_, _| ()).expect_err("a VM with rings has no log");
}

#[test]
fn what_vcpus_and_devices_write_is_reported_as_one() {
    prologue!("vcpus_and_devices");
    let Some(mut machine) = machine(Kind::Anonymous, None) else { return };
    let device = DirtyBitmap::new(&[(GuestAddress(0), (PAGES + 1) * 4096)]).expect("a bitmap");
    let device = Arc::new(device);
    let log = Box::new(log_of(&machine));
    let mut tracker = Trackers::new(vec![log, Box::new(Arc::clone(&device))]);
    tracker.start().expect("started");
    let memory = Arc::clone(&machine.memory);
    let mut copy = Copy::of(&memory);
    machine.run(100, &mut Random::new(7), None, || ());
    // KVM does not see what this process writes.
    memory.word(PAGES, 100).store(1, Ordering::Relaxed);
    device.mark(GuestAddress(PAGES * 4096 + 800), 8);
    let found = collected(&mut tracker, &memory);
    assert!(found.contains(&PAGES) && found.len() > 50, "{found:?}");
    for page in &found {
        copy.page(*page);
    }
    copy.check();
    tracker.stop().expect("stopped");
    assert!(!machine.is_logged());
}
