//! The engine under an unmodified QEMU: the commands as a user runs them.
//!
//! The destination's QEMU hands its RAM to page-client by the preload library; then
//! afterimage-qemu takes the guest from one QEMU to the other. Both commands are processes
//! of their own, beside QEMU, and have no options that a user need not give.

use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use afterimage_tools::qemu::{Deadline, unix_now};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde::Serialize;
use serde_json::Value;

use super::QemuError;
use super::machine::{Machine, Preload, Side, io_error};
use super::method::{MIGRATION, Method, Moved, Own, reach};
use super::scene::Scene;
use super::tool::{Tool, Tools};

/// What the guest is called at page-client.
const GUEST: &str = "guest";
/// A program of a few MiB that has nothing to do yet, on a machine that may be busy.
const START: Duration = Duration::from_mins(1);
/// What page-client and afterimage-qemu say when every page has arrived.
const ARRIVED: &str = "every page is in place";
const SENT: &str = "every page has arrived";

/// What the engine itself says of a migration.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct EngineStatistics {
    /// Mean time from a fault to its page, in microseconds.
    pub fault_mean_us: Option<f64>,
    /// 99 % took no longer.
    pub fault_p99_us: Option<f64>,
    /// Pages that the destination asked for.
    pub requests: Option<u64>,
    /// What afterimage-qemu reports.
    pub source: Value,
    /// What page-client reports.
    pub destination: Value,
}

impl EngineStatistics {
    fn new(source: Value, destination: Value) -> Self {
        let latency = &destination["fault_latency_us"];
        Self {
            fault_mean_us: latency["mean"].as_f64(),
            fault_p99_us: latency["p99"].as_f64(),
            requests: destination["pages_requested"].as_u64(),
            source,
            destination,
        }
    }
}

/// The engine, over loopback TCP.
#[derive(Debug)]
pub(super) struct Engine {
    tools: Tools,
    client: Tool,
    /// Where page-client waits for the source.
    address: SocketAddr,
    /// Where it waits for the destination's QEMU, and for whoever drives that.
    attach: OsString,
}

impl Engine {
    /// Starts page-client, which must be there before the destination's QEMU is.
    pub(super) fn start(scene: &Scene) -> Result<Self, QemuError> {
        let tools = Tools::find()?;
        // A socket that listens already, so that nobody has to be asked for its port.
        let listener = TcpListener::bind("127.0.0.1:0").map_err(io_error("listen on loopback"))?;
        let address = listener.local_addr().map_err(io_error("ask for a port"))?;
        let descriptor = listener.as_raw_fd();
        let attach = unix(&scene.path("attach"));
        let mut command = Command::new(&tools.client);
        command.arg("--json").arg("--attach").arg(&attach);
        command.arg("--listen").arg(format!("fd:{descriptor}"));
        // SAFETY: between fork and exec only this one system call is made, which is
        // async-signal-safe and allocates nothing.
        unsafe { command.pre_exec(move || inherit(descriptor)) };
        let mut client = Tool::start("page-client", command)?;
        client.hear("a VMM can have its memory served", START)?;
        Ok(Self { tools, client, address, attach })
    }

    fn driver(&self, source: &Machine, destination: &Machine) -> Command {
        let mut command = Command::new(&self.tools.driver);
        command.args(["migrate", "--json", "--guest", GUEST]);
        command.arg("--source-qmp").arg(unix(&source.monitor()));
        command.arg("--destination-qmp").arg(unix(&destination.monitor()));
        command.arg("--connect").arg(format!("tcp:{}", self.address));
        command.arg("--attach").arg(&self.attach);
        command
    }
}

impl Method for Engine {
    fn ram(&self, scene: &Scene, side: Side) -> String {
        scene.shared_ram(side)
    }

    fn preload(&self, scene: &Scene, side: Side) -> Option<Preload> {
        let environment = vec![
            ("AFTERIMAGE_MEMORY", scene.ram_file(side).into()),
            ("AFTERIMAGE_SOCKET", self.attach.clone()),
            ("AFTERIMAGE_GUEST", GUEST.into()),
        ];
        let library = self.tools.library.clone();
        (side == Side::Destination).then_some(Preload { library, environment })
    }

    fn carry(
        mut self: Box<Self>,
        source: &mut Machine,
        destination: &mut Machine,
    ) -> Result<Moved, QemuError> {
        let command = self.driver(source, destination);
        let started = unix_now();
        let mut driver = Tool::start("afterimage-qemu", command)?;
        let sent = driver.hear(SENT, MIGRATION)?;
        let arrived = self.client.hear(ARRIVED, MIGRATION)?;
        // QEMU said both long ago, with the time.
        let deadline = Deadline::after(MIGRATION);
        let (from, to) = (&mut source.qmp, &mut destination.qmp);
        let stopped = reach(from, deadline, "STOP", |event| event.name == "STOP")?;
        let resumed = reach(to, deadline, "RESUME", |event| event.name == "RESUME")?;
        let (at_source, at_destination) = (driver.finish()?, self.client.finish()?);

        let count = |report: &Value, name: &str| report[name].as_u64().unwrap_or_default();
        let content = count(&at_destination, "bytes_received");
        Ok(Moved {
            started,
            stopped,
            resumed,
            finished: arrived.max(sent),
            bytes: content + count(&at_source, "state_bytes"),
            postcopy_bytes: content,
            own: Own::Engine(EngineStatistics::new(at_source, at_destination)),
        })
    }
}

fn unix(path: &Path) -> OsString {
    let mut address = OsString::from("unix:");
    address.push(path);
    address
}

/// Leaves a descriptor open for the program that this process becomes.
fn inherit(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor is open in the parent until the child has been started, and so
    // in the copy of its table that this process has.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(())
}
