//! The part of a command line that is about the control socket and the metrics.

use std::net::{TcpListener, ToSocketAddrs};

use afterimage::{Address, Endpoint, Listener, Plaintext};
use clap::Args;

use super::server::Door;
use super::words::{Recovery, Refusal};
use crate::page_server::{Failure, check_connect, listen_privately};

/// Where to be driven from and watched.
#[derive(Clone, Debug, Default, Args)]
pub struct ControlOptions {
    /// Take commands and tell the state at this socket (unix:PATH), for afterimage-ctl and
    /// managers; only this user and root may connect. See docs/control.md
    #[arg(long, value_name = "ADDR")]
    pub control: Option<Address>,

    /// Answer GET /metrics here (tcp:HOST:PORT or unix:PATH), for Prometheus and its kin
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<Address>,

    /// Let --metrics listen beyond this machine: whoever can connect reads the counters
    #[arg(long, requires = "metrics")]
    pub insecure_metrics: bool,
}

/// Listens for scrapers; without leave on this machine only.
pub(super) fn listen_for_scrapes(
    address: &Address,
    options: &ControlOptions,
) -> Result<Door, Failure> {
    let Address::Tcp(host) = address else {
        return Ok(Door::from(listen_privately(address, "--metrics")?));
    };
    let found = host.to_socket_addrs().map_err(|error| Failure::listen(address, &error))?;
    let found: Vec<_> = found.collect();
    let beyond = found.iter().find(|it| !it.ip().is_loopback());
    if let Some(at) = beyond.filter(|_| !options.insecure_metrics) {
        return Err(Failure::usage(format!(
            "--metrics tcp:{at} is beyond this machine, and whoever can connect would read the \
             counters: allow it with --insecure-metrics, or use tcp:127.0.0.1:PORT"
        )));
    }
    let bound = TcpListener::bind(&found[..]);
    bound.map(Door::from).map_err(|error| Failure::listen(address, &error))
}

/// Where a session that was paused is to go on; `None` at the same place. May look up a name.
pub(super) fn endpoint(at: &Recovery, plaintext: Plaintext) -> Result<Option<Endpoint>, Refusal> {
    let failed = |failure: Failure| Refusal::failed(format!("recover: {failure}"));
    match (&at.connect, &at.listen) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => {
            Err(Refusal::bad_request("recover: give \"connect\" or \"listen\", not both"))
        }
        // A number says nothing about descriptors here to whoever is in another process.
        (Some(Address::Descriptor(_)), _) | (_, Some(Address::Descriptor(_))) => {
            Err(Refusal::bad_request("recover: give tcp:HOST:PORT or unix:PATH, not a descriptor"))
        }
        (Some(address), None) => {
            check_connect(address, plaintext).map_err(failed)?;
            Ok(Some(Endpoint::Connect(address.clone())))
        }
        (None, Some(address)) => {
            let listener = Listener::bind(address, plaintext)
                .map_err(|error| failed(Failure::listen(address, &error)))?;
            Ok(Some(Endpoint::Listen(listener)))
        }
    }
}
