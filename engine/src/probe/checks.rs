//! The single questions of a probe.

use super::{Finding, FindingState, Need};
use crate::sys::holes::Pagemap;
use crate::sys::machine::{self, Seccomp};
use crate::sys::uffd::{self, FaultScope, Features, UffdError};
use std::fs::OpenOptions;
use std::io;

/// The oldest kernel that is supported.
const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Descriptors for a session with many streams and its VMM.
const DESCRIPTORS: u64 = 1024;
/// The kernel's own default.
const MAPPINGS: u64 = 65_530;

/// Name, bit, release, who needs it, what it is for.
type FeatureRow = (&'static str, u32, &'static str, Need, &'static str);

const FEATURES: [FeatureRow; 9] = [
    ("missing faults, shared memory", 5, "4.11", Need::Always, "guest RAM in a memfd"),
    ("minor faults, shared memory", 10, "5.14", Need::Always, "pages shown by CONTINUE, in runs"),
    ("missing faults, hugetlbfs", 4, "4.11", Need::Useful, "guest RAM on huge pages"),
    ("minor faults, hugetlbfs", 9, "5.13", Need::Useful, "guest RAM on huge pages"),
    ("events, removed memory", 3, "4.11", Need::Useful, "discards learnt from the kernel"),
    ("exact addresses", 11, "5.18", Need::Useful, "faults told by byte, for statistics"),
    ("poison", 14, "6.6", Need::Useful, "pages that the source has lost fail instead of waiting"),
    ("asynchronous write protection", 15, "6.7", Need::Useful, "precopy without the KVM dirty log"),
    ("move", 16, "6.8", Need::Useful, "pages moved instead of copied"),
];

pub(super) fn all() -> Vec<Finding> {
    let mut findings = vec![kernel()];
    findings.extend(userfaultfd());
    findings.extend(features());
    findings.extend([pagemap_scan(), kvm()]);
    findings.extend(huge_pages());
    findings.extend([descriptors(), locked_memory(), mappings(), seccomp(), memory_limit()]);
    findings
}

/// A finding; `remedy` is kept only where something is lacking.
fn finding(
    name: impl Into<String>,
    is_ok: bool,
    need: Need,
    found: impl Into<String>,
    meaning: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    let (state, remedy) = if is_ok {
        (FindingState::Ok, String::new())
    } else {
        (FindingState::Lacking, remedy.into())
    };
    Finding { name: name.into(), state, need, found: found.into(), meaning: meaning.into(), remedy }
}

fn said<T>(result: &io::Result<T>, good: &str) -> String {
    match result {
        Ok(_) => good.to_owned(),
        Err(error) => why(error),
    }
}

/// What the system said, without its number.
fn why(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn kernel() -> Finding {
    let release = machine::kernel_release();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
    let version = (numbers.next().flatten().unwrap_or(0), numbers.next().flatten().unwrap_or(0));
    finding(
        "kernel",
        version >= OLDEST_KERNEL,
        Need::Useful,
        release,
        "the oldest that is tested is 6.1; features of newer ones are used where they are",
        "boot Linux 6.1 or newer",
    )
}

fn userfaultfd() -> Vec<Finding> {
    let call = uffd::by_call(FaultScope::KernelAndUser).map(drop);
    let device = uffd::by_device(FaultScope::KernelAndUser).map(drop);
    let plain = uffd::by_call(FaultScope::UserOnly).map(drop);
    let sysctl = machine::read_number("/proc/sys/vm/unprivileged_userfaultfd");
    let full = uffd::available_features(FaultScope::KernelAndUser);
    let found = match (&call, &device, &full) {
        (Ok(()), ..) => "by the system call".to_owned(),
        (_, Ok(()), _) => "by /dev/userfaultfd".to_owned(),
        (.., Err(UffdError::NotPermitted)) => "not permitted".to_owned(),
        (Err(error), ..) => why(error),
    };
    vec![
        finding(
            "userfaultfd for kernel faults",
            full.is_ok(),
            Need::KernelFaults,
            found,
            "guests on KVM, and memory that system calls touch",
            "run as root, or give the process CAP_SYS_PTRACE, or access to /dev/userfaultfd \
             (chgrp kvm /dev/userfaultfd && chmod 660 /dev/userfaultfd), or set \
             vm.unprivileged_userfaultfd=1",
        ),
        finding(
            "userfaultfd for user faults",
            plain.is_ok() || full.is_ok(),
            Need::Always,
            said(&plain, "by the system call"),
            "guests that are plain threads; never one on KVM, which would read zeros",
            "allow the userfaultfd system call in the container's seccomp profile; the kernel \
             needs CONFIG_USERFAULTFD",
        ),
        finding(
            "userfaultfd system call",
            call.is_ok(),
            Need::Useful,
            said(&call, "permitted"),
            "one way to kernel faults: root, CAP_SYS_PTRACE or the sysctl",
            "give the process CAP_SYS_PTRACE, or use /dev/userfaultfd",
        ),
        finding(
            "/dev/userfaultfd",
            device.is_ok(),
            Need::Useful,
            said(&device, "can be opened"),
            "another way to kernel faults, by the rights of a file",
            "chgrp kvm /dev/userfaultfd && chmod 660 /dev/userfaultfd, and join that group; in a \
             container, pass the device in",
        ),
        finding(
            "vm.unprivileged_userfaultfd",
            sysctl.as_ref().is_ok_and(|value| *value == 1),
            Need::Useful,
            sysctl.map_or_else(|error| why(&error), |value| value.to_string()),
            "a third way, for every process of the machine",
            "not needed where one of the others is there; else sysctl vm.unprivileged_userfaultfd=1",
        ),
    ]
}

fn features() -> Vec<Finding> {
    let available = uffd::available_features(FaultScope::KernelAndUser)
        .or_else(|_| uffd::available_features(FaultScope::UserOnly));
    let available = available.unwrap_or_default();
    FEATURES
        .iter()
        .map(|(name, bit, since, need, meaning)| {
            let is_ok = Features(1 << bit).lacking(available) == Features::default();
            let found = if is_ok { "offered" } else { "not offered" };
            let remedy = format!("boot Linux {since} or newer, built with it");
            finding(*name, is_ok, *need, found, *meaning, remedy)
        })
        .collect()
}

fn pagemap_scan() -> Finding {
    let result = Pagemap::of_this_process().and_then(|pagemap| pagemap.try_scan());
    finding(
        "PAGEMAP_SCAN",
        result.is_ok(),
        Need::Useful,
        said(&result, "works"),
        "finds content and changed pages by runs; without, entry by entry",
        "boot Linux 6.7 or newer",
    )
}

fn kvm() -> Finding {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    finding(
        "/dev/kvm",
        opened.is_ok(),
        Need::Useful,
        said(&opened, "can be opened"),
        "guests on KVM; the demo runs on threads without",
        "load kvm_intel or kvm_amd (virtualisation may be off in the firmware), and join the \
         group kvm",
    )
}

fn huge_pages() -> Vec<Finding> {
    let sizes = machine::huge_page_sizes();
    if sizes.is_empty() {
        return vec![finding(
            "huge pages",
            false,
            Need::Useful,
            "none of any size",
            "guest RAM on hugetlbfs",
            "the kernel needs CONFIG_HUGETLBFS",
        )];
    }
    sizes
        .into_iter()
        .map(|pool| {
            let name = format!("huge pages of {}", human_bytes(pool.kib << 10));
            let found = format!("{} free of {}", pool.free, pool.total);
            let remedy =
                format!("echo N > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", pool.kib);
            finding(name, pool.free > 0, Need::Useful, found, "guest RAM on hugetlbfs", remedy)
        })
        .collect()
}

fn descriptors() -> Finding {
    let limit = machine::open_files();
    finding(
        "RLIMIT_NOFILE",
        limit.is_none_or(|limit| limit >= DESCRIPTORS),
        Need::Useful,
        limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string()),
        "about 10 descriptors for each destination, and one for each piece of memory",
        format!("ulimit -n {DESCRIPTORS}, or LimitNOFILE={DESCRIPTORS} in the unit"),
    )
}

fn locked_memory() -> Finding {
    let limit = machine::locked_memory();
    finding(
        "RLIMIT_MEMLOCK",
        true,
        Need::Useful,
        limit.map_or_else(|| "unlimited".to_owned(), human_bytes),
        "the engine locks nothing; matters to a VMM that does (VFIO, mlock)",
        "",
    )
}

fn mappings() -> Finding {
    let limit = machine::read_number("/proc/sys/vm/max_map_count");
    finding(
        "vm.max_map_count",
        limit.as_ref().map_or(true, |limit| *limit >= MAPPINGS),
        Need::Useful,
        limit.map_or_else(|error| why(&error), |limit| limit.to_string()),
        "registering and unregistering parts of RAM splits mappings",
        format!("sysctl vm.max_map_count={MAPPINGS}"),
    )
}

fn seccomp() -> Finding {
    let forbids = uffd::by_call(FaultScope::UserOnly).is_err();
    let (is_ok, found) = match machine::seccomp() {
        Seccomp::Off => (true, "no filter".to_owned()),
        Seccomp::Strict => (false, "strict".to_owned()),
        Seccomp::Filters(count) => (!forbids, format!("{count} filter(s)")),
        Seccomp::Unknown => (!forbids, "unknown".to_owned()),
    };
    finding(
        "seccomp",
        is_ok,
        Need::Useful,
        found,
        "a container's filter often forbids userfaultfd, whatever the rights",
        "allow userfaultfd in the profile (Docker: --security-opt seccomp=profile.json), or pass \
         /dev/userfaultfd in",
    )
}

fn memory_limit() -> Finding {
    let found = machine::memory_limit().map_or_else(|| "none".to_owned(), human_bytes);
    finding(
        "memory limit",
        true,
        Need::Useful,
        found,
        "of the control group: guest RAM and the engine's tables must fit, or the kernel kills",
        "",
    )
}

/// Bytes in the largest unit that keeps them readable.
fn human_bytes(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >> shift > 0 {
            let whole = bytes as f64 / f64::from(1_u32 << shift);
            return if bytes.is_multiple_of(1 << shift) {
                format!("{whole:.0} {unit}")
            } else {
                format!("{whole:.1} {unit}")
            };
        }
    }
    format!("{bytes} B")
}
