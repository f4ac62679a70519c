//! What breaks after the guest was given away costs it time, and nothing else: the link, the
//! page-client, and afterimage-qemu itself, killed in the middle of the move.

use afterimage_tools::require;
use serde_json::{Value, json};

use crate::support::{
    Backing, Daemon, Network, Qemu, SERVER, Scene, Side, Survival, can_move, check_lived_on,
};

const ROUNDS: usize = 3;
/// Where `send` is killed, and whether it has given the guest away then.
const DEATHS: [(&str, Gone); 5] = [
    ("source:+SendState", Gone::No),
    ("source:Persist+Given", Gone::No),
    ("source:Send(Go", Gone::Yes),
    ("source:Acknowledge#20", Gone::Yes),
    (NEARLY_OVER, Gone::Yes),
];
/// Before the source knows that the destination has everything.
const NEARLY_OVER: &str = "source:Persist+Finished";
/// Slow enough for something to happen in the middle.
const SLOW: &str = "25M";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    No,
    Yes,
}

/// A guest that runs at the destination, while its memory is on its way.
struct Moving {
    scene: Scene,
    network: Network,
    source: Qemu,
    client: Daemon,
    destination: Qemu,
    send: Daemon,
    receive: Daemon,
}

impl Moving {
    fn start(vcpus: usize, backing: Backing, client: &[&str]) -> Self {
        let scene = Scene::new(vcpus, backing);
        let network = Network::to(scene.path("pages"));
        let source = Qemu::start(&scene, Side::Source);
        source.serial.wait_rounds(vcpus, ROUNDS);
        let address = network.address.clone();
        let client = scene.client(&[&["--connect", address.as_str()], client].concat());
        let destination = Qemu::start(&scene, Side::Destination);
        let mut receive = scene.receive();
        receive.line("waiting for the guest");
        let mut moving =
            Self { send: send(&scene), scene, network, source, client, destination, receive };
        moving.send.line("the guest runs at the destination");
        moving.receive.line("the guest runs here");
        moving
    }

    /// All of it arrives, and the guest has lived on.
    fn finish(self) -> (Value, Value) {
        let Self { scene, mut source, client, mut destination, send, receive, .. } = self;
        let (status, sent, lines) = send.report();
        assert_eq!((status, &sent["outcome"]), (0, &Value::from("finished")), "{lines:#?}");
        let (status, _, lines) = receive.report();
        assert_eq!(status, 0, "{lines:#?}");
        let (status, served, _) = client.report();
        assert_eq!((status, &served["pages_complete"]), (0, &served["pages_total"]), "{served:#}");
        destination.serial.wait_rounds(scene.vcpus, ROUNDS);
        assert_eq!(destination.status(), "running");
        assert_eq!(source.status(), "postmigrate");
        let (before, after) = (source.last_words(), destination.last_words());
        check_lived_on(&before, &after, scene.vcpus, ROUNDS as u32);
        (sent, served)
    }
}

fn send(scene: &Scene) -> Daemon {
    let state = scene.path("state").display().to_string();
    scene.send(&["--state", &state, "--bandwidth", SLOW])
}

#[test]
fn a_link_that_is_cut_in_the_middle_costs_nothing_but_time() {
    if !require::qemu_system() {
        return;
    }
    let mut moving = Moving::start(2, Backing::File, &[]);
    for _ in 0..3 {
        assert!(moving.network.cut() > 0, "there were connections");
        moving.send.line("page-client is away");
        moving.send.line("page-client is attached");
        moving.client.line("a source is attached");
    }
    let (sent, served) = moving.finish();
    for report in [sent, served] {
        let recoveries = report["recoveries"].as_u64().unwrap();
        assert!(recoveries > 0, "{report:#}");
    }
}

#[test]
fn a_page_client_killed_in_the_middle_goes_on_where_it_was() {
    for backing in [Backing::File, Backing::Memfd] {
        if !can_move(backing) {
            continue;
        }
        let survival = Survival::start();
        let more: Vec<_> = survival.arguments.iter().map(String::as_str).collect();
        let mut moving = Moving::start(1, backing, &more);
        moving.client.kill();
        let address = moving.network.address.clone();
        moving.client = moving.scene.client(&[&["--connect", &address], &more[..]].concat());
        moving.receive.line("page-client is there again");
        let (_, served) = moving.finish();
        assert_eq!(served["taken_over"], true, "{served:#}");
        let fetched = |what: &str| served[what].as_u64().unwrap();
        assert!(fetched("pages_background") + fetched("pages_requested") > 0, "{served:#}");
    }
}

#[test]
fn afterimage_qemu_killed_in_the_middle_goes_on_where_it_was() {
    if !can_move(Backing::Memfd) {
        return;
    }
    let mut moving = Moving::start(2, Backing::Memfd, &[]);
    moving.send.kill();
    moving.send = send(&moving.scene);
    moving.send.line("the guest was given to the destination");
    moving.receive.kill();
    moving.receive = moving.scene.receive();
    moving.finish();
}

#[test]
fn a_guest_that_was_paused_stays_so_though_receive_is_killed_when_it_is_there() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(1, Backing::File);
    let network = Network::to(scene.path("pages"));
    let mut source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(1, ROUNDS);
    source.qmp.execute("stop", &json!({})).unwrap();
    let client = scene.client(&["--connect", &network.address]);
    let mut destination = Qemu::start(&scene, Side::Destination);
    let mut receive = scene.receive();
    receive.line("waiting for the guest");
    let send = send(&scene);
    receive.line("paused as it was");
    receive.kill();
    let mut receive = scene.receive();
    receive.line("this side's");
    assert!(receive.line("the guest ").contains("paused as it was"));
    for daemon in [send, receive, client] {
        let (status, _, lines) = daemon.end();
        assert_eq!(status, 0, "{lines:#?}");
    }
    assert_eq!(destination.status(), "paused");
    destination.qmp.execute("cont", &json!({})).unwrap();
    destination.serial.wait_rounds(1, ROUNDS);
    check_lived_on(&source.last_words(), &destination.last_words(), 1, ROUNDS as u32);
}

#[test]
fn a_guest_that_was_given_goes_on_at_the_source_if_the_other_qemu_dies_before_it_ran() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(1, Backing::File);
    let survival = Survival::start();
    let pages = scene.unix("pages");
    let mut served: Vec<_> = survival.arguments.iter().map(String::as_str).collect();
    served.extend(["--connect", &pages]);
    let mut source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(1, ROUNDS);
    let mut client = scene.client_until(Some("destination:Persist+Running"), &served);
    let destination = Qemu::start(&scene, Side::Destination);
    let mut receive = scene.receive();
    receive.line("waiting for the guest");
    let mut send = send(&scene);
    assert!(client.is_killed());
    send.line("the guest is given to the destination");
    destination.daemon.kill();

    let (status, report, lines) = scene.client(&served).report();
    assert_eq!((status, &report["outcome"]), (5, &Value::from("vmm_died")), "{lines:#?}");
    let (status, _, lines) = receive.report();
    assert!([1, 3].contains(&status), "it has heard of it, or QEMU has ended: {lines:#?}");
    let (status, report, lines) = send.report();
    assert_eq!((status, &report["outcome"]), (3, &Value::from("not_moved")), "{lines:#?}");
    assert!(report["error"].as_str().unwrap().contains("has refused it"), "{report:#}");
    source.serial.wait_rounds(1, ROUNDS);
    assert_eq!(source.status(), "running");
    check_lived_on(&source.last_words(), &[], 1, 0);
}

#[test]
fn a_guest_whose_destination_was_fenced_and_lives_is_stopped_there() {
    if !require::qemu_system() {
        return;
    }
    let scene = Scene::new(1, Backing::File);
    let mut source = Qemu::start(&scene, Side::Source);
    source.serial.wait_rounds(1, ROUNDS);
    let client = scene.client(&["--connect", &scene.unix("pages")]);
    let mut destination = Qemu::start(&scene, Side::Destination);
    let mut receive = scene.receive();
    receive.line("waiting for the guest");
    let state = scene.path("state").display().to_string();
    assert!(scene.send_until(Some(NEARLY_OVER), &["--state", &state]).is_killed());
    receive.line("every page is in place");
    assert_eq!(destination.status(), "running");

    let (status, _, lines) = Daemon::start(SERVER, &["--fence", "--state", &state]).end();
    assert_eq!(status, 0, "{lines:#?}");
    let (pages, memory) = (scene.unix("pages"), scene.path("source.memory").display().to_string());
    let more = ["--state", &state, "--listen", &pages, "--memory", &memory];
    let server = Daemon::start(SERVER, &more);
    let (status, _, lines) = receive.end();
    assert_eq!(status, 3, "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains("it was stopped")), "{lines:#?}");
    assert_eq!(destination.status(), "paused");
    // As of the switchover. QEMU there has the disk until it ends.
    destination.daemon.kill();
    source.qmp.execute("cont", &json!({})).unwrap();
    source.serial.wait_rounds(1, ROUNDS);
    check_lived_on(&source.last_words(), &[], 1, 0);
    drop((server, client));
}

/// What is changed for a migration.
fn settings_of(qemu: &mut Qemu) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|query| qemu.qmp.execute(query, &json!({})).unwrap())
}

#[test]
fn send_killed_at_any_step_lets_the_guest_live_on_exactly_one_side() {
    if !require::qemu_system() {
        return;
    }
    for (step, gone) in DEATHS {
        println!("{step}");
        let scene = Scene::new(2, Backing::File);
        let mut source = Qemu::start(&scene, Side::Source);
        source.serial.wait_rounds(scene.vcpus, ROUNDS);
        let settings = settings_of(&mut source);
        let client = scene.client(&["--connect", &scene.unix("pages")]);
        let mut destination = Qemu::start(&scene, Side::Destination);
        let mut receive = scene.receive();
        receive.line("waiting for the guest");
        let state = scene.path("state").display().to_string();
        let more = ["--state", &state, "--bandwidth", "100M"];
        assert!(scene.send_until(Some(step), &more).is_killed(), "{step}");
        assert_eq!(source.status(), "postmigrate", "{step}");

        let (status, report, lines) = scene.send(&more).report();
        let (client_status, ..) = client.report();
        let (receive_status, ..) = receive.report();
        match gone {
            Gone::Yes => {
                assert_eq!((status, client_status, receive_status), (0, 0, 0), "{step} {lines:#?}");
                assert_eq!(report["outcome"], "finished", "{report:#}");
                destination.serial.wait_rounds(scene.vcpus, ROUNDS);
                assert_eq!(source.status(), "postmigrate", "{step}");
                assert_eq!(destination.status(), "running", "{step}");
            }
            Gone::No => {
                assert_eq!((status, client_status, receive_status), (3, 3, 3), "{step} {lines:#?}");
                assert_eq!(report["outcome"], "not_moved", "{report:#}");
                source.serial.wait_rounds(scene.vcpus, ROUNDS);
                assert_eq!(source.status(), "running", "{step}");
                assert_ne!(destination.status(), "running", "{step}");
                assert_eq!(settings_of(&mut source), settings, "{step}");
            }
        }
        let (before, after) = (source.last_words(), destination.last_words());
        let more = if gone == Gone::Yes { ROUNDS as u32 } else { 0 };
        check_lived_on(&before, &after, scene.vcpus, more);
    }
}
