//! One QEMU: its arguments, its sockets, and its end.
//!
//! Both sides are started with the same devices, as a migration needs. What differs with
//! the way the memory is moved, the object behind the guest's RAM, is given by the caller.
//! Invariant: a process outlives neither its [`Machine`] nor the driver, even if that is
//! killed.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use afterimage_tools::qemu::guest::Guest;
use afterimage_tools::qemu::{Deadline, Lines, Qmp, Speaker};
use afterimage_tools::size::Size;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;

use super::QemuError;
use super::place::Place;

/// The loader has some 30 MB to bind, on a machine that may be busy.
const START: Duration = Duration::from_mins(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Boots the guest.
    Source,
    /// Waits for `migrate-incoming`.
    Destination,
}

#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) side: Side,
    pub(super) memory: Size,
    pub(super) working_set: Size,
    /// The value of `-object` for the guest's RAM; its id is `ram`.
    pub(super) ram: String,
    /// Who is told of the RAM as it is mapped; the QEMU then waits to be told to run.
    pub(super) preload: Option<Preload>,
}

/// A library that is loaded into QEMU, and what it is told.
#[derive(Clone, Debug)]
pub(super) struct Preload {
    pub(super) library: PathBuf,
    pub(super) environment: Vec<(&'static str, OsString)>,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) qmp: Qmp,
    /// The guest, as long as it runs here.
    pub(super) guest: Guest,
    process: Process,
    /// Sockets and logs; removed with the machine.
    directory: TempDir,
}

impl Machine {
    pub(super) fn start(place: &Place, setup: &Setup) -> Result<Self, QemuError> {
        let directory = tempfile::Builder::new()
            .prefix("afterimage-qemu-")
            .tempdir()
            .map_err(io_error("make a directory for sockets"))?;
        let path = directory.path();
        let name = match setup.side {
            Side::Source => "the source's QEMU",
            Side::Destination => "the destination's QEMU",
        };
        let log = path.join("qemu.log");
        let speaker = Speaker { name: name.into(), log: Some(log.clone()) };
        let qmp = UnixListener::bind(path.join(QMP)).map_err(io_error("listen for QMP"))?;
        let guest = UnixListener::bind(path.join(GUEST)).map_err(io_error("listen for a guest"))?;

        let print = File::create(&log).map_err(io_error("make a log for QEMU"))?;
        let print_too = print.try_clone().map_err(io_error("share the log"))?;
        let mut command = place.qemu(setup.preload.as_ref().map(|it| it.library.as_path()));
        command.args(arguments(place, setup, path));
        command.envs(setup.preload.iter().flat_map(|it| it.environment.clone()));
        command.stdin(Stdio::null()).stdout(print).stderr(print_too);
        let mut process = Process::start(command, name)?;

        let deadline = Deadline::after(START);
        let qmp = Lines::accept(&qmp, &mut process.child, speaker.clone(), deadline)?;
        let guest_speaker = Speaker { name: "the guest".into(), log: Some(path.join(CONSOLE)) };
        let guest = Lines::accept(&guest, &mut process.child, guest_speaker, deadline)?;
        let qmp = Qmp::greet(qmp, deadline)?;
        Ok(Self { qmp, guest: Guest::new(guest), process, directory })
    }

    /// Where QEMU listens for another client of QMP.
    pub(super) fn monitor(&self) -> PathBuf {
        self.directory.path().join(MONITOR)
    }

    /// Ends QEMU as it wants to be ended.
    pub(super) fn quit(mut self) -> Result<(), QemuError> {
        self.qmp.execute("quit", &json!({}))?;
        let ended = self.process.child.wait();
        ended.map(drop).map_err(io_error(&format!("wait for the end of {}", self.qmp.name())))
    }
}

fn arguments(place: &Place, setup: &Setup, directory: &Path) -> Vec<OsString> {
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |text: &str| all.extend(text.split_whitespace().map(OsString::from));
    add("-nodefaults -no-user-config -display none -no-reboot");
    add("-machine q35,memory-backend=ram -accel tcg -cpu max -smp 1 -nic none");
    add(&format!("-m {}M -object {}", setup.memory.0 >> 20, setup.ram));
    if setup.side == Side::Destination {
        add("-incoming defer");
    }
    if setup.preload.is_some() {
        add("-S");
    }
    let mut pair = |name: &str, value: OsString| all.extend([name.into(), value]);
    // Before the one at which QEMU greets: whoever has heard that can connect here.
    let mut monitor = with_path("socket,id=monitor,path=", &directory.join(MONITOR));
    monitor.push(",server=on,wait=off");
    pair("-chardev", monitor);
    pair("-mon", "chardev=monitor,mode=control".into());
    pair("-chardev", with_path("socket,id=qmp,path=", &directory.join(QMP)));
    pair("-mon", "chardev=qmp,mode=control".into());
    pair("-serial", with_path("file:", &directory.join(CONSOLE)));
    pair("-chardev", with_path("socket,id=guest,path=", &directory.join(GUEST)));
    pair("-serial", "chardev:guest".into());
    pair("-kernel", place.kernel().into());
    pair("-initrd", place.initrd().into());
    // Without `tsc=reliable` the kernel compares two emulated clocks, finds them apart on
    // a busy host, and goes over to a slower one in the middle of a round.
    let append =
        format!("console=ttyS0 panic=-1 tsc=reliable afterimage.mib={}", setup.working_set.0 >> 20);
    pair("-append", append.into());
    all
}

fn with_path(prefix: &str, path: &Path) -> OsString {
    let mut value = OsString::from(prefix);
    value.push(path);
    value
}

pub(super) fn io_error(operation: &str) -> impl Fn(io::Error) -> QemuError {
    move |source| QemuError::Io { operation: operation.to_owned(), source }
}

/// A child that ends with its value, or with the driver.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) child: Child,
}

impl Process {
    pub(super) fn start(mut command: Command, name: &str) -> Result<Self, QemuError> {
        // SAFETY: between fork and exec only this one system call is made, which is
        // async-signal-safe and allocates nothing.
        unsafe { command.pre_exec(|| Ok(set_pdeathsig(Signal::SIGKILL)?)) };
        let child = command.spawn().map_err(io_error(&format!("start {name}")))?;
        Ok(Self { child })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const QMP: &str = "qmp";
const MONITOR: &str = "monitor";
const GUEST: &str = "guest";
const CONSOLE: &str = "console.log";
