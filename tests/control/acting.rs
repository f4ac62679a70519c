//! What is asked for at the socket is done.

use afterimage::DestinationEvent;
use serde_json::json;

use crate::support::{LIMIT, PAGES, Server, Target};
use std::time::Instant;

#[test]
fn a_bandwidth_that_is_set_acts_at_once_and_is_told_to_all() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let (mut manager, mut other) = (server.begun(), server.begun());
    other.ok(json!({"do": "subscribe"}));
    let target = Target::connect(&server.address);
    target.until(|event| *event == DestinationEvent::Run);
    assert_eq!(manager.query()["parameters"]["bandwidth"], "on-request");
    assert_eq!(target.complete(), 0, "nobody has asked for a page");
    manager.ok(json!({"do": "set", "bandwidth": "1G"}));
    assert_eq!(other.event("parameters")["parameters"]["bandwidth"], "1073741824");
    assert_eq!(manager.query()["parameters"]["bandwidth"], "1073741824");
    target.finish();
    other.event("finished");
    assert_eq!(server.daemon.end().0, 0);
}

#[test]
fn a_pause_holds_the_migration_until_it_is_recovered() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut manager = server.begun();
    manager.ok(json!({"do": "subscribe"}));
    let target = Target::connect(&server.address);
    target.until(|event| *event == DestinationEvent::Run);
    manager.ok(json!({"do": "pause"}));
    assert_eq!(manager.event("paused")["link"], "paused");
    target.until(|event| *event == DestinationEvent::Disconnected);
    manager.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    // The destination tries again and again, and is refused.
    let mut looks = server.manager();
    looks.ok(json!({"do": "subscribe", "progress_ms": 50}));
    for _ in 0..20 {
        let told = looks.event("progress");
        let left = (&told["link"], &told["counts"]["pages_missing"]);
        assert_eq!(left, (&json!("paused"), &json!(PAGES)), "{told}");
    }
    // At another place, to which the destination is sent as well.
    let elsewhere = format!("unix:{}/elsewhere.sock", server.directory.path().display());
    manager.ok(json!({"do": "recover", "listen": elsewhere}));
    assert_eq!(manager.event("recovering")["link"], "down");
    target.recover(&elsewhere.parse().unwrap());
    assert_eq!(manager.event("attached")["link"], "up");
    target.finish();
    manager.event("finished");
    assert_eq!(server.daemon.end().0, 0);
}

#[test]
fn recovering_is_refused_where_it_makes_no_sense() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut manager = server.begun();
    manager.ok(json!({"do": "subscribe"}));
    let target = Target::connect(&server.address);
    target.until(|event| *event == DestinationEvent::Run);
    manager.event("running");
    let (code, message) = manager.refused(json!({"do": "recover"}));
    assert_eq!(code, "not_now", "{message}");
    for (request, code) in [
        (json!({"do": "recover", "connect": "tcp:192.0.2.1:1"}), "failed"),
        (json!({"do": "recover", "connect": "fd:0"}), "bad_request"),
        (json!({"do": "recover", "connect": "unix:/a", "listen": "unix:/b"}), "bad_request"),
        (json!({"do": "set"}), "bad_request"),
    ] {
        assert_eq!(manager.refused(request.clone()).0, code, "{request}");
    }
    assert_eq!(manager.query()["link"], "up");
}

#[test]
fn a_guest_that_was_not_given_away_can_be_taken_back() {
    let server = Server::start(&[]);
    let mut manager = server.begun();
    manager.ok(json!({"do": "subscribe"}));
    manager.ok(json!({"do": "cancel"}));
    assert_eq!(manager.event("reclaimed")["phase"], "reclaimed");
    assert_eq!(manager.event("closing")["outcome"], "stopped");
    assert_eq!(server.daemon.end().0, 3);
}

#[test]
fn a_destination_that_is_declared_dead_is_refused() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut manager = server.begun();
    manager.ok(json!({"do": "subscribe"}));
    let target = Target::connect(&server.address);
    target.until(|event| *event == DestinationEvent::Run);
    manager.event("running");
    let (code, _) = manager.refused(json!({"do": "cancel"}));
    assert_eq!(code, "not_now", "the destination runs the guest");
    manager.ok(json!({"do": "fence"}));
    manager.event("reclaimed");
    target.until(|event| *event == DestinationEvent::Fenced);
    assert_eq!(server.daemon.end().0, 3);
}

#[test]
fn capabilities_give_a_reason_for_what_a_role_cannot_do() {
    let server = Server::start(&[]);
    let mut manager = server.begun();
    let told = manager.ok(json!({"do": "capabilities"}));
    for verb in ["pause", "recover", "cancel", "fence", "set"] {
        assert_eq!(told["verbs"][verb], json!({"possible": true, "reason": null}), "{verb}");
    }
    for verb in ["start", "switchover", "continue"] {
        let reason = told["verbs"][verb]["reason"].as_str().unwrap().to_owned();
        let refused = manager.refused(json!({"do": verb}));
        assert_eq!(refused, ("not_now".to_owned(), reason), "{verb}");
    }
    let findings = told["machine"]["findings"].as_array().unwrap();
    assert!(findings.iter().all(|it| it["ok"] == true || it["meaning"] != ""), "{findings:#?}");
    assert!(!findings.is_empty());
}

#[test]
fn a_snapshot_tells_its_destinations_apart_and_can_be_slowed_down() {
    let server = Server::start(&["--snapshot", "--bandwidth", "on-request"]);
    let mut manager = server.begun();
    assert_eq!(manager.greeting["role"], "snapshot");
    manager.ok(json!({"do": "subscribe"}));
    let target = Target::connect(&server.address);
    let attached = manager.event("attached");
    assert_eq!(attached["phase"], "serving");
    assert_eq!(attached["destination"].as_str().unwrap().len(), 32, "{attached}");
    let (code, message) = manager.refused(json!({"do": "pause"}));
    assert!(code == "not_now" && message.contains("snapshot"), "{code}: {message}");
    manager.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    target.until(|event| matches!(event, DestinationEvent::Attached(_)));
    target.ready();
    target.finish();
    assert_eq!(manager.event("finished")["destination"], attached["destination"]);
    let until = Instant::now() + LIMIT;
    while manager.query()["counts"]["pages_missing"] != 0 {
        assert!(Instant::now() < until);
        std::thread::yield_now();
    }
    assert_eq!(manager.query()["counts"]["destinations"], 1);
}
