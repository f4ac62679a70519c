//! What processes of this test binary do: each is a test that does nothing in the test itself.

use std::io::BufRead;
use std::time::Duration;

use afterimage::dirty::DirtyTracker;
use afterimage_tools::page_client::Ran;
use afterimage_tools::page_server::Notice;
use afterimage_tools::tracking::VmmTracker;
use afterimage_tools::{keeper, page_client, page_server};
use clap::Parser;

use crate::bystanders;
use crate::process::{ARGUMENTS, ROLE, say};
use crate::vmm::Vmm;

/// The arguments of this process, if it plays this role.
fn arguments(role: &str) -> Option<Vec<String>> {
    if std::env::var(ROLE).ok()? != role {
        return None;
    }
    let arguments = std::env::var(ARGUMENTS).unwrap_or_default();
    Some(arguments.lines().map(str::to_owned).collect())
}

fn tell(notice: Notice) {
    match notice {
        Notice::Listening(address) => say(&format!("listening on {address}")),
        Notice::Line(line) => say(&line),
        _ => {}
    }
}

/// Ends the process at once: the harness would write more.
fn end<E: std::fmt::Display>(result: Result<(), E>) -> ! {
    match result {
        Ok(()) => say("finished"),
        Err(error) => say(&format!("failed: {error}")),
    }
    std::process::exit(0)
}

#[test]
fn page_server() {
    let Some(arguments) = arguments("page_server") else { return };
    let arguments = std::iter::once("page-server".to_owned()).chain(arguments);
    let options = page_server::options::Options::try_parse_from(arguments).unwrap();
    end(page_server::run(&options, tell));
}

#[test]
fn page_client() {
    let Some(arguments) = arguments("page_client") else { return };
    let arguments = std::iter::once("page-client".to_owned()).chain(arguments);
    let options = page_client::options::Options::try_parse_from(arguments).unwrap();
    let ran = page_client::run(&options, Duration::from_millis(200), tell);
    end(ran.map_err(|failure| failure.to_string()).and_then(|ran| match ran {
        Ran::Here => Ok(()),
        Ran::NotHere => Err("the guest does not run here".to_owned()),
    }));
}

#[test]
fn keeper() {
    let Some(arguments) = arguments("keeper") else { return };
    let address = arguments[0].parse().unwrap();
    end(keeper::hold(&address, 64, tell).map(drop));
}

/// Tracks a VMM until it is killed.
#[test]
fn tracker() {
    let Some(arguments) = arguments("tracker") else { return };
    let mut tracker = VmmTracker::connect(arguments[0].as_ref()).unwrap();
    tracker.start().unwrap();
    say("tracking");
    end(std::io::stdin().lines().last().transpose().map(drop));
}

/// A program that maps memory, preloaded with the library.
#[test]
fn vmm() {
    let Some(_) = arguments("vmm") else { return };
    let mut vmm = Vmm::default();
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        if line == "end" {
            break;
        }
        say(&vmm.take(&line));
    }
    std::process::exit(0);
}

/// A program that has nothing to do with guest memory.
#[test]
fn bystander() {
    let Some(_) = arguments("bystander") else { return };
    let before = bystanders::descriptors();
    for line in bystanders::act() {
        say(&line);
    }
    assert_eq!(bystanders::descriptors(), before, "none is left open, and no socket made");
    std::process::exit(0);
}
