//! Two hosts that are one, with a QEMU each, and the commands of both sides.

mod daemon;
mod network;
mod serial;

use std::ffi::OsString;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use afterimage::dirty::{DirtyTracker, WriteProtectTracker};
use afterimage_tools::qemu::{Deadline, Lines, Qmp, Speaker};
use afterimage_tools::require;
use serde_json::json;

use crate::boot;
pub(crate) use daemon::Daemon;
pub(crate) use network::Network;
pub(crate) use serial::{Serial, check_lived_on};

pub(crate) const QEMU: &str = "qemu-system-x86_64";
pub(crate) const DRIVER: &str = env!("CARGO_BIN_EXE_afterimage-qemu");
pub(crate) const CLIENT: &str = env!("CARGO_BIN_EXE_page-client");
pub(crate) const SERVER: &str = env!("CARGO_BIN_EXE_page-server");
pub(crate) const KEEPER: &str = env!("CARGO_BIN_EXE_afterimage-keeper");
/// What the guest is called.
pub(crate) const GUEST: &str = "vm7";
/// Long enough for anything on a busy machine; reached only in failure.
pub(crate) const LIMIT: Duration = Duration::from_mins(2);

/// What is behind the guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    File,
    Memfd,
    /// A file on the hugetlbfs that [`Scene::huge`] is.
    Huge,
    /// As QEMU does it by itself.
    Private,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source,
    Destination,
}

/// Two hosts that are one, and what both QEMUs are started with.
pub(crate) struct Scene {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) accelerator: Accelerator,
    pub(crate) vcpus: usize,
    pub(crate) backing: Backing,
    pub(crate) writes: Writes,
    /// The sizes of the memory backends in MiB; several are a NUMA node each.
    pub(crate) backends: Vec<u64>,
    /// The backends in the order in which a library is told of them.
    pub(crate) named: Vec<usize>,
    /// What runs there.
    pub(crate) program: Vec<String>,
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// QEMU itself, whose threads touch guest memory.
    Tcg,
    /// The kernel, which touches it for the guest.
    Kvm,
}

/// Whether the source's QEMU runs with the library that lets its writes be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    Untracked,
    Tracked,
}

impl Scene {
    /// For the guest of [`boot`], on a disk that both can reach.
    pub(crate) fn new(vcpus: usize, backing: Backing) -> Self {
        let mut scene = Self::of(vcpus, backing, boot::MEMORY_MIB);
        let disk = scene.path("disk");
        boot::write_disk(&disk, vcpus).unwrap();
        scene.program = vec!["-drive".into(), format!("file={},format=raw", disk.display())];
        scene
    }

    /// For another.
    pub(crate) fn of(vcpus: usize, backing: Backing, mib: u64) -> Self {
        // On tmpfs, because guest memory is there too.
        let directory = tempfile::Builder::new().prefix("qemu-").tempdir_in("/dev/shm").unwrap();
        let (writes, program) = (Writes::Untracked, Vec::new());
        Self {
            directory,
            accelerator: Accelerator::Tcg,
            vcpus,
            backing,
            writes,
            backends: vec![mib],
            named: vec![0],
            program,
        }
    }

    /// The same with these memory backends.
    pub(crate) fn with_backends(mut self, backends: &[u64]) -> Self {
        self.backends = backends.to_vec();
        self.named = (0..backends.len()).collect();
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Where huge pages are mounted, if they are.
    pub(crate) fn huge(&self) -> PathBuf {
        self.path("huge")
    }

    fn memory(&self, side: Side, backend: usize) -> PathBuf {
        let directory = if self.backing == Backing::Huge { self.huge() } else { self.path("") };
        directory.join(format!("{}.memory{backend}", side.name()))
    }

    pub(crate) fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// With the arguments of page-client, but for where its guest comes in.
    pub(crate) fn client(&self, more: &[&str]) -> Daemon {
        self.client_until(None, more)
    }

    /// One that is killed when the engine comes to this step.
    pub(crate) fn client_until(&self, step: Option<&str>, more: &[&str]) -> Daemon {
        let attach = self.unix("attach");
        let mut command = Command::new(CLIENT);
        command.args(["--attach", &attach, "--json"]).args(more);
        if let Some(step) = step {
            command.env("AFTERIMAGE_KILL_AT", step);
        }
        Daemon::of(command)
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
pub(crate) struct Qemu<S = Serial> {
    pub(crate) daemon: Daemon,
    pub(crate) qmp: Qmp,
    pub(crate) serial: S,
}

impl Qemu {
    pub(crate) fn start(scene: &Scene, side: Side) -> Self {
        Self::start_with(scene, side, &[])
    }

    /// With more arguments.
    pub(crate) fn start_with(scene: &Scene, side: Side, more: &[&str]) -> Self {
        Self::launch(scene, side, more, Serial::of)
    }

    /// Ends it, and gives all that its guest has ever said.
    pub(crate) fn last_words(self) -> Vec<u8> {
        let Self { daemon, serial, .. } = self;
        daemon.kill();
        serial.all()
    }
}

impl<S> Qemu<S> {
    /// With another listener at the last serial port.
    pub(crate) fn launch(
        scene: &Scene,
        side: Side,
        more: &[&str],
        listen: impl FnOnce(UnixStream) -> S,
    ) -> Self {
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
        let serial = listen(serial.accept().unwrap().0);
        let speaker = Speaker { name: format!("the {}'s QEMU", side.name()), log: None };
        let stream = UnixStream::connect(path("test")).unwrap();
        let qmp = Qmp::greet(Lines::new(stream, speaker), Deadline::after(LIMIT)).unwrap();
        Self { daemon, qmp, serial }
    }

    pub(crate) fn status(&mut self) -> String {
        let answer = self.qmp.execute("query-status", &json!({})).unwrap();
        answer["status"].as_str().unwrap().to_owned()
    }
}

impl Side {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// The same on both sides, but for whose the memory is and what waits for a guest.
fn machine(scene: &Scene, side: Side) -> Vec<String> {
    let mib: u64 = scene.backends.iter().sum();
    let (nothing, vcpus) = ("-nodefaults -no-user-config -display none", scene.vcpus);
    let accelerator = match scene.accelerator {
        Accelerator::Tcg => "tcg",
        Accelerator::Kvm => "kvm",
    };
    let mut all = vec![format!("{nothing} -accel {accelerator} -m {mib}M -smp {vcpus} -machine")];
    all.push(match (scene.backing, scene.backends.len()) {
        (Backing::Private, _) => "pc".to_owned(),
        (_, 1) => "pc,memory-backend=ram0".to_owned(),
        (_, many) => {
            let nodes: Vec<_> = (0..many).map(|it| format!("-numa node,memdev=ram{it}")).collect();
            format!("pc {}", nodes.join(" "))
        }
    });
    for (number, mib) in scene.backends.iter().enumerate() {
        let of = |kind: &str| format!("-object {kind},id=ram{number},share=on,size={mib}M");
        let path = scene.memory(side, number);
        all.push(match scene.backing {
            Backing::Private => continue,
            Backing::Memfd => of("memory-backend-memfd"),
            Backing::File | Backing::Huge => {
                format!("{},mem-path={}", of("memory-backend-file"), path.display())
            }
        });
    }
    if side == Side::Destination {
        all.push("-S -incoming defer".to_owned());
    }
    let words = all.iter().flat_map(|it| it.split_whitespace()).map(str::to_owned);
    words.chain(scene.program.iter().cloned()).collect()
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
    let name = |backend: &usize| match scene.backing {
        Backing::Memfd => "memfd:memory-backend-memfd".to_owned(),
        _ => scene.memory(side, *backend).display().to_string(),
    };
    let memory = scene.named.iter().map(name).collect::<Vec<_>>().join(";");
    [work, vec![("LD_PRELOAD", preload().into()), ("AFTERIMAGE_MEMORY", memory.into())]].concat()
}

/// Whether this machine's QEMU can have a guest moved with such memory.
pub(crate) fn can_move(backing: Backing) -> bool {
    require::qemu_system() && (backing != Backing::Memfd || require::qemu_memfd())
}

/// Whether this kernel finds out what is written.
pub(crate) fn can_track() -> bool {
    let tracked = WriteProtectTracker::new(Vec::new()).and_then(|mut tracker| tracker.start());
    require::or_skip("wp_async", tracked).is_some()
}

/// A page-client that can die: what it needs is held by a keeper.
pub(crate) struct Survival {
    _keeper: Daemon,
    _directory: tempfile::TempDir,
    /// Of each page-client in turn.
    pub(crate) arguments: Vec<String>,
}

impl Survival {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let place = format!("unix:{}", at("keeper"));
        let mut keeper = Daemon::start(KEEPER, &["--listen", &place]);
        keeper.line(&place);
        let state = at("client.state");
        let arguments = ["--state", &state, "--keeper", &place, "--guest", GUEST];
        let arguments = arguments.map(str::to_owned).to_vec();
        Self { _keeper: keeper, _directory: directory, arguments }
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
