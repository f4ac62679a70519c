//! The end, which a VMM hears of whichever process says it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use afterimage::SourceEvent;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::host::Host;
use crate::support::{Origin, register};
use crate::words::Words;

/// A VMM hangs up when its guest could run, and page-client dies before it comes back.
#[test]
fn a_successor_after_the_end_says_that_the_guest_may_run() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let (_map, memory) = register(64, true);
    let mut vmm = Words::attach(&host.attach_path(), &memory);
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.expect(&["attached", "state"]);
    vmm.say(&json!({"say": "ready"}));
    drop(vmm);
    origin.until(&SourceEvent::Finished);
    client.line("the session is over");
    // It has recorded the end when it looks at the next signal.
    client.signal(Signal::SIGTERM);
    client.line("stopping");
    assert_eq!(client.end().0, 4);

    let mut client = host.client();
    client.line("waiting for the VMM");
    let mut vmm = Words::back(&host.attach_path());
    vmm.expect(&["attached", "run", "all_arrived", "finished"]);
    assert_eq!(client.end().0, 0);
    assert_eq!(host.kept(), 0);
    memory.all_arrived();
}

#[test]
fn a_successor_after_the_end_says_that_the_guest_does_not_run_here() {
    let origin = Origin::start(4096);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let (_map, memory) = register(4096, true);
    let mut vmm = Words::attach(&host.attach_path(), &memory);
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.expect(&["attached", "state"]);
    drop(vmm);
    origin.source.reclaim().unwrap();
    client.line("the guest does not run here");
    for expected in ["not stopping", "a second signal"] {
        client.signal(Signal::SIGTERM);
        client.line(expected);
    }
    assert_eq!(client.end().0, 4);

    let mut client = host.client();
    client.line("waiting for the VMM");
    let mut vmm = Words::back(&host.attach_path());
    vmm.expect(&["attached", "not_here"]);
    assert_eq!(client.end().0, 3);
    assert_eq!(host.kept(), 0);
}

#[test]
fn a_successor_after_the_end_waits_for_no_driver_of_a_guest_that_is_not_here() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let client = host.open_client();
    // The process that has the memory is away.
    let (_map, memory) = register(64, true);
    drop(Words::attach_driven(&host.attach_path(), &memory));
    let mut driver = Words::drive(&host.attach_path(), "guest");
    origin.source.switch_over(Vec::new()).unwrap();
    driver.expect(&["attached", "state"]);
    origin.source.reclaim().unwrap();
    driver.expect(&["not_here"]);
    client.signal(Signal::SIGKILL);
    client.end();

    let mut client = host.client();
    client.line("waiting for the VMM");
    let mut driver = Words::drive(&host.attach_path(), "guest");
    driver.expect(&["attached", "not_here"]);
    let mut vmm = Words::back(&host.attach_path());
    vmm.expect(&["attached", "not_here"]);
    let (status, _, said) = client.end();
    assert_eq!(status, 3, "{said:#?}");
    assert!(!said.iter().any(|line| line.contains("has not come back")), "{said:#?}");
    assert_eq!(host.kept(), 0);
}

/// A VMM that hangs up when its guest could run, and waits to be killed.
#[test]
fn role_vmm() {
    let Some(path) = std::env::var_os("AFTERIMAGE_TEST_ROLE") else { return };
    let (_map, memory) = register(64, true);
    let mut vmm = Words::attach(Path::new(&path), &memory);
    vmm.expect(&["attached", "state"]);
    vmm.say(&json!({"say": "ready"}));
    drop(vmm);
    loop {
        thread::park();
    }
}

#[test]
fn a_vmm_that_ends_after_the_session_makes_no_failure_of_it() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let mut vmm = Command::new(std::env::current_exe().unwrap());
    vmm.args(["--exact", "farewell::role_vmm"]).env("AFTERIMAGE_TEST_ROLE", host.attach_path());
    let mut vmm = vmm.stdout(Stdio::null()).spawn().unwrap();
    client.line("serving the guest");
    origin.source.switch_over(Vec::new()).unwrap();
    client.line("the session is over");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let (status, report, said) = client.end();
    assert_eq!(status, 0, "{said:#?}");
    assert!(report.contains(r#""outcome":"finished""#), "{report}");
    assert_eq!(host.kept(), 0);
}
