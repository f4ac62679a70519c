//! Sides that are only busy: a slow disk under a ledger, a process that was stopped. Nobody is
//! taken for dead who is not, and who was is taken in again.

mod common;

use afterimage::{
    Background, DestinationEvent, DestinationLedger, DestinationOwnership, Endpoint, SourceEvent,
    SourceLedger, SourceOwnership,
};
use common::children::{Role, argument, say};
use common::{Kind, Listening, LoneDestination, LoneSource, Memory, Pair, Setup, Toucher};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Long enough for a machine that tests several things at once.
const SILENCE: Duration = Duration::from_secs(1);

/// A disk whose next write takes until somebody lets it go on.
#[derive(Clone, Default)]
struct SlowDisk(Arc<(Mutex<Disk>, Condvar)>);

#[derive(Default)]
struct Disk {
    writes: bool,
    may_go_on: bool,
}

impl SlowDisk {
    fn write(&self) {
        let (disk, changed) = &*self.0;
        let mut disk = disk.lock().expect("not poisoned");
        disk.writes = true;
        changed.notify_all();
        drop(changed.wait_while(disk, |disk| !disk.may_go_on).expect("not poisoned"));
    }

    /// Lets a write that has begun take so long.
    fn hold_for(&self, time: Duration, dump: impl Fn() -> String) {
        let (disk, changed) = &*self.0;
        let is_writing = || disk.lock().expect("not poisoned").writes;
        common::wait_until("a record to be written", &dump, is_writing);
        let since = Instant::now();
        common::wait_until("a slow disk", &dump, || since.elapsed() >= time);
        disk.lock().expect("not poisoned").may_go_on = true;
        changed.notify_all();
    }
}

#[test]
fn a_disk_slower_than_the_silence_disconnects_nobody() {
    prologue!("a_disk_slower_than_the_silence");
    for listening in [Listening::Source, Listening::Destination] {
        let (bound, given, running) =
            (SlowDisk::default(), SlowDisk::default(), SlowDisk::default());
        let (at_bound, at_given, at_running) = (bound.clone(), given.clone(), running.clone());
        let setup = Setup { listening, kinds: vec![(Kind::Memfd, 8 * MIB)], ..Setup::default() };
        let pair = Pair::start_with(
            &setup,
            |source, destination| {
                (source.silence, destination.silence) = (SILENCE, SILENCE);
                source.ledger = SourceLedger::new(move |record| {
                    if record.ownership == SourceOwnership::Given {
                        at_given.write();
                    }
                    Ok(())
                });
                destination.ledger = DestinationLedger::new(move |record| {
                    match record.ownership {
                        DestinationOwnership::Running => at_running.write(),
                        _ => at_bound.write(),
                    }
                    Ok(())
                });
            },
            |address| address,
        );
        let pair = pair.expect("no huge pages");
        bound.hold_for(3 * SILENCE, || pair.dump());
        pair.prepare(&[]);
        given.hold_for(3 * SILENCE, || pair.dump());
        running.hold_for(3 * SILENCE, || pair.dump());
        pair.wait_destination(&DestinationEvent::Run);
        pair.finish();
        assert!(!pair.at_source.rest().contains(&SourceEvent::Disconnected));
        assert!(!pair.at_destination.rest().contains(&DestinationEvent::Disconnected));
        assert_eq!(pair.source.stats().recoveries, 0);
        assert_eq!(pair.check_counts().recoveries, 0);
        pair.check_content();
    }
}

/// A destination waits five seconds for its greeting.
#[test]
fn a_disk_slower_than_the_greeting_keeps_nobody_out() {
    prologue!("a_disk_slower_than_the_greeting");
    let slowness = Duration::from_secs(7);
    let records = Arc::new(AtomicU32::new(0));
    let written = Arc::clone(&records);
    let pair = Pair::start_with(
        &Setup::default(),
        |source, _| {
            source.ledger = SourceLedger::new(move |record| {
                if record.ownership == SourceOwnership::Owner {
                    written.fetch_add(1, Ordering::AcqRel);
                    // The disk.
                    std::thread::sleep(slowness);
                }
                Ok(())
            });
        },
        |address| address,
    );
    let pair = pair.expect("no huge pages");
    pair.switch(&[]);
    pair.finish();
    pair.check_content();
    let records = records.load(Ordering::Acquire);
    assert!(records <= 2, "{records} epochs were recorded for one greeting");
}

#[test]
fn a_ledger_that_panics_is_one_that_fails() {
    prologue!("a_ledger_that_panics");
    let setup = Setup::default();
    let pair = Pair::start_with(
        &setup,
        |source, _| {
            source.ledger = SourceLedger::new(|record| {
                assert_ne!(record.ownership, SourceOwnership::Given, "on purpose");
                Ok(())
            });
        },
        |address| address,
    );
    let pair = pair.expect("no huge pages");
    pair.prepare(&[]);
    pair.wait_source(&SourceEvent::PersistFailed);
    assert!(!pair.at_source.rest().contains(&SourceEvent::Given));
    assert!(!pair.at_destination.rest().contains(&DestinationEvent::Run));
}

fn stopped_setup() -> Setup {
    Setup { kinds: vec![(Kind::Anonymous, 4 * MIB)], seed: 5, ..Setup::default() }
}

fn signal(role: &Role, signal: Signal) {
    kill(Pid::from_raw(role.id() as i32), signal).expect("a child that lives");
}

/// Stops a child, and waits until each of its threads has stopped.
fn stop(role: &Role) {
    signal(role, Signal::SIGSTOP);
    let threads = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", role.id())).expect("a child");
        let stat = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.ok()?.path().join("stat")).ok()
        };
        tasks.filter_map(stat).collect::<Vec<_>>()
    };
    common::wait_until(
        "all threads to stop",
        || format!("{:?}", threads()),
        || threads().iter().all(|stat| stat.contains(") T ")),
    );
}

/// A source that sends only what is asked for, of a guest that has stopped.
fn stopped_source(endpoint: Endpoint) -> LoneSource {
    let source = LoneSource::start(&stopped_setup(), endpoint, |options| {
        (options.silence, options.background) = (SILENCE, Background::OnRequest);
    });
    source.switch_over(vec![]);
    source
}

/// Reads all of the guest.
fn check(new: &Memory) {
    let Setup { seed, content, .. } = stopped_setup();
    new.check(seed, content);
}

/// Plays a source.
#[test]
fn child_stopped_source() {
    let Some(address) = argument("child_stopped_source") else { return };
    let source = stopped_source(Endpoint::Connect(address.parse().expect("an address")));
    source.wait(&SourceEvent::Finished);
    say("finished");
}

#[test]
fn a_source_that_was_stopped_for_a_while_goes_on() {
    prologue!("a_source_that_was_stopped");
    let listener = common::session::listen();
    let role = Role::start("child_stopped_source", &listener.address().to_string());
    let side = LoneDestination::start(&stopped_setup(), Endpoint::Listen(listener));
    side.wait_to_run();
    let dump = || side.dump();
    let touch = |page| {
        let new = Arc::clone(&side.new);
        Toucher::start(move || new.word(page, 0).load(Ordering::Relaxed))
    };
    touch(3).finish("a page", dump);
    stop(&role);
    let waiting = touch(700);
    side.wait(&DestinationEvent::Disconnected);
    assert!(waiting.is_waiting(), "nobody can have brought it");
    signal(&role, Signal::SIGCONT);
    waiting.finish("a page after the stop", dump);
    let reading = Arc::clone(&side.new);
    Toucher::start(move || check(&reading)).finish("the guest reads", dump);
    side.wait(&DestinationEvent::Finished);
    assert!(side.destination.stats().recoveries >= 1);
    assert_eq!(role.hear("the source's end"), "finished");
    role.finish();
}

/// Plays a destination whose guest reads everything once the link has been away.
#[test]
fn child_stopped_destination() {
    let Some(address) = argument("child_stopped_destination") else { return };
    let endpoint = Endpoint::Connect(address.parse().expect("an address"));
    let side = LoneDestination::start(&stopped_setup(), endpoint);
    side.wait_to_run();
    say("runs");
    side.wait(&DestinationEvent::Disconnected);
    check(&side.new);
    side.wait(&DestinationEvent::Finished);
    assert!(side.destination.stats().recoveries >= 1, "{}", side.dump());
    say("finished");
}

#[test]
fn a_destination_that_was_stopped_for_a_while_goes_on() {
    prologue!("a_destination_that_was_stopped");
    let listener = common::session::listen();
    let role = Role::start("child_stopped_destination", &listener.address().to_string());
    let side = stopped_source(Endpoint::Listen(listener));
    assert_eq!(role.hear("the guest"), "runs");
    stop(&role);
    side.wait(&SourceEvent::Disconnected);
    signal(&role, Signal::SIGCONT);
    side.wait(&SourceEvent::Finished);
    assert!(side.source.stats().recoveries >= 1, "{}", side.dump());
    assert_eq!(role.hear("the destination's end"), "finished");
    role.finish();
}
