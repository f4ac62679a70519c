//! What the kernel says about itself and this process, for [`crate::probe`].

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use std::fs;
use std::io;
use std::path::Path;

/// The running kernel's release, as `uname -r` prints it.
pub(crate) fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".to_owned(), |it| it.release().to_string_lossy().into_owned())
}

/// The number that a file of /proc or /sys holds.
pub(crate) fn read_number(path: impl AsRef<Path>) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a number"))
}

/// How many files may be open; `None` without a limit.
pub(crate) fn open_files() -> Option<u64> {
    soft_limit(Resource::RLIMIT_NOFILE)
}

/// How many bytes may be locked; `None` without a limit.
pub(crate) fn locked_memory() -> Option<u64> {
    soft_limit(Resource::RLIMIT_MEMLOCK)
}

fn soft_limit(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

/// Huge pages of one size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HugePagePool {
    pub(crate) kib: u64,
    pub(crate) total: u64,
    pub(crate) free: u64,
}

/// All sizes of huge pages that the kernel has, smallest first.
pub(crate) fn huge_page_sizes() -> Vec<HugePagePool> {
    let Ok(entries) = fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let mut pools: Vec<_> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?;
            let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let of = |file| read_number(path.join(file)).unwrap_or(0);
            Some(HugePagePool { kib, total: of("nr_hugepages"), free: of("free_hugepages") })
        })
        .collect();
    pools.sort_by_key(|pool| pool.kib);
    pools
}

/// What confines this process's system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seccomp {
    Off,
    Strict,
    Filters(u64),
    Unknown,
}

/// The seccomp state of this process.
pub(crate) fn seccomp() -> Seccomp {
    fs::read_to_string("/proc/self/status")
        .map_or(Seccomp::Unknown, |status| seccomp_of_status(&status))
}

fn seccomp_of_status(status: &str) -> Seccomp {
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
    };
    match field("Seccomp:") {
        Some(0) => Seccomp::Off,
        Some(1) => Seccomp::Strict,
        Some(2) => Seccomp::Filters(field("Seccomp_filters:").unwrap_or(1)),
        _ => Seccomp::Unknown,
    }
}

/// The tightest memory limit of the control groups that this process is in, in bytes; `None`
/// if none is below the machine's memory.
pub(crate) fn memory_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let limit = groups.lines().filter_map(limit_of_group).min()?;
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    (machine.is_none_or(|kib| limit < kib << 10)).then_some(limit)
}

/// The tightest limit on the way from a group, as a line of /proc/self/cgroup names it, to
/// its root.
fn limit_of_group(line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    let (root, file) = if controllers.is_empty() {
        ("/sys/fs/cgroup", "memory.max")
    } else if controllers.split(',').any(|it| it == "memory") {
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
    } else {
        return None;
    };
    // In a container the path may be the host's; then only the root is there to be read.
    let group = Path::new(path.trim_start_matches('/'));
    group.ancestors().filter_map(|at| read_number(Path::new(root).join(at).join(file)).ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seccomp_is_read_from_a_status() {
        assert_eq!(seccomp_of_status("Name:\tx\nSeccomp:\t0\n"), Seccomp::Off);
        assert_eq!(seccomp_of_status("Seccomp:\t1\n"), Seccomp::Strict);
        let filtered = "Seccomp:\t2\nSeccomp_filters:\t3\n";
        assert_eq!(seccomp_of_status(filtered), Seccomp::Filters(3));
        assert_eq!(seccomp_of_status("Name:\tx\n"), Seccomp::Unknown);
    }

    #[test]
    fn groups_of_other_controllers_limit_no_memory() {
        assert_eq!(limit_of_group("3:cpuset:/"), None);
        assert_eq!(limit_of_group("nonsense"), None);
    }

    #[test]
    fn the_kernel_has_a_release() {
        assert!(kernel_release().starts_with(|c: char| c.is_ascii_digit()));
    }
}
