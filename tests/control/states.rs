//! What is told, to whom, and in which order.

use serde_json::{Value, json};

use crate::support::{Manager, PAGES, Server, Target};

fn names(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["event"].as_str().unwrap()).collect()
}

fn until_closing(manager: &mut Manager) -> Vec<Value> {
    let mut events = Vec::new();
    loop {
        let event = manager.next_event().expect("closing is the last event");
        events.push(event);
        if events[events.len() - 1]["event"] == "closing" {
            return events;
        }
    }
}

#[test]
fn subscribers_hear_every_change_of_a_migration_in_order() {
    let server = Server::start(&[]);
    let (mut first, mut second) = (server.begun(), server.begun());
    let greeting = &first.greeting;
    assert_eq!(
        (&greeting["schema_version"], &greeting["tool"], &greeting["role"]),
        (&json!(1), &json!("page-server"), &json!("source")),
        "{greeting}"
    );
    assert_eq!(greeting["session"].as_str().unwrap().len(), 32, "{greeting}");
    let state = first.ok(json!({"do": "subscribe"}));
    assert_eq!((&state["phase"], &state["link"]), (&json!("connecting"), &json!("down")));
    assert_eq!(state["counts"]["pages_missing"], PAGES);
    assert_eq!(second.ok(json!({"do": "subscribe"}))["sequence"], state["sequence"]);

    let target = Target::connect(&server.address);
    target.finish();
    let told = until_closing(&mut first);
    let expected = ["attached", "ready", "given", "running", "finished", "closing"];
    assert_eq!(names(&told), expected, "{told:#?}");
    for (event, before) in told.iter().zip(state["sequence"].as_u64().unwrap()..) {
        assert_eq!(event["sequence"], before + 1, "{event}");
        assert_eq!(event["session"], state["session"], "{event}");
    }
    for pair in told.windows(2) {
        assert!(pair[0]["at_us"].as_u64() <= pair[1]["at_us"].as_u64(), "{pair:#?}");
    }
    assert_eq!(told[5]["outcome"], "finished");
    assert_eq!((&told[4]["phase"], &told[0]["link"]), (&json!("finished"), &json!("up")));
    assert_eq!(names(&until_closing(&mut second)), expected);
    assert!(first.read().is_none(), "the connection ends with the process");
    let socket = server.socket();
    let (status, report) = server.daemon.end();
    assert_eq!(status, 0, "{report}");
    assert!(!socket.exists(), "the socket goes with its process");
}

#[test]
fn the_state_at_a_subscription_and_the_events_after_it_leave_nothing_out() {
    // Subscribed at any moment of the migration, state and events together tell all of it.
    let server = Server::start(&["--bandwidth", "4M"]);
    let mut setter = server.begun();
    let target = Target::connect(&server.address);
    let mut managers: Vec<_> = (0..8).map(|_| server.manager()).collect();
    let states: Vec<_> = managers.iter_mut().map(|it| it.ok(json!({"do": "subscribe"}))).collect();
    setter.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    target.finish();
    let mut ends = Vec::new();
    for (manager, state) in managers.iter_mut().zip(states) {
        let mut next = state["sequence"].as_u64().unwrap();
        for event in until_closing(manager) {
            next += 1;
            assert_eq!(event["sequence"], next, "{event}");
        }
        ends.push(next);
    }
    ends.dedup();
    assert_eq!(ends.len(), 1, "all have heard of the same events: {ends:?}");
}

#[test]
fn progress_is_told_to_who_wants_it_and_counts_pages() {
    let server = Server::start(&["--bandwidth", "on-request"]);
    let mut manager = server.begun();
    let target = Target::connect(&server.address);
    manager.ok(json!({"do": "subscribe", "progress_ms": 50}));
    let before = manager.event("progress");
    assert_eq!(before["counts"]["pages_total"], PAGES);
    assert!(before["counts"]["pages_missing"].as_u64() > Some(0), "{before}");
    manager.ok(json!({"do": "set", "bandwidth": "unlimited"}));
    target.finish();
    let mut last = Value::Null;
    while let Some(event) = manager.next_event() {
        last = event;
    }
    assert_eq!(last["event"], "closing");
    let (code, message) =
        Server::start(&[]).begun().refused(json!({"do": "subscribe", "progress_ms": 1}));
    assert_eq!(code, "bad_request");
    assert!(message.contains("50 to 60000"), "{message}");
}

#[test]
fn every_line_of_the_log_names_the_session() {
    let server = Server::start_logging("info", &[]);
    let mut manager = server.begun();
    let session = manager.query()["session"].as_str().unwrap().to_owned();
    manager.ok(json!({"do": "capabilities"}));
    let mut daemon = server.daemon;
    daemon.line("asked at the control socket");
    Target::connect(&server.address).finish();
    daemon.line("the control connection ended");
    let logged: Vec<_> = daemon.seen.iter().filter(|line| line.contains(" INFO ")).collect();
    assert!(logged.len() > 1, "of threads here and of the engine: {logged:#?}");
    for line in logged {
        assert!(line.contains(&format!(" session={session} ")), "{line}");
    }
}
