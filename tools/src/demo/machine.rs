//! What this machine has for the demo: KVM, the right to userfaultfd, memory.

use std::fs;
use std::io;
use std::sync::Arc;

use afterimage::{DiscardNotice, FaultScope};
use serde::Serialize;

use super::error::{DemoError, Status, one_line};
use super::options::{GuestChoice, Options};
use super::report;
use crate::guest::{GuestError, GuestKind};
use crate::microvm::PreparedVm;
use crate::migrate;
use crate::ram::{Backing, GuestRam, HUGE_PAGE_BYTES, HugePages};
use crate::size::Size;

/// What the guest will run on.
#[derive(Clone, Debug)]
pub(super) struct Choice {
    pub(super) kind: GuestKind,
    /// Whether the right to a full userfaultfd is missing.
    pub(super) user_faults_only: bool,
    /// What the user should know about it.
    pub(super) note: Option<String>,
}

/// Chooses what the guest runs on, by trying.
pub(super) fn choose(wanted: GuestChoice) -> Result<Choice, DemoError> {
    let full = userfaultfd(FaultScope::KernelAndUser);
    let kvm = if wanted == GuestChoice::Threads { Ok(()) } else { kvm() };
    match (wanted, kvm, full) {
        (GuestChoice::Auto | GuestChoice::Kvm, Ok(()), Ok(())) => {
            Ok(Choice { kind: GuestKind::Kvm, user_faults_only: false, note: None })
        }
        (GuestChoice::Kvm, kvm, full) => {
            let lacking = [kvm.err(), full.err()].into_iter().flatten().collect::<Vec<_>>();
            Err(DemoError::Lacking(format!(
                "--guest kvm is not possible here: {}; or use --guest threads",
                lacking.join("; ")
            )))
        }
        (GuestChoice::Auto, Err(lacking), Ok(())) => Ok(Choice {
            kind: GuestKind::Threads,
            user_faults_only: false,
            note: Some(format!("the guest runs on threads, without KVM: {lacking}")),
        }),
        (_, kvm, Err(lacking)) => {
            userfaultfd(FaultScope::UserOnly).map_err(DemoError::Lacking)?;
            let lacking = kvm.err().into_iter().chain([lacking]).collect::<Vec<_>>().join("; ");
            Ok(Choice {
                kind: GuestKind::Threads,
                user_faults_only: true,
                note: Some(format!(
                    "the guest runs on threads, with a userfaultfd for user-mode faults only: \
                     {lacking}"
                )),
            })
        }
        (GuestChoice::Threads, _, Ok(())) => {
            Ok(Choice { kind: GuestKind::Threads, user_faults_only: false, note: None })
        }
    }
}

/// Checks that there is memory for both sides.
pub(super) fn check_memory(options: &Options) -> Result<(), DemoError> {
    let needed = 2 * options.memory.0;
    if options.backing() == Backing::Hugetlb {
        let pages = needed / HUGE_PAGE_BYTES;
        let free =
            HugePages::available().map_err(|error| DemoError::lacking("no huge pages", &error))?;
        if free < pages {
            return Err(DemoError::Lacking(format!(
                "{pages} huge pages of 2 MiB are needed for two times {}, {free} are free: reserve \
                 more (sysctl vm.nr_hugepages), or give a smaller --memory",
                options.memory
            )));
        }
    } else if let Some(available) = available_memory()
        && available < needed
    {
        return Err(DemoError::Lacking(format!(
            "guest memory is needed twice, {} in all, and {} are available: give a smaller --memory",
            Size(needed),
            Size(available)
        )));
    }
    Ok(())
}

/// `MemAvailable` in bytes, where the kernel says it.
fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Whether a virtual machine can be built here; if not, why, and what would help.
fn kvm() -> Result<(), String> {
    let ram = GuestRam::allocate(2 * HUGE_PAGE_BYTES, Backing::Anonymous);
    let ram = Arc::new(ram.map_err(|error| one_line(&error))?);
    PreparedVm::new(ram, 1).map(drop).map_err(|error| {
        let remedy = match &error {
            GuestError::Kvm { source, .. } => kvm_remedy(source.kind()),
            _ => "",
        };
        format!("{}{remedy}", one_line(&error))
    })
}

const fn kvm_remedy(kind: io::ErrorKind) -> &'static str {
    match kind {
        io::ErrorKind::PermissionDenied => {
            " (run as root, or join the group of /dev/kvm: usermod -aG kvm USER)"
        }
        io::ErrorKind::NotFound => {
            " (load kvm_intel or kvm_amd; the firmware, or the host of this machine, must allow \
             virtualisation)"
        }
        _ => "",
    }
}

/// Whether guest memory can be registered here with faults of this scope.
fn userfaultfd(scope: FaultScope) -> Result<(), String> {
    let ram = GuestRam::allocate(2 * HUGE_PAGE_BYTES, Backing::Anonymous);
    let ram = ram.map_err(|error| one_line(&error))?;
    // SAFETY: dropped before the RAM, into which nobody has a reference.
    unsafe { migrate::destination_memory(&ram, scope, DiscardNotice::Called) }
        .map(drop)
        .map_err(|error| one_line(&error))
}

#[derive(Debug, Serialize)]
struct Probe {
    schema_version: u32,
    /// `null` where it can be had, else why not.
    kvm: Option<String>,
    userfaultfd: Option<String>,
    userfaultfd_user_mode: Option<String>,
    memory_available_bytes: Option<u64>,
    huge_pages_available: Option<u64>,
}

/// Says what the machine has, and whether the demo can run at all.
pub(super) fn probe(json: bool) -> Status {
    let probe = Probe {
        schema_version: report::SCHEMA_VERSION,
        kvm: kvm().err(),
        userfaultfd: userfaultfd(FaultScope::KernelAndUser).err(),
        userfaultfd_user_mode: userfaultfd(FaultScope::UserOnly).err(),
        memory_available_bytes: available_memory(),
        huge_pages_available: HugePages::available().ok(),
    };
    let text = if json { as_json(&probe) } else { as_text(&probe) };
    // If nobody listens, the status still says it.
    let _ = io::Write::write_all(&mut io::stdout(), text.as_bytes());
    if probe.userfaultfd.is_some() && probe.userfaultfd_user_mode.is_some() {
        return Status::Lacking;
    }
    Status::Verified
}

fn as_json(probe: &Probe) -> String {
    // Numbers and strings only: this cannot fail.
    serde_json::to_string(probe).expect("plain data serialises") + "\n"
}

fn as_text(probe: &Probe) -> String {
    let said = |lacking: &Option<String>| lacking.as_ref().map_or("yes", |why| why).to_owned();
    let amount = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |it| Size(it).to_string());
    format!(
        "KVM                      {}\n\
         userfaultfd, all faults  {}\n\
         userfaultfd, user mode   {}\n\
         memory                   {} available\n\
         huge pages of 2 MiB      {} free\n",
        said(&probe.kvm),
        said(&probe.userfaultfd),
        said(&probe.userfaultfd_user_mode),
        amount(probe.memory_available_bytes),
        probe.huge_pages_available.map_or("none".to_owned(), |pages| pages.to_string())
    )
}
