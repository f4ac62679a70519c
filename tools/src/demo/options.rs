//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::bandwidth::Bandwidth;
use crate::guest::{GuestKind, MAX_VCPUS, TrackerKind, Workload};
use crate::ram::{Backing, HUGE_PAGE_BYTES};
use crate::size::Size;

use super::error::{DemoError, one_line};
use super::precopy::PassesWanted;

const EXAMPLES: &str = "\
Examples:
  demo                                    1 GiB, on KVM where there is KVM
  demo --memory 4G --vcpus 4 --streams 4  more of everything
  demo --workload random --backing memfd  another guest, other memory
  demo --bandwidth 200M                   a guest that waits for most of its pages
  demo --passes auto                      its memory is sent while it still runs; what is left
                                          follows after the switchover
  demo --passes 2 --dirty-tracker ring --precopy-bandwidth 500M
                                          two passes, slowed down, tracked by KVM's rings
  demo --passes converged --worked-fraction 0.05
                                          it moves only when hardly anything is left
  demo --guest threads --transport unix   plain threads, over a Unix socket
  demo --handoff                          the source's VMM hands its guest to a page server, and
                                          is killed before a page is sent
  demo --cuts 100                         the network is cut after each percent of the pages
  demo --cuts 20 --passes 2               before the switchover, too
  demo --cuts 100 --kill page-server,page-client,source --json
                                          and the processes around the guest are killed
  demo --json | jq .blackout_us           one object, described in docs/report.md
  demo --control run --hold               driven by afterimage-ctl --socket unix:run/source.sock
  demo --control run --hold before-switchover,before-run
                                          held again when the destination is ready
  demo --report out                       also a page with pictures, out/index.html
  demo --probe                            what this machine has for it

Exit status:
  0  the guest moved and every page was verified
  1  the guest moved (or stayed), but its memory is not what it should be
  2  the command line is wrong
  3  the machine lacks something (KVM, a right, memory); nothing was moved
  4  the move failed or took too long, or its page could not be written
  5  it was cancelled at the control socket: the guest stayed at the source, where it ran on and
     every page was verified";

/// Moves a running guest between two processes of this machine, in postcopy: its vCPUs
/// first, its memory while it runs; or after precopy passes, while it still runs at the
/// source. Then verifies every page.
#[derive(Clone, Debug, Parser)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[command(name = "demo", version, after_help = EXAMPLES, max_term_width = 100)]
pub(super) struct Options {
    /// Guest memory, a multiple of 2M; the machine needs it twice
    #[arg(long, short, default_value = "1G", value_name = "SIZE", value_parser = memory)]
    pub(super) memory: Size,

    /// Virtual CPUs, 1 to 8
    #[arg(long, default_value_t = 2, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub(super) vcpus: u32,

    /// What the guest does
    #[arg(long, value_enum, default_value_t = Workload::Pattern)]
    pub(super) workload: Workload,

    /// What guest memory is made of, on both sides [default: anonymous; memfd where a
    /// guest is handed over]
    #[arg(long, value_enum)]
    backing: Option<Backing>,

    /// What runs the guest
    #[arg(long, value_enum, default_value_t = GuestChoice::Auto)]
    pub(super) guest: GuestChoice,

    /// Hand the stopped guest over to a page server, which serves it; the VMM that had it is
    /// killed before a page is sent. Needs --backing memfd or hugetlb
    #[arg(long)]
    handoff: bool,

    /// Cut the network so many times, each time that such a part of the pages has arrived; with
    /// --passes half of them while passes are sent
    #[arg(long, default_value_t = 0, value_name = "N",
        value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub(super) cuts: u32,

    /// Kill these by SIGKILL, some of: source (the VMM, when it has handed its guest over),
    /// page-server (serves from then on), page-client (serves the destination's memory). The
    /// latter two are started again
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',')]
    pub(super) kill: Vec<Victim>,

    /// How often each of page-server and page-client is killed
    #[arg(long, default_value_t = 3, value_name = "N", requires = "kill",
        value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(super) kills: u32,

    /// How the processes are connected
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub(super) transport: Transport,

    /// Background streams, 1 to 16
    #[arg(long, default_value_t = 1, value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(super) streams: u16,

    /// What may leave in a second of pages that the guest does not wait for: a size, as 100M,
    /// or unlimited [default: unlimited; with --cuts and --kill so little that there is time for
    /// them]
    #[arg(long, value_name = "SIZE|unlimited")]
    bandwidth: Option<Bandwidth>,

    /// Send memory in passes while the guest still runs at the source: after N of them it is
    /// stopped; auto: when what is left can be sent within 300 ms, or another pass would not
    /// shrink it, or after a minute; converged: only in the first case, and it runs at the
    /// destination when all memory is there
    #[arg(long, default_value_t = PassesWanted::None, value_name = "N|auto|converged")]
    pub(super) passes: PassesWanted,

    /// How it is found out what the guest writes meanwhile [default: log on KVM, pagemap on
    /// threads]
    #[arg(long, value_enum, requires = "passes")]
    dirty_tracker: Option<TrackerKind>,

    /// What may leave in a second during the passes [default: as --bandwidth]
    #[arg(long, value_name = "SIZE|unlimited", requires = "passes")]
    pub(super) precopy_bandwidth: Option<Bandwidth>,

    /// Check a CRC-32C of every frame
    #[arg(long)]
    pub(super) checksums: bool,

    /// Part of the memory that the guest works in, 0 to 1
    #[arg(long, default_value_t = 0.5, value_name = "PART", value_parser = fraction)]
    pub(super) worked_fraction: f64,

    /// Part of the rest that is zero, 0 to 1
    #[arg(long, default_value_t = 0.25, value_name = "PART", value_parser = fraction)]
    pub(super) zero_fraction: f64,

    /// How long any one step may take before the demo gives up; grows with the memory by
    /// default
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: Option<u64>,

    /// Let the processes be driven and watched at sockets in this directory: source.sock and
    /// destination.sock, and page-server.sock and page-client.sock where there are those. See
    /// docs/control.md
    #[arg(long, value_name = "DIR")]
    pub(super) control: Option<PathBuf>,

    /// Answer GET /metrics at sockets in this directory, source.metrics.sock and so on
    #[arg(long, value_name = "DIR")]
    pub(super) metrics: Option<PathBuf>,

    /// Wait for somebody at the source's control socket, before some of: before-switchover (the
    /// guest runs at the source until switchover or continue is asked for), before-run (it runs
    /// nowhere until continue is) [without LIST: before-switchover]
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',', num_args = 0..=1,
        default_missing_value = "before-switchover",
        requires = "control", conflicts_with_all = ["handoff", "kill"])]
    pub(super) hold: Vec<HoldPoint>,

    /// One JSON object on standard output instead of the report
    #[arg(long)]
    pub(super) json: bool,

    /// Write a page with pictures of the migration into this directory, as index.html
    #[arg(long, value_name = "DIR")]
    pub(super) report: Option<PathBuf>,

    /// Say what the machine has for the demo, and move nothing
    #[arg(long)]
    pub(super) probe: bool,

    /// For the tests: the destination changes one byte before it verifies
    #[arg(long, hide = true)]
    pub(super) corrupt_one_byte: bool,

    /// Which part this process plays; the parent says it
    #[arg(long, hide = true)]
    pub(super) role: Option<Role>,
}

impl Options {
    /// How long any one step may take.
    pub(super) fn limit(&self) -> Duration {
        let by_memory = 60 + (self.memory.0 >> 26);
        Duration::from_secs(self.timeout.unwrap_or(by_memory)) + self.patience()
    }

    /// How much longer a step may take for what interrupts it.
    fn patience(&self) -> Duration {
        Duration::from_millis(500) * self.cuts + Duration::from_secs(5) * self.kills_in_all()
    }

    /// Whether a process of this kind is killed.
    pub(super) fn kills(&self, victim: Victim) -> bool {
        self.kill.contains(&victim)
    }

    /// How often processes are killed and started again.
    fn kills_in_all(&self) -> u32 {
        let victims = [Victim::PageServer, Victim::PageClient];
        self.kills * victims.into_iter().map(|it| u32::from(self.kills(it))).sum::<u32>()
    }

    /// Whether anything interrupts the migration.
    pub(super) fn has_outages(&self) -> bool {
        self.cuts + self.kills_in_all() > 0
    }

    /// Whether the source hands its guest over.
    pub(super) fn hands_over(&self) -> bool {
        self.handoff || self.kills(Victim::Source) || self.kills(Victim::PageServer)
    }

    /// What guest memory is made of.
    pub(super) fn backing(&self) -> Backing {
        let default = if self.hands_over() { Backing::Memfd } else { Backing::Anonymous };
        self.backing.unwrap_or(default)
    }

    /// How fast pages leave that the guest does not wait for.
    pub(super) fn bandwidth(&self) -> Bandwidth {
        self.bandwidth.or_else(|| self.slow_enough()).unwrap_or_default()
    }

    /// As much as lets the memory travel for a second at least, and for a while between any two
    /// outages.
    fn slow_enough(&self) -> Option<Bandwidth> {
        let millis = u64::from(self.cuts) * 100 + u64::from(self.kills_in_all()) * 500;
        let bytes = self.memory.0.saturating_mul(1000) / millis.max(1000);
        NonZeroU64::new(bytes).filter(|_| self.has_outages()).map(Bandwidth::Limited)
    }

    /// Whether the background was slowed down without having been asked for.
    pub(super) fn is_slowed(&self) -> bool {
        self.bandwidth.is_none() && self.has_outages()
    }

    /// Refuses what cannot be together.
    pub(super) fn check(&self) -> Result<(), DemoError> {
        if self.hands_over() && self.backing() == Backing::Anonymous {
            let option = if self.handoff { "--handoff" } else { "--kill of source or page-server" };
            return Err(DemoError::Usage(format!(
                "{option} cannot be done with --backing anonymous: anonymous memory ends with its \
                 process, and only files can be handed to another; use --backing memfd or hugetlb"
            )));
        }
        if self.bandwidth == Some(Bandwidth::OnRequest) {
            return Err(DemoError::Usage(
                "--bandwidth on-request would never end: the guest does not touch all of its \
                 memory; use a small size, as 1M"
                    .to_owned(),
            ));
        }
        self.check_passes()?;
        if self.report.is_some() && self.kills(Victim::PageClient) {
            return Err(DemoError::Usage(
                "--report cannot be done with --kill page-client: what is drawn would die with \
                 it; leave one of them out"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

impl Options {
    /// How writes are noticed.
    pub(super) fn tracker(&self, guest: GuestKind) -> TrackerKind {
        self.dirty_tracker.unwrap_or(TrackerKind::default_for(guest))
    }

    /// Refuses a tracker that this kind of guest cannot have.
    pub(super) fn check_tracker(&self, guest: GuestKind) -> Result<(), DemoError> {
        let checked = self.tracker(guest).check(guest);
        checked.map_err(|error| DemoError::Usage(format!("--dirty-tracker: {}", one_line(&error))))
    }

    fn check_passes(&self) -> Result<(), DemoError> {
        if self.passes == PassesWanted::None {
            return Ok(());
        }
        let refused = |why: &str| Err(DemoError::Usage(format!("--passes {why}")));
        if self.hands_over() {
            return refused(
                "cannot be done with --handoff or --kill of source or page-server: a guest is \
                 handed over when it is stopped, and passes are sent while it runs; leave one of \
                 them out",
            );
        }
        if self.kills(Victim::PageClient) && self.backing() == Backing::Anonymous {
            return refused(
                "cannot be done with --kill page-client and anonymous memory: a page-client cannot \
                 empty pages that are out of date in memory without a file; use --backing memfd or \
                 hugetlb",
            );
        }
        if self.precopy_bandwidth == Some(Bandwidth::OnRequest) {
            return refused(
                "would never end with --precopy-bandwidth on-request: nobody asks for pages \
                 before the switchover; use a size, as 1M",
            );
        }
        Ok(())
    }
}

/// Where --hold lets the migration wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum HoldPoint {
    /// The guest runs at the source
    BeforeSwitchover,
    /// It is stopped at the source, and restored at the destination
    BeforeRun,
}

/// Whom --kill kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Victim {
    /// The VMM that had the guest, once it has handed it over
    Source,
    /// Who serves the guest's memory from then on
    PageServer,
    /// Who serves the destination's memory
    PageClient,
}

/// What the user wants the guest to run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum GuestChoice {
    /// KVM where it can be had, else threads
    Auto,
    /// A small virtual machine on KVM
    Kvm,
    /// Plain threads of the process
    Threads,
}

/// How the processes are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Transport {
    /// TCP on the loopback interface
    Tcp,
    /// A Unix socket
    Unix,
}

/// The part that a process plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Role {
    /// Has the guest and gives it away.
    Source,
    /// Serves a guest that the source has handed over.
    PageServer,
    /// Gets it.
    Destination,
    /// Serves the destination's memory.
    PageClient,
    /// Holds what others leave behind that are killed.
    Keeper,
}

impl Role {
    /// As it is written, on the command line and in reports.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::PageServer => "page-server",
            Self::Destination => "destination",
            Self::PageClient => "page-client",
            Self::Keeper => "keeper",
        }
    }
}

fn memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
    if !(4 << 20..=256 << 30).contains(&size.0) || !size.0.is_multiple_of(HUGE_PAGE_BYTES) {
        return Err(format!("{} bytes: must be a multiple of 2M, from 4M to 256G", size.0));
    }
    Ok(size)
}

fn fraction(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "must be a number, as 0.25".to_owned())?;
    if (0.0..=1.0).contains(&value) { Ok(value) } else { Err("must be 0 to 1".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
    }

    #[test]
    fn bad_values_say_what_would_be_good() {
        for (arguments, hint) in [
            (["--memory", "4X"], "as 512M or 4G"),
            (["--memory", "3M"], "a multiple of 2M, from 4M to 256G"),
            (["--vcpus", "9"], "1..=8"),
            (["--streams", "0"], "1..=16"),
            (["--zero-fraction", "2"], "must be 0 to 1"),
        ] {
            let command = std::iter::once("demo").chain(arguments);
            let error = Options::try_parse_from(command).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(hint), "{error}");
        }
    }

    #[test]
    fn a_hold_is_before_the_switchover_unless_it_is_said_what_before() {
        let (switchover, run) = (HoldPoint::BeforeSwitchover, HoldPoint::BeforeRun);
        for (arguments, holds) in [
            (&["--json"][..], &[][..]),
            (&["--hold", "--json"], &[switchover]),
            (&["--hold", "before-run"], &[run]),
            (&["--hold", "before-switchover,before-run"], &[switchover, run]),
        ] {
            let command = ["demo", "--control", "run"].iter().chain(arguments);
            assert_eq!(Options::try_parse_from(command).unwrap().hold, holds, "{arguments:?}");
        }
    }
}
