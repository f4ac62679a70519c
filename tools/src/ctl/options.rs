//! The command line.

use std::time::Duration;

use afterimage::Address;
use clap::{Args, Parser, Subcommand};

use crate::bandwidth::Bandwidth;
use crate::page_server::options::parse_time;

const AFTER_HELP: &str = "\
Examples:
  afterimage-ctl --socket unix:/run/vm/control.sock query
  afterimage-ctl --socket unix:/run/vm/control.sock set --bandwidth 100M
  afterimage-ctl --socket unix:/run/vm/control.sock pause
  afterimage-ctl --socket unix:/run/vm/control.sock recover --connect tcp:192.0.2.7:4000
  afterimage-ctl --socket unix:/run/vm/control.sock watch
  afterimage-ctl --socket unix:/run/vm/control.sock --json watch | jq .event

Exit status:
  0  done; watch: the session is over, and the guest is where it should be
  1  it failed, or nobody answers at the socket; the line on the standard error says why
  2  the command line is wrong, or the other side does not know such a request
  3  not now: the state of the session or the role of the process does not allow it
  4  watch: the process ended before everything had arrived";

/// Drives and watches a migration by its control socket.
#[derive(Debug, Parser)]
#[command(name = "afterimage-ctl", version, after_help = AFTER_HELP, max_term_width = 100)]
pub(super) struct Options {
    /// The control socket of a page-server, a page-client or a VMM (unix:PATH)
    #[arg(long, value_name = "ADDR")]
    pub(super) socket: Address,

    /// How long to wait for an answer, as 500ms or 10s
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    pub(super) timeout: Duration,

    /// Print what the other side says, one JSON object a line
    #[arg(long)]
    pub(super) json: bool,

    /// What to do
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Tell the state of the session
    Query,
    /// Tell what that side can do, and why not the rest
    Capabilities,
    /// Connect, and begin
    Start,
    /// Stop the vCPUs, and switch over now
    Switchover,
    /// Go on from a hold
    Continue,
    /// Hang up, and neither connect nor accept until recover
    Pause,
    /// Go on after pause, at the same or another address
    Recover(Recover),
    /// Take the guest back
    Cancel,
    /// Declare the destination dead, and take the guest back. If it is not dead, there will be
    /// two guests
    Fence,
    /// Change parameters of this migration
    Set(Set),
    /// Show how it goes until the process ends
    Watch(Watch),
}

#[derive(Debug, Args)]
pub(super) struct Recover {
    /// Connect here: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", conflicts_with = "listen")]
    pub(super) connect: Option<Address>,

    /// Listen here: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    pub(super) listen: Option<Address>,
}

#[derive(Debug, Args)]
pub(super) struct Set {
    /// What may leave in a second of pages that nobody has asked for
    #[arg(long, value_name = "SIZE|unlimited|on-request")]
    pub(super) bandwidth: Bandwidth,
}

#[derive(Debug, Args)]
pub(super) struct Watch {
    /// Between looks
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time)]
    pub(super) interval: Duration,
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
