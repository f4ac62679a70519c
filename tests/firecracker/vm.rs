//! The test's side: a snapshot, a VMM to command, and the page-client that serves it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use nix::sys::signal::Signal;

use crate::memory::{Kind, Layout};
use crate::support::{CLIENT, Daemon, LIMIT, PAGE, SERVER, word_of, write_image};
use crate::vmm::{ANSWER, LAYOUT};

/// A snapshot on this machine.
pub(crate) struct Snapshot {
    directory: tempfile::TempDir,
    pub(crate) layout: Layout,
}

impl Snapshot {
    pub(crate) fn new(kind: Kind, lengths: &[u64]) -> Self {
        let layout = Layout { kind, lengths: lengths.to_vec() };
        let directory = tempfile::tempdir().unwrap();
        write_image(&directory.path().join("memory"), layout.pages());
        Self { directory, layout }
    }

    /// One of which only these pages hold something.
    pub(crate) fn sparse(lengths: &[u64], pages: &[std::ops::Range<u64>]) -> Self {
        let layout = Layout { kind: Kind::Private, lengths: lengths.to_vec() };
        let directory = tempfile::tempdir().unwrap();
        let file = File::create(directory.path().join("memory")).unwrap();
        file.set_len(layout.bytes()).unwrap();
        for page in pages.iter().cloned().flatten() {
            let words = (0..PAGE / 8).flat_map(|word| word_of(page, word).to_le_bytes());
            file.write_all_at(&words.collect::<Vec<_>>(), page * PAGE).unwrap();
        }
        Self { directory, layout }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A page-client for a Firecracker that connects to the socket `name`.
    pub(crate) fn handler(&self, name: &str, more: &[&str]) -> Daemon {
        let socket = format!("unix:{}", self.text(name));
        let mut arguments = vec!["--json", "--firecracker", &socket];
        arguments.extend(more);
        let mut handler = Daemon::start(CLIENT, &arguments);
        handler.line("a VMM can have its memory served at");
        handler
    }

    /// The same, with the snapshot's own file.
    pub(crate) fn local_handler(&self, name: &str, more: &[&str]) -> Daemon {
        let memory = self.text("memory");
        self.handler(name, &[&["--memory", memory.as_str()], more].concat())
    }

    /// A page-server with the snapshot, at the socket `pages`.
    pub(crate) fn server(&self, more: &[&str]) -> Daemon {
        let mut offset = 0;
        let pieces = self.layout.lengths.iter().map(|length| {
            let piece = format!("{},{offset},{length}", self.text("memory"));
            offset += length;
            ["--memory".to_owned(), piece]
        });
        let pieces: Vec<String> = pieces.flatten().collect();
        let pieces = pieces.iter().map(String::as_str);
        self.server_of(&pieces.chain(more.iter().copied()).collect::<Vec<_>>())
    }

    /// The same, where page-server is told no more than the file.
    pub(crate) fn server_of_the_file(&self) -> Daemon {
        self.server_of(&["--memory", &self.text("memory")])
    }

    fn server_of(&self, more: &[&str]) -> Daemon {
        let pages = self.pages();
        let mut server =
            Daemon::start(SERVER, &[&["--snapshot", "--listen", pages.as_str()], more].concat());
        server.line("listening on");
        server
    }

    /// Where that one listens.
    pub(crate) fn pages(&self) -> String {
        format!("unix:{}", self.text("pages"))
    }

    /// A VMM that has its memory, and has not connected.
    pub(crate) fn vmm(&self) -> Vm {
        Vm::start(&self.layout)
    }

    /// A VMM that has handed its memory over at the socket `name`.
    pub(crate) fn loaded(&self, name: &str) -> Vm {
        let mut vm = self.vmm();
        self.load(&mut vm, name);
        vm
    }

    pub(crate) fn load(&self, vm: &mut Vm, name: &str) {
        vm.does(&format!("connect {}", self.text(name)));
        vm.does("hand-over");
    }
}

/// A VMM in a process of its own.
pub(crate) struct Vm {
    pub(crate) child: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
    pages: u64,
}

impl Vm {
    fn start(layout: &Layout) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "vmm::role_vmm", "--nocapture", "--test-threads=1"]);
        command.env(LAYOUT, serde_json::to_string(layout).unwrap());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, answers) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(at) = line.find(ANSWER)
                    && sender.send(line[at + ANSWER.len()..].to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let commands = child.stdin.take().unwrap();
        Self { child, commands, answers, pages: layout.pages() }
    }

    /// Does something, and waits until it is done.
    pub(crate) fn does(&mut self, command: &str) {
        self.begins(command);
        self.has_done(command);
    }

    pub(crate) fn begins(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    pub(crate) fn has_done(&mut self, command: &str) {
        let answer = self.answers.recv_timeout(LIMIT);
        let answer = answer.unwrap_or_else(|_| panic!("the VM has not done {command:?}"));
        assert_eq!(answer, command);
    }

    /// Whether it is still at it.
    pub(crate) fn is_at_it(&self) -> bool {
        self.answers.try_recv().is_err()
    }

    /// Every page is as in the snapshot.
    pub(crate) fn check(&mut self) {
        self.does(&format!("check 0 {}", self.pages));
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a handler ended: its report.
pub(crate) fn ended(handler: Daemon, status: i32, outcome: &str) -> serde_json::Value {
    let (found, report, said) = handler.end();
    assert_eq!(found, status, "{report} {said:#?}");
    // A VM that ends is nothing to be warned of.
    let warned = outcome == "vm_ended" && said.iter().any(|line| line.contains("WARN"));
    assert!(!warned, "{said:#?}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["outcome"], outcome, "{report} {said:#?}");
    report
}

/// Stops it for good, though pages are missing.
pub(crate) fn give_up(handler: &mut Daemon) {
    handler.signal(Signal::SIGTERM);
    handler.line("not stopping");
    handler.signal(Signal::SIGTERM);
    handler.line("a second signal");
}

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
/// The captured layouts, a thousand times smaller.
pub(crate) const OF_4_GIB: &[u64] = &[3 * MIB, MIB];
pub(crate) const OF_1_GIB: &[u64] = &[MIB];
const _: () = assert!(MIB.is_multiple_of(PAGE));
