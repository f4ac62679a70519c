//! Two hosts of our own on this machine: network namespaces, joined by a veth pair that can be
//! broken in several ways.
//!
//! Invariant: both are gone when the value is; with them go all interfaces, routes and queues.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Source,
    Destination,
}

impl Place {
    /// Its address; nobody but the two hosts sees it.
    pub(crate) const fn address(self) -> &'static str {
        match self {
            Self::Source => "10.213.9.1",
            Self::Destination => "10.213.9.2",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

pub(crate) struct Hosts {
    source: String,
    destination: String,
}

impl Hosts {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side| format!("page-client-{}-{number}-{side}", std::process::id());
        let hosts = Self { source: name("s"), destination: name("d") };
        let (from, to) = (&*hosts.source, &*hosts.destination);
        ip(&["netns", "add", from]);
        ip(&["netns", "add", to]);
        ip(&["-n", from, "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", to]);
        for place in [Place::Source, Place::Destination] {
            let address = format!("{}/24", place.address());
            hosts.ip(place, &["address", "add", &address, "dev", "v0"]);
            hosts.ip(place, &["link", "set", "v0", "up"]);
            hosts.ip(place, &["link", "set", "lo", "up"]);
        }
        hosts
    }

    pub(crate) fn name(&self, place: Place) -> &str {
        match place {
            Place::Source => &self.source,
            Place::Destination => &self.destination,
        }
    }

    fn ip(&self, place: Place, arguments: &[&str]) {
        ip(&[&["-n", self.name(place)], arguments].concat());
    }

    pub(crate) fn link_down(&self, place: Place) {
        self.ip(place, &["link", "set", "v0", "down"]);
    }

    pub(crate) fn link_up(&self, place: Place) {
        self.ip(place, &["link", "set", "v0", "up"]);
    }

    /// What leaves a host is addressed to an interface that is not there: it is lost without a
    /// word, and what comes the other way arrives.
    pub(crate) fn lose_what_leaves(&self, place: Place) {
        let to = place.other().address();
        let nobody = "02:00:00:00:00:99";
        self.ip(
            place,
            &["neigh", "replace", to, "lladdr", nobody, "nud", "permanent", "dev", "v0"],
        );
    }

    pub(crate) fn find_what_leaves(&self, place: Place) {
        self.ip(place, &["neigh", "del", place.other().address(), "dev", "v0"]);
    }

    /// A host has no way to the other any more, and notices when it sends.
    pub(crate) fn no_way(&self, place: Place) {
        self.ip(place, &["route", "add", "blackhole", place.other().address()]);
    }

    pub(crate) fn a_way(&self, place: Place) {
        self.ip(place, &["route", "del", "blackhole", place.other().address()]);
    }

    /// What leaves a host passes a queue that is too short for it, so that much is dropped.
    pub(crate) fn try_dropping(&self, place: Place) -> Result<(), String> {
        let queue = ["tbf", "rate", "200mbit", "burst", "8kb", "limit", "16kb"];
        let at = ["-n", self.name(place), "qdisc", "add", "dev", "v0", "root"];
        run("tc", &[&at[..], &queue].concat()).map(drop)
    }

    /// How many packets were dropped.
    pub(crate) fn dropped(&self, place: Place) -> u64 {
        let said =
            run("tc", &["-n", self.name(place), "-s", "qdisc", "show", "dev", "v0"]).unwrap();
        let (_, after) = said.split_once("dropped ").expect("a count of drops");
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in [&self.source, &self.destination] {
            // It may not have been made.
            let _ = run("ip", &["netns", "delete", name]);
        }
    }
}

fn ip(arguments: &[&str]) {
    run("ip", arguments).unwrap();
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{program} {}: {}", arguments.join(" "), said.trim()))
}
