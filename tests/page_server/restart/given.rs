//! Guests that VMMs gave, which the keeper has.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{
    Background, Endpoint, GuestAddress, Listener, Plaintext, Source, SourceMemory, SourceOptions,
    SourceRegion, SourceStateFile,
};
use afterimage_tools::handoff::Piece;
use afterimage_tools::keeper::{Keeper, KeptGuest};

use super::scene::{LENGTH, PAGES, Reader, Scene, filled, kill_at, resumed, state};
use crate::support::{LIMIT, argument, line_of, role};

#[test]
fn a_given_guest_goes_on_after_every_death() {
    let scene = Scene::new();
    let _keeper = scene.keeper();
    let serve = || scene.serve_kept(&["--bandwidth", "on-request"]);
    let mut server = serve();
    server.line("can hand its guest over");
    drop(server);
    let mut server = serve();
    server.line("can hand its guest over");
    let taken = scene.give(80).unwrap();
    assert_eq!(scene.kept().len(), 1, "it is kept before the VMM hears that it was taken");
    // The VMM's files are closed: only server and keeper have the guest.
    drop(server);
    let mut server = serve();
    assert_eq!(resumed(&mut server), (taken.session.clone(), 0));
    let reader = Reader::start(&scene.address, 80);
    for line in ["is attached", "is given", "runs at the destination"] {
        kill_at(server, line);
        server = serve();
        assert_eq!(resumed(&mut server).0, taken.session);
    }
    for pages in (1..6).map(|sixth| sixth * PAGES / 6) {
        reader.until_read(pages);
        drop(server);
        server = serve();
        assert_eq!(resumed(&mut server).0, taken.session);
    }
    let fetched = reader.finish(80);
    assert_eq!(fetched.state(), state());
    let (status, report, lines) = server.end();
    assert_eq!((status, report["outcome"].as_str()), (0, Some("finished")), "{lines:#?}");
    assert!(scene.kept().is_empty(), "what is over is let go");
    let text = fs::read_to_string(scene.path("state")).unwrap();
    assert!(text.contains("ownership=finished") && text.contains("note.bye=yes"), "{text}");
    let (status, _, lines) = serve().end();
    assert!(status == 0 && lines.iter().any(|it| it.contains("is finished")), "{lines:#?}");
}

/// When a server dies during a hand-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// From before the VMM connects until after it has been told.
    AtAnyTime,
    /// Mostly before the VMM is told.
    WhenItIsKept,
    /// The keeper stands still.
    BeforeItIsKept,
}

/// Whenever the server dies during a hand-over, the guest is the VMM's or the successor's.
#[test]
fn a_guest_has_one_owner_whenever_the_server_dies() {
    let (mut kept, mut taken) = (0, 0);
    for round in 0..12_u64 {
        let deaths = [Death::AtAnyTime, Death::WhenItIsKept, Death::BeforeItIsKept];
        let death = deaths[round as usize % deaths.len()];
        if is_taken_although_the_server_dies(death, Duration::from_micros(round * 400)) {
            assert_ne!(death, Death::BeforeItIsKept, "no successor can have found it");
            taken += 1;
        } else {
            assert_ne!(death, Death::WhenItIsKept, "the successor tells the VMM");
            kept += 1;
        }
    }
    assert!(kept >= 4 && taken >= 4, "the VMM kept it {kept} times, it was taken {taken} times");
}

fn is_taken_although_the_server_dies(death: Death, time: Duration) -> bool {
    let scene = Arc::new(Scene::new());
    let keeper_process = scene.keeper();
    let mut server = scene.serve_kept(&[]);
    server.line("can hand its guest over");
    let mut keeper = Keeper::connect(&scene.path("keeper.sock"), "a test").unwrap();
    if death == Death::BeforeItIsKept {
        keeper_process.stop();
    }
    let clients = keeper_process.clients();
    let vmm = Arc::clone(&scene);
    let giver = thread::spawn(move || vmm.give(81));
    let begun = Instant::now();
    let mut is_time = || match death {
        Death::WhenItIsKept => !keeper.list().unwrap().is_empty(),
        // The server has the guest, and waits for the keeper.
        Death::BeforeItIsKept => keeper_process.clients() > clients,
        Death::AtAnyTime => begun.elapsed() >= time,
    };
    while !is_time() && !giver.is_finished() {
        assert!(begun.elapsed() < LIMIT, "the time does not come for {death:?}");
        std::hint::spin_loop();
    }
    drop(server);
    keeper_process.go_on();
    // What the dead one has left tells a VMM that waits that its guest was taken.
    let mut server = scene.serve_kept(&[]);
    server.line("listening on");
    let is_taken = giver.join().unwrap().is_ok();
    if !is_taken {
        assert!(scene.kept().is_empty(), "two have the guest");
        scene.give(81).unwrap();
    }
    Reader::start(&scene.address, 81).finish(81);
    assert_eq!(server.end().0, 0);
    assert!(scene.kept().is_empty());
    is_taken
}

#[test]
fn a_vmm_that_still_waits_is_told_by_the_successor() {
    let scene = Scene::new();
    let _keeper = scene.keeper();
    // As if a server had been killed when the keeper had the guest.
    let file = SourceStateFile::open(&scene.path("state")).unwrap();
    let memory = filled(82);
    let region = SourceRegion::file(GuestAddress(0), memory.try_clone().unwrap().into(), 0, LENGTH);
    let layout = SourceMemory::new(vec![region.unwrap()]).unwrap().layout().clone();
    let session = file.begin(&layout, SourceStateFile::fresh()).unwrap().session;
    drop(file);
    let (mut vmm, other) = UnixStream::pair().unwrap();
    store(&scene, &memory, session, Some(&other));
    drop((memory, other));
    let server = scene.serve_kept(&[]);
    let mut said = Vec::new();
    // Its end comes because nobody has the connection any more.
    vmm.read_to_end(&mut said).unwrap();
    let said = String::from_utf8_lossy(&said[4..]).into_owned();
    assert!(said.contains("taken") && said.contains(&session.to_string()), "{said}");
    let fetched = Reader::start(&scene.address, 82).finish(82);
    assert_eq!(fetched.state(), state());
    assert_eq!(server.end().0, 0);
}

fn store(scene: &Scene, memory: &File, session: afterimage::SessionId, vmm: Option<&UnixStream>) {
    let piece =
        Piece { guest_address: GuestAddress(0), length: LENGTH, file: memory.as_fd(), offset: 0 };
    let mut keeper = Keeper::connect(&scene.path("keeper.sock"), "a test").unwrap();
    KeptGuest::store(&mut keeper, "web1", session, "a VMM", &[piece], &state()).unwrap();
    if let Some(vmm) = vmm {
        keeper.add("web1", &[("handoff", vmm.as_fd())]).unwrap();
    }
    keeper.release("web1").unwrap();
}

/// A VMM that links the engine, and keeps its guest at the keeper from the switchover on.
#[test]
fn role_linked_vmm() {
    let Some(directory) = argument().map(PathBuf::from) else { return };
    let memory = filled(83);
    let region = SourceRegion::file(GuestAddress(0), memory.try_clone().unwrap().into(), 0, LENGTH);
    let served = Arc::new(SourceMemory::new(vec![region.unwrap()]).unwrap());
    let mut options = SourceOptions::default();
    options.background = Background::OnRequest;
    (options.record, options.ledger) =
        SourceStateFile::open_or_create(&directory.join("state"), served.layout()).unwrap();
    let session = options.record.session;
    let address = afterimage::Address::Unix(directory.join("pages.sock"));
    let listener = Listener::bind(&address, Plaintext::LoopbackOnly).unwrap();
    let (source, _events) = Source::start(served, Endpoint::Listen(listener), options).unwrap();
    let mut keeper = Keeper::connect(&directory.join("keeper.sock"), "a VMM").unwrap();
    let piece =
        Piece { guest_address: GuestAddress(0), length: LENGTH, file: memory.as_fd(), offset: 0 };
    KeptGuest::store(&mut keeper, "web1", session, "a VMM", &[piece], &state()).unwrap();
    source.switch_over(state()).unwrap();
    println!("\nserving");
    loop {
        thread::park();
    }
}

#[test]
fn a_page_server_takes_over_from_a_linked_vmm_that_died() {
    let scene = Scene::new();
    let _keeper = scene.keeper();
    let directory = scene.directory.path().to_str().unwrap();
    let mut vmm = role("restart::given::role_linked_vmm", directory).spawn().unwrap();
    line_of(&mut vmm, "serving");
    let reader = Reader::start(&scene.address, 83);
    reader.until_read(PAGES / 3);
    let keeper = scene.unix("keeper.sock");
    let takes_over = || scene.serve(&["--keeper", &keeper, "--guest", "web1"]);
    // Not while it lives.
    let (status, report, _) = takes_over().end();
    let error = report["error"].as_str().unwrap();
    let holder = format!("process {}", vmm.id());
    assert!(status == 1 && error.contains("in use by") && error.contains(&holder), "{error}");
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    let mut server = takes_over();
    resumed(&mut server);
    let fetched = reader.finish(83);
    assert_eq!(fetched.state(), state());
    assert_eq!(server.end().0, 0);
    assert!(scene.kept().is_empty());
}

#[test]
fn a_guest_is_stored_again_when_the_keeper_comes_back() {
    let scene = Scene::new();
    let keeper = scene.keeper();
    let serve = || scene.serve_kept(&["--bandwidth", "on-request"]);
    let mut server = serve();
    server.line("can hand its guest over");
    scene.give(84).unwrap();
    drop(keeper);
    let line = server.line("does not hold the guest");
    assert!(line.contains("warning"), "{line}");
    let _keeper = scene.keeper();
    server.line("holds the guest again");
    let reader = Reader::start(&scene.address, 84);
    reader.until_read(10);
    drop(server);
    let server = serve();
    reader.finish(84);
    assert_eq!(server.end().0, 0);
    assert!(scene.kept().is_empty());
}
