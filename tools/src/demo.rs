//! The demo: a running guest moves between two processes, and every page is verified.
//!
//! One program in several roles. `parent` asks the machine what it has, starts the others
//! from the same executable, watches them, and reports; `source` has the guest and gives
//! it away; `destination` gets it. With `--handoff`, `vmm` has the guest, and hands it
//! to `page_server`, which gives it away; with `--kill page-client`, `page_client` serves the
//! destination's memory; and `keeper` holds what those that are killed leave behind. They talk by
//! lines of JSON (`messages`). The engine does the moving; the demo is what a VMM would do around
//! it, and what the world does to it (`outages`, by a `proxy`).
//!
//! Invariant: nobody waits without a limit, the others end with the parent, and success
//! is only said where every page has been verified.

mod destination;
mod error;
mod hearing;
mod keeper;
mod machine;
mod messages;
mod options;
mod outages;
mod page_client;
mod page_server;
mod parent;
pub(crate) mod precopy;
mod process;
mod progress;
mod proxy;
mod report;
mod served;
mod source;
mod trial;
mod vmm;
mod watch;

use std::process::ExitCode;

use crate::logging;
use clap::Parser;

use options::{Options, Role};

/// The whole program: reads the command line, does what it says, returns the exit status.
#[must_use]
pub fn main() -> ExitCode {
    let options = Options::parse();
    logging::start("error");
    let status = match options.role {
        Some(Role::Source) => messages::run_role(|line, setup| match &setup.handoff {
            None => source::run(line, setup),
            Some(path) => vmm::run(line, setup, path),
        }),
        Some(Role::PageServer) => messages::run_role(page_server::run),
        Some(Role::PageClient) => messages::run_role(page_client::run),
        Some(Role::Keeper) => messages::run_role(keeper::run),
        Some(Role::Destination) => messages::run_role(destination::run),
        None if options.probe => machine::probe(options.json),
        None => parent::run(&options),
    };
    ExitCode::from(status as u8)
}
