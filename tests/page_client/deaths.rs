//! page-client is killed, and what it leaves behind is enough.

use std::path::Path;
use std::thread;

use afterimage::{DestinationStateFile, SourceEvent, StateSection};
use afterimage_tools::attachment::{Attachment, AttachmentEvent};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::host::Host;
use crate::support::{Origin, Vcpu, Vmm, register};

fn state() -> Vec<StateSection> {
    vec![StateSection { name: "cpu".into(), version: 3, bytes: vec![5; 300_000] }]
}

fn goes_on_after_each_death(has_file: bool) {
    const PAGES: u64 = 4096;
    let origin = Origin::start(PAGES);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach(&host.attach_path(), "guest", PAGES, has_file);
    origin.source.switch_over(state()).unwrap();
    let event = vmm.until(|event| matches!(event, AttachmentEvent::State(_)));
    assert_eq!(event, AttachmentEvent::State(state()));
    vmm.attachment.ready();
    vmm.until(|event| *event == AttachmentEvent::Run);
    let vcpu = Vcpu::start(&vmm, 7);
    for death in 0..8 {
        // It dies in the middle of the guest's work: what was asked of it, the next answers.
        vcpu.may_go_on(1 + death * 9);
        vcpu.may_go_on(100);
        vcpu.has_gone_on();
        client.signal(Signal::SIGKILL);
        assert_eq!(client.end().0, -1);
        client = host.client();
        vcpu.has_gone_on();
    }
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    origin.until(&SourceEvent::Finished);
    let (status, report, said) = client.end();
    assert_eq!(status, 0, "{said:#?}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["outcome"], "finished", "{report}");
    assert_eq!(report["taken_over"], true, "{report}");
    assert_eq!(report["pages_complete"], PAGES, "{report}");
    vcpu.stop();
    vmm.check();
    vmm.memory.all_arrived();
    // Nothing is left to do, and it says so.
    let (status, _, said) = host.client().end();
    assert_eq!(status, 0, "{said:#?}");
    assert!(said.iter().any(|line| line.contains("nothing is left to do")), "{said:#?}");
}

#[test]
fn a_guest_in_a_file_goes_on_after_each_death() {
    goes_on_after_each_death(true);
}

#[test]
fn a_guest_in_private_memory_goes_on_after_each_death() {
    goes_on_after_each_death(false);
}

#[test]
fn a_guest_that_has_not_run_yet_is_not_lost() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach(&host.attach_path(), "guest", 64, true);
    // Before anything has come.
    client.signal(Signal::SIGKILL);
    client.end();
    client = host.client();
    client.line("taking over");
    origin.source.switch_over(state()).unwrap();
    vmm.until(|event| matches!(event, AttachmentEvent::State(_)));
    // With state that the VMM has not restored.
    client.signal(Signal::SIGKILL);
    client.end();
    client = host.client();
    client.line("taking over");
    vmm.attachment.ready();
    vmm.until(|event| *event == AttachmentEvent::Run);
    vmm.check();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    assert_eq!(client.end().0, 0);
    vmm.memory.all_arrived();
}

#[test]
fn the_keeper_may_die_and_page_client_after_it() {
    const PAGES: u64 = 1024;
    let origin = Origin::start(PAGES);
    let mut host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach(&host.attach_path(), "guest", PAGES, true);
    origin.source.switch_over(state()).unwrap();
    vmm.run();
    let vcpu = Vcpu::start(&vmm, 3);
    vcpu.may_go_on(100);
    vcpu.has_gone_on();
    host.restart_keeper();
    client.line("the keeper holds the guest again");
    vcpu.may_go_on(100);
    client.signal(Signal::SIGKILL);
    client.end();
    client = host.client();
    vcpu.has_gone_on();
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    assert_eq!(client.end().0, 0);
    vcpu.stop();
    vmm.check();
    vmm.memory.all_arrived();
}

#[test]
fn a_guest_is_only_continued_with_its_own_record() {
    let origin = Origin::start(64);
    let mut host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    let vmm = Vmm::attach(&host.attach_path(), "guest", 64, true);
    origin.source.switch_over(state()).unwrap();
    vmm.run();
    client.signal(Signal::SIGKILL);
    client.end();

    // Another guest of the same size, with a record of its own.
    let other = Host::with_keeper(&origin.address);
    let others = other.open_client();
    let another = Vmm::attach(&other.attach_path(), "other", 64, true);
    others.signal(Signal::SIGKILL);
    others.end();
    let right = host.path("state");
    for wrong in [other.path("state"), host.path("nothing")] {
        host.set("--state", &wrong);
        let (status, _, said) = host.client().end();
        assert_eq!(status, 1, "{said:#?}");
        let is_told = said.iter().any(|line| line.contains("state file of th"));
        assert!(is_told, "{said:#?}");
    }
    host.set("--state", &right);
    client = host.client();
    origin.hurry();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    assert_eq!(client.end().0, 0);
    vmm.check();
    vmm.memory.all_arrived();
    drop(another);
}

/// A process that dies between storing a guest and recording it leaves a record of memory that is
/// gone; in memory that nobody has begun to serve, no guest has run.
#[test]
fn a_guest_that_was_stored_and_not_recorded_is_begun() {
    for has_record in [false, true] {
        let origin = Origin::start(64);
        let mut host = Host::with_keeper(&origin.address);
        let (map, memory) = register(64, true);
        if has_record {
            let state = host.path("state");
            DestinationStateFile::open_or_create(Path::new(&state), memory.layout()).unwrap();
        }
        // Who writes a record writes this first, and waits here for a reader.
        let new = host.path("state.new");
        mkfifo(new.as_str(), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let client = host.open_client();
        let path = host.attach_path();
        thread::scope(|scope| {
            let attaching = scope.spawn(|| Attachment::attach(&path, "guest", &memory));
            host.keeper().line("vm7 is stored");
            client.signal(Signal::SIGKILL);
            client.end();
            assert!(attaching.join().unwrap().is_err(), "it is taken before it is recorded");
        });
        // The next cannot record it, and ends.
        std::fs::remove_file(&new).unwrap();
        std::fs::create_dir(&new).unwrap();
        let (status, _, said) = host.client().end();
        assert_eq!(status, 1, "{said:#?}");
        std::fs::remove_dir(&new).unwrap();

        let mut client = host.client();
        client.line("taking over");
        let attachment = Attachment::attach(&path, "guest", &memory).unwrap();
        let vmm = Vmm { map, memory, attachment, pages: 64 };
        origin.source.switch_over(state()).unwrap();
        vmm.run();
        vmm.check();
        vmm.until(|event| *event == AttachmentEvent::Finished);
        assert_eq!(client.end().0, 0);
        vmm.memory.all_arrived();
    }
}

#[test]
fn a_keeper_that_was_started_again_before_a_vmm_came_holds_its_guest() {
    let origin = Origin::start(64);
    let mut host = Host::with_keeper(&origin.address);
    let mut client = host.open_client();
    // As one that has hung up on a client that was silent for too long.
    host.restart_keeper();
    let vmm = Vmm::attach(&host.attach_path(), "guest", 64, true);
    client.signal(Signal::SIGKILL);
    client.end();
    client = host.client();
    client.line("taking over");
    origin.source.switch_over(state()).unwrap();
    vmm.run();
    vmm.check();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    assert_eq!(client.end().0, 0);
    vmm.memory.all_arrived();
}
