//! A keeper, a guest to serve, page servers that are killed, and a destination that reads every
//! page while that happens.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use afterimage::{Address, DestinationEvent, GuestAddress, StateSection};
use afterimage_tools::handoff::{GiveError, Piece, Taken, give};
use afterimage_tools::keeper::{Keeper, Listed};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::support::{Fetched, LIMIT, PAGE, Server, Target, memfd, pattern};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

pub(super) const PAGES: u64 = 2048;
pub(super) const LENGTH: u64 = PAGES * PAGE;
/// Pages that a guest reads beyond those that are waited for.
const AHEAD: u64 = 64;

/// Where everything lies.
pub(super) struct Scene {
    pub(super) directory: tempfile::TempDir,
    pub(super) address: Address,
}

impl Scene {
    /// The address is a Unix socket, so that it is the same for every server and nobody
    /// else's.
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let address = Address::Unix(directory.path().join("pages.sock"));
        Self { directory, address }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub(super) fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.text(name))
    }

    pub(super) fn keeper(&self) -> KeeperProcess {
        KeeperProcess::start(&self.path("keeper.sock"))
    }

    pub(super) fn kept(&self) -> Vec<Listed> {
        Keeper::connect(&self.path("keeper.sock"), "a test").unwrap().list().unwrap()
    }

    /// A server of a guest that a VMM hands over, or that the keeper has.
    pub(super) fn serve_kept(&self, more: &[&str]) -> Server {
        let (handoff, keeper) = (self.unix("handoff.sock"), self.unix("keeper.sock"));
        let mut arguments = vec!["--handoff", &handoff, "--keeper", &keeper, "--guest", "web1"];
        arguments.extend(more);
        self.serve(&arguments)
    }

    pub(super) fn serve(&self, more: &[&str]) -> Server {
        let (address, state) = (self.address.to_string(), self.text("state"));
        let mut arguments = vec!["--listen", &address, "--state", &state];
        // A machine that builds and tests at once leaves a thread, or a flush of the disk,
        // waiting for longer than a second. A death is not noticed by silence here.
        arguments.extend(["--silence", "10s"]);
        arguments.extend(more);
        Server::start(&arguments)
    }

    /// Hands a guest with this content over.
    pub(super) fn give(&self, seed: u64) -> Result<Taken, GiveError> {
        let file = filled(seed);
        let piece =
            Piece { guest_address: GuestAddress(0), length: LENGTH, file: file.as_fd(), offset: 0 };
        give(&self.path("handoff.sock"), "a test's VMM", &[piece], &state())
    }
}

pub(super) fn filled(seed: u64) -> File {
    let file = memfd(LENGTH);
    file.write_all_at(&pattern(PAGES, seed), 0).unwrap();
    file
}

pub(super) fn state() -> Vec<StateSection> {
    let section = |name: &str, bytes| StateSection { name: name.into(), version: 2, bytes };
    vec![section("cpu0", vec![1, 2, 3]), section("disk", vec![9; 1 << 20])]
}

/// A keeper, killed when it is dropped.
pub(super) struct KeeperProcess {
    child: Child,
    path: PathBuf,
}

impl KeeperProcess {
    pub(super) fn start(path: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage-keeper"));
        command.arg("--listen").arg(format!("unix:{}", path.display())).stdin(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(lines.next().unwrap().unwrap().contains("listening on"));
        // What it says later is read, so that it never waits.
        thread::spawn(move || lines.for_each(drop));
        Self { child, path: path.to_owned() }
    }

    /// Returns when it stands still.
    pub(super) fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
        let status = waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(matches!(status, WaitStatus::Stopped(..)), "{status:?}");
    }

    pub(super) fn go_on(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// How many clients are connected, also those that it has not taken in.
    pub(super) fn clients(&self) -> usize {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        let path = self.path.display().to_string();
        // One is that on which it listens.
        sockets.lines().filter(|line| line.ends_with(&path)).count() - 1
    }
}

impl Drop for KeeperProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A destination on a thread of its own, whose guest reads every page in an order of its own
/// and checks it.
pub(super) struct Reader {
    read: Arc<AtomicU64>,
    allowed: Arc<AtomicU64>,
    thread: JoinHandle<Fetched>,
}

impl Reader {
    pub(super) fn start(address: &Address, seed: u64) -> Self {
        let mut target = Target::start_quietly(&[(0, LENGTH)], address);
        let read = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&read);
        let allowed = Arc::new(AtomicU64::new(0));
        let limit = Arc::clone(&allowed);
        let thread = thread::spawn(move || {
            target.until(|event| *event == DestinationEvent::Run);
            let expected = pattern(PAGES, seed);
            let map = target.pieces[0].2.as_ptr();
            for step in 0..PAGES {
                while step >= limit.load(Ordering::Acquire) {
                    thread::yield_now();
                }
                // Each page once: the factor is odd, the count a power of two.
                let at = (step.wrapping_mul(1_103_515_245) % PAGES * PAGE) as usize + 8;
                // SAFETY: inside the mapping; volatile because the engine fills it.
                let byte = unsafe { map.wrapping_add(at).read_volatile() };
                assert_eq!(byte, expected[at], "byte {at}");
                count.fetch_add(1, Ordering::Release);
            }
            target.finish()
        });
        Self { read, allowed, thread }
    }

    /// Waits until the guest has read so many pages; it reads some more, but not many.
    pub(super) fn until_read(&self, pages: u64) {
        self.allowed.fetch_max(pages + AHEAD, Ordering::AcqRel);
        let until = Instant::now() + LIMIT;
        while self.read.load(Ordering::Acquire) < pages {
            assert!(!self.thread.is_finished(), "the destination has failed");
            assert!(Instant::now() < until, "only {} pages", self.read.load(Ordering::Acquire));
            thread::yield_now();
        }
    }

    /// Waits until everything has arrived, and checks it.
    pub(super) fn finish(self, seed: u64) -> Fetched {
        self.allowed.store(PAGES, Ordering::Release);
        let until = Instant::now() + LIMIT;
        while !self.thread.is_finished() {
            let count = self.read.load(Ordering::Acquire);
            assert!(Instant::now() < until, "the destination has read {count} pages");
            thread::yield_now();
        }
        let fetched = self.thread.join().unwrap();
        assert!(fetched.contents[0] == pattern(PAGES, seed), "the content differs");
        let runs = fetched.said.iter().filter(|event| **event == DestinationEvent::Run).count();
        assert_eq!(runs, 1, "the guest is started once");
        fetched
    }
}

/// Kills a server when a destination has come so far, or further.
pub(super) fn kill_at(mut server: Server, line: &str) {
    let steps = ["is attached", "is given", "runs at the destination"];
    let from = steps.iter().position(|step| *step == line).unwrap();
    server.any_line(&steps[from..]);
    drop(server);
}

/// Whether a successor goes on; otherwise there is nothing to do.
pub(super) fn goes_on(server: &mut Server) -> bool {
    server.any_line(&["going on with session", "is finished"]).contains("going on")
}

/// The session and the epoch that a successor goes on after.
pub(super) fn resumed(server: &mut Server) -> (String, u32) {
    let line = server.line("going on with session");
    let words: Vec<_> = line.split_whitespace().collect();
    let after = |word: &str| {
        let at = words.iter().position(|it| *it == word).unwrap();
        words[at + 1].trim_end_matches(':').to_owned()
    };
    (after("session"), after("epoch").parse().unwrap())
}
