//! A Firecracker, its API, what its guest says, and a snapshot of it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use super::guest::{self, MEMORY_MIB};
use crate::docs::{install, search_path};
use crate::support::{CLIENT, Daemon, LIMIT, SERVER};

/// How many rounds a guest does before it is snapshotted, and after it was restored: in the first
/// of these it reads what it wrote elsewhere, all of it once the round is whole.
const ROUNDS: u64 = 3;

/// A running Firecracker.
pub(crate) struct Machine {
    child: Child,
    api: PathBuf,
    _socket: tempfile::TempDir,
    said: Receiver<String>,
    /// The last round that the guest has told of.
    round: u64,
}

impl Machine {
    /// One that has no guest yet; paths that it is told are of `directory`.
    fn start(firecracker: &Path, directory: &Path) -> Self {
        let socket = tempfile::tempdir().unwrap();
        let api = socket.path().join("api");
        let mut command = Command::new(firecracker);
        command.arg("--api-sock").arg(&api).current_dir(directory);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("Firecracker starts");
        let output = BufReader::new(child.stdout.take().unwrap());
        let pid = child.id();
        let (sender, said) = channel();
        thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                // Shown where the test fails.
                println!("{pid}: {line}");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let machine = Self { child, api, _socket: socket, said, round: 0 };
        let until = Instant::now() + LIMIT;
        while let Err(error) = UnixStream::connect(&machine.api) {
            assert!(Instant::now() < until, "Firecracker does not listen: {error}");
            thread::yield_now();
        }
        machine
    }

    /// Asks its API for something, and has it.
    fn asks(&self, method: &str, path: &str, what: &Value) {
        let (status, text) = self.answer(method, path, what).expect("Firecracker answers");
        assert_eq!(status, 204, "{method} {path} {what}: {text}");
    }

    /// The answer to one request: its status, and what it says.
    fn answer(&self, method: &str, path: &str, what: &Value) -> io::Result<(u16, String)> {
        let body = what.to_string();
        let mut stream = UnixStream::connect(&self.api)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let status = line.split_whitespace().nth(1).and_then(|it| it.parse().ok());
        let mut length = 0;
        while line.trim() != "" {
            line.clear();
            stream.read_line(&mut line)?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or(0);
            }
        }
        let mut text = vec![0; length];
        stream.read_exact(&mut text)?;
        let status = status.ok_or_else(|| io::Error::other("no status in the answer"))?;
        Ok((status, String::from_utf8_lossy(&text).into_owned()))
    }

    /// Waits until the guest has read all of its memory again, and found nothing wrong.
    pub(crate) fn lives_on(&mut self) {
        let last = self.round + ROUNDS;
        let until = Instant::now() + LIMIT;
        while self.round < last {
            let left = until.saturating_duration_since(Instant::now());
            let line = self.said.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("the guest stands still at {}", self.round));
            self.hears(&line);
        }
    }

    /// Takes note of a line, if it is a round's. The first that a restored guest says may have begun
    /// where it was snapshotted.
    fn hears(&mut self, line: &str) {
        let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
        let Some((_, told)) = line.split_once("round ") else { return };
        let Some((round, wrong)) = told.split_once(" wrong ") else { return };
        let (Some(round), Some(wrong)) = (number(round), number(wrong.trim())) else { return };
        assert_eq!(wrong, 0, "the guest has read something wrong: {line}");
        if self.round > 0 {
            assert_eq!(round, self.round + 1, "the guest goes on where it was");
        }
        self.round = round;
    }

    pub(crate) fn snapshot(&self, state: &str, memory: &str) {
        self.asks("PATCH", "/vm", &json!({"state": "Paused"}));
        let what = json!({
            "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory
        });
        self.asks("PUT", "/snapshot/create", &what);
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// How it ended, by itself.
    pub(crate) fn end(&mut self) -> ExitStatus {
        self.hears_the_rest();
        self.child.wait().unwrap()
    }

    /// The first round that it tells of is the one after this, or the one after that.
    fn goes_on_after(&mut self, round: u64) {
        while self.round == 0 {
            let line = self.said.recv_timeout(LIMIT).expect("the guest says something");
            self.hears(&line);
        }
        let found = self.round;
        assert!((round + 1..=round + 2).contains(&found), "{found} after {round}");
    }

    /// What the guest has said to the end of the process.
    fn hears_the_rest(&mut self) {
        loop {
            match self.said.recv_timeout(LIMIT) {
                Ok(line) => self.hears(&line),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => panic!("Firecracker does not end"),
            }
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A snapshot of a guest that runs no more.
pub(crate) struct Snapshot {
    firecracker: PathBuf,
    directory: tempfile::TempDir,
    /// The last round that its guest has told of.
    round: u64,
}

impl Snapshot {
    /// Boots a guest, lets it work, and takes it.
    pub(crate) fn take(firecracker: PathBuf, huge_pages: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        guest::write_image(&path.join("kernel")).unwrap();
        let mut machine = Machine::start(&firecracker, path);
        machine.asks("PUT", "/boot-source", &json!({"kernel_image_path": "kernel"}));
        let config = json!({
            "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "huge_pages": huge_pages
        });
        machine.asks("PUT", "/machine-config", &config);
        machine.asks("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
        machine.lives_on();
        machine.snapshot("vm.state", "vm.mem");
        machine.kill();
        machine.hears_the_rest();
        let round = machine.round;
        drop(machine);
        Self { firecracker, directory, round }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// The socket `name`, as the commands take it.
    pub(crate) fn socket(&self, name: &str) -> String {
        format!("unix:{}", self.text(name))
    }

    /// A page-client that a Firecracker can connect to at the socket `name`.
    pub(crate) fn handler(&self, name: &str, more: &[&str]) -> Daemon {
        let socket = self.socket(name);
        let mut handler =
            Daemon::start(CLIENT, &[&["--json", "--firecracker", &socket], more].concat());
        handler.line("a VMM can have its memory served at");
        handler
    }

    /// The same, with the memory file `memory`.
    pub(crate) fn local_handler(&self, name: &str, memory: &str, more: &[&str]) -> Daemon {
        self.handler(name, &[&["--memory", &self.text(memory)], more].concat())
    }

    /// A page-server with the memory file, at the socket `pages`.
    pub(crate) fn server(&self, more: &[&str]) -> Daemon {
        let (pages, memory) = (self.socket("pages"), self.text("vm.mem"));
        let arguments = ["--snapshot", "--memory", &memory, "--listen", &pages];
        let mut server = Daemon::start(SERVER, &[&arguments, more].concat());
        server.line("listening on");
        server
    }

    /// Runs commands where the snapshot is, as a person would; what is printed is in the file
    /// `said`.
    pub(crate) fn types(&self, script: &str) {
        let bin = self.path("bin");
        install(&bin);
        symlink(&self.firecracker, bin.join("firecracker")).unwrap();
        let said = self.path("said");
        let print = File::create(&said).unwrap();
        let mut shell = Command::new("timeout");
        // It ends what it has started also when it is told to end.
        shell.args(["60", "sh", "-c", &format!("trap 'exit 1' TERM\n{script}")]);
        shell.current_dir(self.directory.path());
        shell.env("PATH", search_path(&bin)).stdin(Stdio::null());
        shell.stderr(print.try_clone().unwrap()).stdout(print);
        let status = shell.status().unwrap();
        assert!(status.success(), "{}", std::fs::read_to_string(&said).unwrap_or_default());
    }

    /// A guest restored with the handler at the socket `name`; it runs.
    pub(crate) fn restored(&self, name: &str) -> Machine {
        self.restored_from("vm.state", name)
    }

    pub(crate) fn restored_from(&self, state: &str, name: &str) -> Machine {
        let mut machine = Machine::start(&self.firecracker, self.directory.path());
        let what = json!({
            "snapshot_path": state,
            "mem_backend": {"backend_type": "Uffd", "backend_path": name},
            "resume_vm": true,
        });
        machine.asks("PUT", "/snapshot/load", &what);
        // Of the line that it was snapshotted in the midst of, nobody knows who has heard it.
        if state == "vm.state" {
            machine.goes_on_after(self.round);
        }
        machine
    }
}
