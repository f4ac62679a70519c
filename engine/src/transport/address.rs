//! `tcp:HOST:PORT`, `unix:PATH`, `fd:N`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a session listens or connects.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A host name or address and a port; an IPv6 address in brackets.
    Tcp(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// A listening socket that this process inherited, by its number.
    Descriptor(i32),
}

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address: write tcp:HOST:PORT, unix:PATH or fd:N")]
pub struct AddressError {
    text: String,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || AddressError { text: text.to_owned() };
        let (kind, rest) = text.split_once(':').ok_or_else(error)?;
        match kind {
            "tcp" => {
                let (host, port) = rest.rsplit_once(':').ok_or_else(error)?;
                let is_host = !host.is_empty() && (!host.contains(':') || host.ends_with(']'));
                if !is_host || port.parse::<u16>().is_err() {
                    return Err(error());
                }
                Ok(Self::Tcp(rest.to_owned()))
            }
            "unix" if !rest.is_empty() => Ok(Self::Unix(rest.into())),
            "fd" => match rest.parse() {
                Ok(number) if number >= 0 => Ok(Self::Descriptor(number)),
                _ => Err(error()),
            },
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Descriptor(number) => write!(f, "fd:{number}"),
        }
    }
}

/// How far guest memory may travel unencrypted over TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Plaintext {
    /// Within this machine only.
    #[default]
    LoopbackOnly,
    /// Anywhere: whoever can read or change the network's packets has the guest.
    Anywhere,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["tcp:127.0.0.1:4000", "tcp:[::1]:0", "tcp:host:9", "unix:/run/a b", "fd:3"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_says_what_would_be() {
        for text in [
            "",
            "tcp",
            "tcp:host",
            "tcp::1",
            "tcp:::1:5",
            "tcp:h:99999",
            "unix:",
            "fd:x",
            "fd:-1",
            "udp:a:1",
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains("tcp:HOST:PORT"), "{text}: {error}");
        }
    }
}
