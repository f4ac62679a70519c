//! What ends the command early: one line that says what, where, and how to mend it.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::ToSocketAddrs;

use afterimage::{Address, Plaintext};

use super::memory::FileError;

/// Why the command ended early, in one line.
#[derive(Debug)]
pub struct Failure {
    line: String,
    pub(crate) exit: u8,
}

/// Something failed.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE: u8 = 2;

impl Failure {
    pub(crate) fn new(line: impl Into<String>) -> Self {
        Self { line: line.into(), exit: FAILED }
    }

    pub(crate) fn usage(line: impl Into<String>) -> Self {
        Self { line: line.into(), exit: USAGE }
    }

    /// Wraps an error: "could not `operation`: why: why".
    pub(crate) fn of<E: Error>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::new(format!("could not {operation}: {}", chain(&error)))
    }

    /// An address that cannot be listened on.
    pub(crate) fn listen(address: &Address, error: &io::Error) -> Self {
        let remedy = match (error.kind(), address) {
            (io::ErrorKind::AddrInUse, _) => {
                "; another process listens there: stop it, or choose another address"
            }
            (io::ErrorKind::PermissionDenied, Address::Tcp(_)) if error.get_ref().is_none() => {
                "; ports below 1024 need a privilege: choose a higher one"
            }
            (io::ErrorKind::PermissionDenied, Address::Unix(_)) => {
                "; choose a directory that this user may write"
            }
            (io::ErrorKind::NotFound, Address::Unix(_)) => "; make its directory first",
            (io::ErrorKind::AddrNotAvailable, _) => "; use an address that this machine has",
            (_, Address::Descriptor(_)) => {
                "; pass a listening socket in, as systemd does from descriptor 3 on"
            }
            _ => "",
        };
        Self::new(format!("could not listen on {address}: {error}{remedy}"))
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Self::new(chain(&error))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line, whatever the causes hold.
        f.write_str(&self.line.replace('\n', " "))
    }
}

impl Error for Failure {}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}

/// Refuses at once what no later attempt could mend. A name that cannot be resolved now may
/// be resolved later.
pub(crate) fn check_connect(address: &Address, plaintext: Plaintext) -> Result<(), Failure> {
    match address {
        Address::Descriptor(_) => Err(Failure::usage(format!(
            "--connect {address}: a descriptor cannot be connected to; it is for --listen"
        ))),
        Address::Tcp(host) if plaintext == Plaintext::LoopbackOnly => {
            let found = host.to_socket_addrs().into_iter().flatten();
            let mut beyond = found.filter(|it| !it.ip().is_loopback());
            beyond.next().map_or(Ok(()), |at| {
                Err(Failure::new(format!(
                    "tcp:{at} is beyond this machine, and guest memory would travel unencrypted: \
                     allow it with --insecure-plaintext where the network can be trusted"
                )))
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_never_be_connected_to_is_refused_at_once() {
        let check = |text: &str, plaintext| check_connect(&text.parse().unwrap(), plaintext);
        check("tcp:127.0.0.1:1", Plaintext::LoopbackOnly).unwrap();
        check("unix:/nowhere", Plaintext::LoopbackOnly).unwrap();
        check("tcp:192.0.2.1:1", Plaintext::Anywhere).unwrap();
        let error = check("tcp:192.0.2.1:1", Plaintext::LoopbackOnly).unwrap_err();
        assert!(error.to_string().contains("--insecure-plaintext"), "{error}");
        assert_eq!(check("fd:3", Plaintext::Anywhere).unwrap_err().exit, USAGE);
    }
}
