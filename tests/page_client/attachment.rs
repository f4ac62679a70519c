//! An attachment that fails half way.

use std::os::unix::net::UnixListener;
use std::thread;

use afterimage_tools::attachment::{AttachError, Attachment, AttachmentEvent};
use serde_json::json;

use crate::host::Host;
use crate::support::{Origin, Vmm, register};
use crate::words::{Words, read_prefix};

#[test]
fn a_vmm_that_fails_to_attach_withdraws_its_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("attach");
    let listener = UnixListener::bind(&path).unwrap();
    let (_map, memory) = register(16, false);
    thread::scope(|scope| {
        let attaching = scope.spawn(|| Attachment::attach(&path, "guest", &memory));
        let (mut socket, _) = listener.accept().unwrap();
        read_prefix(&mut socket);
        let mut vmm = Words::over(socket);
        vmm.expect(&["attach"]);
        // Not what is to be said first.
        vmm.say(&json!({"say": "run"}));
        let mut carrier = [0];
        std::io::Read::read_exact(&mut vmm.0, &mut carrier).unwrap();
        assert_eq!(vmm.all(), ["withdrawn"]);
        let error = attaching.join().unwrap().unwrap_err();
        assert!(matches!(error, AttachError::Refused { .. }), "{error}");
    });
}

#[test]
fn memory_that_was_withdrawn_is_let_go_and_other_memory_taken() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let client = host.open_client();
    let (_map, memory) = register(64, true);
    let mut vmm = Words::attach(&host.attach_path(), &memory);
    vmm.expect(&["attached"]);
    assert_eq!(host.kept(), 1);
    vmm.say(&json!({"say": "withdrawn"}));
    let (status, report, said) = client.end();
    assert_eq!(status, 3, "{said:#?}");
    assert!(report.contains(r#""outcome":"withdrawn""#), "{report}");
    assert_eq!(host.kept(), 0);

    let client = host.open_client();
    let vmm = Vmm::attach(&host.attach_path(), "guest", 64, true);
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.run();
    vmm.until(|event| *event == AttachmentEvent::Finished);
    vmm.check();
    assert_eq!(client.end().0, 0);
    vmm.memory.all_arrived();
}

#[test]
fn a_guest_that_runs_is_not_withdrawn() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let client = host.open_client();
    let (_map, memory) = register(64, true);
    let mut vmm = Words::attach(&host.attach_path(), &memory);
    origin.source.switch_over(Vec::new()).unwrap();
    vmm.expect(&["attached", "state"]);
    vmm.say(&json!({"say": "ready"}));
    vmm.expect(&["run"]);
    vmm.say(&json!({"say": "withdrawn"}));
    vmm.expect(&["all_arrived", "finished"]);
    assert_eq!(client.end().0, 0);
    memory.all_arrived();
}

#[test]
fn a_guest_that_cannot_be_recorded_is_let_go() {
    let origin = Origin::start(64);
    let host = Host::with_keeper(&origin.address);
    let _client = host.open_client();
    // In the way of who writes a record.
    std::fs::create_dir(host.path("state.new")).unwrap();
    let (_map, memory) = register(64, true);
    let error = Attachment::attach(&host.attach_path(), "guest", &memory).unwrap_err();
    assert!(matches!(error, AttachError::Refused { .. }), "{error}");
    assert_eq!(host.kept(), 0);
    std::fs::remove_dir(host.path("state.new")).unwrap();
    Attachment::attach(&host.attach_path(), "guest", &memory).unwrap();
    assert_eq!(host.kept(), 1);
}
