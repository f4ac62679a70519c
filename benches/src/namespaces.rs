//! Two network namespaces joined by a veth pair, with a rate if one is wanted.
//!
//! Invariant: both are gone when the value is; with them go all interfaces and rules.

use std::path::Path;
use std::process::Command;

use crate::error::BenchError;

/// The source's address within its namespace; nobody else sees it.
const SOURCE: &str = "10.213.7.1";
const DESTINATION: &str = "10.213.7.2";

/// Two hosts of our own on this machine.
#[derive(Debug)]
pub struct Namespaces {
    source: String,
    destination: String,
}

impl Namespaces {
    /// Makes them; `rate` is in bits a second, for each direction.
    ///
    /// # Errors
    /// [`BenchError::Lacking`] without the right or without iproute2.
    pub fn create(rate: Option<u64>) -> Result<Self, BenchError> {
        let name = |side| format!("postcopy-bench-{}-{side}", std::process::id());
        let pair = Self { source: name("s"), destination: name("d") };
        ip(&["netns", "add", &pair.source])?;
        ip(&["netns", "add", &pair.destination])?;
        let (from, to) = (&pair.source, &pair.destination);
        ip(&["-n", from, "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", to])?;
        for (namespace, address) in [(from, SOURCE), (to, DESTINATION)] {
            let address = format!("{address}/24");
            ip(&["-n", namespace, "address", "add", &address, "dev", "v0"])?;
            ip(&["-n", namespace, "link", "set", "v0", "up"])?;
            ip(&["-n", namespace, "link", "set", "lo", "up"])?;
            if let Some(rate) = rate {
                limit(namespace, rate)?;
            }
        }
        Ok(pair)
    }

    /// Where a source can listen.
    #[must_use]
    pub const fn source_address(&self) -> &'static str {
        SOURCE
    }

    /// A command on the source's host.
    #[must_use]
    pub fn in_source(&self, program: &Path) -> Command {
        inside(&self.source, program)
    }

    /// A command on the destination's host.
    #[must_use]
    pub fn in_destination(&self, program: &Path) -> Command {
        inside(&self.destination, program)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for namespace in [&self.source, &self.destination] {
            // It may not have been made.
            let _ = ip(&["netns", "delete", namespace]);
        }
    }
}

fn inside(namespace: &str, program: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

fn limit(namespace: &str, rate: u64) -> Result<(), BenchError> {
    let rate = format!("{rate}bit");
    // A burst of a few milliseconds, and no more waiting in the queue than that.
    run(
        "tc",
        &[
            "-n", namespace, "qdisc", "add", "dev", "v0", "root", "tbf", "rate", &rate, "burst",
            "256kb", "latency", "5ms",
        ],
    )
}

fn ip(arguments: &[&str]) -> Result<(), BenchError> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> Result<(), BenchError> {
    let lacking = |why: &str| {
        BenchError::Lacking(format!(
            "network namespaces need root and iproute2; `{program} {}`: {why}",
            arguments.join(" ")
        ))
    };
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| lacking(&error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(lacking(String::from_utf8_lossy(&output.stderr).trim()))
    }
}
