//! The page-client's process: it serves the destination's memory.
//!
//! All of that is page-client's; here it gets its command line and a way to talk.

use std::cell::OnceCell;

use clap::Parser;

use super::error::DemoError;
use super::messages::{Line, Message, Progress, Setup, Stats, now_us};
use super::options::Role;
use crate::page_client;
use crate::page_client::options::Options;
use crate::page_server::Notice;

/// Plays the page-client.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let options = Options::try_parse_from(arguments(setup)?)
        .map_err(|error| DemoError::failed("no such page-client", &error))?;
    let line = line.clone();
    // The engine's times begin where it does, and it counts from there on.
    let started = OnceCell::new();
    let hear = move |notice| match notice {
        Notice::Listening(address) => line.say(&Message::Listening(address.to_string())),
        Notice::Attached => line.say(&Message::Attached),
        Notice::Counted(stats) => line.say(&Message::Progress(Box::new(Progress {
            at_us: now_us(),
            operations: None,
            stats: Some(Stats::of(&stats, *started.get_or_init(now_us))),
        }))),
        notice => tracing::info!(?notice, "page-client"),
    };
    // Where its guest stayed the destination says so, or the source why it failed.
    page_client::run(&options, setup.progress_pause, hear)
        .map(drop)
        .map_err(|error| DemoError::failed("cannot serve the guest's memory", &error))
}

/// What one would type.
fn arguments(setup: &Setup) -> Result<Vec<String>, DemoError> {
    let (Some(client), Some(keeper)) = (&setup.page_client, &setup.keeper) else {
        return Err(DemoError::Failed("nobody said where the page-client is".to_owned()));
    };
    let mut arguments = vec![
        "page-client".to_owned(),
        format!("--attach=unix:{}", client.attach.display()),
        format!("--connect={}", client.source),
        format!("--state={}", client.state.display()),
        format!("--keeper=unix:{}", keeper.display()),
        "--guest=demo-destination".to_owned(),
    ];
    arguments.extend(setup.control_arguments(Role::PageClient));
    arguments.extend(setup.checksums.then(|| "--checksums".to_owned()));
    Ok(arguments)
}
