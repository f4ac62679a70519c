//! A guest that cannot run here goes back to its source, unless it is on record that it runs.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use afterimage::{SourceEvent, StateSection};
use afterimage_tools::attachment::AttachmentEvent;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::host::Host;
use crate::support::{Daemon, Origin, Vmm, register};
use crate::words::Words;

/// Where page-client has heard that the guest is its own, and has not recorded it.
const GIVEN: &str = "destination:Persist+Running";

fn state() -> Vec<StateSection> {
    vec![StateSection { name: "cpu".into(), version: 1, bytes: vec![4; 5000] }]
}

fn is_killed(client: Daemon) {
    let (status, _, said) = client.end();
    assert_eq!(status, -1, "it was not killed at the step: {said:#?}");
}

/// The source runs the guest again, and nobody asked it to.
fn has_it_back(origin: &Origin) {
    origin.until(&SourceEvent::Refused);
    origin.until(&SourceEvent::Reclaimed);
}

fn ends(host: &Host, client: Daemon, status: i32, outcome: &str) {
    let (found, report, said) = client.end();
    assert_eq!(found, status, "{said:#?}");
    assert!(report.contains(&format!(r#""outcome":"{outcome}""#)), "{report}");
    assert_eq!(host.kept(), 0);
}

/// A page-client that is killed when the guest was given to it; its driver has gone.
fn given(origin: &Origin, host: &Host) -> Vmm {
    let mut client = host.dying_client(GIVEN);
    client.line("a VMM can have its memory served");
    let vmm = Vmm::attach_driven(&host.attach_path(), 64);
    let mut driver = Words::drive(&host.attach_path(), "guest");
    origin.source.switch_over(state()).unwrap();
    driver.expect(&["attached", "state"]);
    driver.say(&json!({"say": "ready"}));
    is_killed(client);
    origin.until(&SourceEvent::Given);
    vmm
}

#[test]
fn a_driver_that_cannot_run_a_guest_that_was_given_gives_it_back() {
    let origin = Origin::start(64);
    let mut host = Host::with_keeper(&origin.address);
    let vmm = given(&origin, &host);
    let mut client = host.client();
    client.line("taking over");
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached"]);
    driver.say(&json!({"say": "withdrawn"}));
    has_it_back(&origin);
    vmm.until(|event| matches!(event, AttachmentEvent::NotHere(_)));
    ends(&host, client, 3, "withdrawn");
    drop(vmm);

    // Started again, it takes another guest, of another source.
    let another = Origin::start(64);
    another.hurry();
    host.set("--connect", &another.address);
    let client = host.open_client();
    let vmm = Vmm::attach(&host.attach_path(), "other", 64, true);
    another.source.switch_over(state()).unwrap();
    vmm.run();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    vmm.check();
    ends(&host, client, 0, "finished");
    vmm.memory.all_arrived();
}

#[test]
fn a_source_that_is_away_hears_of_it_later_also_from_a_successor() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let vmm = given(&origin, &host);
    origin.source.pause().unwrap();
    let mut client = host.client();
    client.line("taking over");
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached"]);
    driver.say(&json!({"say": "withdrawn"}));
    driver.expect(&["not_here"]);
    client.line("giving the guest back");
    client.signal(Signal::SIGTERM);
    client.line("not stopping yet");
    client.signal(Signal::SIGTERM);
    let (status, _, said) = client.end();
    assert_eq!(status, 4, "{said:#?}");
    assert_eq!(host.kept(), 1);
    origin.source.recover(None).unwrap();
    let mut client = host.client();
    client.line("taking over");
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached", "not_here"]);
    has_it_back(&origin);
    vmm.until(|event| matches!(event, AttachmentEvent::NotHere(_)));
    ends(&host, client, 3, "withdrawn");
}

/// A VMM that says that its guest could run, and waits to be killed.
#[test]
fn role_ready_vmm() {
    let Some(path) = std::env::var_os("AFTERIMAGE_TEST_READY_VMM") else { return };
    let (_map, memory) = register(64, true);
    let mut vmm = Words::attach(Path::new(&path), &memory);
    vmm.expect(&["attached", "state"]);
    if std::env::var_os("AFTERIMAGE_TEST_SAYS_READY").is_some() {
        vmm.say(&json!({"say": "ready"}));
    }
    println!("heard");
    loop {
        thread::park();
    }
}

fn start_vmm(path: &Path, says_ready: bool) -> Child {
    let mut vmm = Command::new(std::env::current_exe().unwrap());
    vmm.args(["--exact", "giving_back::role_ready_vmm", "--nocapture"]);
    vmm.env("AFTERIMAGE_TEST_READY_VMM", path).stdout(Stdio::piped());
    if says_ready {
        vmm.env("AFTERIMAGE_TEST_SAYS_READY", "1");
    }
    vmm.spawn().unwrap()
}

fn dies(mut vmm: Child) {
    vmm.kill().unwrap();
    vmm.wait().unwrap();
}

#[test]
fn the_guest_of_a_vmm_that_dies_before_it_has_run_goes_back() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let vmm = start_vmm(&host.attach_path(), false);
    client.line("serving the guest");
    origin.source.switch_over(state()).unwrap();
    client.line("the device state has arrived");
    dies(vmm);
    has_it_back(&origin);
    ends(&host, client, 5, "vmm_died");
}

#[test]
fn the_guest_of_a_vmm_that_dies_when_it_was_given_goes_back() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.dying_client(GIVEN);
    client.line("a VMM can have its memory served");
    let vmm = start_vmm(&host.attach_path(), true);
    client.line("serving the guest");
    origin.source.switch_over(state()).unwrap();
    is_killed(client);
    origin.until(&SourceEvent::Given);
    dies(vmm);
    let client = host.client();
    has_it_back(&origin);
    ends(&host, client, 5, "vmm_died");
}

#[test]
fn a_guest_that_is_on_record_to_run_here_is_not_given_back() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    // Recorded, and nobody has heard so.
    let mut client = host.dying_client("destination:Event(Run");
    client.line("a VMM can have its memory served");
    let vmm = Vmm::attach_driven(&host.attach_path(), 64);
    let mut driver = Words::drive(&host.attach_path(), "guest");
    origin.source.switch_over(state()).unwrap();
    driver.expect(&["attached", "state"]);
    driver.say(&json!({"say": "ready"}));
    is_killed(client);
    let mut client = host.client();
    client.line("taking over");
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached", "run"]);
    driver.say(&json!({"say": "withdrawn"}));
    // Ignored; another one sees to it.
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached", "run"]);
    driver.say(&json!({"say": "started"}));
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    ends(&host, client, 0, "finished");
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn whoever_withdraws_a_guest_and_hangs_up_is_not_waited_for() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let client = host.open_client();
    let (_map, memory) = register(64, true);
    let mut vmm = Words::attach(&host.attach_path(), &memory);
    origin.source.switch_over(state()).unwrap();
    vmm.expect(&["attached", "state"]);
    vmm.say(&json!({"say": "withdrawn"}));
    drop(vmm);
    has_it_back(&origin);
    let (status, _, said) = client.end();
    assert_eq!(status, 3, "{said:#?}");
    assert!(!said.iter().any(|line| line.contains("has not come back")), "{said:#?}");
    assert_eq!(host.kept(), 0);
}

#[test]
fn a_successor_does_not_wait_for_a_source_that_knew() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    // The process that has the memory is not there to hear of it.
    let (_map, memory) = register(64, true);
    drop(Words::attach_driven(&host.attach_path(), &memory));
    let mut driver = Words::drive(&host.attach_path(), "guest");
    origin.source.switch_over(state()).unwrap();
    driver.expect(&["attached", "state"]);
    driver.say(&json!({"say": "withdrawn"}));
    client.line("the source has the guest back");
    client.signal(Signal::SIGKILL);
    client.end();
    has_it_back(&origin);
    drop(origin);
    let mut client = host.client();
    client.line("the source has the guest back");
    let mut vmm = Words::back(&host.attach_path());
    vmm.expect(&["attached", "not_here"]);
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached", "not_here"]);
    ends(&host, client, 3, "withdrawn");
}
