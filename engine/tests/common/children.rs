//! Roles in other processes: the test binary executes itself.
//!
//! A child is a test of its own that does nothing unless [`ROLE`] is set. It talks in lines
//! that begin with [`MARK`].

use super::PATIENCE;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

/// Names what a child shall do.
const ROLE: &str = "AFTERIMAGE_TEST_ROLE";
/// What a child is given.
const ARGUMENT: &str = "AFTERIMAGE_TEST_ARGUMENT";
const MARK: &str = "@@ ";

/// A process of this test binary; killed when dropped.
pub struct Role {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Role {
    /// Runs the test `entry` of this binary as a child.
    pub fn start(entry: &str, argument: &str) -> Self {
        let mut child =
            command(entry, argument).stdout(Stdio::piped()).spawn().expect("the test binary runs");
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // The harness writes the name of the test before the first line.
                if let Some((_, said)) = line.split_once(MARK)
                    && sender.send(said.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line that the child says.
    pub fn hear(&self, what: &str) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"))
    }

    /// What the child has said and nobody has heard.
    pub fn heard(&self) -> Option<String> {
        self.lines.try_recv().ok()
    }

    /// Waits until the child ends, which must be with success.
    pub fn finish(mut self) {
        let id = self.child.id();
        super::wait_until(
            "the end of a child",
            || format!("process {id}"),
            || self.child.try_wait().expect("a child").is_some(),
        );
        let status = self.child.wait().expect("a child");
        assert!(status.success(), "a child failed: {status}");
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How the test `entry` of this binary is run as a child.
pub fn command(entry: &str, argument: &str) -> Command {
    let program = std::env::current_exe().expect("the test's own path");
    let mut command = Command::new(program);
    command
        .args(["--exact", entry, "--nocapture", "--test-threads=1"])
        .env(ROLE, entry)
        .env(ARGUMENT, argument);
    command
}

/// In a child that plays `entry`: what it was given.
pub fn argument(entry: &str) -> Option<String> {
    if std::env::var(ROLE).ok()? != entry {
        return None;
    }
    Some(std::env::var(ARGUMENT).unwrap_or_default())
}

/// In a child: says a line.
pub fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{MARK}{line}").and_then(|()| output.flush()).expect("a parent that listens");
}
