//! Either helper is killed at each step of the protocol, and everything goes on.
//!
//! The commands are built with the engine's feature `steps` here: `AFTERIMAGE_KILL_AT` names
//! the step at which the process ends itself with SIGKILL.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage_tools::attachment::{AttachError, Attachment, AttachmentEvent};

use crate::host::start_keeper;
use crate::support::{CLIENT, Daemon, LIMIT, PAGE, SERVER, check, discard, register, write_image};

const PAGES: u64 = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Client,
    Server,
}

/// The steps of page-client, and which memory passes by them.
const OF_CLIENT: &[(&str, &[bool])] = &[
    ("destination:Persist+Waiting", &[true]),
    ("destination:Send(Attach", &[true]),
    ("destination:SendReceived", &[true]),
    ("destination:OpenData", &[true]),
    ("destination:Event(StateComplete", &[true]),
    ("destination:Send(Ready", &[true]),
    ("destination:Persist+Running", &[true]),
    ("destination:Event(Run", &[true]),
    ("destination:Send(Running", &[true]),
    ("destination:ZeroClaimed", &[true, false]),
    ("destination:Looked", &[false]),
    ("destination:Looked#20", &[false]),
    ("destination:Copied", &[false]),
    ("destination:Copied#9", &[false]),
    ("destination:Written", &[true]),
    ("destination:Completed", &[true]),
    ("destination:Completed#9", &[true]),
    ("destination:EventsRead#3", &[true, false]),
    ("destination:EventsDone#5", &[true, false]),
    ("destination:EventsDone#40", &[true, false]),
    ("destination:Send(Complete", &[true, false]),
];

const OF_SERVER: &[&str] = &[
    "source:Persist+Owner",
    "source:Greet",
    "source:Send(Offer",
    "source:ResetBook",
    "source:Received",
    "source:Send(Begin",
    "source:OpenData",
    "source:SendState",
    "source:Event(Ready",
    "source:Persist+Given",
    "source:Event(Given",
    "source:Send(Go",
    "source:Event(Running",
    "source:DropState",
    "source+Answers",
    "source+Answers#30",
    "source:Acknowledge",
    "source:Persist+Finished",
    "source:Send(Bye",
];

/// Those of a source that frees what has arrived.
const OF_RELEASE: &[&str] = &["source:Persist+Released", "source:Release"];

/// A host with everything on it.
struct Scene {
    directory: tempfile::TempDir,
    victim: Victim,
    step: String,
    releases: bool,
    _keeper: Daemon,
}

impl Scene {
    fn new(victim: Victim, step: &str, releases: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        write_image(&directory.path().join("ram"), PAGES);
        let address = format!("unix:{}", directory.path().join("keeper").display());
        let keeper = start_keeper(&address);
        Self { directory, victim, step: step.to_owned(), releases, _keeper: keeper }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    fn plain(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn start(&self, who: Victim, dies: bool) -> Daemon {
        let step = (dies && who == self.victim).then_some(self.step.as_str());
        match who {
            Victim::Server => {
                let (listen, ram, state) =
                    (self.unix("pages"), self.plain("ram"), self.plain("server.state"));
                let mut arguments =
                    vec!["--listen", &listen, "--memory", &ram, "--state", &state, "--json"];
                arguments.extend(["--bandwidth", "4M"]);
                if self.releases {
                    arguments.push("--release");
                }
                let mut server = Daemon::start_with(SERVER, &arguments, step);
                if step.is_none() {
                    server.line("listening on");
                }
                server
            }
            Victim::Client => {
                let (attach, pages, keeper, state) = (
                    self.unix("attach"),
                    self.unix("pages"),
                    self.unix("keeper"),
                    self.plain("client.state"),
                );
                let arguments = [
                    "--attach",
                    &attach,
                    "--connect",
                    &pages,
                    "--keeper",
                    &keeper,
                    "--guest",
                    "vm",
                    "--state",
                    &state,
                    "--json",
                ];
                Daemon::start_with(CLIENT, &arguments, step)
            }
        }
    }
}

/// Attaches, again if page-client has died over it.
fn attach(scene: &Scene, memory: &afterimage::DestinationMemory) -> Attachment {
    let begun = Instant::now();
    loop {
        match Attachment::attach(&scene.path("attach"), "guest", memory) {
            Ok(attachment) => return attachment,
            Err(AttachError::Refused { reason }) => panic!("{}: refused: {reason}", scene.step),
            Err(error) => assert!(begun.elapsed() < LIMIT, "{}: {error}", scene.step),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn goes_on(victim: Victim, step: &str, has_file: bool, releases: bool) {
    let scene = Scene::new(victim, step, releases);
    let mut server = scene.start(Victim::Server, true);
    let mut client = scene.start(Victim::Client, true);
    let (map, memory) = register(PAGES, has_file);
    let attachment = attach(&scene, &memory);
    let (mut has_died, mut guest, begun) = (false, None, Instant::now());
    let mut said = BTreeSet::new();
    loop {
        assert!(begun.elapsed() < LIMIT, "{victim:?} {step}, file {has_file}: {said:?}");
        let dying = if victim == Victim::Client { &mut client } else { &mut server };
        if !has_died && let Some(status) = dying.child.try_wait().unwrap() {
            assert_eq!(status.signal(), Some(9), "{step}: {status}; {:#?}", dying.lines_so_far());
            has_died = true;
            *dying = scene.start(victim, false);
        }
        let Some(event) = attachment.next(Duration::from_millis(2)) else { continue };
        said.insert(format!("{event:?}"));
        match event {
            AttachmentEvent::State(_) => attachment.ready(),
            AttachmentEvent::Run => {
                assert!(guest.is_none(), "{step}: the guest was told to run twice");
                let map = Arc::clone(&map);
                guest = Some(thread::spawn(move || works(&map)));
            }
            AttachmentEvent::Finished if has_died => break,
            AttachmentEvent::NotHere(reason) | AttachmentEvent::Failed(reason) => {
                panic!("{step}: {reason}")
            }
            // The victim dies of what it does last.
            _ => {}
        }
    }
    guest.expect("it runs").join().expect("every page is what it must be");
    works(&map);
    let (status, _, lines) = client.end();
    assert_eq!(status, 0, "{step}: {lines:#?}");
    let (status, _, lines) = server.end();
    assert_eq!(status, 0, "{step}: {lines:#?}");
    memory.all_arrived();
}

/// What the guest does: gives some pages up, and reads all.
fn works(map: &memmap2::MmapRaw) {
    for page in (0..PAGES).step_by(11) {
        discard(map, page);
    }
    for page in 0..PAGES {
        if page % 11 == 0 {
            assert_eq!(
                crate::support::at(map, page, 5).load(std::sync::atomic::Ordering::Relaxed),
                0
            );
        } else {
            check(map, page);
        }
    }
    assert!(map.len() as u64 == PAGES * PAGE);
}

#[test]
fn page_client_may_die_at_each_step() {
    for (step, memories) in OF_CLIENT {
        for has_file in *memories {
            goes_on(Victim::Client, step, *has_file, false);
        }
    }
}

#[test]
fn page_server_may_die_at_each_step() {
    for step in OF_SERVER {
        goes_on(Victim::Server, step, true, false);
    }
}

#[test]
fn page_server_may_die_at_each_step_of_a_release() {
    for step in OF_RELEASE {
        goes_on(Victim::Server, step, false, true);
    }
}
