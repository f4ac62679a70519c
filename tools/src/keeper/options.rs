//! The command line.

use afterimage::Address;
use clap::{Parser, Subcommand};

use super::words::MAX_FILES_OF_GUEST;

const ABOUT: &str = "Holds file descriptors for processes that may die";

const LONG_ABOUT: &str = "\
Holds file descriptors for processes that may die: a guest's memory, its device state, \
userfaultfds. page-server --keeper stores a guest here, and a page-server that is started after \
it was killed fetches it and goes on. Does nothing with the descriptors but hold them.";

const AFTER_HELP: &str = "\
Examples:
  afterimage-keeper --listen unix:/run/afterimage/keeper.sock
  afterimage-keeper list --at unix:/run/afterimage/keeper.sock --json
  afterimage-keeper remove --at unix:/run/afterimage/keeper.sock --guest web1

Exit status:
  0  done; the daemon was stopped and held nothing
  1  something failed; the line on the standard error says what, where, and how to mend it
  2  the command line is wrong
  4  the daemon was stopped by a second signal while it held descriptors

Signals: SIGINT and SIGTERM stop the daemon, but while it holds something the first one only
says so.

Its socket has mode 0600: who runs it, and root, can use it.";

/// What to do.
#[derive(Debug, Parser)]
#[command(name = "afterimage-keeper", version, about = ABOUT, long_about = LONG_ABOUT)]
#[command(after_help = AFTER_HELP, max_term_width = 100, args_conflicts_with_subcommands = true)]
pub struct Options {
    /// Be the daemon, and let clients connect here (unix:PATH)
    #[arg(long, value_name = "ADDR", required = true)]
    pub listen: Option<Address>,

    /// The most descriptors that are held, for all guests together
    #[arg(long, value_name = "N", default_value_t = MAX_FILES_OF_GUEST)]
    #[arg(value_parser = parse_count)]
    pub max_files: usize,

    /// What to ask of a daemon.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What can be asked of a daemon.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Say which guests are held, and who has a claim on them
    List {
        /// Where the daemon listens (unix:PATH)
        #[arg(long, value_name = "ADDR")]
        at: Address,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Let go of a guest that nobody has a claim on: if nobody else has its memory, it is lost
    Remove {
        /// Where the daemon listens (unix:PATH)
        #[arg(long, value_name = "ADDR")]
        at: Address,
        /// The guest's name
        #[arg(long, value_name = "NAME")]
        guest: String,
    },
}

fn parse_count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|it| (1..=1 << 20).contains(it));
    count.ok_or_else(|| format!("{text:?} is no number from 1 to {}", 1 << 20))
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
