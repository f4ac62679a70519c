//! A guest that moves: on files and on memfds, with one vCPU and with two.

use afterimage_tools::require;

use crate::support::{
    Accelerator, Backing, Qemu, Scene, Side, Writes, can_move, can_track, check_lived_on,
};

/// Rounds before the guest moves, and after it has.
const ROUNDS: usize = 5;

/// One process drives both.
fn migrates(vcpus: usize, backing: Backing) {
    if can_move(backing) {
        moves(&Scene::new(vcpus, backing));
    }
}

fn moves(scene: &Scene) {
    let vcpus = scene.vcpus;
    let pages = scene.unix("pages");
    let source = Qemu::start(scene, Side::Source);
    source.serial.wait_rounds(vcpus, ROUNDS);
    let client = scene.client(&["--connect", &pages]);
    let mut destination = Qemu::start(scene, Side::Destination);
    let driver = scene.migrate(&["--quit-source"]);
    let (status, report, _) = driver.report();
    assert_eq!(status, 0, "{report:#}");
    destination.serial.wait_rounds(vcpus, ROUNDS);
    assert_eq!(destination.status(), "running");
    assert_eq!(report["outcome"], "finished");
    assert!(report["blackout_us"].as_u64().unwrap() > 0, "{report:#}");
    let (status, client, _) = client.report();
    assert_eq!((status, client["pages_complete"].as_u64()), (0, report["pages_total"].as_u64()));
    let (before, after) = (source.last_words(), destination.last_words());
    check_lived_on(&before, &after, vcpus, ROUNDS as u32);
}

/// Memory goes in passes first, and the guest writes all the time.
fn migrates_in_passes(vcpus: usize, backing: Backing, passes: &str) {
    if can_move(backing) && can_track() {
        moves_in_passes(Scene::new(vcpus, backing), passes);
    }
}

fn moves_in_passes(mut scene: Scene, passes: &str) {
    let vcpus = scene.vcpus;
    scene.writes = Writes::Tracked;
    let source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(vcpus, ROUNDS);
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let destination = Qemu::start(&scene, Side::Destination);
    let tracking = scene.unix("tracking");
    let (status, report, _) =
        scene.migrate(&["--passes", passes, "--tracking", &tracking, "--quit-source"]).report();
    assert_eq!(status, 0, "{report:#}");
    let done = report["passes"].as_array().unwrap();
    assert!(!done.is_empty(), "{report:#}");
    if let Ok(count) = passes.parse::<usize>() {
        assert_eq!((done.len(), report["switchover_cause"].as_str()), (count, Some("passes-done")));
    }
    let (status, client, _) = client.report();
    assert_eq!((status, client["pages_complete"].as_u64()), (0, report["pages_total"].as_u64()));
    // The firmware's part of memory at least is not written any more.
    assert!(client["pages_precopy"].as_u64().unwrap() > 0, "{client:#}");
    destination.serial.wait_rounds(vcpus, ROUNDS);
    let (before, after) = (source.last_words(), destination.last_words());
    check_lived_on(&before, &after, vcpus, ROUNDS as u32);
}

#[test]
fn two_passes_before_a_guest_of_two_vcpus_moves_leave_nothing_old() {
    migrates_in_passes(2, Backing::File, "2");
}

#[test]
fn passes_end_by_themselves_although_the_guest_writes_all_the_time() {
    migrates_in_passes(1, Backing::Memfd, "auto");
}

#[test]
fn a_guest_of_one_vcpu_moves_from_file_to_file() {
    migrates(1, Backing::File);
}

#[test]
fn a_guest_of_two_vcpus_moves_from_file_to_file() {
    migrates(2, Backing::File);
}

#[test]
fn a_guest_of_one_vcpu_moves_from_memfd_to_memfd() {
    migrates(1, Backing::Memfd);
}

#[test]
fn a_guest_of_two_vcpus_moves_from_memfd_to_memfd() {
    migrates(2, Backing::Memfd);
}

/// A guest that the kernel runs, and takes the faults for.
fn on_kvm(vcpus: usize, backing: Backing) -> Option<Scene> {
    if !can_move(backing) || !require::kvm() {
        return None;
    }
    let mut scene = Scene::new(vcpus, backing);
    scene.accelerator = Accelerator::Kvm;
    Some(scene)
}

#[test]
fn a_guest_on_kvm_moves_from_file_to_file() {
    if let Some(scene) = on_kvm(2, Backing::File) {
        moves(&scene);
    }
}

#[test]
fn two_passes_before_a_guest_on_kvm_moves_leave_nothing_old() {
    if let Some(scene) = on_kvm(2, Backing::File)
        && can_track()
    {
        moves_in_passes(scene, "2");
    }
}
