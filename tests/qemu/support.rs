//! Processes to talk to: the commands, two QEMUs with their guest's serial ports, and a network
//! between the hosts.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use afterimage_tools::qemu::{Deadline, Lines, Qmp, Speaker};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::boot;

pub(crate) const QEMU: &str = "qemu-system-x86_64";
pub(crate) const DRIVER: &str = env!("CARGO_BIN_EXE_afterimage-qemu");
pub(crate) const CLIENT: &str = env!("CARGO_BIN_EXE_page-client");
pub(crate) const SERVER: &str = env!("CARGO_BIN_EXE_page-server");
pub(crate) const KEEPER: &str = env!("CARGO_BIN_EXE_afterimage-keeper");
/// What the guest is called.
pub(crate) const GUEST: &str = "vm7";
/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_mins(2);

/// A running command, heard line by line.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    lines: Receiver<String>,
    pub(crate) seen: Vec<String>,
}

impl Daemon {
    pub(crate) fn start<S: AsRef<OsStr>>(program: &str, arguments: &[S]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments);
        Self::of(command)
    }

    pub(crate) fn of(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command starts");
        let (pid, errors) = (child.id(), child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(errors).lines().map_while(Result::ok) {
                // Shown where the test fails.
                println!("{pid}: {line}");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines, seen: Vec::new() }
    }

    /// Waits for its end by a signal.
    pub(crate) fn is_killed(&mut self) -> bool {
        self.child.wait().unwrap().signal() == Some(Signal::SIGKILL as i32)
    }

    /// Waits for a line that holds `text`.
    pub(crate) fn line(&mut self, text: &str) -> String {
        let until = Instant::now() + LIMIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no line with {text:?}; there were {:#?}", self.seen)
            };
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Ends it without a word.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end: exit status, what it printed, and what it said.
    pub(crate) fn end(mut self) -> (i32, String, Vec<String>) {
        let mut text = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = self.child.wait().unwrap();
        self.seen.extend(self.lines.iter());
        (status.code().unwrap_or(-1), text, std::mem::take(&mut self.seen))
    }

    /// The same, and its JSON.
    pub(crate) fn report(self) -> (i32, Value, Vec<String>) {
        let (status, text, lines) = self.end();
        let report = serde_json::from_str(&text);
        (status, report.unwrap_or_else(|_| panic!("no JSON: {text:?} {lines:#?}")), lines)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is behind the guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    File,
    Memfd,
    /// As QEMU does it by itself.
    Private,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// Two hosts that are one, and a disk that both can reach.
pub(crate) struct Scene {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) vcpus: usize,
    pub(crate) backing: Backing,
    pub(crate) writes: Writes,
}

/// Whether the source's QEMU runs with the library that lets its writes be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    Untracked,
    Tracked,
}

impl Scene {
    pub(crate) fn new(vcpus: usize, backing: Backing) -> Self {
        // On tmpfs, because guest memory is there too.
        let directory = tempfile::Builder::new().prefix("qemu-").tempdir_in("/dev/shm").unwrap();
        let scene = Self { directory, vcpus, backing, writes: Writes::Untracked };
        boot::write_disk(&scene.path("disk"), vcpus).unwrap();
        scene
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn memory(&self, side: Side) -> PathBuf {
        self.path(&format!("{}.memory", side.name()))
    }

    pub(crate) fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// The arguments of page-client, but for where the source is.
    pub(crate) fn client(&self, more: &[&str]) -> Daemon {
        let attach = self.unix("attach");
        let mut arguments = vec!["--attach", &attach, "--json"];
        arguments.extend(more);
        Daemon::start(CLIENT, &arguments)
    }
}

/// The commands of both sides.
impl Scene {
    pub(crate) fn send(&self, more: &[&str]) -> Daemon {
        self.send_until(None, more)
    }

    /// One that is killed when the engine comes to this step.
    pub(crate) fn send_until(&self, step: Option<&str>, more: &[&str]) -> Daemon {
        let (qmp, pages) = (self.unix("source.qmp"), self.unix("pages"));
        let mut arguments = vec!["send", "--qmp", &qmp, "--listen", &pages, "--json"];
        arguments.extend(more);
        let mut command = Command::new(DRIVER);
        command.args(&arguments);
        if let Some(step) = step {
            command.env("AFTERIMAGE_KILL_AT", step);
        }
        Daemon::of(command)
    }

    pub(crate) fn receive(&self) -> Daemon {
        let (qmp, attach) = (self.unix("destination.qmp"), self.unix("attach"));
        let arguments = ["receive", "--qmp", &qmp, "--attach", &attach, "--guest", GUEST];
        Daemon::start(DRIVER, &[&arguments[..], &["--json"]].concat())
    }

    pub(crate) fn migrate(&self, more: &[&str]) -> Daemon {
        let [from, to, pages, attach] =
            ["source.qmp", "destination.qmp", "pages", "attach"].map(|name| self.unix(name));
        let mut arguments = vec!["migrate", "--source-qmp", &from, "--destination-qmp", &to];
        arguments.extend(["--listen", &pages, "--attach", &attach, "--guest", GUEST, "--json"]);
        arguments.extend(more);
        Daemon::start(DRIVER, &arguments)
    }
}

/// A QEMU, its guest's serial port, and a monitor for the test.
pub(crate) struct Qemu {
    pub(crate) daemon: Daemon,
    pub(crate) qmp: Qmp,
    pub(crate) serial: Serial,
}

impl Qemu {
    pub(crate) fn start(scene: &Scene, side: Side) -> Self {
        Self::start_with(scene, side, &[])
    }

    /// With more arguments.
    pub(crate) fn start_with(scene: &Scene, side: Side, more: &[&str]) -> Self {
        let path = |what: &str| scene.path(&format!("{}.{what}", side.name()));
        let serial = UnixListener::bind(path("serial")).unwrap();
        let mut command = Command::new(QEMU);
        command.args(machine(scene, side)).args(more);
        for monitor in ["qmp", "test"] {
            let address = format!("unix:{},server=on,wait=off", path(monitor).display());
            command.args(["-qmp", &address]);
        }
        // The last, so that everything else is there when it has connected.
        let chardev = format!("socket,id=serial,path={}", path("serial").display());
        command.args(["-chardev", &chardev, "-serial", "chardev:serial"]);
        command.envs(library(scene, side));
        let daemon = Daemon::of(command);
        let serial = Serial::accept(&serial);
        let speaker = Speaker { name: format!("the {}'s QEMU", side.name()), log: None };
        let stream = UnixStream::connect(path("test")).unwrap();
        let qmp = Qmp::greet(Lines::new(stream, speaker), Deadline::after(LIMIT)).unwrap();
        Self { daemon, qmp, serial }
    }

    pub(crate) fn status(&mut self) -> String {
        let answer = self.qmp.execute("query-status", &json!({})).unwrap();
        answer["status"].as_str().unwrap().to_owned()
    }

    /// Ends it, and gives all that its guest has ever said.
    pub(crate) fn last_words(self) -> Vec<u8> {
        let Self { daemon, serial, .. } = self;
        daemon.kill();
        serial.all()
    }
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// The same on both sides, but for whose the memory is and what waits for a guest.
fn machine(scene: &Scene, side: Side) -> Vec<String> {
    let mib = boot::MEMORY_MIB;
    let disk = scene.path("disk").display().to_string();
    let memory = scene.memory(side).display().to_string();
    let object = match scene.backing {
        Backing::Private => None,
        Backing::Memfd => Some(format!("memory-backend-memfd,id=ram,share=on,size={mib}M")),
        Backing::File => {
            Some(format!("memory-backend-file,id=ram,share=on,size={mib}M,mem-path={memory}"))
        }
    };
    let common = format!(
        "-nodefaults -no-user-config -display none -accel tcg -m {mib}M -smp {} \
         -drive file={disk},format=raw",
        scene.vcpus
    );
    let backed = match object {
        None => "-machine pc".to_owned(),
        Some(object) => format!("-machine pc,memory-backend=ram -object {object}"),
    };
    let waits = if side == Side::Destination { "-S -incoming defer" } else { "" };
    let all = [&common, &backed, waits].join(" ");
    all.split_whitespace().map(str::to_owned).collect()
}

/// The environment of the preload library, where it is wanted.
fn library(scene: &Scene, side: Side) -> Vec<(&'static str, OsString)> {
    let work = match side {
        Side::Source if scene.writes == Writes::Untracked => return Vec::new(),
        Side::Source => vec![("AFTERIMAGE_TRACKING", scene.unix("tracking").into())],
        Side::Destination => vec![
            ("AFTERIMAGE_SOCKET", scene.unix("attach").into()),
            ("AFTERIMAGE_GUEST", GUEST.into()),
        ],
    };
    let memory = match scene.backing {
        Backing::Memfd => "memfd:memory-backend-memfd".into(),
        _ => scene.memory(side).into(),
    };
    [work, vec![("LD_PRELOAD", preload().into()), ("AFTERIMAGE_MEMORY", memory)]].concat()
}

/// What a guest says.
pub(crate) struct Serial {
    said: Arc<Mutex<Vec<u8>>>,
    news: Receiver<()>,
    reader: JoinHandle<()>,
}

impl Serial {
    fn accept(listener: &UnixListener) -> Self {
        Self::of(listener.accept().unwrap().0)
    }

    /// What is read from there.
    pub(crate) fn of(mut stream: impl Read + Send + 'static) -> Self {
        let said = Arc::new(Mutex::new(Vec::new()));
        let (sender, news) = channel();
        let shared = Arc::clone(&said);
        let reader = thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut piece) {
                shared.lock().unwrap().extend(&piece[..length]);
                // The test may have heard enough.
                let _ = sender.send(());
            }
        });
        Self { said, news, reader }
    }

    /// What was said so far.
    pub(crate) fn so_far(&self) -> Vec<u8> {
        self.said.lock().unwrap().clone()
    }

    /// Waits until every vCPU has said that it has done so many more rounds.
    pub(crate) fn wait_rounds(&self, vcpus: usize, more: usize) {
        let rounds = || {
            let said = self.so_far();
            (0..vcpus).map(|vcpu| lines_of(&said, vcpu).count()).min().unwrap()
        };
        let (enough, until) = (rounds() + more, Instant::now() + LIMIT);
        while rounds() < enough {
            let left = until.saturating_duration_since(Instant::now());
            self.news.recv_timeout(left).unwrap_or_else(|_| {
                panic!("{} of {enough} rounds: {:?}", rounds(), tail(&self.so_far()))
            });
        }
    }

    fn all(self) -> Vec<u8> {
        self.reader.join().unwrap();
        Arc::into_inner(self.said).unwrap().into_inner().unwrap()
    }
}

fn tail(said: &[u8]) -> String {
    String::from_utf8_lossy(&said[said.len().saturating_sub(200)..]).into_owned()
}

/// The whole lines of a vCPU: how many rounds, and how many wrong words.
fn lines_of(said: &[u8], vcpu: usize) -> impl Iterator<Item = (u32, u32)> {
    let letter = b'A' + vcpu as u8;
    let lines = said.split_inclusive(|byte| *byte == b'\n');
    let whole = lines.filter(move |line| line.ends_with(b"\n") && line.first() == Some(&letter));
    whole.map(|line| {
        let text = std::str::from_utf8(&line[1..line.len() - 1]).unwrap();
        let (rounds, wrong) = text.split_once(' ').unwrap();
        let number = |text| u32::from_str_radix(text, 16).unwrap();
        (number(rounds), number(wrong))
    })
}

/// What the guest has said at the source, and then at the destination: each vCPU must have
/// counted every round once, and found no wrong word; `more` of them at the destination.
pub(crate) fn check_lived_on(source: &[u8], destination: &[u8], vcpus: usize, more: u32) {
    let all = [source, destination].concat();
    for vcpu in 0..vcpus {
        let lines: Vec<_> = lines_of(&all, vcpu).collect();
        for (index, (rounds, wrong)) in lines.iter().enumerate() {
            assert_eq!(*rounds as usize, index + 1, "vCPU {vcpu} counts every round once");
            assert_eq!(*wrong, 0, "vCPU {vcpu} has read what it wrote, up to round {rounds}");
        }
        let here = lines_of(destination, vcpu).count();
        assert!(here >= more as usize, "vCPU {vcpu} did {here} rounds at the destination");
    }
}

/// Where cargo has put the preload library.
pub(crate) fn preload() -> PathBuf {
    let name = "libafterimage_preload.so";
    let test = std::env::current_exe().unwrap();
    let near = [test.parent(), test.parent().and_then(Path::parent)];
    let found = near.into_iter().flatten().map(|it| it.join(name)).find(|it| it.exists());
    found.unwrap_or_else(|| panic!("no {name} beside {}", test.display()))
}

/// A network of one listening address on loopback, which can be cut.
pub(crate) struct Network {
    pub(crate) address: String,
    links: Arc<Mutex<Vec<TcpStream>>>,
    is_open: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
}

impl Network {
    /// Whoever connects is led to the Unix socket `host`, as long as the network is open.
    pub(crate) fn to(host: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let links = Arc::new(Mutex::new(Vec::new()));
        let [is_open, is_over] = [true, false].map(|it| Arc::new(AtomicBool::new(it)));
        let network = Self { address, links, is_open, is_over };
        let (links, open, over) =
            (network.links.clone(), network.is_open.clone(), network.is_over.clone());
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if over.load(Ordering::Acquire) {
                    return;
                }
                let is_open = open.load(Ordering::Acquire);
                let Some(far) = is_open.then(|| UnixStream::connect(&host).ok()).flatten() else {
                    continue;
                };
                near.set_nodelay(true).unwrap();
                links.lock().unwrap().push(near.try_clone().unwrap());
                let (back, forth) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                thread::spawn(move || carry(forth, far, |it| it.shutdown(Shutdown::Both)));
                thread::spawn(move || carry(back, near, |it| it.shutdown(Shutdown::Both)));
            }
        });
        network
    }

    pub(crate) fn set_open(&self, is_open: bool) {
        self.is_open.store(is_open, Ordering::Release);
    }

    /// Breaks every connection of this moment; returns how many there were.
    pub(crate) fn cut(&self) -> usize {
        let links: Vec<_> = self.links.lock().unwrap().drain(..).collect();
        links.iter().filter(|link| link.shutdown(Shutdown::Both).is_ok()).count()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        self.cut();
        // So that the thread that accepts notices.
        let _ = TcpStream::connect(self.address.trim_start_matches("tcp:"));
    }
}

fn carry<To: Write>(mut from: impl Read, mut to: To, end: fn(&To) -> std::io::Result<()>) {
    let mut piece = vec![0; 256 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    // The other way may have ended it already.
    let _ = end(&to);
}
