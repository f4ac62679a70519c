//! A keeper to talk to, memory to keep, and clients that are killed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_tools::keeper::{Keeper, NamedFile};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);

/// A running keeper, in a directory of its own.
pub(crate) struct Daemon {
    child: Child,
    lines: Receiver<String>,
    pub(crate) path: PathBuf,
    /// Of its own, removed with it.
    directory: Option<tempfile::TempDir>,
}

impl Daemon {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keeper.sock");
        let mut daemon = Self::start_at(&path, arguments);
        daemon.directory = Some(directory);
        daemon
    }

    /// Listens there when this returns.
    pub(crate) fn start_at(path: &Path, arguments: &[&str]) -> Self {
        let mut command = command();
        command.args(["--listen", &address(path)]).args(arguments);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let errors = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let daemon = Self { child, lines, path: path.to_owned(), directory: None };
        daemon.line("listening on");
        daemon
    }

    /// Waits for a line that holds `text`.
    pub(crate) fn line(&self, text: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|error| panic!("no line with {text:?}: {error}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn client(&self) -> Keeper {
        Keeper::connect(&self.path, "a test").unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for its end: the exit status, -1 if it was killed.
    pub(crate) fn end(mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap_or(-1)
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// How many descriptors it has open.
    pub(crate) fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Waits until it has so many descriptors open.
    pub(crate) fn until_open_files(&self, expected: usize) {
        let until = Instant::now() + LIMIT;
        while self.open_files() != expected {
            let count = self.open_files();
            assert!(Instant::now() < until, "{count} descriptors are open, not {expected}");
            thread::yield_now();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage-keeper"));
    command.stdin(Stdio::null());
    command
}

pub(crate) fn address(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// A memfd with something in it.
pub(crate) fn memfd(content: &[u8]) -> File {
    let file = File::from(memfd_create(c"kept", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

pub(crate) fn content(file: &NamedFile) -> Vec<u8> {
    let file = File::from(file.file.try_clone().unwrap());
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Asks again and again until it is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < limit, "waited in vain until {what}");
        thread::yield_now();
    }
}

/// Waits until the keeper at the other end of a connection is gone.
pub(crate) fn until_gone(keeper: &Keeper) {
    let mut fds = [PollFd::new(keeper.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(LIMIT).unwrap();
    assert_eq!(poll(&mut fds, limit).unwrap(), 1, "the keeper is not gone");
}

/// Runs this test binary again, as the test `role`, which plays a part of its own.
pub(crate) fn role(role: &str, path: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", role, "--nocapture"]).env("AFTERIMAGE_TEST_ROLE", path);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap()
}

/// The argument of the part that this process plays, if it plays one.
pub(crate) fn argument() -> Option<PathBuf> {
    std::env::var_os("AFTERIMAGE_TEST_ROLE").map(PathBuf::from)
}

/// Waits until a child has said a line that is `text`.
pub(crate) fn until_said(child: &mut Child, text: &str) {
    let output = child.stdout.as_mut().unwrap();
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(format!("\n{text}\n").as_bytes()) {
        assert_eq!(output.read(&mut byte).unwrap(), 1, "the child ended without {text:?}");
        said.push(byte[0]);
    }
}
