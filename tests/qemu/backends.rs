//! Other memory than one file on tmpfs: huge pages, and several backends.

use std::fs;
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use afterimage_tools::ram::HUGE_PAGE_BYTES;
use afterimage_tools::require;
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;

use crate::boot;
use crate::support::{Backing, Qemu, Scene, Side, Writes, can_move, can_track, check_lived_on};

const ROUNDS: usize = 3;
const VCPUS: usize = 2;
/// Two NUMA nodes of different sizes, so that each is known by its own.
const NODES: [u64; 2] = [64, boot::MEMORY_MIB - 64];

/// Held by whoever needs huge pages: what is reserved is counted once for all of this process.
static TURN: Mutex<()> = Mutex::new(());

/// Moves a guest of this scene after so many passes; returns what page-client reports.
fn moves(scene: &mut Scene, passes: usize) -> Value {
    if passes > 0 {
        scene.writes = Writes::Tracked;
    }
    let source = Qemu::start(scene, Side::Source);
    source.serial.wait_rounds(VCPUS, ROUNDS);
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let mut destination = Qemu::start(scene, Side::Destination);
    let (count, tracking) = (passes.to_string(), scene.unix("tracking"));
    let in_passes = ["--passes", &count, "--tracking", &tracking];
    let (status, report, lines) = scene.migrate(if passes > 0 { &in_passes } else { &[] }).report();
    assert_eq!(status, 0, "{lines:#?}");
    assert_eq!(report["passes"].as_array().map_or(0, Vec::len), passes, "{report:#}");
    let (status, served, _) = client.report();
    assert_eq!((status, &served["pages_complete"]), (0, &report["pages_total"]), "{served:#}");
    destination.serial.wait_rounds(VCPUS, ROUNDS);
    assert_eq!(destination.status(), "running");
    let (before, after) = (source.last_words(), destination.last_words());
    check_lived_on(&before, &after, VCPUS, ROUNDS as u32);
    served
}

fn can(backing: Backing, passes: usize) -> bool {
    can_move(backing) && (passes == 0 || can_track())
}

/// Of two memory backends.
fn of_two_nodes(backing: Backing, passes: usize) {
    if !can(backing, passes) {
        return;
    }
    moves(&mut Scene::new(VCPUS, backing).with_backends(&NODES), passes);
}

/// On huge pages at both sides, which stay huge; with a hugetlbfs that only this test has.
fn on_huge_pages(backends: &'static [u64], passes: usize) {
    if !can(Backing::Huge, passes) {
        return;
    }
    let _turn = TURN.lock();
    let pages = 2 * (boot::MEMORY_MIB << 20) / HUGE_PAGE_BYTES;
    let Some(_pages) = require::hugetlb(pages) else { return };
    // A name space for this thread and the processes that it starts.
    let test = thread::spawn(move || {
        let mut scene = Scene::new(VCPUS, Backing::Huge).with_backends(backends);
        let Some(_mounted) = Mounted::at(&scene) else { return };
        let served = moves(&mut scene, passes);
        assert_eq!(served["pages_total"], pages / 2, "{served:#}");
    });
    test.join().unwrap();
}

/// Huge pages, mounted.
struct Mounted(String);

impl Mounted {
    fn at(scene: &Scene) -> Option<Self> {
        let place = scene.huge().display().to_string();
        fs::create_dir(&place).unwrap();
        let mounted = unshare(CloneFlags::CLONE_NEWNS).map_err(|error| error.to_string());
        let mounted = mounted.and_then(|()| {
            run("mount", &["--make-rprivate", "/"])?;
            run("mount", &["-t", "hugetlbfs", "-o", "pagesize=2M", "huge", &place])
        });
        require::or_skip("mount", mounted).map(|()| Self(place))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Else the directory cannot be removed.
        if let Err(error) = run("umount", &[&self.0]) {
            println!("{error}");
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(said)
}

#[test]
fn a_guest_of_two_numa_nodes_in_files_moves() {
    of_two_nodes(Backing::File, 0);
}

#[test]
fn a_guest_of_two_numa_nodes_in_memfds_moves_after_two_passes() {
    of_two_nodes(Backing::Memfd, 2);
}

/// Taken in another order, two of the same size would change places, and nobody would notice.
fn refuses_another_order(side: Side) {
    if !can(Backing::File, 2) {
        return;
    }
    let half = boot::MEMORY_MIB / 2;
    let mut scene = Scene::new(VCPUS, Backing::File).with_backends(&[half, half]);
    scene.writes = Writes::Tracked;
    let tracking = scene.unix("tracking");
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let mut start = |it| {
        scene.named = if it == side { vec![1, 0] } else { vec![0, 1] };
        Qemu::start(&scene, it)
    };
    let (mut source, destination) = (start(Side::Source), start(Side::Destination));
    source.serial.wait_rounds(VCPUS, ROUNDS);
    let (status, report, lines) =
        scene.migrate(&["--passes", "2", "--tracking", &tracking]).report();
    assert_ne!(status, 0, "{report:#}");
    let line = lines.last().unwrap();
    let who = format!("the {}'s QEMU", side.name());
    for what in [&who, "AFTERIMAGE_MEMORY", "memory1 in the place of guest RAM ram0"] {
        assert!(line.contains(what), "{line}");
    }
    source.serial.wait_rounds(VCPUS, ROUNDS);
    assert_eq!(source.status(), "running");
    check_lived_on(&source.last_words(), &[], VCPUS, 0);
    drop((destination, client));
}

#[test]
fn backends_named_to_the_destinations_library_in_another_order_are_refused() {
    refuses_another_order(Side::Destination);
}

#[test]
fn backends_named_to_the_sources_library_in_another_order_are_refused() {
    refuses_another_order(Side::Source);
}

#[test]
fn memory_files_given_in_another_order_are_refused() {
    if !can(Backing::File, 0) {
        return;
    }
    let half = boot::MEMORY_MIB / 2;
    let scene = Scene::new(VCPUS, Backing::File).with_backends(&[half, half]);
    let mut source = Qemu::start(&scene, Side::Source);
    let [first, second] =
        ["source.memory1", "source.memory0"].map(|it| scene.path(it).display().to_string());
    let (status, report, lines) = scene.send(&["--memory", &first, "--memory", &second]).report();
    assert_ne!(status, 0, "{report:#}");
    let line = lines.last().unwrap();
    assert!(line.contains("source.memory1 is another file than guest RAM ram0"), "{line}");
    assert_eq!(source.status(), "running");
}

#[test]
fn a_guest_on_huge_pages_moves() {
    on_huge_pages(&[boot::MEMORY_MIB], 0);
}

#[test]
fn a_guest_of_two_numa_nodes_on_huge_pages_moves_after_two_passes() {
    on_huge_pages(&NODES, 2);
}
