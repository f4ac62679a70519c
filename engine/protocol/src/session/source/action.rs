//! What a source session is given, and what it asks of its driver.

use super::super::{LostPages, SourceRecord};
use crate::bitmap::Segment;
use crate::layout::{GuestLayout, PageRange};
use crate::wire::{
    Capabilities, Channel, ControlFrame, Generation, Hello, Incarnation, Offer, Refusal,
    SessionKind, Stamp,
};
use std::time::Duration;

/// What a source brings to a session.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Migration or snapshot.
    pub kind: SessionKind,
    /// The guest's memory here.
    pub layout: GuestLayout,
    /// Background streams, 1 to 16.
    pub streams: u16,
    /// Request channels.
    pub shards: u16,
    /// How often a side with nothing to say says so.
    pub heartbeat: Duration,
    /// How long a side may say nothing.
    pub silence: Duration,
    /// What this side can do.
    pub capabilities: Capabilities,
    /// Whether pages that have arrived are freed here.
    pub releasing: Releasing,
    /// What becomes of a guest that the destination refuses.
    pub after_refusal: AfterRefusal,
}

/// Whether a source frees pages that have arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Releasing {
    /// It keeps all memory.
    #[default]
    Never,
    /// It may, once the destination of a migration is known to run the guest.
    AfterRunning,
}

/// What becomes of a guest that a destination has refused of its own accord, whether it had been
/// given to it or not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AfterRefusal {
    /// The source takes it back, and the session is over.
    #[default]
    TakeBack,
    /// It is offered to the next destination, with other memory: for a source that cannot run it.
    OfferAgain,
}

impl SourceConfig {
    /// The offer that it makes. Whoever takes a configuration from outside checks it
    /// ([`ControlFrame::check`]) before a session is made of it.
    #[must_use]
    pub fn offer(&self) -> ControlFrame {
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        ControlFrame::Offer(Offer {
            kind: self.kind,
            streams: self.streams,
            shards: self.shards,
            heartbeat_ms: millis(self.heartbeat),
            silence_ms: millis(self.silence),
            layout: self.layout.clone(),
        })
    }
}

/// What a driver has to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceAction {
    /// Make the record durable, then call [`persisted`](super::SourceSession::persisted).
    Persist(SourceRecord),
    /// Send this hello on the new control connection.
    Greet(Hello),
    /// Send a frame on the control connection.
    Send(ControlFrame),
    /// Send all sections of device state that were not sent on this connection, then
    /// `StateEnd`.
    SendState,
    /// Forget what was sent and acknowledged; what the destination has follows. Pages are
    /// numbered as in [`SourceSession::served`](super::SourceSession::served), which may
    /// have more or fewer than before.
    ResetBook,
    /// The destination has these pages.
    Received {
        /// What the segment covers.
        range: PageRange,
        /// The pages.
        segment: Segment,
    },
    /// Send which early copies are out of date, as `Stale` frames: after a new attachment all
    /// that the destination has said and this side does not vouch for, otherwise what has been
    /// written since the last pass began. Until [`OpenPass`](Self::OpenPass) or
    /// [`Settled`](Self::Settled) acknowledgements of these pages are of older copies, and do not
    /// count.
    TellStale,
    /// Early copies of pages may be sent.
    OpenPass {
        /// Counts the passes.
        number: u16,
    },
    /// The destination keeps early copies no more: those that were up to date are complete.
    /// What is under way and not acknowledged by now is lost; background pages may leave.
    Settled,
    /// These pages are complete at the destination.
    Acknowledge(Vec<PageRange>),
    /// All that the destination has is in the book: see whether it has every page that was
    /// freed here, then call [`compared`](super::SourceSession::compared).
    CompareReleased,
    /// Pages that are acknowledged may be freed, until the next
    /// [`HangUp`](Self::HangUp). Which they are must be durable before they are freed.
    Release,
    /// Accept, or open, the other channels of this epoch; serve pages in the destination's
    /// page sizes.
    OpenData {
        /// The epoch; each slot begins with generation 1.
        stamp: Stamp,
        /// The layout in which to serve.
        layout: GuestLayout,
    },
    /// Device state is not needed any more.
    DropState,
    /// The peer has given this connection up: close it, if it is the newest of its channel.
    /// Whoever makes connections makes the next.
    Renew {
        /// Which channel.
        channel: Channel,
        /// The connection's.
        generation: Generation,
    },
    /// Tell the VMM.
    Event(SourceEvent),
    /// Close every connection of the session; what was sent on the data channels and not
    /// acknowledged may be lost. With a refusal, send that first.
    HangUp(Option<Refusal>),
}

/// What a VMM is told.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// A destination is connected and has been accepted.
    Attached(Incarnation),
    /// The connection is gone; nothing is lost.
    Disconnected,
    /// Memory is final: the vCPUs are stopped.
    Stopped,
    /// The destination is ready, and the guest is [held](super::SourceSession::hold).
    Held,
    /// The destination has restored the device state.
    Ready,
    /// The guest was given away: durably recorded, go is sent.
    Given,
    /// The destination runs the guest.
    Running,
    /// The guest is the source's again, for good.
    Reclaimed,
    /// The destination will not run the guest, and was not asked to give it back;
    /// [`Reclaimed`](Self::Reclaimed) follows, or another destination may have it
    /// ([`AfterRefusal`]).
    Refused,
    /// The destination runs the guest already and keeps it.
    ReclaimDenied,
    /// The destination of a snapshot needs nothing more, although it lacks pages.
    Left,
    /// Everything has arrived; the session is over.
    Finished,
    /// A record could not be made durable; what needed it did not happen.
    PersistFailed,
    /// The destination lacks pages that were freed here, and is refused. It is told once,
    /// however often it comes back with the same.
    Lost(LostPages),
}
