//! `afterimage-keeper`: holds file descriptors for processes that may die, and gives them to
//! their successors.
//!
//! Answers for holding and for who may have what; what the descriptors are is its clients'
//! affair: it never reads, writes or maps one. [`Keeper`] is a client's connection, and
//! [`KeptGuest`] a guest as a set of descriptors.
//!
//! Invariant: a set is there whole or not at all, and at most one live connection has a claim
//! on it. A set goes only because its holder or, where it is unclaimed, anybody whom the
//! socket admits says so, or because the keeper ends.

mod client;
mod guest;
mod options;
mod packet;
mod place;
mod server;
mod shelf;
mod words;

pub use client::{Keeper, KeeperError, NamedFile};
pub use guest::{KeptGuest, KeptGuestError};
pub use options::{Command, Options};
pub(crate) use place::{Place, path_of as place_path};
pub use words::{Listed, MAX_CLIENTS, MAX_FILES_OF_GUEST, MAX_GUESTS, MAX_NAME, Why};

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use afterimage::Address;
use clap::Parser;
use serde::Serialize;

use crate::page_server::Notice;

/// Grows when a field of the JSON changes its meaning or goes.
const SCHEMA_VERSION: u32 = 1;

/// What `list --json` prints; described in docs/reliability.md.
#[derive(Debug, Serialize)]
struct Report {
    schema_version: u32,
    tool: &'static str,
    version: &'static str,
    guests: Vec<Listed>,
}

/// Runs the command with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    let done = match (&options.command, &options.listen) {
        (Some(command), _) => run(command),
        (None, Some(address)) => hold(address, options.max_files, |notice| {
            let line = match notice {
                Notice::Listening(address) => format!("listening on {address}"),
                Notice::Line(line) => line,
                _ => return,
            };
            // If the standard error is closed there is nobody to tell.
            let _ = writeln!(io::stderr(), "afterimage-keeper: {line}");
        }),
        (None, None) => Err("give --listen, or a command".to_owned()),
    };
    done.unwrap_or_else(|error| {
        eprintln!("afterimage-keeper: {}", error.replace('\n', " "));
        ExitCode::from(1)
    })
}

/// Does in another program what the daemon does, but tells `hear` what the daemon says on the
/// standard error, and when clients can connect.
///
/// Blocks until it is stopped by SIGINT or SIGTERM, which are blocked for this thread and taken
/// as the daemon takes them.
///
/// # Errors
/// One line that says what is wrong with the address, or with the limits of this process.
pub fn hold(
    address: &Address,
    max_files: usize,
    hear: impl Fn(Notice) + 'static,
) -> Result<ExitCode, String> {
    server::serve(path_of(address)?, max_files, Box::new(hear)).map_err(|error| line(&error))
}

fn run(command: &Command) -> Result<ExitCode, String> {
    match command {
        Command::List { at, json } => {
            let guests = connect(at)?.list().map_err(|error| line(&error))?;
            if *json {
                let (tool, version) = ("afterimage-keeper", env!("CARGO_PKG_VERSION"));
                let report = Report { schema_version: SCHEMA_VERSION, tool, version, guests };
                let text = serde_json::to_string(&report);
                println!("{}", text.expect("text and numbers are always JSON"));
            } else {
                for guest in guests {
                    println!("{guest}");
                }
            }
        }
        Command::Remove { at, guest } => {
            connect(at)?.remove(guest).map_err(|error| line(&error))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn connect(at: &Address) -> Result<Keeper, String> {
    Keeper::connect(path_of(at)?, "afterimage-keeper").map_err(|error| line(&error))
}

fn path_of(address: &Address) -> Result<&Path, String> {
    match address {
        Address::Unix(path) => Ok(path),
        other => Err(format!("{other}: descriptors only travel over Unix sockets; give unix:PATH")),
    }
}

/// An error and its causes in one line.
pub(crate) fn line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
