//! Guests in files.

use std::fs;
use std::thread;

use nix::sys::signal::Signal;

use super::scene::{PAGES, Reader, Scene, goes_on, kill_at, resumed};
use crate::support::pattern;

/// A scene with a file of memory.
fn scene(seed: u64) -> Scene {
    let scene = Scene::new();
    fs::write(scene.path("ram"), pattern(PAGES, seed)).unwrap();
    scene
}

#[test]
fn a_file_goes_on_after_every_death() {
    let scene = scene(70);
    let ram = scene.text("ram");
    // Nothing leaves that is not asked for: the deaths come while faults are served.
    let serve = || scene.serve(&["--memory", &ram, "--bandwidth", "on-request"]);
    let mut server = serve();
    server.line("listening on");
    drop(server);
    let mut server = serve();
    let reader = Reader::start(&scene.address, 70);
    let mut epochs = Vec::new();
    let mut session = None;
    for line in ["is attached", "is given", "runs at the destination"] {
        kill_at(server, line);
        server = serve();
        let (name, epoch) = resumed(&mut server);
        assert_eq!(*session.get_or_insert(name.clone()), name);
        epochs.push(epoch);
    }
    for pages in (1..8).map(|eighth| eighth * PAGES / 8) {
        reader.until_read(pages);
        drop(server);
        server = serve();
        let (name, epoch) = resumed(&mut server);
        assert_eq!(session.as_ref(), Some(&name));
        epochs.push(epoch);
    }
    assert!(epochs.is_sorted(), "{epochs:?}");
    assert!(epochs.last().unwrap() >= &7, "each server that served has grown it: {epochs:?}");
    reader.finish(70);
    let (status, report, lines) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")), "{lines:#?}");
    assert_eq!(report["session"].as_str(), session.as_deref());
    // Once more: there is nothing to do.
    let (status, report, lines) = serve().end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")));
    assert_eq!(report["session"].as_str(), session.as_deref());
    assert!(lines.iter().any(|line| line.contains("is finished")), "{lines:#?}");
}

#[test]
fn a_file_goes_on_in_background_after_every_death() {
    let scene = scene(71);
    let ram = scene.text("ram");
    let serve = || scene.serve(&["--memory", &ram, "--bandwidth", "8M", "--streams", "2"]);
    let mut server = serve();
    let reader = Reader::start(&scene.address, 71);
    for pages in [1, 300, 900, 1500] {
        reader.until_read(pages);
        drop(server);
        server = serve();
        if !goes_on(&mut server) {
            break;
        }
    }
    // The last death may come before the destination has heard that it is over, or after.
    let fetched = thread::spawn(move || reader.finish(71));
    server.any_line(&["every page has arrived", "is finished", "has not come back"]);
    drop(server);
    let server = serve();
    fetched.join().unwrap();
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_second_signal_stops_what_a_successor_goes_on_with() {
    let scene = scene(72);
    let ram = scene.text("ram");
    let serve = || scene.serve(&["--memory", &ram, "--bandwidth", "on-request"]);
    let mut server = serve();
    let reader = Reader::start(&scene.address, 72);
    reader.until_read(100);
    server.signal(Signal::SIGTERM);
    let line = server.line("not stopping");
    assert!(line.contains("the same command line goes on"), "{line}");
    server.signal(Signal::SIGTERM);
    let (status, report, _) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (3, Some("stopped")), "{report}");
    let server = serve();
    reader.finish(72);
    assert_eq!(server.end().0, 0);
}

#[test]
fn a_guest_that_was_taken_back_is_not_served_again() {
    let scene = scene(73);
    let ram = scene.text("ram");
    let mut server = scene.serve(&["--memory", &ram]);
    server.line("listening on");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().0, 3);
    let (status, report, _) = scene.serve(&["--memory", &ram]).end();
    let error = report["error"].as_str().unwrap();
    assert!(status == 1 && error.contains("was taken back"), "{error}");
}
