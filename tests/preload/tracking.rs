//! What a VMM writes is found out by whoever connects, and by one at a time.

use std::collections::BTreeSet;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Instant;

use afterimage::dirty::DirtyTracker;
use afterimage_tools::attachment::{self, Arrival};
use afterimage_tools::require;
use afterimage_tools::tracking::{TrackingError, VmmTracker};

use crate::content::PAGE;
use crate::process::{LIMIT, Process};
use crate::scene::Scene;

const PAGES: u64 = 1024;

/// A VMM of which nothing arrives.
fn vmm(scene: &Scene, memory: &str) -> Process {
    scene.vmm_with(memory, |command| {
        command.env_remove("AFTERIMAGE_SOCKET").env_remove("AFTERIMAGE_GUEST");
        command.env("AFTERIMAGE_TRACKING", format!("unix:{}", scene.path("tracking")));
    })
}

fn does(vmm: &mut Process, lines: &[&str]) {
    for line in lines {
        assert_eq!(vmm.ask(line), "ok", "{line}");
    }
}

fn maps(vmm: &mut Process) {
    let bytes = PAGES * PAGE;
    does(vmm, &[&format!("memfd f ram {bytes}"), &format!("map m f 0 {bytes} reserved")]);
}

fn path(scene: &Scene) -> PathBuf {
    scene.path("tracking").into()
}

/// A tracker that has begun.
fn tracker(scene: &Scene) -> VmmTracker {
    let mut tracker = VmmTracker::connect(&path(scene)).unwrap();
    tracker.start().unwrap();
    tracker
}

/// Whether this kernel finds out what is written.
fn is_possible() -> bool {
    let region = Vec::new();
    let mut tracker = afterimage::dirty::WriteProtectTracker::new(region).unwrap();
    require::or_skip("wp_async", tracker.start()).is_some()
}

fn written(tracker: &mut VmmTracker) -> Vec<u64> {
    let mut pages = BTreeSet::new();
    let mut note = |at: afterimage::GuestAddress, length| {
        pages.extend(at.0 / PAGE..(at.0 + length) / PAGE);
    };
    tracker.collect(&mut note).unwrap();
    pages.into_iter().collect()
}

fn refusal(scene: &Scene) -> String {
    match VmmTracker::connect(&path(scene)) {
        Err(TrackingError::Refused { reason }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_is_written_is_found_pass_by_pass() {
    if !is_possible() {
        return;
    }
    let scene = Scene::new();
    let mut vmm = vmm(&scene, "memfd:ram");
    maps(&mut vmm);
    does(&mut vmm, &["write m 3", "write m 700"]);
    let mut tracker = tracker(&scene);
    assert_eq!(tracker.process(), vmm.child.id());
    assert_eq!(tracker.regions(), [(afterimage::GuestAddress(0), PAGES * PAGE)]);
    // What the blocks around it hold is not written, and may be reported once.
    written(&mut tracker);
    assert!(written(&mut tracker).is_empty());
    does(&mut vmm, &["write m 3", "write m 5", "write m 1023"]);
    assert_eq!(written(&mut tracker), [3, 5, 1023]);
    assert_eq!(vmm.ask("read m 700"), "0x5a");
    assert!(written(&mut tracker).is_empty());
    does(&mut vmm, &["write m 5"]);
    tracker.stop().unwrap();
    drop(tracker);
    // Another time.
    let mut tracker = self::tracker(&scene);
    written(&mut tracker);
    does(&mut vmm, &["write m 9"]);
    assert_eq!(written(&mut tracker), [9]);
    assert_eq!(vmm.end().0, 0);
    let error = tracker.collect(&mut |_, _| ()).unwrap_err().to_string();
    assert!(error.contains("has ended"), "{error}");
}

#[test]
fn what_is_written_to_huge_pages_is_found() {
    let Some(_pages) = require::hugetlb(4) else { return };
    if !is_possible() {
        return;
    }
    let scene = Scene::new();
    let mut vmm = vmm(&scene, "memfd:ram");
    let bytes = PAGES * PAGE;
    does(&mut vmm, &[&format!("huge f ram {bytes}"), &format!("map m f 0 {bytes} shared")]);
    does(&mut vmm, &["write m 3", "write m 600"]);
    let mut tracker = tracker(&scene);
    written(&mut tracker);
    does(&mut vmm, &["write m 700"]);
    assert_eq!(written(&mut tracker), (512..1024).collect::<Vec<_>>());
}

#[test]
fn one_process_at_a_time_tracks_and_its_death_frees_the_vmm() {
    if !is_possible() {
        return;
    }
    let scene = Scene::new();
    let mut vmm = vmm(&scene, "memfd:ram");
    maps(&mut vmm);
    let own = tracker(&scene);
    assert!(refusal(&scene).contains("another process tracks"));
    // Who hangs up at once has disturbed nobody.
    drop(UnixStream::connect(path(&scene)).unwrap());
    assert!(refusal(&scene).contains("another process tracks"));
    drop(own);
    let socket = scene.path("tracking");
    let mut other = Process::start(crate::process::role("tracker", &[&socket]));
    other.hear_of("tracking");
    other.kill();
    let until = Instant::now() + LIMIT;
    let mut tracker = loop {
        match VmmTracker::connect(&path(&scene)) {
            Ok(tracker) => break tracker,
            // The library has not noticed yet.
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
    };
    tracker.start().unwrap();
    written(&mut tracker);
    does(&mut vmm, &["write m 77"]);
    // And what is around it, where nothing was before.
    assert!(written(&mut tracker).contains(&77));
}

#[test]
fn memory_stays_where_it_is_as_long_as_it_is_tracked() {
    if !is_possible() {
        return;
    }
    let scene = Scene::new();
    let mut vmm = vmm(&scene, "memfd:ram");
    maps(&mut vmm);
    let tracker = tracker(&scene);
    let busy = format!("errno {}", libc::EBUSY);
    for (line, complaint) in
        [("map n f 0 4096 shared", "is being tracked"), ("move m", "not to be moved")]
    {
        assert_eq!(vmm.ask(line), busy, "{line}");
        vmm.complaint(complaint);
    }
    // Who only reads disturbs nobody.
    does(&mut vmm, &["map r f 0 4096 read-only", "map p f 0 4096 private"]);
    drop(tracker);
    let until = Instant::now() + LIMIT;
    while vmm.ask("map n f 0 4096 shared") != "ok" {
        assert!(Instant::now() < until, "it is free again");
    }
    assert!(refusal(&scene).contains("mapped a second time for writing"));
    does(&mut vmm, &["unmap n"]);
    drop(self::tracker(&scene));
    let until = Instant::now() + LIMIT;
    while vmm.ask("move m") != "ok" {
        assert!(Instant::now() < until, "it is free again");
    }
    assert!(refusal(&scene).contains("not mapped at"));
    assert_eq!(vmm.end().0, 0);
}

#[test]
fn a_guest_that_has_arrived_can_be_tracked_when_it_leaves_again() {
    if !require::userfaultfd() || !is_possible() {
        return;
    }
    let mut scene = Scene::new();
    scene.serve(&[PAGES], &["--bandwidth", "on-request"]);
    scene.open_client();
    let mut vmm = scene.vmm_with("memfd:ram", |command| {
        command.env("AFTERIMAGE_TRACKING", format!("unix:{}", scene.path("tracking")));
    });
    maps(&mut vmm);
    let driving = scene.drive();
    let error = VmmTracker::connect(&path(&scene)).unwrap_err().to_string();
    assert!(error.contains("could not connect"), "{error}");
    does(&mut vmm, &[&format!("check m 0 0 {PAGES}")]);
    scene.arrives(&driving);
    let mut tracker = tracker(&scene);
    written(&mut tracker);
    does(&mut vmm, &["write m 5"]);
    assert_eq!(written(&mut tracker), [5]);
    assert_eq!(vmm.end().0, 0);
}

/// Says something as page-client does.
fn say(mut socket: &UnixStream, word: &str) {
    let text = format!("{{\"say\":\"{word}\",\"reason\":\"{word}\"}}");
    let bytes = [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    socket.write_all(&bytes).unwrap();
}

#[test]
fn memory_that_is_tracked_stays_where_it_is_when_its_arrival_is_said_again() {
    if !require::userfaultfd() || !is_possible() {
        return;
    }
    let scene = Scene::new();
    // As a page-client whose successor does not know what was heard.
    let listener = UnixListener::bind(scene.path("attach")).unwrap();
    let client = thread::spawn(move || {
        let arrival = attachment::receive(listener.accept().unwrap().0).unwrap();
        let Arrival::Offer(offer) = arrival else { panic!("{arrival:?}") };
        say(&offer.socket, "attached");
        say(&offer.socket, "all_arrived");
        offer.socket
    });
    let mut vmm = scene.vmm_with("memfd:ram", |command| {
        command.env("AFTERIMAGE_TRACKING", format!("unix:{}", scene.path("tracking")));
    });
    maps(&mut vmm);
    let client = client.join().unwrap();
    let until = Instant::now() + LIMIT;
    let tracker = loop {
        match VmmTracker::connect(&path(&scene)) {
            Ok(tracker) => break tracker,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
    };
    say(&client, "all_arrived");
    say(&client, "failed");
    vmm.complaint("page-client says: failed");
    assert_eq!(vmm.ask("move m"), format!("errno {}", libc::EBUSY));
    drop(tracker);
    let (status, _, complaints) = vmm.end();
    let is_wrong = |line: &String| line.contains("could not listen");
    assert!(status == 0 && !complaints.iter().any(is_wrong), "{complaints:#?}");
}

#[test]
fn what_cannot_be_tracked_is_refused_at_the_start() {
    if !is_possible() {
        return;
    }
    let scene = Scene::new();
    for (memory, lines, expected) in [
        ("memfd:ram", &["memfd f ram 65536", "map m f 0 65536 private"][..], "is mapped privately"),
        ("ram", &["memfd f ram 65536", "map m f 0 65536 shared"], "absolute path"),
    ] {
        let mut vmm = vmm(&scene, memory);
        assert_eq!(vmm.ask(lines[0]), "ok");
        vmm.tell(lines[1]);
        let (status, said, complaints) = vmm.end();
        assert_eq!((status, said.len(), complaints.len()), (125, 0, 1), "{complaints:#?}");
        assert!(complaints[0].contains(expected), "{complaints:#?}");
    }
    let mut one = vmm(&scene, "memfd:ram");
    maps(&mut one);
    let mut other = vmm(&scene, "memfd:ram");
    does(&mut other, &["memfd f ram 65536"]);
    other.tell("map m f 0 65536 shared");
    let (status, _, complaints) = other.end();
    assert_eq!(status, 125, "{complaints:#?}");
    assert!(complaints[0].contains("could not listen"), "{complaints:#?}");
    // The socket of one that was killed is taken over.
    one.kill();
    let mut next = vmm(&scene, "memfd:ram");
    maps(&mut next);
    drop(tracker(&scene));
}
