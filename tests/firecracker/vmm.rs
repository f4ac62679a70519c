//! Firecracker's side: does what the test says, line by line, and verifies what it reads.

use std::io::{BufRead, IoSlice, Write, stdin, stdout};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use crate::memory::{Layout, Memory};
use crate::support::{PAGE, word_of};

/// In the environment: the layout. Its presence makes a process this.
pub(crate) const LAYOUT: &str = "AFTERIMAGE_TEST_VMM";
/// What an answer begins with; the test harness writes lines too.
pub(crate) const ANSWER: &str = "vmm: ";

#[test]
fn role_vmm() {
    let Some(layout) = std::env::var_os(LAYOUT) else { return };
    let layout: Layout = serde_json::from_str(layout.to_str().unwrap()).unwrap();
    let mut vmm = Vmm { memory: Memory::map(&layout), pages: layout.pages(), socket: None };
    for line in stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        vmm.does(&words);
        println!("{ANSWER}{line}");
        stdout().flush().unwrap();
    }
    // The test has ended.
    std::process::exit(1);
}

struct Vmm {
    memory: Memory,
    pages: u64,
    socket: Option<UnixStream>,
}

impl Vmm {
    fn does(&mut self, words: &[&str]) {
        let number = |index: usize| words[index].parse::<u64>().unwrap();
        let range = || number(1)..number(2);
        let memory = &self.memory;
        match words[0] {
            "connect" => self.socket = Some(UnixStream::connect(Path::new(words[1])).unwrap()),
            "hand-over" => self.send(memory.message().as_bytes(), &[]),
            "hand-over-with-its-file" => {
                let file = memory.file.as_ref().expect("shared memory");
                self.send(memory.message().as_bytes(), &[file]);
            }
            "hand-over-with-a-socket" => {
                let other = OwnedFd::from(UnixStream::pair().unwrap().0);
                self.send(memory.message().as_bytes(), &[&other]);
            }
            "half" => {
                let message = memory.message();
                self.send(&message.as_bytes()[..message.len() / 2], &[]);
            }
            "rest" => {
                let message = memory.message();
                let rest = &message.as_bytes()[message.len() / 2..];
                // Byte by byte.
                for byte in rest {
                    self.socket.as_ref().unwrap().write_all(&[*byte]).unwrap();
                }
            }
            "hang-up" => self.socket = None,
            "check" => range().for_each(|page| memory.check(page)),
            "check-zero" => range().for_each(|page| memory.check_zero(page)),
            "check-in-kernel" => range().for_each(|page| memory.check_in_kernel(page)),
            "remove" => memory.remove(number(1), number(2) - number(1)),
            "work" => self.work(number(1), number(2), Sweep::AtTheEnd),
            "roam" => self.work(number(1), number(2), Sweep::Never),
            other => panic!("{other}?"),
        }
    }

    /// The JSON, and the userfaultfd on the same call.
    fn send(&self, bytes: &[u8], more: &[&OwnedFd]) {
        let socket = self.socket.as_ref().unwrap();
        let mut files: Vec<RawFd> = vec![self.memory.uffd.as_raw_fd()];
        files.extend(more.iter().map(|file| file.as_raw_fd()));
        let rights = [ControlMessage::ScmRights(&files)];
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            &rights,
            MsgFlags::empty(),
            None,
        );
        assert_eq!(sent.unwrap(), bytes.len());
    }

    /// Four vCPUs read, write and give up pages of their own at random, and verify all they read.
    fn work(&self, seed: u64, steps: u64, sweep: Sweep) {
        thread::scope(|scope| {
            for vcpu in 0..4 {
                scope.spawn(move || {
                    let share = self.pages / 4;
                    let seed = seed * 31 + vcpu;
                    Vcpu::new(&self.memory, vcpu * share, share, seed).run(steps, sweep);
                });
            }
        });
    }
}

/// Whether all pages are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sweep {
    AtTheEnd,
    Never,
}

/// What a page holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Content {
    Snapshot,
    Zero,
    Own(u64),
}

struct Vcpu<'a> {
    memory: &'a Memory,
    first: u64,
    known: Vec<Content>,
    state: u64,
}

impl<'a> Vcpu<'a> {
    fn new(memory: &'a Memory, first: u64, pages: u64, seed: u64) -> Self {
        Self { memory, first, known: vec![Content::Snapshot; pages as usize], state: seed }
    }

    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(12345);
        self.state >> 33
    }

    fn run(&mut self, steps: u64, sweep: Sweep) {
        for step in 0..steps {
            let page = self.random() % self.known.len() as u64;
            match self.random() % 4 {
                0 => {
                    let many = (self.random() % 16 + 1).min(self.known.len() as u64 - page);
                    self.memory.remove(self.first + page, many);
                    self.known[page as usize..(page + many) as usize].fill(Content::Zero);
                }
                1 => {
                    self.check(page);
                    for word in 0..PAGE / 8 {
                        self.memory.write(self.first + page, word, step * 8 + 1);
                    }
                    self.known[page as usize] = Content::Own(step * 8 + 1);
                }
                _ => {}
            }
            self.check(page);
        }
        if sweep == Sweep::AtTheEnd {
            (0..self.known.len() as u64).for_each(|page| self.check(page));
        }
    }

    fn check(&self, page: u64) {
        let at = self.first + page;
        for word in [0, 7, 511] {
            let expected = match self.known[page as usize] {
                Content::Snapshot => word_of(at, word),
                Content::Zero => 0,
                Content::Own(value) => value,
            };
            assert_eq!(self.memory.read(at, word), expected, "page {at}, word {word}");
        }
    }
}
