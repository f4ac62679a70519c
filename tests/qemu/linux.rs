//! A Linux guest of 1 GiB that dirties more than half of it, and checks what it reads: with one
//! vCPU and with two, on files and on memfds, at once and after two passes; undisturbed, with a
//! link that is cut, and with a page-client that is killed.
//!
//! The guest (`guest/workload.rs`) says by a serial port how often it has touched a page, and how
//! often one was not as it had left it.
//!
//! Always by TCG: what `/dev/kvm` is on a machine that is virtual itself may not boot a Linux.

use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use afterimage_tools::qemu::guest::{Guest, GuestReport};
use afterimage_tools::qemu::{Lines, Speaker};
use afterimage_tools::require;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::support::{
    Backing, Daemon, LIMIT, Network, Qemu, Scene, Side, Survival, Writes, can_move, can_track,
};

const MEMORY_MIB: u64 = 1024;
const WORKING_SET_MIB: u64 = 640;
/// Slow enough for something to happen in the middle.
const SLOW: &str = "200M";
const CUTS: u64 = 2;

/// Two of these guests at once would have 4 GiB.
static TURN: Mutex<()> = Mutex::new(());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    None,
    LinkCut,
    ClientKilled,
}

fn scene(vcpus: usize, backing: Backing, brought: &Path) -> Scene {
    let mut scene = Scene::of(vcpus, backing, MEMORY_MIB);
    let file = |name: &str| brought.join(name).display().to_string();
    // One vCPU until it has booted: a kernel patches its code as it begins, and TCG (QEMU 7.2) may
    // go on for ever with the old translation where another vCPU runs what is patched, which one in
    // some hundred boots did. A touch is noted by itself only if it takes longer than all.
    let append = format!(
        "console=ttyS0 quiet panic=-1 tsc=reliable maxcpus=1 \
         afterimage.mib={WORKING_SET_MIB} afterimage.gap_us=1000000000"
    );
    let arguments = ["-cpu", "max", "-no-reboot", "-kernel", &file("vmlinuz")];
    let more = ["-initrd", &file("initrd.gz"), "-append", &append];
    scene.program = [&arguments[..], &more].concat().into_iter().map(str::to_owned).collect();
    scene
}

impl Qemu<Guest> {
    fn boot(scene: &Scene, side: Side) -> Self {
        let console = scene.path(&format!("{}.console", side.name()));
        let log = format!("file:{}", console.display());
        let speaker = Speaker { name: "the guest".into(), log: Some(console) };
        Self::launch(scene, side, &["-serial", &log], |stream| {
            Guest::new(Lines::new(stream, speaker))
        })
    }

    /// Waits until the guest has touched more pages than so many.
    fn wait_operations(&mut self, before: u64) -> GuestReport {
        let until = Instant::now() + LIMIT;
        loop {
            let report = self.serial.report().unwrap();
            if report.operations > before {
                return report;
            }
            assert!(Instant::now() < until, "the guest does nothing");
        }
    }
}

/// Both QEMUs, and the commands between them.
struct Moving {
    scene: Scene,
    network: Network,
    survival: Option<Survival>,
    source: Qemu<Guest>,
    client: Daemon,
    destination: Qemu<Guest>,
    receive: Daemon,
    send: Daemon,
}

impl Moving {
    /// The guest runs at the destination, and its memory is on its way.
    fn start(scene: Scene, passes: usize, trouble: Trouble) -> (Self, GuestReport) {
        let network = Network::to(scene.path("pages"));
        let survival = (trouble == Trouble::ClientKilled).then(Survival::start);
        let mut source = Qemu::boot(&scene, Side::Source);
        let client = client(&scene, &network, survival.as_ref());
        let destination = Qemu::boot(&scene, Side::Destination);
        let filled = source.serial.wait_filled().unwrap();
        assert_eq!((filled.workers, filled.pages), (scene.vcpus, WORKING_SET_MIB << 8));
        source.serial.mark().unwrap();
        let before = source.wait_operations(0);

        let (state, tracking) = (scene.path("state"), scene.unix("tracking"));
        let (state, count) = (state.display().to_string(), passes.to_string());
        let mut arguments = vec!["--state", &state];
        if passes > 0 {
            arguments.extend(["--passes", &count, "--tracking", &tracking]);
            arguments.extend(["--precopy-bandwidth", "unlimited"]);
        }
        if trouble != Trouble::None {
            arguments.extend(["--bandwidth", SLOW]);
        }
        let mut receive = scene.receive();
        receive.line("waiting for the guest");
        let mut send = scene.send(&arguments);
        send.line("the guest runs at the destination");
        receive.line("the guest runs here");
        (Self { scene, network, survival, source, client, destination, receive, send }, before)
    }

    fn cut_the_link(&mut self) {
        for _ in 0..CUTS {
            assert!(self.network.cut() > 0, "there were connections");
            self.send.line("page-client is away");
            self.send.line("page-client is attached");
            self.client.line("a source is attached");
        }
    }

    fn kill_the_client(&mut self) {
        self.client.signal(Signal::SIGKILL);
        assert!(self.client.is_killed());
        self.client = client(&self.scene, &self.network, self.survival.as_ref());
        self.receive.line("page-client is there again");
    }

    /// All of it arrives, and the guest has lived on. Returns what was sent and fetched.
    fn finish(self, before: &GuestReport) -> (Value, Value) {
        let Self { mut source, client, mut destination, receive, send, .. } = self;
        let (status, sent, lines) = send.report();
        assert_eq!((status, &sent["outcome"]), (0, &Value::from("finished")), "{lines:#?}");
        let (status, _, lines) = receive.report();
        assert_eq!(status, 0, "{lines:#?}");
        let (status, served, _) = client.report();
        assert_eq!((status, &served["pages_complete"]), (0, &served["pages_total"]), "{served:#}");

        let now = destination.serial.report().unwrap();
        assert!(now.operations > before.operations, "the guest counts on");
        let later = destination.wait_operations(now.operations);
        assert_eq!((before.wrong, now.wrong, later.wrong), (0, 0, 0), "pages read wrong");
        let verified = destination.serial.verify().unwrap();
        assert_eq!((verified.pages, verified.wrong), (WORKING_SET_MIB << 8, 0));
        assert_eq!(
            (source.status(), destination.status()),
            ("postmigrate".into(), "running".into())
        );
        (sent, served)
    }
}

fn client(scene: &Scene, network: &Network, survival: Option<&Survival>) -> Daemon {
    let more = survival.iter().flat_map(|it| &it.arguments).map(String::as_str);
    let arguments: Vec<_> = ["--connect", &network.address].into_iter().chain(more).collect();
    scene.client(&arguments)
}

/// Moves a guest, which meets with trouble in the middle.
fn lives_on(vcpus: usize, backing: Backing, passes: usize, trouble: Trouble) {
    let Some(brought) = require::qemu_guest() else { return };
    if !can_move(backing) || (passes > 0 && !can_track()) {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut scene = scene(vcpus, backing, &brought);
    if passes > 0 {
        scene.writes = Writes::Tracked;
    }
    let (mut moving, before) = Moving::start(scene, passes, trouble);
    match trouble {
        Trouble::None => {}
        Trouble::LinkCut => moving.cut_the_link(),
        Trouble::ClientKilled => moving.kill_the_client(),
    }
    let (sent, served) = moving.finish(&before);
    let count = |of: &Value, name: &str| of[name].as_u64().unwrap_or_default();
    let sent_in_passes = sent["passes"].as_array().map_or(&[][..], Vec::as_slice);
    assert_eq!(sent_in_passes.len(), passes, "{sent:#}");
    for pass in sent_in_passes.iter().take(1) {
        assert!(count(pass, "bytes_sent") >= WORKING_SET_MIB << 20, "{sent:#}");
    }
    assert_eq!(count(&sent, "recoveries") >= CUTS, trouble == Trouble::LinkCut, "{sent:#}");
    assert_eq!(served["taken_over"] == true, trouble == Trouble::ClientKilled, "{served:#}");
    // It did not stand still until all was there.
    assert!(count(&served, "pages_requested") > 0, "{served:#}");
}

// Each two of vCPUs, backing, passes and trouble meet once.

#[test]
fn a_linux_guest_of_one_vcpu_moves_from_file_to_file() {
    lives_on(1, Backing::File, 0, Trouble::None);
}

#[test]
fn a_linux_guest_of_two_vcpus_moves_from_memfd_to_memfd_after_two_passes() {
    lives_on(2, Backing::Memfd, 2, Trouble::None);
}

#[test]
fn a_linux_guest_of_two_vcpus_on_files_outlives_a_link_that_is_cut() {
    lives_on(2, Backing::File, 0, Trouble::LinkCut);
}

#[test]
fn a_linux_guest_of_one_vcpu_on_memfds_outlives_a_link_that_is_cut_after_two_passes() {
    lives_on(1, Backing::Memfd, 2, Trouble::LinkCut);
}

#[test]
fn a_linux_guest_of_one_vcpu_on_files_outlives_a_page_client_killed_after_two_passes() {
    lives_on(1, Backing::File, 2, Trouble::ClientKilled);
}

#[test]
fn a_linux_guest_of_two_vcpus_on_memfds_outlives_a_page_client_that_is_killed() {
    lives_on(2, Backing::Memfd, 0, Trouble::ClientKilled);
}
