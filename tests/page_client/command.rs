//! The command by itself: what it says, and how it ends.

use afterimage::SourceEvent;
use afterimage_tools::attachment::{AttachError, Attachment, AttachmentEvent};
use nix::sys::signal::Signal;

use crate::host::Host;
use crate::support::{CLIENT, Daemon, Origin, Vcpu, Vmm, register};

#[test]
fn a_guest_is_served_without_a_keeper() {
    let origin = Origin::start(512);
    let host = Host::alone(&origin.address);
    let (client, path) = (host.open_client(), host.attach_path());
    let vmm = Vmm::attach(&path, "guest", 512, true);
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.run();
    let vcpu = Vcpu::start(&vmm, 1);
    vcpu.may_go_on(300);
    vcpu.has_gone_on();
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::AllArrived);
    vmm.until(|event| *event == AttachmentEvent::Finished);
    origin.until(&SourceEvent::Finished);
    vcpu.stop();
    vmm.check();
    let (status, report, said) = client.end();
    assert_eq!(status, 0, "{said:#?}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["schema_version"], 1);
    assert_eq!(report["taken_over"], false);
    let by = |field: &str| report[field].as_u64().unwrap();
    let ways = by("pages_requested") + by("pages_background") + by("pages_zero");
    assert_eq!(ways, 512, "{report}");
    vmm.memory.all_arrived();
}

#[test]
fn another_guest_is_turned_away() {
    let origin = Origin::start(16);
    let host = Host::alone(&origin.address);
    let (_client, path) = (host.open_client(), host.attach_path());
    let vmm = Vmm::attach(&path, "guest", 16, true);
    let (_map, other) = register(16, true);
    let error = Attachment::attach(&path, "other", &other).unwrap_err();
    assert!(matches!(&error, AttachError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("start another"), "{error}");
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.run();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn a_signal_before_any_guest_ends_it() {
    let client = Host::alone("unix:/nowhere").open_client();
    client.signal(Signal::SIGTERM);
    let (status, _, said) = client.end();
    assert_eq!(status, 3, "{said:#?}");
}

#[test]
fn a_guest_that_the_source_takes_back_does_not_run_here() {
    let origin = Origin::start(16);
    let host = Host::alone(&origin.address);
    let (client, path) = (host.open_client(), host.attach_path());
    let vmm = Vmm::attach(&path, "guest", 16, true);
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.until(|event| matches!(event, AttachmentEvent::State(_)));
    origin.source.reclaim().unwrap();
    origin.until(&SourceEvent::Reclaimed);
    vmm.until(|event| matches!(event, AttachmentEvent::NotHere(_)));
    let (status, _, said) = client.end();
    assert_eq!(status, 3, "{said:#?}");
}

#[test]
fn options_that_do_not_fit_are_refused_in_a_line() {
    for (arguments, expected) in [
        (&["--attach", "tcp:127.0.0.1:1", "--connect", "unix:/x"][..], "only travel over Unix"),
        (&["--attach", "unix:/nowhere/at/all", "--connect", "unix:/x"], "make its directory"),
        (&["--attach", "unix:/x", "--connect", "fd:3"], "cannot be connected to"),
    ] {
        let (status, _, said) = Daemon::start(CLIENT, arguments).end();
        assert!(status == 1 || status == 2, "{said:#?}");
        assert!(said.iter().any(|line| line.contains(expected)), "{said:#?}");
    }
}
