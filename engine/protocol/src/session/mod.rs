//! The state machines of both sides, and the books of the source.
//!
//! A session is driven from outside: a connection came up or broke, a frame arrived, the
//! VMM calls, time has passed. It answers with actions, which the driver carries out **in
//! order**. Three rules bind the driver, and the simulator breaks each to see it matter:
//!
//! - a frame counts only if its stamp is that of its connection ([`Stamp::admits`]);
//! - [`Persist`](SourceAction::Persist) is answered by `persisted`, and with success only
//!   when the record would survive a power failure at that moment;
//! - a page is acknowledged only once it is complete in the planes.
//!
//! Ownership of the guest lies in the two records alone. A source may run the guest while
//! its record says so ([`SourceRecord::may_run`]), a destination while its record says
//! [`DestinationOwnership::Running`]; the order of the records makes these exclude each
//! other (invariant I3): a source records `Given` before it says go, a destination records
//! `Running` only after go, and `Refused` before a source takes the guest back.
//!
//! A destination also records, before it attaches, whose session its memory belongs to and
//! in which epoch; a source, before each hello, its epoch, and that it has the guest back
//! before the guest may run, even if it was never given. While a record is being written a
//! session says nothing and is not called. A driver sends heartbeats of its own meanwhile, or a
//! write that takes longer than the silence agreed on would cost the connection; and it calls
//! [`tick`](SourceSession::tick) with the time at which it last began to read, so that what lies
//! in the socket counts before the silence does.
//!
//! A source that is to free what has arrived ([`Releasing::AfterRunning`]) records
//! [`SourcePages::Released`] before the first page is freed, and only once the destination is
//! known to run the guest. From then on the guest is nowhere else: it is neither taken back nor
//! fenced, and a destination is let in only when the driver has compared what it has with what
//! was freed.
//!
//! [`Stamp::admits`]: crate::wire::Stamp::admits

mod book;
mod destination;
mod pulse;
mod source;

pub use book::{Book, InFlight, MAX_IN_FLIGHT_RUNS};
pub use destination::{DestinationAction, DestinationConfig, DestinationEvent, DestinationSession};
pub use pulse::Pulse;
pub use source::{AfterRefusal, Releasing, SourceAction, SourceConfig, SourceEvent, SourceSession};

use crate::layout::PageNumber;
use crate::wire::{Epoch, Incarnation, SessionId};

/// Who may run the guest, as a source has durably recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SourceOwnership {
    /// The guest is the source's.
    Owner = 1,
    /// The destination may run it; the source may not by itself.
    Given = 2,
    /// The destination has agreed not to run it: it is the source's again, for good.
    Reclaimed = 3,
    /// An operator has declared the destination dead: it is the source's again, for good.
    Fenced = 4,
    /// The destination has everything.
    Finished = 5,
}

/// Whether the source has all of the guest's memory, as it has durably recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SourcePages {
    /// No page was freed.
    Whole = 1,
    /// Pages that the destination had acknowledged may have been freed, after it ran the
    /// guest: they are at the destination alone.
    Released = 2,
}

/// Pages that were freed at the source and that a destination does not have, in the
/// destination's numbering: they are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LostPages {
    /// The first of them.
    pub first: PageNumber,
    /// How many there are.
    pub count: u64,
}

/// What a source records durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRecord {
    /// The session.
    pub session: SessionId,
    /// The newest epoch that may have been used.
    pub epoch: Epoch,
    /// Who may run the guest.
    pub ownership: SourceOwnership,
    /// To whom it was given.
    pub incarnation: Incarnation,
    /// Whether all pages are still here.
    pub pages: SourcePages,
}

impl SourceRecord {
    /// The record of a session that has not begun.
    #[must_use]
    pub fn new(session: SessionId) -> Self {
        Self {
            session,
            epoch: Epoch::default(),
            ownership: SourceOwnership::Owner,
            incarnation: Incarnation::default(),
            pages: SourcePages::Whole,
        }
    }

    /// Whether the source may run the guest.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        matches!(
            self.ownership,
            SourceOwnership::Owner | SourceOwnership::Reclaimed | SourceOwnership::Fenced
        )
    }
}

/// Who may run the guest, as a destination has durably recorded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DestinationOwnership {
    /// Not yet this side.
    Waiting = 1,
    /// Never this side: it has agreed that the source takes the guest back.
    Refused = 2,
    /// This side. The point of no return.
    Running = 3,
}

/// What a destination records durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DestinationRecord {
    /// The session, [`SessionId::UNKNOWN`] until it has attached to one.
    pub session: SessionId,
    /// This memory.
    pub incarnation: Incarnation,
    /// The newest epoch in which it has attached.
    pub epoch: Epoch,
    /// Who may run the guest.
    pub ownership: DestinationOwnership,
}

/// A driver could not make a record durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ownership record could not be made durable")]
pub struct PersistFailed;

/// A call that the session cannot carry out in its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {call}: {reason}")]
pub struct NotNow {
    /// What was asked for.
    pub call: &'static str,
    /// Why not.
    pub reason: &'static str,
}
