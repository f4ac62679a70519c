//! What a session does when its link is lost.

use afterimage_protocol::wire::{Refusal, RefuseCode};

/// What a session does when its link is lost. Before the first connection it tries, or
/// listens, in either case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reconnect {
    /// The side that connects does so again, without end, with pauses that grow to 250 ms, or to
    /// a second where its peer is there and refuses; the side that listens goes on listening.
    #[default]
    Automatic,
    /// It pauses, as if `pause` had been called, until `recover` is.
    ByHand,
}

/// When a session makes or takes its first connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FirstConnection {
    /// As soon as it can.
    #[default]
    AtOnce,
    /// Not before `recover` is called; until then the session is paused.
    OnRecover,
}

/// What a paused side says to whoever connects. The code makes it try again.
pub(crate) fn is_paused_here() -> Refusal {
    Refusal::new(RefuseCode::Failed, "the session is paused on this side: try later")
}
