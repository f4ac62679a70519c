//! Destinations that are declared dead.

use std::fs::{self, File};
use std::thread;
use std::time::Instant;

use afterimage::{Address, DestinationEvent};
use afterimage_tools::keeper::{Keeper, KeptGuest};
use nix::sys::signal::Signal;

use super::scene::{LENGTH, PAGES, Scene, state};
use crate::support::{LIMIT, Server, Target, pattern, read};

fn fence(scene: &Scene, more: &[&str]) -> (i32, serde_json::Value, Vec<String>) {
    let state = scene.text("state");
    let mut arguments = vec!["--fence", "--state", &state];
    arguments.extend(more);
    Server::start(&arguments).end()
}

/// A destination that has begun to run the guest, and lacks pages.
fn running(scene: &Scene, server: &mut Server) -> Target {
    let mut target = Target::start_quietly(&[(0, LENGTH)], &scene.address);
    target.until(|event| *event == DestinationEvent::Run);
    server.line("runs at the destination");
    target
}

#[test]
fn a_given_guest_is_rolled_back_and_its_destination_refused() {
    let scene = Scene::new();
    let _keeper = scene.keeper();
    let serve = || scene.serve_kept(&["--bandwidth", "on-request"]);
    let mut server = serve();
    server.line("can hand its guest over");
    scene.give(90).unwrap();
    let mut target = running(&scene, &mut server);
    let keeper = scene.unix("keeper.sock");
    let at = ["--keeper", &keeper, "--guest", "web1"];
    // Not while a server lives.
    let (status, report, _) = fence(&scene, &at);
    let error = report["error"].as_str().unwrap();
    assert!(status == 1 && error.contains("stop that process first"), "{error}");
    drop(server);
    let before = fs::read_to_string(scene.path("state")).unwrap();
    let (status, report, _) = fence(&scene, &["--keeper", &keeper, "--guest", "other"]);
    assert!(status == 1 && report["error"].as_str().unwrap().contains("not fenced"), "{report}");
    assert_eq!(fs::read_to_string(scene.path("state")).unwrap(), before);
    let (status, report, lines) = fence(&scene, &at);
    assert_eq!((status, report["outcome"].as_str()), (0, Some("fenced")), "{report}");
    assert!(report["guest_at"].as_str().unwrap().contains("web1 at the keeper"), "{report}");
    assert!(lines.iter().any(|line| line.contains("this side's again")), "{lines:#?}");
    assert_eq!(fence(&scene, &[]).0, 0, "twice is once");
    // A VMM fetches the guest as it was at the switchover.
    let mut keeper = Keeper::connect(&scene.path("keeper.sock"), "a VMM").unwrap();
    let guest = KeptGuest::fetch(&mut keeper, "web1").unwrap();
    assert_eq!(guest.sections, state());
    let file = File::from(guest.regions[0].file.try_clone().unwrap());
    assert!(read(&file, LENGTH) == pattern(PAGES, 90), "the content differs");
    // The destination was not dead after all: it comes back, and is refused for good.
    let mut server = serve();
    server.line("was fenced");
    target.until(|event| *event == DestinationEvent::Fenced);
    server.signal(Signal::SIGTERM);
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("fenced")), "{report}");
}

#[test]
fn a_file_is_rolled_back_and_named() {
    let scene = Scene::new();
    fs::write(scene.path("ram"), pattern(PAGES, 91)).unwrap();
    let ram = scene.text("ram");
    let (status, report, _) = fence(&scene, &[]);
    assert!(status == 1 && report["error"].as_str().unwrap().contains("records no session"));
    let serve = || scene.serve(&["--memory", &ram, "--bandwidth", "on-request"]);
    let mut server = serve();
    let mut target = running(&scene, &mut server);
    drop(server);
    let (status, report, _) = fence(&scene, &[]);
    assert_eq!((status, report["guest_at"].as_str()), (0, Some(&*ram)), "{report}");
    let _server = serve();
    target.until(|event| *event == DestinationEvent::Fenced);
    assert!(fs::read(&ram).unwrap() == pattern(PAGES, 91), "nobody has written to it");
}

#[test]
fn a_guest_that_is_elsewhere_for_good_is_not_fenced() {
    let scene = Scene::new();
    fs::write(scene.path("ram"), pattern(PAGES, 92)).unwrap();
    let server = scene.serve(&["--memory", &scene.text("ram")]);
    Target::connect(&[(0, LENGTH)], &scene.address).finish();
    assert_eq!(server.end().0, 0);
    let (status, report, _) = fence(&scene, &[]);
    let error = report["error"].as_str().unwrap();
    assert!(status == 1 && error.contains("the destination has everything"), "{error}");
}

#[test]
fn a_guest_of_which_pages_were_freed_is_not_fenced() {
    let mut scene = Scene::new();
    // Where files can have holes.
    scene.directory = tempfile::tempdir_in("/dev/shm").unwrap();
    scene.address = Address::Unix(scene.path("pages.sock"));
    fs::write(scene.path("ram"), pattern(PAGES, 93)).unwrap();
    let mut server =
        scene.serve(&["--memory", &scene.text("ram"), "--bandwidth", "4M", "--release"]);
    let line = server.line("the guest is lost");
    assert!(line.contains("if the destination dies after it ran the guest"), "{line}");
    let target = running(&scene, &mut server);
    let begun = Instant::now();
    while !fs::read_to_string(scene.path("state")).unwrap().contains("pages=released") {
        assert!(begun.elapsed() < LIMIT, "nothing was freed");
        thread::yield_now();
    }
    drop(target);
    drop(server);
    let before = fs::read_to_string(scene.path("state")).unwrap();
    let (status, report, _) = fence(&scene, &[]);
    let error = report["error"].as_str().unwrap();
    assert!(status == 1 && error.contains("(--release)"), "{error}");
    assert!(error.contains("exists only at the destination"), "{error}");
    assert_eq!(fs::read_to_string(scene.path("state")).unwrap(), before);
}
