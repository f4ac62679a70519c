//! A page server to talk to, memory with something in it, and a destination that fetches it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::ptr::NonNull;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{
    Address, Checksums, Destination, DestinationEvent, DestinationMemory, DestinationOptions,
    DestinationRegion, DiscardNotice, Endpoint, Events, FaultScope, GuestAddress, NoEvent,
    StateSection,
};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest, Sha256};

pub(crate) const PAGE: u64 = 4096;
/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_secs(40);

/// A running page server.
pub(crate) struct Server {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Server {
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_page-server"));
        command.args(arguments);
        Self::spawn(command)
    }

    pub(crate) fn spawn(mut command: Command) -> Self {
        command.arg("--json").stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the page server starts");
        let errors = child.stderr.take().unwrap();
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: Vec::new() }
    }

    /// Waits for a line that holds `text`.
    pub(crate) fn line(&mut self, text: &str) -> String {
        self.any_line(&[text])
    }

    /// Waits for a line that holds one of these.
    pub(crate) fn any_line(&mut self, texts: &[&str]) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if texts.iter().any(|text| line.contains(text)) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("no line with {texts:?}; there were {:#?}", self.seen)
                }
            }
        }
    }

    /// Where it listens, as it says.
    pub(crate) fn address(&mut self) -> Address {
        let line = self.line("listening on ");
        line.split("listening on ").nth(1).unwrap().parse().unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end: exit status, report, all it said.
    pub(crate) fn end(mut self) -> (i32, serde_json::Value, Vec<String>) {
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = self.child.wait().unwrap();
        self.seen.extend(self.lines.iter());
        let seen = std::mem::take(&mut self.seen);
        let report = serde_json::from_str(text.trim())
            .unwrap_or_else(|error| panic!("{error}: {text:?}; {seen:#?}"));
        (status.code().unwrap_or(-1), report, seen)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `pages` pages, each of its own content; every seventh is zero.
pub(crate) fn pattern(pages: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; (pages * PAGE) as usize];
    for (number, page) in bytes.chunks_mut(PAGE as usize).enumerate() {
        if number % 7 == 3 {
            continue;
        }
        let mut state = (seed << 32) | (number as u64 + 1);
        for word in page.chunks_mut(8) {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

pub(crate) fn memfd(length: u64) -> File {
    let file = File::from(memfd_create(c"memory", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(length).unwrap();
    file
}

/// Memory of a destination, in memfds.
pub(crate) struct Target {
    /// File, length, mapping.
    pub(crate) pieces: Vec<(File, u64, MmapRaw)>,
    pub(crate) destination: Destination,
    pub(crate) events: Events<DestinationEvent>,
    pub(crate) said: Vec<DestinationEvent>,
    is_quiet: bool,
    is_snapshot: bool,
    has_refused: bool,
}

impl Target {
    /// Memory of these guest addresses and lengths, from `endpoint`.
    pub(crate) fn start(regions: &[(u64, u64)], endpoint: Endpoint, checksums: Checksums) -> Self {
        let mut pieces = Vec::new();
        let mut described = Vec::new();
        for (guest, length) in regions {
            let file = memfd(*length);
            let map = MmapOptions::new().len(*length as usize).map_raw(&file).unwrap();
            let start = NonNull::new(map.as_mut_ptr()).unwrap();
            let same: OwnedFd = file.try_clone().unwrap().into();
            // SAFETY: the mapping is kept in `pieces` beside the destination, and its bytes
            // are reached through raw pointers only.
            described.push(unsafe {
                DestinationRegion::shared(GuestAddress(*guest), start, *length, same, 0)
            });
            pieces.push((file, *length, map));
        }
        let memory =
            DestinationMemory::register(described, FaultScope::UserOnly, DiscardNotice::Called)
                .unwrap();
        let mut options = DestinationOptions::default();
        options.checksums = checksums;
        let (destination, events) = Destination::start(memory, endpoint, options).unwrap();
        Self {
            pieces,
            destination,
            events,
            said: Vec::new(),
            is_quiet: false,
            is_snapshot: false,
            has_refused: false,
        }
    }

    pub(crate) fn connect(regions: &[(u64, u64)], address: &Address) -> Self {
        Self::start(regions, Endpoint::Connect(address.clone()), Checksums::Off)
    }

    /// One whose guest touches nothing.
    pub(crate) fn start_quietly(regions: &[(u64, u64)], address: &Address) -> Self {
        Self { is_quiet: true, ..Self::connect(regions, address) }
    }

    /// One of a snapshot.
    pub(crate) fn of_snapshot(regions: &[(u64, u64)], address: &Address) -> Self {
        Self { is_snapshot: true, ..Self::connect(regions, address) }
    }

    /// The guest is not to run here. Its state may be on its way.
    pub(crate) fn refuse(&mut self) {
        self.has_refused = true;
        self.destination.refuse().unwrap();
    }

    pub(crate) fn until_attached(&mut self) {
        self.until(|event| matches!(event, DestinationEvent::Attached(_)));
    }

    /// Waits for the next event, answering those that a VMM answers.
    pub(crate) fn next(&mut self) -> DestinationEvent {
        let event = match self.events.next_timeout(LIMIT) {
            Ok(event) => event,
            Err(NoEvent::NotInTime | NoEvent::Ended) => {
                panic!("no event; {:?}, {:?}", self.said, self.destination.stats())
            }
        };
        match &event {
            // A snapshot has no state to wait for.
            DestinationEvent::Attached(_) if self.is_snapshot => self.destination.ready().unwrap(),
            DestinationEvent::State(_) if self.has_refused => {}
            DestinationEvent::State(_) => self.destination.ready().unwrap(),
            DestinationEvent::Run if !self.is_quiet => self.touch(),
            _ => {}
        }
        self.said.push(event.clone());
        event
    }

    /// Waits for an event.
    pub(crate) fn until(&mut self, is_it: impl Fn(&DestinationEvent) -> bool) {
        while !is_it(&self.next()) {}
    }

    /// Waits until the session is over; the contents, in the order of guest addresses.
    pub(crate) fn finish(mut self) -> Fetched {
        if !self.said.contains(&DestinationEvent::Finished) {
            self.until(|event| *event == DestinationEvent::Finished);
        }
        let Self { pieces, destination, said, .. } = self;
        drop(destination);
        let contents = pieces.iter().map(|(file, length, _)| read(file, *length)).collect();
        let files = pieces.into_iter().map(|(file, ..)| file).collect();
        Fetched { contents, files, said }
    }

    /// Reads some pages as a guest does: its last page first.
    fn touch(&self) {
        for (_, length, map) in &self.pieces {
            for page in [length / PAGE - 1, length / PAGE / 2, 0] {
                let byte = map.as_ptr().wrapping_add((page * PAGE) as usize);
                // SAFETY: inside the mapping; volatile because the engine fills it.
                unsafe { byte.read_volatile() };
            }
        }
    }
}

/// What a destination got.
pub(crate) struct Fetched {
    pub(crate) contents: Vec<Vec<u8>>,
    pub(crate) files: Vec<File>,
    pub(crate) said: Vec<DestinationEvent>,
}

impl Fetched {
    pub(crate) fn state(&self) -> &[StateSection] {
        let found = self.said.iter().find_map(|event| match event {
            DestinationEvent::State(sections) => Some(sections.as_slice()),
            _ => None,
        });
        found.expect("state arrives in a migration")
    }
}

/// Everything in a file, by reading, which allocates no holes.
pub(crate) fn read(file: &File, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Runs this test binary again, as the test `role`, which plays a part of its own.
pub(crate) fn role(role: &str, argument: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", role, "--nocapture"]).env("AFTERIMAGE_TEST_ROLE", argument);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// The argument of the part that this process plays, if it plays one.
pub(crate) fn argument() -> Option<String> {
    std::env::var("AFTERIMAGE_TEST_ROLE").ok()
}

/// Waits for a line of a child that holds `text`.
pub(crate) fn line_of(child: &mut Child, text: &str) -> String {
    // A byte at a time: whoever comes next finds the rest.
    let output = child.stdout.as_mut().unwrap();
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        assert_eq!(output.read(&mut byte).unwrap(), 1, "the child ended without {text:?}");
        if byte[0] != b'\n' {
            line.push(byte[0]);
            continue;
        }
        let whole = String::from_utf8_lossy(&line).into_owned();
        if whole.contains(text) {
            return whole;
        }
        line.clear();
    }
}

/// A descriptor that a child is to inherit as number 3.
pub(crate) fn inherit_as_3(command: &mut Command, fd: OwnedFd) {
    use std::os::unix::process::CommandExt;
    let move_it = move || {
        // SAFETY: they take numbers; 3 is the child's. It could be the same descriptor, which
        // dup2 leaves to be closed on exec.
        let result = unsafe {
            nix::libc::dup2(fd.as_raw_fd(), 3);
            nix::libc::fcntl(3, nix::libc::F_SETFD, 0)
        };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe { command.pre_exec(move_it) };
}
