//! A page server to drive, a manager that drives it, and destinations for its guest.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{
    Address, Destination, DestinationEvent, DestinationMemory, DestinationOptions,
    DestinationRegion, DiscardNotice, Endpoint, Events, FaultScope, GuestAddress,
};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const PAGES: u64 = 2048;
/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);
/// Within this a query is answered, whatever the session does; some milliseconds are expected.
pub(crate) const PROMPT: Duration = Duration::from_secs(3);

/// A process with a control socket.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    lines: Receiver<String>,
    pub(crate) seen: Vec<String>,
    /// What was printed and read already.
    begun: String,
}

impl Daemon {
    pub(crate) fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let errors = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        let pid = child.id();
        thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                // Shown where the test fails.
                println!("{pid}: {line}");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: Vec::new(), begun: String::new() }
    }

    /// Waits for a line that holds `text`.
    pub(crate) fn line(&mut self, text: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let line = self.lines.recv_timeout(until.saturating_duration_since(Instant::now()));
            let Ok(line) = line else { panic!("no line with {text:?}; {:#?}", self.seen) };
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits until it has printed something.
    pub(crate) fn first_output(&mut self) {
        let mut byte = [0];
        self.child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        self.begun.push(char::from(byte[0]));
    }

    /// Waits for its end: exit status, and what it printed.
    pub(crate) fn end(mut self) -> (i32, String) {
        let mut text = std::mem::take(&mut self.begun);
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = self.child.wait().unwrap();
        self.seen.extend(self.lines.iter());
        (status.code().unwrap_or(-1), text)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A page server over a file, with a control socket.
pub(crate) struct Server {
    pub(crate) daemon: Daemon,
    pub(crate) address: Address,
    pub(crate) directory: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_logging("warn", arguments)
    }

    /// With so much said in its log.
    pub(crate) fn start_logging(level: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ram = directory.path().join("ram");
        fs::write(&ram, pattern()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
        command.env("RUST_LOG", level).args(["--json", "--listen", "tcp:127.0.0.1:0"]);
        command.arg("--memory").arg(ram).args(arguments);
        command.arg("--control").arg(socket_argument(&directory.path().join("control.sock")));
        let mut daemon = Daemon::spawn(command);
        let line = daemon.line("listening on ");
        let address = line.split("listening on ").nth(1).unwrap().parse().unwrap();
        Self { daemon, address, directory }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("control.sock")
    }

    pub(crate) fn manager(&self) -> Manager {
        Manager::connect(&self.socket())
    }

    /// Once its session has begun, which is a moment after it listens, and it has told of a guest
    /// that its memory is final.
    pub(crate) fn begun(&self) -> Manager {
        let mut manager = self.manager();
        let is_snapshot = manager.greeting["role"] == "snapshot";
        let (last, sequence) = if is_snapshot { ("begun", 1) } else { ("stopped", 2) };
        if manager.ok(json!({"do": "subscribe"}))["sequence"].as_u64() < Some(sequence) {
            manager.event(last);
        }
        self.manager()
    }
}

pub(crate) fn socket_argument(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// Memory in which every seventh page is zero.
pub(crate) fn pattern() -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * PAGE) as usize];
    for (number, page) in bytes.chunks_mut(PAGE as usize).enumerate() {
        if number % 7 != 3 {
            page.fill(number as u8 | 1);
        }
    }
    bytes
}

/// A client of a control socket.
pub(crate) struct Manager {
    stream: BufReader<UnixStream>,
    pub(crate) greeting: Value,
    last_id: u64,
    /// Events that came while something else was waited for.
    early: Vec<Value>,
}

impl Manager {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut manager = Self {
            stream: BufReader::new(stream),
            greeting: Value::Null,
            last_id: 0,
            early: Vec::new(),
        };
        manager.greeting = manager.read().expect("a greeting");
        manager
    }

    /// The next line; `None` at the end.
    pub(crate) fn read(&mut self) -> Option<Value> {
        let mut line = String::new();
        let count = self.stream.read_line(&mut line).expect("a line in time");
        (count > 0).then(|| serde_json::from_str(&line).expect("a JSON object a line"))
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask(&mut self, request: Value) -> Value {
        self.try_ask(request).expect("an answer")
    }

    /// The same; `None` where the process has ended.
    pub(crate) fn try_ask(&mut self, mut request: Value) -> Option<Value> {
        self.last_id += 1;
        request["id"] = json!(self.last_id);
        // What it said before its end can be read all the same.
        let _ = self.stream.get_mut().write_all(format!("{request}\n").as_bytes());
        loop {
            let answer = self.read()?;
            if answer["id"] == self.last_id {
                return Some(answer);
            }
            self.early.push(answer);
        }
    }

    /// The same, of which it is known that it is carried out.
    pub(crate) fn ok(&mut self, request: Value) -> Value {
        let mut answer = self.ask(request);
        assert!(answer.get("error").is_none(), "{answer}");
        answer["ok"].take()
    }

    /// The code of the error in the answer, and its message.
    pub(crate) fn refused(&mut self, request: Value) -> (String, String) {
        let answer = self.ask(request);
        let of = |name: &str| answer["error"][name].as_str().unwrap_or_default().to_owned();
        (of("code"), of("message"))
    }

    pub(crate) fn query(&mut self) -> Value {
        self.ok(json!({"do": "query"}))
    }

    /// The next event.
    pub(crate) fn next_event(&mut self) -> Option<Value> {
        if self.early.is_empty() { self.read() } else { Some(self.early.remove(0)) }
    }

    /// Waits for an event of this name.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        self.any_event(&[name])
    }

    /// Waits for an event of any of these names; which it was.
    pub(crate) fn first_of(&mut self, names: &[&str]) -> String {
        self.any_event(names)["event"].as_str().unwrap_or_default().to_owned()
    }

    fn any_event(&mut self, names: &[&str]) -> Value {
        let mut seen = Vec::new();
        loop {
            let event = self.next_event();
            let event = event.unwrap_or_else(|| panic!("none of {names:?} after {seen:#?}"));
            if names.iter().any(|name| event["event"] == *name) {
                return event;
            }
            seen.push(event);
        }
    }
}

/// Memory of a destination in this process, and what serves it.
pub(crate) struct Target {
    map: MmapRaw,
    destination: Destination,
    events: Events<DestinationEvent>,
}

impl Target {
    pub(crate) fn connect(address: &Address) -> Self {
        let length = PAGES * PAGE;
        let map = MmapRaw::from(MmapOptions::new().len(length as usize).map_anon().unwrap());
        let start = NonNull::new(map.as_mut_ptr()).unwrap();
        // SAFETY: the mapping is kept beside the destination, and read through raw pointers.
        let region = unsafe { DestinationRegion::anonymous(GuestAddress(0), start, length) };
        let memory =
            DestinationMemory::register(vec![region], FaultScope::UserOnly, DiscardNotice::Called);
        let endpoint = Endpoint::Connect(address.clone());
        let options = DestinationOptions::default();
        let (destination, events) = Destination::start(memory.unwrap(), endpoint, options).unwrap();
        Self { map, destination, events }
    }

    /// Waits for an event, restoring the guest when its state comes.
    pub(crate) fn until(&self, is_it: impl Fn(&DestinationEvent) -> bool) {
        let until = Instant::now() + LIMIT;
        loop {
            let event = self.events.next_timeout(until.saturating_duration_since(Instant::now()));
            let event = event.unwrap_or_else(|why| panic!("{why}: {:?}", self.destination.stats()));
            if matches!(event, DestinationEvent::State(_)) {
                self.destination.ready().unwrap();
            }
            if is_it(&event) {
                return;
            }
        }
    }

    pub(crate) fn complete(&self) -> u64 {
        self.destination.stats().pages_complete
    }

    /// Looks for its source here from now on.
    pub(crate) fn recover(&self, at: &Address) {
        self.destination.recover(Some(Endpoint::Connect(at.clone()))).unwrap();
    }

    pub(crate) fn ready(&self) {
        self.destination.ready().unwrap();
    }

    /// Waits for the end, and verifies every page.
    pub(crate) fn finish(self) {
        self.until(|event| *event == DestinationEvent::Finished);
        let expected = pattern();
        for (page, bytes) in expected.chunks(PAGE as usize).enumerate() {
            let at = self.map.as_ptr().wrapping_add(page * PAGE as usize);
            // SAFETY: inside the mapping; volatile because the engine has filled it.
            let first = unsafe { at.read_volatile() };
            // SAFETY: the same, for the last byte of the page.
            let last = unsafe { at.wrapping_add(PAGE as usize - 1).read_volatile() };
            assert_eq!([first, last], [bytes[0], bytes[PAGE as usize - 1]], "page {page}");
        }
    }
}
