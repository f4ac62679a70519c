//! Processes of this test binary, which talk in lines.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_mins(1);
/// Which role a process plays.
pub(crate) const ROLE: &str = "AFTERIMAGE_TEST_ROLE";
/// The arguments of that role, one a line.
pub(crate) const ARGUMENTS: &str = "AFTERIMAGE_TEST_ARGUMENTS";
/// Before what a role says: the test harness writes to the same output.
const MARK: &str = "@@ ";

/// In a role: says a line.
pub(crate) fn say(line: &str) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{MARK}{line}").and_then(|()| output.flush()).expect("a parent that listens");
}

/// The library, as cargo has built it beside the tests.
pub(crate) fn library() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let beside = test.parent().unwrap();
    let name = "libafterimage_preload.so";
    let places = [beside.join(name), beside.parent().unwrap().join(name)];
    let found = places.iter().find(|path| path.exists());
    found.unwrap_or_else(|| panic!("the library is not at {places:?}")).clone()
}

/// How this test binary is run in a role.
pub(crate) fn role(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let test = format!("roles::{name}");
    command.args(["--exact", &test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, name).env(ARGUMENTS, arguments.join("\n"));
    command
}

/// A process that is killed when it is dropped.
pub(crate) struct Process {
    pub(crate) child: Child,
    input: ChildStdin,
    said: Receiver<String>,
    errors: Receiver<String>,
    /// Lines of the standard error.
    pub(crate) seen: Vec<String>,
}

impl Process {
    pub(crate) fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the test binary starts");
        let said = lines(child.stdout.take().unwrap(), child.id(), |line| {
            line.split_once(MARK).map(|(_, said)| said.to_owned())
        });
        let errors = lines(child.stderr.take().unwrap(), child.id(), Some);
        let input = child.stdin.take().unwrap();
        Self { child, input, said, errors, seen: Vec::new() }
    }

    /// Tells it something, and waits for its answer.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.hear()
    }

    pub(crate) fn tell(&mut self, line: &str) {
        // It may have ended, which shows afterwards.
        let _ = writeln!(self.input, "{line}");
    }

    /// The next line that it says.
    pub(crate) fn hear(&mut self) -> String {
        self.said.recv_timeout(LIMIT).unwrap_or_else(|error| {
            self.seen.extend(self.errors.try_iter());
            panic!("nothing was said ({error}): {:#?}", self.seen)
        })
    }

    /// Waits until it says a line that holds `text`.
    pub(crate) fn hear_of(&mut self, text: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let line = self.hear();
            if line.contains(text) {
                return line;
            }
            assert!(Instant::now() < until, "nothing was said of {text}");
        }
    }

    /// Waits for a line of the standard error that holds `text`.
    pub(crate) fn complaint(&mut self, text: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(line) = self.errors.recv_timeout(left) else {
                panic!("no line with {text:?}; there were {:#?}", self.seen)
            };
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn kill(&mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL).unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end: its exit status, and what it has said and complained of meanwhile.
    pub(crate) fn end(mut self) -> (i32, Vec<String>, Vec<String>) {
        self.tell("end");
        let until = Instant::now() + LIMIT;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > until => panic!("it does not end: {:#?}", self.seen),
                None => thread::sleep(Duration::from_millis(2)),
            }
        };
        let seen = self.seen.drain(..).chain(self.errors.iter()).collect();
        (status.code().unwrap_or(-1), self.said.iter().collect(), seen)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(
    from: impl Read + Send + 'static,
    pid: u32,
    wanted: impl Fn(String) -> Option<String> + Send + 'static,
) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            // Shown where the test fails.
            println!("{pid}: {line}");
            if let Some(line) = wanted(line)
                && sender.send(line).is_err()
            {
                return;
            }
        }
    });
    lines
}
