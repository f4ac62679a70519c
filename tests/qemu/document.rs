//! The commands of docs/qemu.md, as they are written there.
//!
//! Each block of shell is one terminal. If a block of text follows, its first line is waited
//! for. Only the directory is another one, so that several can do this at once.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use afterimage_tools::require;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use crate::boot;
use crate::support::{DRIVER, Daemon, Serial, check_lived_on, preload};

const DOCUMENT: &str = include_str!("../../docs/qemu.md");
const DIRECTORY: &str = "/dev/shm/vm7";
const ROUNDS: usize = 3;
const VCPUS: usize = 2;

/// Blocks of the document: a language, and what is in it.
fn blocks() -> Vec<(&'static str, &'static str)> {
    let section = DOCUMENT.split("\n## ").find(|it| it.starts_with("In ten minutes")).unwrap();
    let fenced = section.split("```").skip(1).step_by(2);
    fenced.filter_map(|block| block.split_once('\n')).collect()
}

/// A QEMU that has gone into the background; it ends with this.
struct Background(Pid);

impl Background {
    fn of(pidfile: &Path) -> Self {
        let text = std::fs::read_to_string(pidfile).unwrap();
        Self(Pid::from_raw(text.trim().parse().unwrap()))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It may have quit.
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

#[test]
fn the_commands_of_the_document_move_a_guest() {
    if !require::qemu_system() {
        return;
    }
    let directory = tempfile::Builder::new().prefix("vm7-").tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| directory.path().join(name);
    boot::write_disk(&at("disk.img"), VCPUS).unwrap();
    let serials = ["source.log", "destination.log"].map(|name| {
        mkfifo(&at(name), Mode::S_IRWXU).unwrap();
        // Open for writing too, so that nobody waits, and nobody reads an end.
        let both = File::options().read(true).write(true).open(at(name)).unwrap();
        Serial::of(both)
    });

    let blocks = blocks();
    let mut terminals = Vec::new();
    let mut qemus = Vec::new();
    for (index, (language, text)) in blocks.iter().enumerate() {
        if *language != "sh" {
            continue;
        }
        let mut terminal = terminal(text, directory.path());
        match blocks.get(index + 1) {
            Some(("text", said)) => {
                terminal.line(said.lines().next().unwrap());
                terminals.push(terminal);
            }
            _ => {
                let (status, _, lines) = terminal.end();
                assert_eq!(status, 0, "{text}{lines:#?}");
            }
        }
        for pidfile in ["source.pid", "destination.pid"].into_iter().skip(qemus.len()) {
            if at(pidfile).exists() {
                qemus.push(Background::of(&at(pidfile)));
                if qemus.len() == 1 {
                    serials[0].wait_rounds(VCPUS, ROUNDS);
                }
            }
        }
    }
    assert_eq!((terminals.len(), qemus.len()), (3, 2), "page-client, receive, send; two QEMUs");
    for terminal in terminals {
        let (status, _, lines) = terminal.end();
        assert_eq!(status, 0, "{lines:#?}");
    }
    serials[1].wait_rounds(VCPUS, ROUNDS);
    let [before, after] = serials.map(|serial| serial.so_far());
    check_lived_on(&before, &after, VCPUS, ROUNDS as u32);
}

/// A shell in which the commands are found, as if they were installed.
fn terminal(text: &str, directory: &Path) -> Daemon {
    let text = text.replace(DIRECTORY, &directory.display().to_string());
    let binaries = Path::new(DRIVER).parent().unwrap().display().to_string();
    let library = preload();
    let mut shell = Command::new("sh");
    // The last command takes the shell's place, so that ending it ends that.
    shell.args(["-e", "-c", &text]).current_dir(directory);
    shell.env("PATH", format!("{binaries}:{}", std::env::var("PATH").unwrap()));
    shell.env("LD_LIBRARY_PATH", library.parent().unwrap());
    Daemon::of(shell)
}
