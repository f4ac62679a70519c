//! The commands that move a guest for the engine: where they are, and one of them running.

use std::env;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_tools::qemu::{QmpError, unix_now};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use serde_json::Value;

use super::QemuError;
use super::machine::{Process, io_error};

/// Lines that are repeated where a command fails.
const LAST_WORDS: usize = 3;

/// Where the commands are.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    pub(super) client: PathBuf,
    pub(super) driver: PathBuf,
    pub(super) library: PathBuf,
}

impl Tools {
    /// Looks for them beside this program; that of a test is one directory deeper.
    pub(super) fn find() -> Result<Self, QemuError> {
        let program = env::current_exe().map_err(io_error("find this program"))?;
        let near = [program.parent(), program.parent().and_then(Path::parent)];
        let find = |what: &str| {
            let mut found = near.into_iter().flatten().map(|directory| directory.join(what));
            let beside = || program.parent().unwrap_or(&program).to_owned();
            let missing = || QemuError::Unbuilt { what: what.to_owned(), directory: beside() };
            found.find(|path| path.exists()).ok_or_else(missing)
        };
        Ok(Self {
            client: find("page-client")?,
            driver: find("afterimage-qemu")?,
            library: find("libafterimage_preload.so")?,
        })
    }
}

/// A running command.
#[derive(Debug)]
pub(super) struct Tool {
    name: &'static str,
    process: Process,
    /// What it says, with the time at which that was heard.
    lines: Receiver<(Duration, String)>,
    said: Vec<String>,
    output: ChildStdout,
}

impl Tool {
    /// Starts it; it must have been asked for `--json`.
    pub(super) fn start(name: &'static str, mut command: Command) -> Result<Self, QemuError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = Process::start(command, name)?;
        let pipes = process.child.stderr.take().zip(process.child.stdout.take());
        let (errors, output) = pipes.expect("both were asked for");
        let (sender, lines) = crossbeam_channel::unbounded();
        let listen = move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                if sender.send((unix_now(), line)).is_err() {
                    return;
                }
            }
        };
        let listener = thread::Builder::new().name(name.to_owned()).spawn(listen);
        listener.map_err(io_error("start a thread"))?;
        Ok(Self { name, process, lines, said: Vec::new(), output })
    }

    /// When it said a line with `text` in it.
    pub(super) fn hear(&mut self, text: &str, limit: Duration) -> Result<Duration, QemuError> {
        let until = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok((at, line)) => {
                    tracing::debug!(tool = self.name, line);
                    let is_it = line.contains(text);
                    self.said.push(line);
                    if is_it {
                        return Ok(at);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) => return Err(self.late(text, limit)),
            }
        }
    }

    /// Waits for its end, which must be a good one, and gives what it reports.
    pub(super) fn finish(mut self) -> Result<Value, QemuError> {
        let mut text = String::new();
        let read = self.output.read_to_string(&mut text);
        read.map_err(io_error(&format!("read the report of {}", self.name)))?;
        let status = self.process.child.wait();
        let status = status.map_err(io_error(&format!("wait for the end of {}", self.name)))?;
        self.said.extend(self.lines.iter().map(|(_, line)| line));
        if !status.success() {
            return Err(self.ended());
        }
        let expected = "one object of JSON".to_owned();
        serde_json::from_str(&text).map_err(|_| {
            QmpError::Answer { who: self.name.to_owned(), line: text, expected }.into()
        })
    }

    fn ended(&self) -> QemuError {
        QmpError::Ended { who: self.name.to_owned(), said: self.last_words() }.into()
    }

    fn late(&self, text: &str, limit: Duration) -> QemuError {
        let (who, awaited) = (self.name.to_owned(), format!("line with {text:?}"));
        QmpError::Late { who, awaited, limit, said: self.last_words() }.into()
    }

    fn last_words(&self) -> String {
        match &self.said[self.said.len().saturating_sub(LAST_WORDS)..] {
            [] => "nothing".to_owned(),
            last => last.join("; "),
        }
    }
}
