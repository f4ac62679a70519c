//! What a test needs of the machine: asked for here, and skipped aloud if missing.
//!
//! Invariant: nothing is skipped silently. A missing thing prints `skipped: …`; if
//! the environment variable `AFTERIMAGE_REQUIRE` (comma-separated names) names it,
//! its absence is a panic instead, so that a machine that should run all tests does.

use std::env;
use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::ram::HugePages;

/// The environment variable that turns skips into failures.
pub const VARIABLE: &str = "AFTERIMAGE_REQUIRE";

/// Whether `/dev/kvm` can be opened. Name: `kvm`.
///
/// # Panics
/// If it cannot and `AFTERIMAGE_REQUIRE` names `kvm`.
#[must_use]
pub fn kvm() -> bool {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    or_skip("kvm", opened).is_some()
}

/// Reserves `pages` huge pages of 2 MiB until the result is dropped. Name: `hugetlb`.
///
/// # Panics
/// If they cannot be had and `AFTERIMAGE_REQUIRE` names `hugetlb`.
#[must_use]
pub fn hugetlb(pages: u64) -> Option<HugePages> {
    or_skip("hugetlb", HugePages::reserve(pages))
}

/// Whether userfaultfd that serves faults from kernel context can be had, by right
/// or through `/dev/userfaultfd`. Name: `userfaultfd`.
///
/// # Panics
/// If it cannot and `AFTERIMAGE_REQUIRE` names `userfaultfd`.
#[must_use]
pub fn userfaultfd() -> bool {
    // SAFETY: the call takes flags only and returns a new descriptor or an error.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    if let Ok(fd @ 0..) = i32::try_from(fd) {
        // SAFETY: the descriptor is ours and used nowhere else.
        unsafe { libc::close(fd) };
        return true;
    }
    let opened = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd");
    or_skip("userfaultfd", opened).is_some()
}

/// Whether network namespaces can be made. Name: `netns`.
///
/// # Panics
/// If they cannot and `AFTERIMAGE_REQUIRE` names `netns`.
#[must_use]
pub fn network_namespaces() -> bool {
    // Several tests of a process may ask at once.
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let asked = ASKED.fetch_add(1, Ordering::Relaxed);
    let name = format!("require-{}-{asked}", std::process::id());
    let ip = |verb: &str| {
        let output = Command::new("ip").args(["netns", verb, &name]).output();
        let output = output.map_err(|error| format!("ip: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    };
    or_skip("netns", ip("add").and_then(|()| ip("delete"))).is_some()
}

/// Whether the machine's own QEMU can be run. Name: `qemu-system`.
///
/// # Panics
/// If it cannot and `AFTERIMAGE_REQUIRE` names `qemu-system`.
#[must_use]
pub fn qemu_system() -> bool {
    or_skip("qemu-system", version_of_qemu()).is_some()
}

/// Whether the machine's own QEMU leaves memfds out of the device state, as it did up to 8.0.
/// Name: `qemu-memfd`.
///
/// # Panics
/// If it does not and `AFTERIMAGE_REQUIRE` names `qemu-memfd`.
#[must_use]
pub fn qemu_memfd() -> bool {
    let version = version_of_qemu().and_then(|said| {
        let number = said.split_whitespace().find(|it| it.starts_with(|it: char| it.is_numeric()));
        let mut parts = number.unwrap_or_default().split('.').map(str::parse::<u32>);
        match (parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor))) if (major, minor) < (8, 1) => Ok(()),
            _ => Err(format!("{} is newer than 8.0", said.lines().next().unwrap_or_default())),
        }
    });
    or_skip("qemu-memfd", version).is_some()
}

fn version_of_qemu() -> Result<String, String> {
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    let output = output.map_err(|error| format!("qemu-system-x86_64: {error}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A Firecracker that can be run: what the environment variable `AFTERIMAGE_FIRECRACKER` names by its
/// whole path, else `firecracker` in the search path. Name: `firecracker`.
///
/// # Panics
/// If there is none and `AFTERIMAGE_REQUIRE` names `firecracker`.
#[must_use]
pub fn firecracker() -> Option<PathBuf> {
    let named = env::var_os("AFTERIMAGE_FIRECRACKER").map(PathBuf::from);
    let search = env::var_os("PATH").unwrap_or_default();
    let found = named.or_else(|| {
        env::split_paths(&search).map(|it| it.join("firecracker")).find(|it| it.is_file())
    });
    let missing =
        || "no firecracker in the search path; AFTERIMAGE_FIRECRACKER may name one".into();
    let runs = found.ok_or_else(missing).and_then(|path| {
        if path.is_relative() {
            // Tests run in other directories.
            return Err(format!("{}: give its whole path", path.display()));
        }
        match Command::new(&path).arg("--version").output() {
            Ok(output) if output.status.success() => Ok(path),
            Ok(output) => Err(format!("{} --version: {}", path.display(), output.status)),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    });
    or_skip("firecracker", runs)
}

/// Where the Linux guest lies that `tests/qemu/guest/get` brings: in `qemu-guest` of the
/// directory of cargo that this test was built in. Name: `qemu-guest`.
///
/// # Panics
/// If it is not there and `AFTERIMAGE_REQUIRE` names `qemu-guest`.
#[must_use]
pub fn qemu_guest() -> Option<PathBuf> {
    let test = env::current_exe().unwrap_or_default();
    let mut near = test.ancestors().skip(1).map(|it| it.join("qemu-guest"));
    // What `get` makes last.
    let found = near.find(|it| it.join("initrd.gz").exists());
    or_skip("qemu-guest", found.ok_or("tests/qemu/guest/get brings it"))
}

/// Passes a success on; prints the failure as a skip, or panics if `name` is required.
///
/// # Panics
/// If it is a failure and `AFTERIMAGE_REQUIRE` names `name`.
pub fn or_skip<T, E: Display>(name: &str, result: Result<T, E>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) if is_required(name, &env::var(VARIABLE).unwrap_or_default()) => {
            panic!("{VARIABLE} names {name}, which this machine lacks: {error}")
        }
        Err(error) => {
            // Not by a macro: what those print, the test harness hides. If even standard
            // error is closed, there is nobody to tell.
            let _ = writeln!(io::stderr(), "skipped: needs {name}: {error}");
            None
        }
    }
}

fn is_required(name: &str, list: &str) -> bool {
    list.split(',').any(|part| part.trim() == name)
}

#[cfg(test)]
mod tests {
    use super::is_required;

    #[test]
    fn requirements_are_whole_names_of_a_list() {
        assert!(is_required("kvm", "kvm"));
        assert!(is_required("hugetlb", "kvm, hugetlb"));
        assert!(!is_required("kvm", "kvm2,xkvm"));
        assert!(!is_required("kvm", ""));
    }
}
