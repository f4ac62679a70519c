//! Where a round happens: a directory on tmpfs for guest RAM and sockets, and a network of
//! its own, so that what crosses it can be counted from outside, for every method alike.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use std::process::Command;

use afterimage_tools::size::Size;
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use super::machine::{Side, io_error};
use super::{PeerRam, QemuError, QemuOptions};

/// Where this kernel's shared memory is.
const TMPFS: &str = "/dev/shm";

#[derive(Debug)]
pub(super) struct Scene {
    directory: TempDir,
    pub(super) memory: Size,
    pub(super) peer_ram: PeerRam,
}

impl Scene {
    pub(super) fn new(options: &QemuOptions) -> Result<Self, QemuError> {
        let room = statvfs(TMPFS).map_err(|error| io_error("look at /dev/shm")(error.into()))?;
        let available = Size(room.blocks_available() * room.fragment_size());
        // A file that finds no room is a SIGBUS in QEMU.
        let needed = Size(2 * options.memory.0);
        if available.0 < needed.0 {
            return Err(QemuError::Room { available, needed });
        }
        let directory = tempfile::Builder::new()
            .prefix("postcopy-bench-")
            .tempdir_in(TMPFS)
            .map_err(io_error("make a directory in /dev/shm"))?;
        Ok(Self { directory, memory: options.memory, peer_ram: options.peer_ram })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The file of one side's RAM, which QEMU makes.
    pub(super) fn ram_file(&self, side: Side) -> PathBuf {
        self.path(match side {
            Side::Source => "source.ram",
            Side::Destination => "destination.ram",
        })
    }

    /// The value of `-object` for RAM in that file.
    pub(super) fn shared_ram(&self, side: Side) -> String {
        let (file, mib) = (self.ram_file(side), self.memory.0 >> 20);
        format!("memory-backend-file,id=ram,share=on,size={mib}M,mem-path={}", file.display())
    }

    /// The same for RAM as QEMU makes it by itself.
    pub(super) fn private_ram(&self) -> String {
        format!("memory-backend-ram,id=ram,size={}M", self.memory.0 >> 20)
    }
}

/// The loopback interface of a network namespace in which nobody else is.
#[derive(Debug)]
pub(super) struct Loopback {
    /// Stays that of its namespace, whoever reads it.
    counters: File,
}

impl Loopback {
    /// Takes this thread, and what it starts from now on, into a namespace of its own; `None`
    /// without the right to.
    pub(super) fn enter() -> Result<Option<Self>, QemuError> {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            tracing::warn!(%error, "no network namespace: what crosses the network is not counted");
            return Ok(None);
        }
        let raised = Command::new("ip").args(["link", "set", "lo", "up"]).output();
        let raised = raised.map_err(io_error("run ip, which is iproute2's"))?;
        if !raised.status.success() {
            let why = String::from_utf8_lossy(&raised.stderr).trim().to_owned();
            let failed = io_error("take loopback up in a network namespace");
            return Err(failed(io::Error::other(why)));
        }
        let counters = File::open("/proc/thread-self/net/dev");
        let counters = counters.map_err(io_error("open the network's counters"))?;
        Ok(Some(Self { counters }))
    }

    /// Bytes that have crossed it, headers and both directions included.
    pub(super) fn bytes(&self) -> Result<u64, QemuError> {
        let (mut file, mut text) = (&self.counters, String::new());
        let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
        read.map_err(io_error("read the network's counters"))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("lo:"));
        let first = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
        Ok(first.unwrap_or_default())
    }
}
