//! A guest that one process holds and another restores and starts.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use afterimage::{SourceEvent, StateSection};
use afterimage_tools::attachment::{AttachError, AttachmentEvent, Driver};
use nix::sys::signal::Signal;

use crate::host::Host;
use crate::support::{LIMIT, Origin, Vcpu, Vmm};
use crate::words::Words;

const PAGES: u64 = 512;

fn state() -> Vec<StateSection> {
    vec![StateSection { name: "qemu".into(), version: 1, bytes: vec![9; 100_000] }]
}

/// The next event but the coming and going of page-client.
fn next(driver: &Driver) -> AttachmentEvent {
    let until = Instant::now() + LIMIT;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match driver.next(left).expect("an event") {
            AttachmentEvent::Lost | AttachmentEvent::Back => {}
            event => return event,
        }
    }
}

fn expect(driver: &Driver, expected: &[AttachmentEvent]) {
    for event in expected {
        assert_eq!(next(driver), *event);
    }
}

/// The guest runs, and its process learns that, and no more.
fn runs_to_the_end(origin: &Origin, vmm: Vmm) {
    let event = vmm.until(|event| !matches!(event, AttachmentEvent::Lost | AttachmentEvent::Back));
    assert_eq!(event, AttachmentEvent::Run);
    let vcpu = Vcpu::start(&vmm, 5);
    vcpu.may_go_on(200);
    vcpu.has_gone_on();
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    vcpu.stop();
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn a_driver_may_come_before_the_memory() {
    let origin = Origin::start(PAGES);
    let host = Host::alone(&origin.address);
    let mut client = host.open_client();
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    client.line("a driver waits for the memory");
    let vmm = Vmm::attach_driven(&host.attach_path(), PAGES);
    expect(&driver, &[AttachmentEvent::Attached]);
    origin.source.switch_over(state()).unwrap();
    expect(&driver, &[AttachmentEvent::State(state())]);
    driver.ready();
    expect(&driver, &[AttachmentEvent::Run]);
    driver.started();
    runs_to_the_end(&origin, vmm);
    expect(&driver, &[AttachmentEvent::AllArrived, AttachmentEvent::Finished]);
    assert_eq!(client.end().0, 0);
}

#[test]
fn the_source_is_connected_to_when_a_driver_is_there_and_another_may_go_on() {
    let origin = Origin::start(PAGES);
    let host = Host::alone(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach_driven(&host.attach_path(), PAGES);
    origin.source.switch_over(state()).unwrap();
    // A source may stop its guest once it is attached to.
    client.line("waiting for the process that drives");
    let first = Driver::connect(&host.attach_path(), "guest").unwrap();
    expect(&first, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    // Lines come in order: it was not attached before.
    client.line("a source is attached");
    drop(first);
    // Out of turn: the one that has the memory does not say when it is restored.
    vmm.attachment.ready();
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    expect(&driver, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    assert_eq!(driver.next(std::time::Duration::ZERO), None);
    driver.ready();
    expect(&driver, &[AttachmentEvent::Run]);
    // It has done its part.
    driver.started();
    drop(driver);
    runs_to_the_end(&origin, vmm);
    assert_eq!(client.end().0, 0);
}

/// A driver that hears the state, says that it is ready if it is told to, and waits to be killed.
#[test]
fn role_driver() {
    let Some(path) = std::env::var_os("AFTERIMAGE_TEST_DRIVES") else { return };
    let driver = Driver::connect(Path::new(&path), "guest").unwrap();
    expect(&driver, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    if std::env::var_os("AFTERIMAGE_TEST_READY").is_some() {
        driver.ready();
        expect(&driver, &[AttachmentEvent::Run]);
    }
    println!("heard");
    loop {
        thread::park();
    }
}

fn start_driver(path: &Path, is_ready: bool) -> Child {
    let mut driver = Command::new(std::env::current_exe().unwrap());
    driver.args(["--exact", "driven::role_driver", "--nocapture"]);
    driver.env("AFTERIMAGE_TEST_DRIVES", path).stdout(Stdio::piped());
    if is_ready {
        driver.env("AFTERIMAGE_TEST_READY", "1");
    }
    let mut driver = driver.spawn().unwrap();
    let lines = std::io::BufReader::new(driver.stdout.take().unwrap());
    let mut lines = std::io::BufRead::lines(lines).map_while(Result::ok);
    assert!(lines.any(|line| line.contains("heard")), "the driver hears what it should");
    driver
}

#[test]
fn a_driver_may_die_at_each_step_and_another_goes_on() {
    let origin = Origin::start(PAGES);
    let host = Host::alone(&origin.address);
    let client = host.open_client();
    let vmm = Vmm::attach_driven(&host.attach_path(), PAGES);
    origin.source.switch_over(state()).unwrap();
    for is_ready in [false, false, true] {
        let mut driver = start_driver(&host.attach_path(), is_ready);
        driver.kill().unwrap();
        driver.wait().unwrap();
    }
    // Whether the one before has started the guest, nobody but this one can see; and whether it
    // was to, the state may say.
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    expect(&driver, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    expect(&driver, &[AttachmentEvent::Run]);
    driver.started();
    runs_to_the_end(&origin, vmm);
    expect(&driver, &[AttachmentEvent::AllArrived, AttachmentEvent::Finished]);
    assert_eq!(client.end().0, 0);
}

#[test]
fn page_client_may_die_at_each_step_and_the_driver_notices_nothing() {
    let origin = Origin::start(PAGES);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let dies = |client: &mut crate::support::Daemon| {
        client.signal(Signal::SIGKILL);
        client.child.wait().unwrap();
        *client = host.client();
        client.line("taking over");
    };
    let vmm = Vmm::attach_driven(&host.attach_path(), PAGES);
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    expect(&driver, &[AttachmentEvent::Attached]);
    dies(&mut client);
    origin.source.switch_over(state()).unwrap();
    expect(&driver, &[AttachmentEvent::State(state())]);
    dies(&mut client);
    client.line("the device state has arrived");
    driver.ready();
    expect(&driver, &[AttachmentEvent::Run]);
    dies(&mut client);
    // Said to whoever is there, and to each that comes.
    driver.started();
    dies(&mut client);
    runs_to_the_end(&origin, vmm);
    expect(&driver, &[AttachmentEvent::AllArrived, AttachmentEvent::Finished]);
    origin.until(&SourceEvent::Finished);
    assert_eq!(client.end().0, 0);
    assert_eq!(host.kept(), 0);
}

#[test]
fn a_guest_that_nobody_has_started_is_waited_for_after_the_end() {
    let origin = Origin::start(PAGES);
    origin.hurry();
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach_driven(&host.attach_path(), PAGES);
    let mut driver = Words::drive(&host.attach_path(), "guest");
    origin.source.switch_over(Vec::new()).unwrap();
    driver.expect(&["attached", "state"]);
    // It goes before it can hear that the guest may run.
    client.signal(Signal::SIGSTOP);
    while !client.is_stopped() {
        thread::yield_now();
    }
    driver.say(&serde_json::json!({"say": "ready"}));
    drop(driver);
    client.signal(Signal::SIGCONT);
    client.line("the session is over");
    vmm.until(|event| *event == AttachmentEvent::Finished);
    // It ends only because it is told to.
    client.signal(Signal::SIGTERM);
    let (status, _, said) = client.end();
    assert_eq!(status, 4, "{said:#?}");
    let mut client = host.client();
    client.line("waiting for");
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    let last = [AttachmentEvent::AllArrived, AttachmentEvent::Finished];
    expect(&driver, &[AttachmentEvent::Attached, AttachmentEvent::Run]);
    expect(&driver, &last);
    driver.started();
    let mut vmm_again = Words::back(&host.attach_path());
    vmm_again.expect(&["attached", "run", "all_arrived", "finished"]);
    assert_eq!(client.end().0, 0);
    assert_eq!(host.kept(), 0);
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn a_driver_that_dies_before_it_has_started_the_guest_is_waited_for_though_all_is_there() {
    let origin = Origin::start(PAGES);
    let host = Host::alone(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach_driven(&host.attach_path(), PAGES);
    origin.source.switch_over(state()).unwrap();
    let mut driver = start_driver(&host.attach_path(), true);
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::AllArrived);
    origin.until(&SourceEvent::Finished);
    driver.kill().unwrap();
    driver.wait().unwrap();
    client.line("waiting for the process that drives");
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    expect(&driver, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    expect(&driver, &[AttachmentEvent::Run, AttachmentEvent::AllArrived]);
    expect(&driver, &[AttachmentEvent::Finished]);
    driver.started();
    assert_eq!(client.end().0, 0);
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn the_newest_driver_drives_and_the_one_before_is_told() {
    let origin = Origin::start(16);
    let host = Host::alone(&origin.address);
    let mut client = host.open_client();
    let waiting = Driver::connect(&host.attach_path(), "guest").unwrap();
    client.line("a driver waits for the memory");
    let mut second = Words::drive(&host.attach_path(), "guest");
    let reason = "another process drives this guest now".to_owned();
    expect(&waiting, &[AttachmentEvent::Refused(reason.clone())]);
    let vmm = Vmm::attach_driven(&host.attach_path(), 16);
    second.expect(&["attached"]);
    let third = Driver::connect(&host.attach_path(), "guest").unwrap();
    second.expect(&["refused"]);
    assert!(second.hear().is_none(), "it is not hung up on");
    origin.source.switch_over(state()).unwrap();
    expect(&third, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    third.ready();
    expect(&third, &[AttachmentEvent::Run]);
    third.started();
    runs_to_the_end(&origin, vmm);
    assert_eq!(client.end().0, 0);
}

#[test]
fn who_would_drive_another_guest_or_one_that_drives_itself_is_refused() {
    let origin = Origin::start(16);
    let host = Host::alone(&origin.address);
    let client = host.open_client();
    let path = host.attach_path();
    let early = Driver::connect(&path, "other").unwrap();
    let refused = |driver: &Driver, expected: &str| {
        let event = next(driver);
        let AttachmentEvent::Refused(reason) = &event else { panic!("{event:?}") };
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(driver.next(LIMIT), None, "nothing follows");
    };
    let vmm = Vmm::attach(&path, "guest", 16, true);
    refused(&early, r#"serves the guest "guest", not "other""#);
    refused(&Driver::connect(&path, "other").unwrap(), "not \"other\"");
    refused(&Driver::connect(&path, "guest").unwrap(), "driven by its own VMM");
    origin.source.switch_over(state()).unwrap();
    vmm.run();
    runs_on(&origin, vmm);
    assert_eq!(client.end().0, 0);
    let error = Driver::connect(Path::new("/nowhere/at/all"), "guest").unwrap_err();
    assert!(matches!(error, AttachError::Connect { .. }), "{error}");
}

fn runs_on(origin: &Origin, vmm: Vmm) {
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn a_driver_that_gives_the_guest_up_lets_the_memory_go() {
    let origin = Origin::start(16);
    let host = Host::with_keeper(&origin.address);
    let client = host.open_client();
    let vmm = Vmm::attach_driven(&host.attach_path(), 16);
    let driver = Driver::connect(&host.attach_path(), "guest").unwrap();
    origin.source.switch_over(state()).unwrap();
    expect(&driver, &[AttachmentEvent::Attached, AttachmentEvent::State(state())]);
    driver.withdraw();
    vmm.until(|event| matches!(event, AttachmentEvent::NotHere(_)));
    let (status, report, said) = client.end();
    assert_eq!(status, 3, "{said:#?}");
    assert!(report.contains(r#""outcome":"withdrawn""#), "{report}");
    assert_eq!(host.kept(), 0);
    // The source has it back, and did not ask.
    origin.until(&SourceEvent::Refused);
    origin.until(&SourceEvent::Reclaimed);
}
