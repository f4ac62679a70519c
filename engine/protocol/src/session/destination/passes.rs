//! Precopy: early copies, which count once the source has said that memory is final.

use super::{DestinationAction, DestinationEvent, DestinationSession};
use crate::wire::{Capabilities, ControlFrame, Hello, Refusal, RefuseCode, SessionKind};

impl DestinationSession {
    /// Whether what has arrived is for good. Until then pages may be early copies, and nobody
    /// is shown one.
    #[must_use]
    pub const fn is_settled(&self) -> bool {
        self.settled
    }

    /// What this side can do.
    #[must_use]
    pub const fn capabilities(&self) -> Capabilities {
        self.config.capabilities
    }

    /// Whether early copies may come on this connection.
    #[must_use]
    pub const fn can_precopy(&self) -> bool {
        matches!(self.kind, Some(SessionKind::Migration)) && self.common.has(Capabilities::PRECOPY)
    }

    pub(super) fn note_capabilities(&mut self, peer: &Hello) {
        self.common = self.config.capabilities.common(peer.capabilities);
    }

    /// A source that does no precopy does not know of early copies either: what an earlier one
    /// has sent so is forgotten.
    pub(super) fn settle_without_passes(&mut self) {
        if self.settled || self.can_precopy() {
            return;
        }
        self.settled = true;
        self.actions.push_back(DestinationAction::ForgetEarly);
    }

    pub(super) fn pass(&mut self, number: u16, last: bool) {
        self.actions.push_back(DestinationAction::Pass { number, last });
        self.send(ControlFrame::PassTaken { number, last });
        if last {
            self.settled = true;
            self.actions.push_back(DestinationAction::Event(DestinationEvent::Stopped));
        }
    }

    pub(super) fn check_stale(&self, range: crate::layout::PageRange) -> Result<(), Refusal> {
        if self.config.layout.contains(range) {
            return Ok(());
        }
        Err(Refusal::new(
            RefuseCode::Protocol,
            format!("pages {range} do not exist, there are {}", self.config.layout.page_count()),
        ))
    }
}
