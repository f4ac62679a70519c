//! What becomes of a guest when the process at one of its ends dies: the promises of
//! docs/reliability.md that need no other tool.
//!
//! Invariant: the guest runs at one side, with the memory that it had there, or nowhere.

mod common;

use afterimage::{
    Background, Destination, DestinationEvent, DestinationLedger, DestinationOwnership,
    DestinationStateFile, DiscardNotice, Endpoint, GuestAddress, MemoryLifetime, Release,
    ReleaseLedger, SourceEvent, SourceMemory, SourceRegion, StateSection,
};
use common::children::{Role, argument, say};
use common::counters::{COUNTER, Counters, LOCK};
use common::{Content, Kind, LoneDestination, LoneSource, Memory, Random, Setup, Toucher};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIB: u64 = 1 << 20;
const KINDS: [(Kind, u64); 2] = [(Kind::Anonymous, 8 * MIB), (Kind::Memfd, 8 * MIB)];
const SEED: u64 = 4242;
/// Long enough for a machine that tests several things at once.
const SILENCE: Duration = Duration::from_secs(1);

fn state() -> Vec<StateSection> {
    vec![StateSection { name: "cpu".into(), version: 2, bytes: vec![3; 1 << 20] }]
}

/// Plays the VMM of a destination, and says what happens to it. Its guest works on the lower
/// half of its memory, so that it never has all of it.
#[test]
fn child_destination() {
    let Some(given) = argument("child_destination") else { return };
    let parts: Vec<_> = given.split(' ').collect();
    let [address, path, stops_at] = parts[..] else { panic!("three parts: {given}") };
    let (new, twin) = (Memory::new(&KINDS), Memory::new(&KINDS));
    twin.fill(SEED, Content::Dense);
    let memory = new.register(DiscardNotice::Called).expect("registered memory");
    let file = DestinationStateFile::open(Path::new(path)).expect("a state file");
    let mut options = common::session::destination_options(&Setup::default());
    options.record = file.begin(memory.layout(), DestinationStateFile::fresh()).expect("a record");
    options.ledger = if stops_at == "record" { dies_before_it_runs(&file) } else { file.ledger() };
    let endpoint = Endpoint::Connect(address.parse().expect("an address"));
    let (destination, events) =
        Destination::start(memory, endpoint, options).expect("a destination");
    let is_stopped = Arc::new(AtomicBool::new(false));
    while let Some(event) = events.next() {
        match event {
            DestinationEvent::Attached(_) if stops_at == "refuses" => {
                destination.refuse().expect("it does not run here");
            }
            DestinationEvent::State(sections) => {
                assert_eq!(sections, state());
                say("state");
                if !matches!(stops_at, "state" | "refuses") {
                    destination.ready().expect("may be ready");
                }
            }
            DestinationEvent::Run => {
                say("run");
                for seed in 0..3 {
                    let (new, twin, stop) =
                        (Arc::clone(&new), Arc::clone(&twin), Arc::clone(&is_stopped));
                    std::thread::spawn(move || works(&new, &twin, seed, &stop));
                }
            }
            DestinationEvent::Fenced | DestinationEvent::Refused | DestinationEvent::Ended(_) => {
                is_stopped.store(true, Ordering::Relaxed);
                assert!(destination.ready().is_err(), "it must not run any more");
                say(match event {
                    DestinationEvent::Fenced => "fenced",
                    DestinationEvent::Refused => "refused",
                    _ => "ended",
                });
            }
            DestinationEvent::Failed(reason) => say(&format!("failed: {reason}")),
            _ => {}
        }
    }
}

/// A state file in which it is never recorded that the guest runs: whoever waits for that is
/// to be killed.
fn dies_before_it_runs(file: &DestinationStateFile) -> DestinationLedger {
    let file = file.clone();
    DestinationLedger::new(move |record| {
        if record.ownership == DestinationOwnership::Running {
            say("asked to run");
            loop {
                std::thread::park();
            }
        }
        file.write(record).map_err(std::io::Error::other)
    })
}

/// A thread of the guest: it verifies pages and writes to them.
fn works(new: &Memory, twin: &Memory, seed: u64, stop: &AtomicBool) {
    let mut random = Random::new(seed);
    for round in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let page = random.below(new.small_pages() / 2);
        for word in [2, 77, 511] {
            let (here, there) = (new.word(page, word), twin.word(page, word));
            let (here, there) = (here.load(Ordering::Relaxed), there.load(Ordering::Relaxed));
            assert_eq!(here, there, "word {word} of page {page}");
        }
        new.word(page, COUNTER).fetch_add(1, Ordering::Relaxed);
        if round == 100 {
            say("has worked");
        }
    }
}

fn setup() -> Setup {
    Setup { kinds: KINDS.to_vec(), seed: SEED, content: Content::Dense, ..Setup::default() }
}

/// A source in this process, whose guest has run here.
struct Host {
    side: LoneSource,
    counters: Arc<Counters>,
    twin: Arc<Memory>,
    random: Random,
    address: String,
    directory: tempfile::TempDir,
}

fn free_locks(memory: &Memory) {
    for page in 0..memory.small_pages() {
        memory.word(page, LOCK).store(0, Ordering::Relaxed);
    }
}

impl Host {
    fn start(test: &str, release: Release) -> Self {
        let listener = common::session::listen();
        let address = listener.address().to_string();
        let side = LoneSource::start(&setup(), Endpoint::Listen(listener), |options| {
            (options.silence, options.background) = (SILENCE, Background::OnRequest);
            options.release = release;
        });
        let twin = Memory::new(&KINDS);
        twin.fill(SEED, Content::Dense);
        let counters = Counters::prepare(&twin, Arc::clone(&side.old));
        free_locks(&side.old);
        let directory = tempfile::tempdir().expect("a directory");
        let random = Random::seeded(test);
        let mut host = Self { side, counters, twin, random, address, directory };
        host.guest_runs();
        host
    }

    /// The guest runs on this side for a while; before and afterwards its memory is what it
    /// must be.
    fn guest_runs(&mut self) {
        self.counters.check(&self.twin);
        for thread in self.counters.start(4, 500, &mut self.random) {
            thread.finish("a guest thread that counts", || self.side.dump());
        }
        self.counters.check(&self.twin);
    }

    fn destination(&self, stops_at: &str) -> Role {
        let state = self.directory.path().join("destination");
        let given = format!("{} {} {stops_at}", self.address, state.display());
        Role::start("child_destination", &given)
    }

    /// To a destination that dies when it has been told to run, before that is on record.
    fn gives_and_loses(&self) {
        self.side.switch_over(state());
        let role = self.destination("record");
        assert_eq!(role.hear("device state"), "state");
        assert_eq!(role.hear("the go"), "asked to run");
        self.side.wait(&SourceEvent::Given);
        self.loses(role);
    }

    /// To a destination where the guest has worked, as the source knows.
    fn hands_over(&self) -> Role {
        self.side.switch_over(state());
        let role = self.destination("nowhere");
        assert_eq!(role.hear("device state"), "state");
        assert_eq!(role.hear("the go"), "run");
        assert_eq!(role.hear("the guest's work"), "has worked");
        self.side.wait(&SourceEvent::Running);
        role
    }

    /// The destination dies, and the source has noticed.
    fn loses(&self, role: Role) {
        drop(role);
        self.side.wait(&SourceEvent::Disconnected);
    }

    fn recorded(&self) -> String {
        let text = std::fs::read_to_string(self.directory.path().join("destination"));
        text.expect("a state file")
    }

    /// The guest is this side's again and goes on; the destination is started again, is told
    /// so, and stays as it is.
    fn goes_on(&mut self, told: &str) {
        self.side.wait(&SourceEvent::Reclaimed);
        self.guest_runs();
        let role = self.destination("nowhere");
        assert_eq!(role.hear("what it is told"), told);
        self.guest_runs();
        assert_eq!(role.heard(), None, "it has nothing to do");
        assert!(!self.side.events.rest().contains(&SourceEvent::Running), "{}", self.side.dump());
    }
}

#[test]
fn a_guest_that_was_not_given_goes_on_at_once_when_its_destination_dies() {
    prologue!("a_guest_that_was_not_given");
    let mut host = Host::start("a_guest_that_was_not_given", Release::Keep);
    host.side.switch_over(state());
    let role = host.destination("state");
    assert_eq!(role.hear("device state"), "state");
    host.loses(role);
    host.side.source.reclaim().expect("it was not given away");
    host.goes_on("ended");
}

#[test]
fn a_given_guest_comes_back_by_agreement_when_its_destination_dies_before_it_ran() {
    prologue!("a_given_guest_comes_back_by_agreement");
    let mut host = Host::start("a_given_guest_comes_back_by_agreement", Release::Keep);
    host.gives_and_loses();
    host.side.source.reclaim().expect("it may be asked for");
    assert!(host.recorded().contains("ownership=waiting"), "{}", host.recorded());
    assert!(!host.side.events.rest().contains(&SourceEvent::Reclaimed), "nobody has agreed");
    let role = host.destination("nowhere");
    assert_eq!(role.hear("the answer"), "refused");
    assert!(host.recorded().contains("ownership=refused"), "{}", host.recorded());
    drop(role);
    host.goes_on("ended");
}

#[test]
fn a_given_guest_comes_back_unasked_when_the_next_process_at_its_destination_refuses_it() {
    prologue!("a_given_guest_comes_back_unasked");
    let mut host = Host::start("a_given_guest_comes_back_unasked", Release::Keep);
    host.gives_and_loses();
    let role = host.destination("refuses");
    while let line = role.hear("its refusal")
        && line != "refused"
    {
        // It may be all there before that is on record.
        assert_eq!(line, "state");
    }
    assert!(host.recorded().contains("ownership=refused"), "{}", host.recorded());
    host.side.wait(&SourceEvent::Refused);
    drop(role);
    host.goes_on("ended");
}

#[test]
fn a_given_guest_goes_on_after_a_fence_when_its_destination_dies_before_it_ran() {
    prologue!("a_given_guest_goes_on_after_a_fence");
    let mut host = Host::start("a_given_guest_goes_on_after_a_fence", Release::Keep);
    host.gives_and_loses();
    host.side.source.fence().expect("the session is not over");
    host.goes_on("fenced");
}

#[test]
fn a_guest_is_rolled_back_to_the_switchover_when_its_destination_dies_after_it_ran() {
    prologue!("a_guest_is_rolled_back");
    let mut host = Host::start("a_guest_is_rolled_back", Release::Keep);
    host.loses(host.hands_over());
    let denied = host.side.source.reclaim().expect_err("it has run").to_string();
    assert!(denied.contains("past the point of no return"), "{denied}");
    host.side.source.fence().expect("the session is not over");
    host.goes_on("fenced");
}

#[test]
fn a_destination_that_was_taken_for_dead_stops_when_it_is_back() {
    prologue!("a_destination_that_was_taken_for_dead");
    let mut host = Host::start("a_destination_that_was_taken_for_dead", Release::Keep);
    let role = host.hands_over();
    let id = Pid::from_raw(role.id() as i32);
    kill(id, Signal::SIGSTOP).expect("a child");
    host.side.wait(&SourceEvent::Disconnected);
    host.side.source.fence().expect("the session is not over");
    host.side.wait(&SourceEvent::Reclaimed);
    host.guest_runs();
    kill(id, Signal::SIGCONT).expect("a child");
    while let line = role.hear("what it is told")
        && line != "fenced"
    {
        // Said before it was stopped.
        assert_eq!(line, "has worked");
    }
    host.guest_runs();
}

#[test]
fn a_guest_of_which_pages_were_freed_is_not_rolled_back() {
    prologue!("a_guest_of_which_pages_were_freed");
    let host =
        Host::start("a_guest_of_which_pages_were_freed", Release::Free(ReleaseLedger::volatile()));
    let role = host.hands_over();
    common::wait_until(
        "pages to be freed",
        || host.side.dump(),
        || host.side.source.stats().pages_released > 0,
    );
    host.loses(role);
    for refused in [host.side.source.fence(), host.side.source.reclaim()] {
        let error = refused.expect_err("the guest is nowhere else").to_string();
        assert!(error.contains("at the destination alone"), "{error}");
    }
    assert!(!host.side.events.rest().contains(&SourceEvent::Reclaimed));
}

/// Plays the VMM of a source whose guest is in private memory.
#[test]
fn child_source() {
    let Some(_) = argument("child_source") else { return };
    let listener = common::session::listen();
    let address = listener.address().to_string();
    let source = LoneSource::start(&setup(), Endpoint::Listen(listener), |options| {
        options.background = Background::OnRequest;
    });
    say(&format!("{:?}", source.old.as_source().lifetime()));
    say(&address);
    source.switch_over(state());
    loop {
        std::thread::park();
    }
}

#[test]
fn a_guest_in_private_memory_is_said_to_go_with_its_process_and_is_no_zeros_then() {
    prologue!("a_guest_in_private_memory");
    let role = Role::start("child_source", "");
    assert_eq!(role.hear("what is left after a death"), "Process");
    let address = role.hear("where it listens").parse().expect("an address");
    let side = LoneDestination::start(&setup(), Endpoint::Connect(address));
    side.wait_to_run();
    let dump = || side.dump();
    let touch = |page| {
        let new = Arc::clone(&side.new);
        Toucher::start(move || new.check_pages(SEED, Content::Dense, page, page + 1))
    };
    for page in [7, 3000] {
        touch(page).finish("a page", dump);
    }
    drop(role);
    side.wait(&DestinationEvent::Disconnected);
    let lost = [touch(8), touch(3001)];
    // What has arrived stays.
    for page in [7, 3000] {
        touch(page).finish("a page that is here", dump);
    }
    assert!(lost.iter().all(Toucher::is_waiting), "whoever needs a page that is lost waits");
    drop(side.destination);
    assert!(lost.iter().all(Toucher::is_waiting), "and goes on to wait");
}

#[test]
fn the_least_that_is_left_of_memory_counts() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len(MIB).expect("room");
    let named = || file.reopen().expect("the file").into();
    let at = |guest, file| SourceRegion::file(GuestAddress(guest), file, 0, MIB).expect("a region");
    let lifetime = |regions| SourceMemory::new(regions).expect("memory").lifetime();
    let kept = || nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::empty());
    let kept = || {
        let file = std::fs::File::from(kept().expect("a memfd"));
        file.set_len(MIB).expect("room");
        file.into()
    };
    assert_eq!(lifetime(vec![at(0, named())]), MemoryLifetime::Files);
    assert_eq!(lifetime(vec![at(0, named()), at(MIB, kept())]), MemoryLifetime::Descriptors);
    let mixed = Memory::new(&[(Kind::Memfd, MIB), (Kind::Anonymous, MIB)]);
    assert_eq!(mixed.as_source().lifetime(), MemoryLifetime::Process);
}

/// The table of promises, and the files with the tests that it names.
#[test]
fn each_promise_names_tests_that_exist() {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let text = std::fs::read_to_string(root.join("docs/reliability.md")).expect("the table");
    let rows: Vec<_> = text.lines().filter(|line| line.starts_with("| ")).collect();
    for number in 1..=9 {
        let start = format!("| {number} |");
        let row = rows.iter().find(|row| row.starts_with(&start)).expect("nine promises");
        let proof = row.rsplit('|').nth(1).expect("a last column");
        // `name`, `name` in file, `name` in file
        let mut names = Vec::new();
        for part in proof.split(", ") {
            let (name, file) = part.split_once(" in ").unwrap_or((part, ""));
            names.push(name.trim().trim_matches('`').to_owned());
            if file.is_empty() {
                continue;
            }
            let code = std::fs::read_to_string(root.join(file.trim())).expect("a file of tests");
            for name in names.drain(..) {
                assert!(code.contains(&format!("#[test]\nfn {name}()")), "{name} in {file}");
            }
        }
        assert_eq!(names, Vec::<String>::new(), "promise {number} names no file");
    }
}
