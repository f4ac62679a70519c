//! What goes wrong before the guest is given away lets it go on at the source.

use std::time::Instant;

use afterimage_tools::require;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::support::{Backing, Daemon, LIMIT, Network, Qemu, Scene, Side, check_lived_on};

const ROUNDS: usize = 3;

/// The guest was not moved, and goes on at the source as if nothing had happened.
fn check_goes_on(scene: &Scene, mut source: Qemu, report: &Value) {
    assert_eq!(report["outcome"], "not_moved", "{report:#}");
    let given = report["events"].as_array().unwrap().iter().any(|it| it["event"] == "given");
    assert!(!given, "{report:#}");
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    assert_eq!(source.status(), "running");
    check_lived_on(&source.last_words(), &[], scene.vcpus, 0);
}

#[test]
fn a_destination_that_dies_before_the_guest_runs_there_lets_it_go_on_at_the_source() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(2, Backing::File);
    let source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let destination = Qemu::start(&scene, Side::Destination);
    let mut receive = scene.receive();
    receive.line("waiting for the guest");
    destination.daemon.signal(Signal::SIGSTOP);
    let send = scene.send(&[]);
    receive.line("the device state is here");
    destination.daemon.kill();

    let (status, report, lines) = receive.report();
    assert_eq!((status, &report["outcome"]), (1, &Value::from("failed")));
    assert!(lines.last().unwrap().contains("ended while it was loading"), "{lines:#?}");
    let (status, report, _) = send.report();
    assert_eq!(status, 3, "{report:#}");
    assert!(report["error"].as_str().unwrap().contains("has refused it"), "{report:#}");
    check_goes_on(&scene, source, &report);
    drop(client);
}

#[test]
fn a_guest_runs_on_until_whoever_restores_it_is_there() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(1, Backing::File);
    let mut source = Qemu::start(&scene, Side::Source);
    let mut client = scene.client(&["--connect", &scene.unix("pages")]);
    let destination = Qemu::start(&scene, Side::Destination);
    let mut send = scene.send(&[]);
    send.line("waiting for the destination");
    client.line("waiting for the process that drives");
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    assert_eq!(source.status(), "running");

    let receive = scene.receive();
    client.line("a source is attached");
    for command in [send, receive, client] {
        let (status, report, lines) = command.report();
        assert_eq!((status, &report["outcome"]), (0, &Value::from("finished")), "{lines:#?}");
    }
    destination.serial.wait_rounds(scene.vcpus, ROUNDS);
    let (before, after) = (source.last_words(), destination.last_words());
    check_lived_on(&before, &after, scene.vcpus, ROUNDS as u32);
}

#[test]
fn a_state_that_does_not_load_lets_the_guest_go_on_at_the_source() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(1, Backing::File);
    // The destination lacks this device.
    let source = Qemu::start_with(&scene, Side::Source, &["-device", "virtio-rng-pci"]);
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let destination = Qemu::start(&scene, Side::Destination);
    let (status, report, _) = scene.migrate(&[]).report();
    assert_eq!(status, 3, "{report:#}");
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("device state") && error.contains("same devices"), "{error}");
    check_goes_on(&scene, source, &report);
    drop((destination, client));
}

#[test]
fn a_guest_that_cannot_go_on_there_is_not_even_stopped() {
    if !require::qemu_system() {
        return;
    }
    let mut scene = Scene::new(1, Backing::File);
    let source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    scene.vcpus = 2;
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let destination = Qemu::start(&scene, Side::Destination);
    let (status, report, _) = scene.migrate(&[]).report();
    assert_eq!(status, 3, "{report:#}");
    assert!(report["error"].as_str().unwrap().contains("1 vCPUs"), "{report:#}");
    assert_eq!(report.get("stop_us"), None, "{report:#}");
    scene.vcpus = 1;
    check_goes_on(&scene, source, &report);
    drop((destination, client));
}

#[test]
fn private_memory_is_refused_before_anything_is_stopped() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(1, Backing::Private);
    let mut source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    let (status, report, lines) = scene.send(&[]).report();
    assert_eq!(status, 1, "{report:#}");
    let line = lines.last().unwrap();
    for what in ["the source's QEMU", "pc.ram is private memory", "share=on"] {
        assert!(line.contains(what), "{line}");
    }
    assert_eq!(source.status(), "running");
    check_lived_on(&source.last_words(), &[], scene.vcpus, 0);
}

/// Does something to the source's guest while `send` waits for a destination, has `send` stopped,
/// and gives the state of the guest, and of a migration by QEMU itself, after that.
fn left_after(act: impl Fn(&mut Qemu)) -> [String; 2] {
    let scene = Scene::new(1, Backing::File);
    let mut source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    let mut send = scene.send(&[]);
    send.line("waiting for the destination");
    act(&mut source);
    send.signal(Signal::SIGTERM);
    let (status, report, lines) = send.report();
    assert_eq!((status, &report["outcome"]), (3, &Value::from("not_moved")), "{lines:#?}");
    [source.status(), migration_of(&mut source)]
}

fn migration_of(qemu: &mut Qemu) -> String {
    let answer = qemu.qmp.execute("query-migrate", &json!({})).unwrap();
    answer["status"].as_str().unwrap_or("none").to_owned()
}

/// Has QEMU migrate by itself, to nowhere.
fn migrate_by_itself(qemu: &mut Qemu) {
    qemu.qmp.execute("migrate", &json!({"uri": "exec:cat > /dev/null"})).unwrap();
}

#[test]
fn what_others_do_to_a_guest_that_was_not_stopped_yet_is_left_as_it_is() {
    if !require::qemu_system() {
        return;
    }
    let pause = |source: &mut Qemu| drop(source.qmp.execute("stop", &json!({})).unwrap());
    assert_eq!(left_after(pause), ["paused", "none"]);
    // It is elsewhere now, and must not run here too.
    let left = left_after(|source| {
        pause(source);
        migrate_by_itself(source);
        let until = Instant::now() + LIMIT;
        while source.status() != "postmigrate" {
            assert!(Instant::now() < until, "QEMU migrates its guest");
        }
    });
    assert_eq!(left, ["postmigrate", "completed"]);
    let left = left_after(|source| {
        let slow = json!({"max-bandwidth": 10_000});
        source.qmp.execute("migrate-set-parameters", &slow).unwrap();
        migrate_by_itself(source);
    });
    assert_eq!(left, ["running", "active"]);
}

/// Both sides are there, the destination's QEMU stands still, and the device state has reached
/// it: the guest runs nowhere, and is the source's.
fn in_between(scene: &Scene, network: &Network, driver: impl FnOnce() -> Daemon) -> InBetween {
    let source = Qemu::start(scene, Side::Source);
    source.serial.wait_rounds(scene.vcpus, ROUNDS);
    let mut client = scene.client(&["--connect", &network.address]);
    let destination = Qemu::start(scene, Side::Destination);
    network.set_open(false);
    let mut driver = driver();
    driver.line("its memory are ready");
    destination.daemon.signal(Signal::SIGSTOP);
    network.set_open(true);
    client.line("the device state has arrived");
    InBetween { source, client, destination, driver }
}

struct InBetween {
    source: Qemu,
    client: Daemon,
    destination: Qemu,
    driver: Daemon,
}

#[test]
fn a_driver_of_both_killed_before_the_guest_is_given_away_takes_it_back_when_started_again() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(2, Backing::File);
    let network = Network::to(scene.path("pages"));
    let state = scene.path("state").display().to_string();
    let more = ["--state", state.as_str()];
    let now = in_between(&scene, &network, || scene.migrate(&more));
    let InBetween { mut source, client, destination, driver } = now;
    driver.kill();
    assert_eq!(source.status(), "postmigrate");

    let (status, report, lines) = scene.send(&more).report();
    assert_eq!(status, 3, "{lines:#?}");
    check_goes_on(&scene, source, &report);
    // It has heard of it, and lets go of the memory.
    let (status, report, _) = client.report();
    assert_eq!((status, &report["outcome"]), (3, &Value::from("not_here")));
    drop(destination);
}
