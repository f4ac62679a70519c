//! Connecting, and the greetings on both ends.

use super::{Address, Plaintext, Stream};
use afterimage_protocol::wire::{GREETING_PREFIX, Greeting, Hello, Refusal, WireError};
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a peer may take for its greeting, and a connection to come about.
pub(super) const GREETING_TIME: Duration = Duration::from_secs(5);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("could not connect to {address}")]
    Io { address: Address, source: io::Error },
    #[error(
        "{address} is beyond this machine, and guest memory would travel unencrypted: allow it \
         with --insecure-plaintext (Plaintext::Anywhere) where the network can be trusted"
    )]
    Plaintext { address: Address },
    #[error("{address} is a listening socket and cannot be connected to")]
    Descriptor { address: Address },
    #[error("the peer's greeting is wrong")]
    Wire(#[from] WireError),
    #[error("the peer refuses: {0}")]
    Refused(Refusal),
}

/// Connects, says hello, and hears the peer's.
pub(crate) fn connect(
    address: &Address,
    plaintext: Plaintext,
    hello: Hello,
) -> Result<(Stream, Hello), ConnectError> {
    let wrap = |source| ConnectError::Io { address: address.clone(), source };
    let stream = dial(address, plaintext)?;
    stream.send_all(&Greeting::Hello(hello).encode()).map_err(wrap)?;
    match hear(&stream, Instant::now() + GREETING_TIME, wrap)? {
        Greeting::Hello(theirs) => Ok((stream, theirs)),
        Greeting::Refuse(refusal) => Err(ConnectError::Refused(refusal)),
    }
}

fn dial(address: &Address, plaintext: Plaintext) -> Result<Stream, ConnectError> {
    let wrap = |source| ConnectError::Io { address: address.clone(), source };
    match address {
        Address::Unix(path) => {
            let socket = UnixStream::connect(path).map_err(wrap)?;
            Stream::new(socket.into(), false).map_err(wrap)
        }
        Address::Descriptor(_) => Err(ConnectError::Descriptor { address: address.clone() }),
        Address::Tcp(host) => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
            for resolved in host.to_socket_addrs().map_err(wrap)? {
                if plaintext == Plaintext::LoopbackOnly && !resolved.ip().is_loopback() {
                    return Err(ConnectError::Plaintext { address: address.clone() });
                }
                match TcpStream::connect_timeout(&resolved, GREETING_TIME) {
                    Ok(socket) => return Stream::new(socket.into(), true).map_err(wrap),
                    Err(error) => last = error,
                }
            }
            Err(wrap(last))
        }
    }
}

fn hear(
    stream: &Stream,
    deadline: Instant,
    wrap: impl Fn(io::Error) -> ConnectError,
) -> Result<Greeting, ConnectError> {
    let mut prefix = [0; GREETING_PREFIX];
    stream.receive_until(&mut prefix, deadline).map_err(&wrap)?;
    let announced = Greeting::announced(&prefix)?;
    let mut body = vec![0; announced.length()];
    stream.receive_until(&mut body, deadline).map_err(&wrap)?;
    Ok(Greeting::decode(announced, &body)?)
}

/// Answers a hello.
pub(crate) fn answer_with(stream: &Stream, hello: Hello) -> io::Result<()> {
    stream.send_all(&Greeting::Hello(hello).encode())
}

/// Answers a hello with a refusal and ends the connection.
pub(crate) fn refuse(stream: &Stream, refusal: Refusal) {
    tracing::info!(%refusal, "a connection was refused");
    // The peer may have gone; then nobody needs the reason.
    let _ = stream.send_some(&Greeting::Refuse(refusal).encode());
    stream.shut_down();
}
