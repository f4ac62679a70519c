//! One session between two VMMs of this process.

use std::any::Any;
use std::fs;
use std::io::Write;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{
    Background, Checksums, Destination, DestinationEvent, DestinationOptions, DestinationStats,
    DiscardNotice, Endpoint, Events, FaultScope, Listener, NoEvent, Passes, Plaintext, Precopy,
    Source, SourceEvent, SourceOptions, SwitchoverCause,
};
use afterimage_tools::guest::{
    Guest, GuestKind, GuestSpec, MachineState, ThreadsGuest, TrackerKind,
};
use afterimage_tools::microvm::{KvmGuest, PreparedVm};
use afterimage_tools::migrate;
use afterimage_tools::ram::GuestRam;

use super::LIMIT;
use super::plan::{Ending, Plan};

/// So that vCPUs meet a full ring.
const RING_ENTRIES: u32 = 1024;
/// Between two looks at what is no event.
const LOOK: Duration = Duration::from_millis(1);

/// A guest of either kind.
pub(crate) enum Machine {
    Kvm(KvmGuest),
    Threads(ThreadsGuest),
}

impl Machine {
    pub(crate) fn new(plan: &Plan, ram: &Arc<GuestRam>, spec: GuestSpec) -> Self {
        match plan.kind {
            GuestKind::Kvm if plan.tracker == TrackerKind::Ring => {
                Self::Kvm(KvmGuest::with_dirty_rings(ram.clone(), spec, RING_ENTRIES).unwrap())
            }
            GuestKind::Kvm => Self::Kvm(KvmGuest::new(ram.clone(), spec).unwrap()),
            GuestKind::Threads => Self::Threads(ThreadsGuest::new(ram.clone(), spec).unwrap()),
        }
    }

    pub(crate) fn guest(&mut self) -> &mut dyn Guest {
        match self {
            Self::Kvm(guest) => guest,
            Self::Threads(guest) => guest,
        }
    }

    /// Asserts that nobody tracks the guest's writes any more, after it has written.
    pub(crate) fn assert_untracked(&mut self) {
        if let Self::Kvm(guest) = self {
            assert!(!guest.is_tracked().unwrap(), "KVM still notes what is written");
        }
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        for region in self.guest().ram().regions() {
            let start = region.host_base().as_ptr() as u64;
            let mut is_inside = false;
            for line in smaps.lines() {
                let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                if let Some((from, to)) = range
                    && let (Ok(from), Ok(to)) =
                        (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16))
                {
                    is_inside = from < start + region.length() && to > start;
                }
                let flags = line.strip_prefix("VmFlags:").filter(|_| is_inside);
                let is_protected = |flags: &str| flags.split(' ').any(|flag| flag == "uw");
                assert!(!flags.is_some_and(is_protected), "still write-protected: {line}");
            }
        }
    }
}

/// How a session ended.
pub(crate) enum Outcome {
    Moved(Box<dyn Guest>),
    /// The guest is at the source, and runs.
    Stayed,
}

/// What the parts of a session know of each other.
#[derive(Default)]
struct Shared {
    is_stopped: AtomicBool,
    is_over: AtomicBool,
    stayed: AtomicBool,
    looks: AtomicU64,
}

/// What a source has said.
#[derive(Debug, Default)]
struct Said {
    passes: Vec<afterimage::PassReport>,
    cause: Option<SwitchoverCause>,
    is_attached: bool,
    end: Option<SourceEvent>,
}

pub(crate) struct Session<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) ending: Ending,
    shared: Shared,
}

impl<'a> Session<'a> {
    pub(crate) fn new(plan: &'a Plan, ending: Ending) -> Self {
        Self { plan, ending, shared: Shared::default() }
    }

    /// Moves a running guest, or not.
    pub(crate) fn run(&self, machine: &mut Machine) -> Outcome {
        let guest = machine.guest();
        // SAFETY: the source is gone when this returns, and whoever calls keeps the guest; it
        // is stopped before the switchover.
        let memory = unsafe { migrate::source_memory(guest.ram()) }.unwrap();
        let address = "tcp:127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind(&address, Plaintext::LoopbackOnly).unwrap();
        let address = listener.address().to_string();
        let options = self.options(guest);
        let (source, events) =
            Source::start(Arc::new(memory), Endpoint::Listen(listener), options).unwrap();
        thread::scope(|scope| {
            let destination =
                scope.spawn(|| self.or_end("at the destination", || self.receive(&address)));
            let since = guest.operations();
            let progress = guest.progress().clone();
            let source = &source;
            scope.spawn(move || self.reclaim(source, || progress.operations() - since));
            let moved = self.or_end("at the source", || self.give(source, &events, guest, since));
            self.shared.stayed.store(!moved, Ordering::SeqCst);
            self.shared.is_over.store(true, Ordering::SeqCst);
            let arrived = destination.join().unwrap();
            match arrived {
                Some(arrived) if moved => Outcome::Moved(arrived),
                None if !moved => Outcome::Stayed,
                arrived => self.end(&format!(
                    "the source says that the guest {}, the destination that it {}",
                    if moved { "moved" } else { "stayed" },
                    if arrived.is_some() { "came" } else { "did not come" }
                )),
            }
        })
    }

    fn options(&self, guest: &mut dyn Guest) -> SourceOptions {
        let mut options = SourceOptions::default();
        options.streams = self.plan.streams;
        options.hold = self.plan.holds;
        if self.plan.checksums {
            options.checksums = Checksums::On;
        }
        let rate = self.plan.rate.and_then(|rate| NonZeroU64::new(rate << 20));
        options.precopy_background =
            rate.map(|bytes_per_second| Background::Limited { bytes_per_second });
        options.precopy = self.plan.passes.map(|passes| {
            let mut precopy = Precopy::new(guest.tracker(self.plan.tracker).unwrap());
            precopy.passes = passes;
            precopy.longest = Duration::from_secs(2);
            precopy
        });
        options
    }

    /// The source's VMM. Whether the guest was given away; else it runs here again.
    fn give(
        &self,
        source: &Source,
        events: &Events<SourceEvent>,
        guest: &mut dyn Guest,
        since: u64,
    ) -> bool {
        let mut said = Said::default();
        listen(source, events, &mut said, |said| {
            // Else it would be waited for in vain.
            assert_eq!(guest.failure(), None, "{said:?}");
            let done = guest.operations() - since;
            said.end.is_some()
                || match self.ending {
                    Ending::Due if self.plan.passes.is_some() => said.cause.is_some(),
                    Ending::Due => said.is_attached,
                    Ending::After(count) | Ending::Reclaimed { stop_after: count, .. } => {
                        done >= count
                    }
                }
        });
        self.check_passes(&said);
        if said.end.is_none() {
            guest.halt().unwrap();
            self.shared.is_stopped.store(true, Ordering::SeqCst);
            // Both fail where somebody else has taken the guest back meanwhile.
            if source.stopped().is_ok() {
                let state = guest.save().unwrap();
                let _ = source.switch_over(migrate::state_sections(&state));
            }
            listen(source, events, &mut said, |said| said.end.is_some());
            if said.end == Some(SourceEvent::Finished) {
                return true;
            }
            guest.start().unwrap();
        }
        assert_eq!(said.end, Some(SourceEvent::Reclaimed), "{said:?}");
        false
    }

    fn check_passes(&self, said: &Said) {
        let numbers = said.passes.iter().map(|pass| pass.number);
        assert!(numbers.eq(1..=said.passes.len() as u32), "{said:?}");
        match (self.plan.passes, said.cause) {
            (None, cause) => assert_eq!(cause, None),
            (Some(Passes::Count(count)), Some(cause)) => {
                assert_eq!(cause, SwitchoverCause::PassesDone);
                assert_eq!(said.passes.len(), count as usize, "{said:?}");
            }
            _ => assert_ne!(said.cause, Some(SwitchoverCause::NoPrecopy), "{said:?}"),
        }
    }

    /// Takes the guest back at the planned instant, if at all.
    fn reclaim(&self, source: &Source, done: impl Fn() -> u64) {
        let Ending::Reclaimed { reclaim_after, looks, .. } = self.ending else { return };
        let shared = &self.shared;
        while done() < reclaim_after && shared.looks.load(Ordering::Relaxed) < looks {
            if shared.is_over.load(Ordering::SeqCst) {
                return;
            }
            if shared.is_stopped.load(Ordering::SeqCst) {
                shared.looks.fetch_add(1, Ordering::Relaxed);
            }
            thread::yield_now();
        }
        // Too late is an answer as well.
        let _ = source.reclaim();
    }

    /// The destination's VMM. The guest that has come, if it has.
    fn receive(&self, address: &str) -> Option<Box<dyn Guest>> {
        let ram = Arc::new(GuestRam::allocate(super::RAM, self.plan.backing).unwrap());
        // SAFETY: the guest that is returned keeps the RAM, and one that is given up nobody
        // runs; nobody has a reference into it.
        let memory = unsafe {
            migrate::destination_memory(&ram, FaultScope::KernelAndUser, DiscardNotice::Called)
        };
        let memory = memory.unwrap();
        assert_eq!(memory.precopy_lack(), None);
        let mut prepared = (self.plan.kind == GuestKind::Kvm)
            .then(|| PreparedVm::new(ram.clone(), self.plan.vcpus).unwrap());
        let endpoint = Endpoint::Connect(address.parse().unwrap());
        let (destination, events) =
            Destination::start(memory, endpoint, DestinationOptions::default()).unwrap();
        let mut guest: Option<Box<dyn Guest>> = None;
        let mut is_running = false;
        let deadline = Instant::now() + 3 * LIMIT;
        loop {
            match events.next_timeout(LOOK) {
                Ok(DestinationEvent::State(sections)) => {
                    let state = migrate::state_from(&sections).unwrap();
                    guest = Some(restored(prepared.take(), &ram, &state));
                    // Fails where the source has taken the guest back.
                    let _ = destination.ready();
                }
                Ok(DestinationEvent::Run) => {
                    is_running = true;
                    guest.as_mut().expect("its state came first").start().unwrap();
                }
                Ok(DestinationEvent::Finished) => {
                    check_counts(&destination.stats());
                    return guest.filter(|_| is_running);
                }
                Ok(_) => {}
                Err(NoEvent::Ended) => panic!("the destination ended"),
                Err(NoEvent::NotInTime) => {
                    if self.shared.stayed.load(Ordering::SeqCst) {
                        assert!(!is_running, "the guest runs on both sides");
                        return None;
                    }
                }
            }
            assert!(Instant::now() < deadline, "nothing comes: {:?}", destination.stats());
        }
    }

    /// Calls a side, and ends the process where it panics: vCPUs may wait for pages that
    /// never come, and could not be joined.
    fn or_end<T>(&self, place: &str, side: impl FnOnce() -> T) -> T {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(side));
        result.unwrap_or_else(|panic| self.end(&format!("{place}: {}", said_by(&*panic))))
    }

    fn end(&self, what: &str) -> ! {
        let (plan, ending) = (self.plan, self.ending);
        let _ = writeln!(
            std::io::stderr(),
            "{what}: AFTERIMAGE_SEED={} of {:?} comes here again: {ending:?} of {plan:?}",
            plan.seed,
            plan.kind
        );
        std::process::abort();
    }
}

/// What a panic said: the harness keeps it to itself, and is ended with the process.
fn said_by(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref().copied()).unwrap_or("it says nothing")
}

/// Takes events until something is so.
fn listen(
    source: &Source,
    events: &Events<SourceEvent>,
    said: &mut Said,
    is_so: impl Fn(&Said) -> bool,
) {
    let deadline = Instant::now() + LIMIT;
    while !is_so(said) {
        match events.next_timeout(LOOK) {
            Ok(SourceEvent::Attached(_)) => said.is_attached = true,
            Ok(SourceEvent::PassEnded(report)) => said.passes.push(report),
            Ok(SourceEvent::SwitchoverDue(cause)) => {
                assert_eq!(said.cause.replace(cause), None, "told once");
            }
            // Whoever takes it back may have been faster.
            Ok(SourceEvent::Held) => drop(source.proceed()),
            Ok(event @ (SourceEvent::Finished | SourceEvent::Reclaimed)) => {
                said.end = Some(event);
            }
            Ok(_) | Err(NoEvent::NotInTime) => {}
            Err(NoEvent::Ended) => panic!("the source ended; it had said {said:?}"),
        }
        assert!(Instant::now() < deadline, "nothing comes of it: {said:?}, {:?}", source.stats());
    }
}

fn restored(
    prepared: Option<PreparedVm>,
    ram: &Arc<GuestRam>,
    state: &MachineState,
) -> Box<dyn Guest> {
    match prepared {
        Some(machine) => Box::new(machine.restore(state).unwrap()),
        None => Box::new(ThreadsGuest::restore(ram.clone(), state).unwrap()),
    }
}

fn check_counts(stats: &DestinationStats) {
    let once = stats.pages_requested + stats.pages_background + stats.pages_precopy;
    assert_eq!(once + stats.pages_zero, stats.pages_total, "{stats:?}");
    assert_eq!(stats.pages_complete, stats.pages_total, "{stats:?}");
}
