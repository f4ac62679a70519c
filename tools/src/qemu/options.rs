//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use afterimage::Address;
use clap::{ArgAction, Args, Parser, Subcommand};

use crate::bandwidth::Bandwidth;
use crate::control::ControlOptions;
pub(crate) use crate::demo::precopy::PassesWanted;
use crate::page_server::options::{Hole, parse_time};

const ABOUT: &str = "Moves a guest between two unmodified QEMUs";

const LONG_ABOUT: &str = "\
Moves a guest between two unmodified QEMUs, whose guest RAM is in shared files.

The source's QEMU runs as it is. The destination's is started with -S -incoming defer and with \
libafterimage_preload.so, which hands its memory to a page-client. `send` runs beside the \
source, `receive` beside the destination; `migrate` is both, where one host has both. The \
guest is stopped, its device state moves, and it runs at the destination at once; its memory \
follows as it is needed, and in the background.

Before the guest is given away, whatever fails lets it go on at the source. From then on it \
runs at the destination alone.";

const AFTER_HELP: &str = "\
Examples:
  afterimage-qemu send --qmp unix:/run/vm7/qmp --listen tcp:127.0.0.1:4000 \\
      --state /var/lib/vm7/source.state
  afterimage-qemu send --qmp unix:/run/vm7/qmp --connect tcp:127.0.0.1:4000 \\
      --passes auto --tracking unix:/run/vm7/tracking
  afterimage-qemu receive --qmp unix:/run/vm7/qmp-in --attach unix:/run/vm7/attach --guest vm7
  afterimage-qemu migrate --source-qmp unix:/run/vm7/qmp --destination-qmp unix:/run/vm7/qmp-in \\
      --listen unix:/run/vm7/pages --attach unix:/run/vm7/attach --guest vm7 --quit-source

Exit status:
  0  the guest is at the destination, and so is all of its memory
  1  something failed; the line on the standard error says what, where, and how to mend it
  2  the command line is wrong
  3  the guest was not moved: it is at the source as it was before
  4  stopped by a signal before the end; the same command line goes on
  5  the guest was not moved, and does not run at the source: the line says what to do

Signals: SIGINT and SIGTERM let the guest go on at the source, as long as it was not given \
away; then the first one only says what is missing, and a second one stops this process.";

/// What to do.
#[derive(Debug, Parser)]
#[command(name = "afterimage-qemu", version, about = ABOUT, long_about = LONG_ABOUT)]
#[command(after_help = AFTER_HELP, max_term_width = 100)]
pub(crate) struct Options {
    /// Which side this is.
    #[command(subcommand)]
    pub(crate) command: Command,

    /// Print one JSON object to the standard output at the end
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// Which side.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Gives the guest of a QEMU on this host away, and serves its memory
    #[command(after_help = AFTER_HELP)]
    Send {
        /// The monitor of the source's QEMU (-qmp unix:PATH,server=on,wait=off)
        #[arg(long, value_name = "ADDR")]
        qmp: Address,

        /// How it is given away.
        #[command(flatten)]
        source: SourceOptions,
    },
    /// Takes a guest into a QEMU on this host, whose memory a page-client serves
    #[command(after_help = AFTER_HELP)]
    Receive {
        /// The monitor of the destination's QEMU (-qmp unix:PATH,server=on,wait=off)
        #[arg(long, value_name = "ADDR")]
        qmp: Address,

        /// How it is taken.
        #[command(flatten)]
        destination: DestinationOptions,
    },
    /// Both, where this host has both QEMUs
    #[command(after_help = AFTER_HELP)]
    Migrate {
        /// The monitor of the source's QEMU
        #[arg(long, value_name = "ADDR")]
        source_qmp: Address,

        /// The monitor of the destination's QEMU
        #[arg(long, value_name = "ADDR")]
        destination_qmp: Address,

        /// How it is given away.
        #[command(flatten)]
        source: SourceOptions,

        /// How it is taken.
        #[command(flatten)]
        destination: DestinationOptions,
    },
}

/// The source's side.
#[derive(Args, Clone, Debug)]
pub(crate) struct SourceOptions {
    /// Where page-client connects: tcp:HOST:PORT, unix:PATH or fd:N (a listening socket)
    #[arg(long, value_name = "ADDR", conflicts_with = "connect")]
    #[arg(required_unless_present = "connect")]
    pub(crate) listen: Option<Address>,

    /// Where page-client listens: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    pub(crate) connect: Option<Address>,

    /// Let memory travel unencrypted beyond this machine: whoever can read the network has
    /// the guest
    #[arg(long)]
    pub(crate) insecure_plaintext: bool,

    /// The file of guest RAM, if QEMU is not to be asked: once for each memory backend, in the
    /// order of their names
    #[arg(long, value_name = "PATH", action = ArgAction::Append)]
    pub(crate) memory: Vec<PathBuf>,

    /// Which guest addresses memory leaves out; as `AFTERIMAGE_HOLE` at the destination
    #[arg(long, value_enum, default_value_t = Hole::Pc)]
    pub(crate) hole: Hole,

    /// Record here who has the guest: after its death the same command line goes on where it was
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,

    /// Send memory in passes while the guest still runs here: after N of them it is stopped, or
    /// (auto) when another would not help, or (converged) when hardly anything is left, and then
    /// it runs at the destination only with all of its memory
    #[arg(long, value_name = "N|auto|converged", default_value_t = PassesWanted::None)]
    pub(crate) passes: PassesWanted,

    /// With --passes: where the source's QEMU, started with `libafterimage_preload.so`, lets
    /// its writes be tracked (its `AFTERIMAGE_TRACKING`, unix:PATH)
    #[arg(long, value_name = "ADDR", requires = "passes")]
    pub(crate) tracking: Option<Address>,

    /// What may leave in a second during the passes [default: as --bandwidth]
    #[arg(long, value_name = "SIZE|unlimited", requires = "passes")]
    pub(crate) precopy_bandwidth: Option<Bandwidth>,

    /// How long the destination may take to restore the stopped guest; then it goes on at the
    /// source
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    pub(crate) ready_within: Duration,

    /// End the source's QEMU when the destination has everything
    #[arg(long)]
    pub(crate) quit_source: bool,

    /// Background streams, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) streams: u16,

    /// What may leave in a second of pages that were not asked for: a size, as 100M, unlimited,
    /// or on-request (none). Pages that are asked for go at once
    #[arg(long, value_name = "SIZE|unlimited|on-request", default_value_t)]
    pub(crate) bandwidth: Bandwidth,

    /// Verify every frame with a CRC-32C, if page-client can do it too
    #[arg(long)]
    pub(crate) checksums: bool,

    /// Where to be driven from and watched.
    #[command(flatten)]
    pub(crate) control: ControlOptions,
}

/// The destination's side.
#[derive(Args, Clone, Debug)]
pub(crate) struct DestinationOptions {
    /// Where page-client lets VMMs attach (its --attach, unix:PATH)
    #[arg(long, value_name = "ADDR")]
    pub(crate) attach: Address,

    /// What the guest is called there (`AFTERIMAGE_GUEST` of the preload library)
    #[arg(long, value_name = "NAME")]
    pub(crate) guest: String,
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
