//! What `benches/qemu/get` has brought: where it lies, its versions, and how QEMU is run
//! from it.
//!
//! QEMU is started by the loader of its own system, with the libraries of that system,
//! and not by chroot(2): so that it needs no rights of its own, is a child of the driver,
//! and sees the driver's sockets under the same names.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use super::QemuError;

/// The environment variable that names the directory.
const VARIABLE: &str = "AFTERIMAGE_QEMU";

/// What the directory holds, by package version.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Versions {
    pub(super) suite: String,
    pub(super) qemu_package: String,
    pub(super) kernel_package: String,
}

#[derive(Clone, Debug)]
pub(super) struct Place {
    directory: PathBuf,
    pub(super) versions: Versions,
}

impl Place {
    /// Looks whether all is there.
    pub(super) fn open(directory: Option<PathBuf>) -> Result<Self, QemuError> {
        let directory = directory.unwrap_or_else(default_directory);
        let missing =
            |what: &str| QemuError::Missing { what: what.to_owned(), directory: directory.clone() };
        for file in [QEMU, LOADER, "vmlinuz", "initrd.gz"] {
            if !directory.join(file).exists() {
                return Err(missing(file));
            }
        }
        // Written last by `get`: without it, that was broken off.
        let text = fs::read(directory.join("info.json")).map_err(|_| missing("info.json"))?;
        let versions =
            serde_json::from_slice(&text).map_err(|_| missing("info.json that can be read"))?;
        Ok(Self { directory, versions })
    }

    /// QEMU, with its own libraries and firmware, and no arguments yet; perhaps with one more
    /// library, which the loader is given: `LD_PRELOAD` would be the loader's own.
    pub(super) fn qemu(&self, preload: Option<&Path>) -> Command {
        let mut command = Command::new(self.directory.join(LOADER));
        if let Some(library) = preload {
            command.arg("--preload").arg(library);
        }
        command
            .arg("--library-path")
            .arg(self.directory.join(LIBRARIES))
            .arg(self.directory.join(QEMU))
            .arg("-L")
            .arg(self.directory.join("chroot/usr/share/qemu"))
            .arg("-L")
            .arg(self.directory.join("chroot/usr/share/seabios"))
            .env("QEMU_MODULE_DIR", self.directory.join(LIBRARIES).join("qemu"));
        command
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.directory.join("initrd.gz")
    }
}

fn default_directory() -> PathBuf {
    if let Some(directory) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        return directory.into();
    }
    let cache = env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty());
    let cache = cache.map(PathBuf::from);
    let home = || Path::new(&env::var_os("HOME").unwrap_or_default()).join(".cache");
    cache.unwrap_or_else(home).join("afterimage-qemu")
}

const QEMU: &str = "chroot/usr/bin/qemu-system-x86_64";
const LOADER: &str = "chroot/usr/lib64/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "chroot/usr/lib/x86_64-linux-gnu";
