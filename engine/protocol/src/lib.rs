//! What both sides of an Afterimage migration agree on, without I/O.
//!
//! Four parts, each usable alone:
//!
//! - [`layout`]: which guest memory there is and how its pages are numbered;
//! - [`bitmap`]: one bit a page, the two planes that say what has arrived, and their
//!   wire form;
//! - [`wire`]: the frames, byte for byte;
//! - [`session`]: the state machines of source and destination, who owns the guest, and
//!   the books the source keeps about what it has sent.
//!
//! Nothing here reads a clock, opens a socket or starts a thread: time and frames come
//! in as arguments, what is to be done comes out as values. The engine drives it with
//! real sockets, the simulator with a made-up network from a seed; both run the same
//! code.
#![forbid(unsafe_code)]

pub mod bitmap;
pub mod layout;
pub mod session;
pub mod wire;

mod sync;
