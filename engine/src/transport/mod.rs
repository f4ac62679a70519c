//! Connections: addresses, listening and connecting, greetings, and bytes into memory that
//! the caller owns.
//!
//! All channels of a session use one address, and either side may listen. A connection is
//! handed on only once it has been greeted, so that whoever gets it knows what it is for;
//! strangers, silent peers and crowds end here, in bounded time and memory.

mod address;
mod attempt;
mod connection;
mod dialer;
mod greet;
mod listener;
mod reader;
mod stream;

pub use address::{Address, AddressError, Plaintext};
pub(crate) use connection::{ControlConnection, ControlError, Received};
pub(crate) use dialer::{Dialed, Dialer};
pub(crate) use greet::{ConnectError, answer_with, refuse};
pub use listener::Listener;
pub(crate) use listener::{Accepted, Acceptor};
pub(crate) use reader::Reader;
pub(crate) use stream::Stream;
