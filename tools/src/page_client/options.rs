//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use afterimage::Address;
use clap::{Parser, ValueEnum};

use crate::bandwidth::Bandwidth;
use crate::control::ControlOptions;
use crate::page_server::options::parse_time;

const ABOUT: &str = "Serves the memory of a guest that another process runs, from its source";

const LONG_ABOUT: &str = "\
Serves the memory of a guest that another process runs, from its source.

A VMM maps guest memory, registers it with userfaultfd, and hands it over at --attach; the \
guest and its pages come from a source (a VMM, or page-server) at --connect or --listen. What \
the guest touches comes at once, the rest in the background.

With --state and --keeper it may be killed at any moment: afterimage-keeper holds the \
userfaultfd, the files and the books meanwhile, and page-client started again with the same \
options goes on. The guest waits, and loses nothing.

With --firecracker it is the page fault handler of one Firecracker that loads a snapshot; the \
memory comes from the snapshot's file on this machine (--memory), or from a page-server \
elsewhere.";

const AFTER_HELP: &str = "\
Examples:
  page-client --attach unix:/run/vm/attach.sock --connect tcp:127.0.0.1:4000
  page-client --attach unix:/run/vm/attach.sock --connect unix:/run/vm.sock \\
              --state /var/lib/vm/client.state --keeper unix:/run/keeper.sock --guest vm7
  page-client --firecracker unix:/run/vm/uffd.sock --memory /var/lib/vm/snapshot.mem
  page-client --firecracker unix:/run/vm/uffd.sock --connect tcp:127.0.0.1:4000

Exit status:
  0  every page is in place, and the source knows it; or the Firecracker that was served has
     ended
  1  something failed; the line on the standard error says what, where, and how to mend it
  2  the command line is wrong
  3  the guest does not run here: the source has it, or nothing was begun; nothing is lost
  4  stopped by a signal before the end; whoever touches a missing page waits until
     page-client is started again
  5  the process that ran the guest has ended

Signals: SIGINT and SIGTERM stop it; while pages are missing the first one only says so.";

/// Whose memory to serve, from where.
#[derive(Debug, Parser)]
#[command(name = "page-client", version, about = ABOUT, long_about = LONG_ABOUT)]
#[command(after_help = AFTER_HELP, max_term_width = 100)]
pub struct Options {
    /// Where the VMM hands its memory over (unix:PATH)
    #[arg(long, value_name = "ADDR", required_unless_present = "firecracker")]
    pub attach: Option<Address>,

    /// Where a Firecracker hands its memory over when it loads a snapshot (unix:PATH)
    #[arg(long, value_name = "ADDR", conflicts_with = "attach")]
    pub firecracker: Option<Address>,

    /// Where the source listens: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", conflicts_with = "listen")]
    #[arg(required_unless_present_any = ["listen", "memory"])]
    pub connect: Option<Address>,

    /// Where the source connects: tcp:HOST:PORT, unix:PATH or fd:N (a listening socket)
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<Address>,

    /// The memory file of the snapshot, if it is on this machine
    #[arg(long, value_name = "FILE", requires = "firecracker")]
    #[arg(conflicts_with_all = ["connect", "listen"])]
    pub memory: Option<PathBuf>,

    /// How fast pages of --memory come that nobody has asked for: unlimited, so many bytes a
    /// second as 100M, or on-request for none. With --connect it is the source's affair
    #[arg(long, value_name = "RATE", default_value_t)]
    pub bandwidth: Bandwidth,

    /// What becomes of a Firecracker that lacks pages when page-client ends or cannot go on
    #[arg(long, value_enum, default_value_t = OnExit::KillVmm, requires = "firecracker")]
    pub on_exit: OnExit,

    /// Let memory travel unencrypted beyond this machine: whoever can read the network has
    /// the guest
    #[arg(long)]
    pub insecure_plaintext: bool,

    /// Remember in this file who owns the guest, so that a restart can go on
    #[arg(long, value_name = "FILE", requires = "keeper", conflicts_with = "firecracker")]
    pub state: Option<PathBuf>,

    /// The afterimage-keeper that holds the guest's descriptors while no page-client runs
    #[arg(long, value_name = "ADDR", requires = "state", requires = "guest")]
    pub keeper: Option<Address>,

    /// What the guest is called at the keeper
    #[arg(long, value_name = "NAME", requires = "keeper")]
    pub guest: Option<String>,

    /// How long the thread that serves faults polls before it sleeps, for example 50us; 0s
    /// never polls
    #[arg(long, value_name = "TIME", default_value = "50us", value_parser = parse_time)]
    pub polling: Duration,

    /// Verify every frame with a CRC-32C, if the source can do it too
    #[arg(long)]
    pub checksums: bool,

    /// Where to be driven from and watched.
    #[command(flatten)]
    pub control: ControlOptions,

    /// Print one JSON object to the standard output at the end
    #[arg(long)]
    pub json: bool,
}

/// What becomes of a VM that lacks pages when nobody serves it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnExit {
    /// Its process is killed (SIGKILL), so that whoever watches it notices
    KillVmm,
    /// It is left: whoever touches a missing page waits for ever
    Leave,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }
}
