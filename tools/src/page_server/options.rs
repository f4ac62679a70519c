//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use afterimage::Address;
use clap::{ArgAction, Parser, ValueEnum};

use crate::bandwidth::Bandwidth;
use crate::control::ControlOptions;
use crate::size::Size;

const ABOUT: &str = "Serves the memory of a stopped guest, or of a snapshot, to whoever runs it";

const LONG_ABOUT: &str = "\
Serves the memory of a stopped guest, or of a snapshot, to whoever runs it.

In a migration (the default) one destination gets the memory and the guest: the guest \
must be stopped, and must not be started from the same memory by anybody else. With \
--snapshot any number of destinations get the memory, which only is read. With --handoff \
a VMM hands its memory over and may exit before a page is sent.

Waits until the destination has every page, also through lost connections. A line \
`listening on ADDRESS` on the standard error says that destinations can connect.";

const AFTER_HELP: &str = "\
Examples:
  page-server --listen tcp:127.0.0.1:4000 --memory /var/lib/vm/ram.bin
  page-server --listen unix:/run/vm.sock --layout layout.json --snapshot --json
  page-server --listen fd:3 --memory /dev/shm/ram,0,3G --memory /dev/shm/ram,4G,1G
  page-server --connect tcp:[::1]:4000 --handoff unix:/run/vm-handoff.sock --streams 4
  page-server --listen tcp:127.0.0.1:4000 --handoff unix:/run/vm-handoff.sock \\
      --state /var/lib/vm/state --keeper unix:/run/afterimage/keeper.sock --guest web1
  page-server --listen tcp:127.0.0.1:4000 --memory ram.bin --control unix:/run/vm/control.sock
  page-server --fence --state /var/lib/vm/state
  page-server --probe

Exit status:
  0  the destination has everything; a snapshot server was stopped and owed nobody anything;
     --fence: recorded
  1  something failed; the line on the standard error says what, where, and how to mend it
  2  the command line is wrong
  3  stopped by a signal or at the control socket, and nothing is lost: the guest is this
     side's, or with --state and the same command line page-server goes on
  4  stopped by a second signal while pages were missing; they are lost to the destination
  5  --probe: something is lacking without which a guest on KVM cannot be served

Signals: SIGINT and SIGTERM stop it, but while a destination lacks pages the first one only
says so, and a second one abandons them.";

/// What to serve, where, and how.
#[derive(Debug, Parser)]
#[command(name = "page-server", version, about = ABOUT, long_about = LONG_ABOUT)]
#[command(after_help = AFTER_HELP, max_term_width = 100)]
#[expect(clippy::struct_excessive_bools, reason = "one for each flag")]
pub struct Options {
    /// Where destinations connect: tcp:HOST:PORT, unix:PATH or fd:N (a listening socket)
    #[arg(long, value_name = "ADDR", conflicts_with = "connect")]
    #[arg(required_unless_present_any = ["connect", "fence", "probe"])]
    pub listen: Option<Address>,

    /// Where the one destination listens: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", conflicts_with = "snapshot")]
    pub connect: Option<Address>,

    /// Let memory travel unencrypted beyond this machine: whoever can read the network has
    /// the guest
    #[arg(long)]
    pub insecure_plaintext: bool,

    /// A file with guest memory, or SIZE bytes of it from OFFSET; given several times, at
    /// consecutive guest addresses
    #[arg(long, value_name = "PATH[,OFFSET,SIZE]", action = ArgAction::Append)]
    #[arg(required_unless_present_any = ["layout", "handoff", "keeper", "fence", "probe"])]
    pub memory: Vec<FilePiece>,

    /// Which guest addresses --memory leaves out
    #[arg(long, value_enum, default_value_t = Hole::Pc)]
    pub hole: Hole,

    /// A JSON file that says which piece of which file lies where; see docs/page-server.md
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "handoff"])]
    pub layout: Option<PathBuf>,

    /// Take guest memory and device state from a VMM that connects here (unix:PATH)
    #[arg(long, value_name = "ADDR", conflicts_with_all = ["memory", "snapshot"])]
    pub handoff: Option<Address>,

    /// Record here who has the guest: after its death page-server goes on where it was, if it is
    /// started with the same command line again
    #[arg(long, value_name = "FILE", conflicts_with = "snapshot")]
    pub state: Option<PathBuf>,

    /// Let an afterimage-keeper that listens here (unix:PATH) hold the guest that a VMM hands
    /// over, or take over the guest that it holds
    #[arg(long, value_name = "ADDR", requires_all = ["guest", "state"])]
    #[arg(conflicts_with_all = ["memory", "layout", "snapshot"])]
    pub keeper: Option<Address>,

    /// What the guest is called at the keeper
    #[arg(long, value_name = "NAME", requires = "keeper")]
    pub guest: Option<String>,

    /// Declare the destination dead: record that the guest is this side's again, as of the
    /// switchover, say where it is, and exit. If the destination is not dead, there will be
    /// two guests
    #[arg(long, requires = "state", conflicts_with_all = ["listen", "connect", "handoff"])]
    pub fence: bool,

    /// Serve any number of destinations, none of which gets the guest
    #[arg(long)]
    pub snapshot: bool,

    /// Free pages here once the destination runs the guest and has acknowledged them. Files of
    /// --memory or --layout lose them too. If the destination dies after it ran the guest, the
    /// guest is lost: there is no going back to the state at the switchover. With --state, which
    /// pages were freed is noted in FILE.released
    #[arg(long, conflicts_with = "snapshot")]
    pub release: bool,

    /// How many destinations a snapshot is served to at a time
    #[arg(long, value_name = "N", default_value_t = 64, requires = "snapshot")]
    pub max_destinations: usize,

    /// Background streams, 1 to 16
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16))]
    pub streams: u16,

    /// What may leave in a second, to each destination, of pages that it did not ask for: a
    /// size, as 100M, unlimited, or on-request (none). Pages that it asks for go at once
    #[arg(long, value_name = "SIZE|unlimited|on-request", default_value_t)]
    pub bandwidth: Bandwidth,

    /// How long threads that answer requests poll before they sleep, for example 50us; 0s
    /// never polls
    #[arg(long, value_name = "TIME", default_value = "50us", value_parser = parse_time)]
    pub polling: Duration,

    /// Verify every frame with a CRC-32C, if the destination can do it too
    #[arg(long)]
    pub checksums: bool,

    /// How often a side that has nothing to say says so
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_time)]
    pub heartbeat: Duration,

    /// After how much silence a connection is taken for dead, and made again
    #[arg(long, value_name = "TIME", default_value = "800ms", value_parser = parse_time)]
    pub silence: Duration,

    /// Where to be driven from and watched.
    #[command(flatten)]
    pub control: ControlOptions,

    /// Print one JSON object to the standard output at the end
    #[arg(long)]
    pub json: bool,

    /// Say what this machine has of what is needed, and exit
    #[arg(long)]
    pub probe: bool,
}

/// Guest addresses that are no RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Hole {
    /// From 3 GiB to 4 GiB, as in a PC
    Pc,
    /// None
    None,
}

/// A file, or a piece of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePiece {
    /// The file.
    pub path: PathBuf,
    /// Where the piece begins, and how long it is; the whole file without.
    pub piece: Option<(u64, u64)>,
}

impl FromStr for FilePiece {
    type Err = std::convert::Infallible;

    /// A comma may also be part of a path: only two sizes at the end are a piece.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.rsplitn(3, ',');
        let (size, offset, path) = (parts.next(), parts.next(), parts.next());
        Ok(match (path, offset.and_then(parse_bytes), size.and_then(parse_bytes)) {
            (Some(path), Some(offset), Some(size)) => {
                Self { path: path.into(), piece: Some((offset, size)) }
            }
            _ => Self { path: text.into(), piece: None },
        })
    }
}

/// Bytes: 0x…, or a size.
#[must_use]
pub fn parse_bytes(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse::<Size>().ok().map(|size| size.0),
    }
}

/// A time: a whole number and us, ms or s.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number = digits.parse::<u64>().map_err(|_| time_error(text))?;
    match unit {
        "us" => Ok(Duration::from_micros(number)),
        "ms" => Ok(Duration::from_millis(number)),
        "s" => Ok(Duration::from_secs(number)),
        _ => Err(time_error(text)),
    }
}

fn time_error(text: &str) -> String {
    format!("{text:?} is no time: write a whole number and us, ms or s, as in 200ms")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn bytes_are_sizes_or_hexadecimal() {
        assert_eq!(parse_bytes("0x100000000"), Some(4 << 30));
        assert_eq!(parse_bytes("4G"), Some(4 << 30));
        for text in ["", "G", "-1", "0x", "0xg", "99999999999T"] {
            assert_eq!(parse_bytes(text), None, "{text:?}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(parse_time("50us"), Ok(Duration::from_micros(50)));
        assert_eq!(parse_time("2s"), Ok(Duration::from_secs(2)));
        for text in ["", "5", "s", "5m", "1.5s"] {
            assert!(parse_time(text).unwrap_err().contains("200ms"), "{text:?}");
        }
    }

    #[test]
    fn a_comma_belongs_to_the_path_unless_two_sizes_follow() {
        let parse = |text: &str| text.parse::<FilePiece>().unwrap();
        let piece = parse("/a,b,4K,1M");
        assert_eq!(piece, FilePiece { path: "/a,b".into(), piece: Some((4096, 1 << 20)) });
        for text in ["/a", "/a,b", "/a,1", "/a,1,b"] {
            assert_eq!(parse(text), FilePiece { path: text.into(), piece: None });
        }
    }
}
