//! The page server's process: it takes the guest from the VMM, and serves it.
//!
//! All of that is page-server's; here it gets its command line and a way to talk.

use clap::Parser;

use super::error::DemoError;
use super::messages::{Line, Message, Setup};
use super::options::Role;
use crate::page_server::options::Options;
use crate::page_server::{self, Notice};

/// Plays the page server.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let options = Options::try_parse_from(arguments(setup))
        .map_err(|error| DemoError::failed("no such page server", &error))?;
    let line = line.clone();
    page_server::run(&options, move |notice| match notice {
        Notice::Listening(address) => line.say(&Message::Listening(address.to_string())),
        notice => tracing::info!(?notice, "page server"),
    })
    .map_err(|error| DemoError::failed("cannot serve the guest", &error))
}

/// What one would type.
fn arguments(setup: &Setup) -> Vec<String> {
    let handoff = setup.handoff.as_ref().map(|path| format!("unix:{}", path.display()));
    let mut arguments = vec![
        "page-server".to_owned(),
        format!("--listen={}", setup.listen),
        format!("--streams={}", setup.streams),
        format!("--bandwidth={}", setup.bandwidth),
    ];
    arguments.extend(handoff.map(|address| format!("--handoff={address}")));
    if let (Some(state), Some(keeper)) = (&setup.page_server_state, &setup.keeper) {
        arguments.push(format!("--state={}", state.display()));
        arguments.push(format!("--keeper=unix:{}", keeper.display()));
        arguments.push("--guest=demo-source".to_owned());
    }
    arguments.extend(setup.control_arguments(Role::PageServer));
    arguments.extend(setup.checksums.then(|| "--checksums".to_owned()));
    arguments
}
