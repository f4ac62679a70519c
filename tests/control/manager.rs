//! A manager that drives a whole migration, and moves a lock that both VMMs need.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo;
use crate::support::{Daemon, LIMIT, Manager, socket_argument};

#[test]
fn a_lock_moves_while_nobody_runs_and_at_most_one_vmm_ever_does() {
    let mut migration = Migration::start();
    let lock = Lock::taken_for_the_source(&migration.directory.path().join("disk.lock"));
    let watch = Watch::start(migration.directory.path(), Arc::clone(&lock.has_moved));
    migration.wait_until_held();
    watch.until(Runs::AtTheSource);

    migration.switch_over();
    watch.until(Runs::Nowhere);
    let held = Instant::now();
    lock.move_to_the_destination();
    // What the guest has done is in the report. What it would do now would be seen as requests:
    // it needs pages, and nothing else brings any.
    let state = migration.destination.query();
    assert_eq!(
        (&state["phase"], &state["counts"]["pages_requested"]),
        (&json!("restoring"), &json!(0))
    );
    assert_ne!(state["counts"]["pages_missing"], 0, "{state}");
    let held = held.elapsed();

    migration.source.ok(json!({"do": "continue"}));
    migration.wait_until_it_runs();
    watch.until(Runs::AtTheDestination);
    watch.end();
    let report = migration.finish();
    let number = |name: &str| report[name].as_u64().unwrap();
    assert!(Duration::from_micros(number("blackout_us")) >= held, "{report}");
    assert!(number("guest_rounds_after") > number("guest_rounds_before"), "{report}");
    assert_eq!(report["passes"].as_array().unwrap().len(), 1, "{report}");
    assert!(matches!(lock.source.try_lock(), Err(TryLockError::WouldBlock)));
}

#[test]
fn a_new_manager_reads_the_whole_state_after_the_death_of_the_old_one() {
    let mut migration = Migration::start();
    migration.wait_until_held();
    let mut watcher = ctl(migration.directory.path(), &["--json", "watch"]);
    watcher.first_output();
    migration.switch_over();
    let before = [migration.source.query(), migration.destination.query()];

    // In the midst of a request, and by SIGKILL.
    migration.source.write(br#"{"id":99,"do":"conti"#);
    let Migration { demo, source, destination, directory } = migration;
    drop((source, destination));
    drop(watcher);

    let (mut source, mut destination) = both(directory.path());
    let after = [subscribe(&mut source), subscribe(&mut destination)];
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(lasting(before), lasting(after));
        let counts = |state: &Value| {
            let names = state["counts"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            (names, state["counts"]["pages_total"].clone())
        };
        assert_eq!(counts(before), counts(after));
        assert_ne!(after["counts"]["pages_missing"], 0, "{after}");
    }
    let [at_source, at_destination] = &after;
    assert_eq!((&at_source["phase"], &at_source["hold"]), (&json!("ready"), &json!("before_run")));
    assert_eq!(at_source["parameters"]["bandwidth"], "on-request");
    assert_eq!(at_destination["phase"], "restoring");

    let mut migration = Migration { demo, source, destination, directory };
    migration.source.ok(json!({"do": "continue"}));
    migration.wait_until_it_runs();
    migration.finish();
}

/// A demo that is held twice, and its manager.
struct Migration {
    demo: Daemon,
    source: Manager,
    destination: Manager,
    directory: TempDir,
}

impl Migration {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let arguments = ["--hold", "before-switchover,before-run", "--passes", "1"];
        let demo = demo::start(directory.path(), &arguments);
        let (source, destination) = both(directory.path());
        Self { demo, source, destination, directory }
    }

    /// Waits until the guest is held at the source, and lets nothing follow it that it does not
    /// ask for: so the source stays.
    fn wait_until_held(&mut self) {
        subscribe(&mut self.destination);
        if subscribe(&mut self.source)["hold"].is_null() {
            assert_eq!(self.source.event("held")["hold"], "before_switchover");
        }
        assert_eq!(self.source.query()["phase"], "attached");
        self.source.ok(json!({"do": "set", "bandwidth": "on-request"}));
    }

    /// Stops the guest, and waits until nothing but its manager keeps it from running.
    fn switch_over(&mut self) {
        self.source.ok(json!({"do": "switchover"}));
        assert_eq!(self.source.event("stopped")["phase"], "stopped");
        let held = self.source.event("held");
        assert_eq!((&held["hold"], &held["phase"]), (&json!("before_run"), &json!("ready")));
        let state = self.source.query();
        assert_eq!((&state["hold"], &state["phase"]), (&json!("before_run"), &json!("ready")));
        // It has told its manager before it told its source that it is ready.
        assert_eq!(self.destination.event("state")["phase"], "restoring");
    }

    /// Waits until the guest runs at the destination, and not before it was given.
    fn wait_until_it_runs(&mut self) {
        assert_eq!(self.destination.event("run")["phase"], "running");
        let given = self.source.event("given");
        let running = self.source.event("running");
        assert!(given["sequence"].as_u64() < running["sequence"].as_u64(), "{given} {running}");
        assert_eq!(self.source.query()["hold"], json!(null));
    }

    /// Lets the rest follow, and reads the report of a guest that was verified.
    fn finish(mut self) -> Value {
        self.source.ok(json!({"do": "set", "bandwidth": "unlimited"}));
        for side in [&mut self.source, &mut self.destination] {
            assert_eq!(side.event("closing")["outcome"], "finished");
        }
        let (status, text) = self.demo.end();
        assert_eq!(status, 0, "{text}");
        let report: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["verified"], true, "{report}");
        report
    }
}

fn both(directory: &Path) -> (Manager, Manager) {
    (demo::manager(directory, "source"), demo::manager(directory, "destination"))
}

fn subscribe(manager: &mut Manager) -> Value {
    manager.ok(json!({"do": "subscribe"}))
}

/// A manager that is a process, at the source.
fn ctl(directory: &Path, arguments: &[&str]) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage-ctl"));
    command.arg("--socket").arg(socket_argument(&directory.join("source.sock"))).args(arguments);
    Daemon::spawn(command)
}

/// A state without the time, and without counts: acknowledgements may still come.
fn lasting(state: &Value) -> Value {
    let mut state = state.clone();
    for name in ["at_us", "unix_us", "counts"] {
        assert!(state.as_object_mut().unwrap().remove(name).is_some(), "no {name}");
    }
    state
}

/// A lock that whoever runs the guest must have: an open file description for each VMM.
struct Lock {
    source: File,
    destination: File,
    has_moved: Arc<AtomicBool>,
}

impl Lock {
    fn taken_for_the_source(path: &Path) -> Self {
        let source = File::create(path).unwrap();
        let destination = File::open(path).unwrap();
        source.try_lock().unwrap();
        assert!(matches!(destination.try_lock(), Err(TryLockError::WouldBlock)));
        Self { source, destination, has_moved: Arc::default() }
    }

    fn move_to_the_destination(&self) {
        self.source.unlock().unwrap();
        self.has_moved.store(true, Ordering::SeqCst);
        self.destination.try_lock().unwrap();
        assert!(matches!(self.source.try_lock(), Err(TryLockError::WouldBlock)));
    }
}

/// Where the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runs {
    AtTheSource,
    Nowhere,
    AtTheDestination,
}

/// Somebody who asks both sides all the time.
struct Watch {
    seen: Receiver<Runs>,
    thread: JoinHandle<()>,
}

impl Watch {
    fn start(directory: &Path, lock_has_moved: Arc<AtomicBool>) -> Self {
        let (mut source, mut destination) = both(directory);
        let (sender, seen) = channel();
        let thread = thread::spawn(move || {
            while sender.send(look(&mut source, &mut destination, &lock_has_moved)).is_ok() {}
        });
        Self { seen, thread }
    }

    /// Waits until it has seen that.
    fn until(&self, wanted: Runs) {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let seen = self.seen.recv_timeout(left).expect("a look, before long");
            if seen == wanted {
                return;
            }
        }
    }

    /// Ends it; fails if it has seen what must not be.
    fn end(self) {
        drop(self.seen);
        self.thread.join().expect("at most one side ran");
    }
}

/// Asks both sides where the guest runs. The source is asked last: it runs no guest any more
/// by the time that the destination runs it, and the answers may be of different moments.
fn look(source: &mut Manager, destination: &mut Manager, lock_has_moved: &AtomicBool) -> Runs {
    let moved_before = lock_has_moved.load(Ordering::SeqCst);
    let there = destination.query()["phase"].take();
    let moved_since = lock_has_moved.load(Ordering::SeqCst);
    let here = source.query()["phase"].take();
    let runs_elsewhere = ["running", "all_arrived", "finished"].iter().any(|it| there == *it);
    let runs_here = ["preparing", "connecting", "attached"].iter().any(|it| here == *it);
    assert!(!(runs_here && runs_elsewhere), "{here} at the source, {there} at the destination");
    assert!(!(runs_here && moved_before), "{here} at the source, without the lock");
    assert!(!runs_elsewhere || moved_since, "{there} at the destination, without the lock");
    match (runs_here, runs_elsewhere) {
        (true, _) => Runs::AtTheSource,
        (false, false) => Runs::Nowhere,
        (false, true) => Runs::AtTheDestination,
    }
}
