//! What a destination session is given, and what it asks of its driver.

use super::super::DestinationRecord;
use crate::bitmap::Segment;
use crate::layout::{GuestLayout, PageRange};
use crate::wire::{Capabilities, Channel, ControlFrame, Generation, Refusal, SessionId, Stamp};
use std::time::Duration;

/// What a destination brings to a session.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// The guest's memory here.
    pub layout: GuestLayout,
    /// What this side can do.
    pub capabilities: Capabilities,
    /// How long the source may say nothing before its offer says otherwise.
    pub silence: Duration,
}

/// What a driver has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationAction {
    /// Make the record durable, then call [`persisted`](super::DestinationSession::persisted).
    Persist(DestinationRecord),
    /// Send a frame on the control connection.
    Send(ControlFrame),
    /// Send which pages are here as `Received` frames, the last marked so: those that are
    /// complete, and the early copies that are not out of date.
    SendReceived,
    /// Open the other channels, or accept them.
    OpenData {
        /// The epoch; each slot begins with generation 1.
        stamp: Stamp,
        /// How many background streams.
        streams: u16,
        /// How many request channels.
        shards: u16,
    },
    /// Forget the device state that has come so far: it is sent again from the start.
    ResetState,
    /// A piece of a section of device state.
    Section {
        /// The section's name.
        name: String,
        /// Its version.
        version: u32,
        /// Whether it ends here.
        last: bool,
        /// The piece.
        bytes: Vec<u8>,
    },
    /// Early copies of these pages are out of date. What is complete stays. No early copy is
    /// taken from here to the next [`Pass`](Self::Pass): it may be older than this.
    Stale {
        /// What the segment covers.
        range: PageRange,
        /// The pages.
        segment: Segment,
    },
    /// Acknowledge what waits for it first. A pass begins: early copies of others are dropped. At
    /// the end of the last, let every early copy that is not out of date be complete, and take
    /// no more of them.
    Pass {
        /// Its number.
        number: u16,
        /// Whether it is the end of the last.
        last: bool,
    },
    /// Forget all early copies, and take none.
    ForgetEarly,
    /// The peer has given this connection up: close it, if it is the newest of its channel.
    /// Whoever makes connections makes the next.
    Renew {
        /// Which channel.
        channel: Channel,
        /// The connection's.
        generation: Generation,
    },
    /// Tell the VMM.
    Event(DestinationEvent),
    /// Close every connection of the session. With a refusal, send that first.
    HangUp(Option<Refusal>),
}

/// What a VMM is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationEvent {
    /// A source is connected.
    Attached(SessionId),
    /// The connection is gone; what has arrived stays, and faults wait.
    Disconnected,
    /// The guest's vCPUs have been stopped at the source; device state follows. Not told
    /// where one side cannot do precopy.
    Stopped,
    /// All device state is there.
    StateComplete,
    /// The guest may run from now on.
    Run,
    /// The guest must never run here, which is on record: the source takes it back, or this side
    /// has [refused](super::DestinationSession::refuse) it.
    Refused,
    /// The guest must never run here again: an operator declared this side dead.
    Fenced,
    /// The source has ended the session before everything had arrived.
    Ended(Refusal),
    /// The source's memory is another than this side's, or whoever answered has turned this
    /// side away. It keeps its faults and may connect again; an operator looks whether the
    /// address is right and the source is alive.
    TurnedAway(Refusal),
    /// Every page has arrived and the source knows it.
    Finished,
    /// A record could not be made durable; what needed it did not happen.
    PersistFailed,
}
