//! Connecting, and the greetings on both ends.

use super::attempt::Attempt;
use super::{Address, Plaintext, Stream};
use crate::sys::socket::Wait;
use afterimage_protocol::wire::{Channel, GREETING_PREFIX, Greeting, Hello, Refusal, WireError};
use nix::poll::PollFlags;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How long a peer may take for its greeting. Longer than a connection may take to come about:
/// a source records its epoch before it says hello, and a disk may be slow. A peer that is out
/// of reach is noticed sooner, because what is said to it is not acknowledged.
pub(super) const GREETING_TIME: Duration = Duration::from_secs(5);
/// The same for data channels, for which nothing is recorded.
const DATA_GREETING_TIME: Duration = Duration::from_secs(2);

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
pub(super) fn connect(
    address: &Address,
    plaintext: Plaintext,
    hello: Hello,
    attempt: Attempt<'_>,
) -> Result<(Stream, Hello), ConnectError> {
    let wrap = |source| ConnectError::Io { address: address.clone(), source };
    let stream = attempt.dial(address, plaintext)?;
    stream.send_all(&Greeting::Hello(hello).encode()).map_err(wrap)?;
    let time = match hello.channel {
        Channel::Control => GREETING_TIME,
        _ => DATA_GREETING_TIME,
    };
    match hear(&stream, attempt, Instant::now() + time, wrap)? {
        Greeting::Hello(theirs) => Ok((stream, theirs)),
        Greeting::Refuse(refusal) => Err(ConnectError::Refused(refusal)),
    }
}

fn hear(
    stream: &Stream,
    attempt: Attempt<'_>,
    deadline: Instant,
    wrap: impl Fn(io::Error) -> ConnectError,
) -> Result<Greeting, ConnectError> {
    let mut prefix = [0; GREETING_PREFIX];
    receive(stream, &mut prefix, attempt, deadline).map_err(&wrap)?;
    let announced = Greeting::announced(&prefix)?;
    let mut body = vec![0; announced.length()];
    receive(stream, &mut body, attempt, deadline).map_err(&wrap)?;
    Ok(Greeting::decode(announced, &body)?)
}

fn receive(
    stream: &Stream,
    into: &mut [u8],
    attempt: Attempt<'_>,
    deadline: Instant,
) -> io::Result<()> {
    let mut got = 0;
    while got < into.len() {
        attempt.wait(stream.as_fd(), PollFlags::POLLIN, deadline)?;
        match stream.receive(&mut into[got..], Wait::Never) {
            Ok(bytes) => got += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
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
