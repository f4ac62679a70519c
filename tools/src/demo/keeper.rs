//! The keeper's process: it holds what the page server and page-client leave behind.
//!
//! All of that is afterimage-keeper's; here it gets an address and a way to talk.

use afterimage::Address;

use super::error::DemoError;
use super::messages::{Line, Message, Setup};
use crate::keeper;
use crate::page_server::Notice;

/// More than the descriptors of two guests, and few enough for any limit of open files.
const MAX_FILES: usize = 256;

/// Plays the keeper, until it is ended.
pub(super) fn run(line: &Line, setup: &Setup) -> Result<(), DemoError> {
    let path = setup
        .keeper
        .clone()
        .ok_or_else(|| DemoError::Failed("nobody said where the keeper is to listen".to_owned()))?;
    let line = line.clone();
    let hear = move |notice| match notice {
        Notice::Listening(address) => line.say(&Message::Listening(address.to_string())),
        notice => tracing::info!(?notice, "keeper"),
    };
    keeper::hold(&Address::Unix(path), MAX_FILES, hear).map(drop).map_err(DemoError::Failed)
}
