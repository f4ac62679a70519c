//! A guest of the demo that is taken back from the socket: it goes on at the source as if nothing
//! had happened, or it is too late.

use std::path::Path;
use std::process::Command;

use afterimage_tools::require;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::demo;
use crate::support::{Daemon, Manager, socket_argument};

/// The demo's exit status where the guest stayed.
const STAYED: i32 = 5;

/// A demo, and who drives its source.
struct Migration {
    demo: Daemon,
    source: Manager,
    destination: Manager,
    directory: TempDir,
}

impl Migration {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        println!("demo {arguments:?}");
        let demo = demo::start(directory.path(), arguments);
        let mut destination = demo::manager(directory.path(), "destination");
        let mut source = demo::manager(directory.path(), "source");
        destination.ok(json!({"do": "subscribe"}));
        // There is nothing to be taken back before.
        if source.ok(json!({"do": "subscribe"}))["phase"] == "preparing" {
            source.event("begun");
        }
        Self { demo, source, destination, directory }
    }

    fn wait_until_held(&mut self, before: &str) {
        while self.source.query()["hold"] != before {
            self.source.event("held");
        }
    }

    /// Takes the guest back, and says what the demo reports of it.
    fn cancel(mut self) -> Value {
        self.source.ok(json!({"do": "cancel"}));
        assert_eq!(self.source.event("reclaimed")["phase"], "reclaimed");
        self.stayed()
    }

    /// The end of a guest that was taken back.
    fn stayed(mut self) -> Value {
        assert_eq!(self.source.event("closing")["outcome"], "reclaimed");
        let closing = self.destination.event("closing");
        assert_eq!(closing["outcome"], "not_here");
        let (status, text) = self.demo.end();
        assert_eq!(status, STAYED, "{text}");
        let report: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["outcome"], "stayed", "{report}");
        assert_eq!(report["verified"], true, "{report}");
        let rounds = |when: &str| report[format!("guest_rounds_{when}")].as_u64().unwrap();
        assert!(rounds("after") > rounds("before"), "it did not go on: {report}");
        let left = std::fs::read_dir(self.directory.path()).unwrap().count();
        assert_eq!(left, 0, "the sockets go with their processes");
        report
    }
}

#[test]
fn a_guest_that_is_held_before_the_switchover_was_never_stopped() {
    let mut migration = Migration::start(&["--hold"]);
    migration.wait_until_held("before_switchover");
    let report = migration.cancel();
    assert_eq!(report["blackout_us"], Value::Null, "{report}");
    assert_eq!(report["passes"], json!([]), "{report}");
}

#[test]
fn passes_under_way_end_with_every_tracker() {
    let mut trackers = vec![("threads", "pagemap"), ("threads", "bitmap")];
    if require::kvm() && require::userfaultfd() {
        trackers.extend([("kvm", "log"), ("kvm", "ring"), ("kvm", "pagemap")]);
    }
    for (guest, tracker) in trackers {
        // The first pass would take half a minute.
        let mut migration = Migration::start(&[
            "--guest",
            guest,
            "--passes",
            "auto",
            "--dirty-tracker",
            tracker,
            "--precopy-bandwidth",
            "2M",
        ]);
        while migration.source.query()["phase"] != "attached" {
            migration.source.event("attached");
        }
        // Not only begun: something has arrived.
        while migration.destination.query()["counts"]["bytes_received"] == json!(0) {
            std::thread::yield_now();
        }
        let report = migration.cancel();
        assert_eq!(report["blackout_us"], Value::Null, "{report}");
        assert_eq!(report["dirty_tracker"], tracker, "{report}");
    }
}

#[test]
fn a_page_client_whose_guest_stays_has_not_failed() {
    if !require::userfaultfd() {
        return;
    }
    let mut migration = Migration::start(&[
        "--backing",
        "memfd",
        "--kill",
        "page-client",
        "--passes",
        "auto",
        "--precopy-bandwidth",
        "2M",
    ]);
    let mut client = demo::manager(migration.directory.path(), "page-client");
    while migration.source.query()["phase"] != "attached" {
        migration.source.event("attached");
    }
    while client.query()["counts"]["bytes_received"] == json!(0) {
        std::thread::yield_now();
    }
    client.ok(json!({"do": "subscribe"}));
    let report = migration.cancel();
    assert_eq!(client.event("closing")["outcome"], "not_here");
    assert_eq!(report["blackout_us"], Value::Null, "{report}");
}

#[test]
fn a_guest_that_is_held_after_the_stop_runs_again_at_the_source() {
    let kvm = require::kvm() && require::userfaultfd();
    for guest in ["threads", "kvm"].into_iter().filter(|it| *it == "threads" || kvm) {
        let hold = "before-switchover,before-run";
        let mut migration = Migration::start(&["--guest", guest, "--hold", hold, "--passes", "1"]);
        migration.wait_until_held("before_switchover");
        migration.source.ok(json!({"do": "switchover"}));
        migration.wait_until_held("before_run");
        let at_destination = migration.destination.query();
        assert_eq!(at_destination["phase"], "restoring", "{at_destination}");
        let report = migration.cancel();
        assert_ne!(report["blackout_us"], Value::Null, "{report}");
        assert_eq!(report["passes"].as_array().unwrap().len(), 1, "{report}");
    }
}

#[test]
fn a_destination_that_cannot_be_told_ends_all_the_same() {
    let mut migration = Migration::start(&["--hold"]);
    migration.wait_until_held("before_switchover");
    migration.source.ok(json!({"do": "pause"}));
    migration.source.event("paused");
    migration.cancel();
}

#[test]
fn past_the_point_of_no_return_it_is_refused_and_the_guest_moves_on() {
    let mut migration = Migration::start(&["--hold", "--bandwidth", "1M"]);
    migration.wait_until_held("before_switchover");
    migration.source.ok(json!({"do": "switchover"}));
    migration.source.event("running");
    let (code, why) = migration.source.refused(json!({"do": "cancel"}));
    assert!(code == "not_now" && why.contains("point of no return"), "{code}: {why}");
    let (code, why) = migration.source.refused(json!({"do": "fence"}));
    assert!(code == "not_now" && why.contains("use cancel"), "{code}: {why}");
    migration.source.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    assert_eq!(migration.source.event("closing")["outcome"], "finished");
    let (status, text) = migration.demo.end();
    assert_eq!(status, 0, "{text}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["outcome"], &report["verified"]), (&json!("moved"), &json!(true)));
}

/// Whoever cancels at any moment gets one of two answers, and the guest is where it says.
#[test]
fn at_any_moment_the_guest_is_on_one_side() {
    let seed = std::env::var("AFTERIMAGE_SEED").ok().and_then(|seed| seed.parse().ok());
    let mut random = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    println!("AFTERIMAGE_SEED={random}");
    let (mut stayed, mut moved) = (0, 0);
    for run in 0..12 {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let passes = ["0", "1"][run % 2];
        let mut migration = Migration::start(&["--hold", "--passes", passes, "--memory", "32M"]);
        // Most of them near the moments that matter.
        let near = [None, Some("stopped"), Some("ready"), Some("given")];
        if let Some(near) = near[(random & 3) as usize] {
            migration.wait_until_held("before_switchover");
            migration.source.ok(json!({"do": "switchover"}));
            migration.source.event(near);
        }
        for _ in 0..(random >> 8) % 20 {
            // It may be over by then.
            if migration.source.try_ask(json!({"do": "query"})).is_none() {
                break;
            }
        }
        let answer = migration.source.try_ask(json!({"do": "cancel"}));
        let is_taken_up = answer.is_some_and(|answer| answer.get("ok").is_some());
        let end = migration.source.first_of(&["reclaimed", "reclaim_denied", "finished"]);
        println!("run {run}: taken up: {is_taken_up}, {end}");
        assert_eq!(is_taken_up, end != "finished", "what is taken up gets an answer");
        if end == "reclaimed" {
            migration.stayed();
            stayed += 1;
        } else {
            let (status, text) = migration.demo.end();
            assert_eq!(status, 0, "{text}");
            moved += 1;
        }
    }
    println!("{stayed} stayed, {moved} moved");
}

#[test]
fn wrong_memory_at_the_source_is_found() {
    let mut migration = Migration::start(&["--hold", "--corrupt-one-byte"]);
    migration.wait_until_held("before_switchover");
    migration.source.ok(json!({"do": "cancel"}));
    let (status, text) = migration.demo.end();
    assert_eq!(status, 1, "{text}");
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["outcome"], &report["verified"]), (&json!("stayed"), &json!(false)));
}

#[test]
fn an_operator_cancels_by_a_command() {
    let mut migration = Migration::start(&["--hold"]);
    migration.wait_until_held("before_switchover");
    let ctl = |path: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage-ctl"));
        command.arg("--socket").arg(socket_argument(path)).arg("cancel");
        command.output().unwrap()
    };
    let output = ctl(&migration.directory.path().join("source.sock"));
    assert!(output.status.success(), "{output:?}");
    migration.stayed();
}
