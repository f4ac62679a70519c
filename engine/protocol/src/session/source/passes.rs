//! Precopy: passes over memory that the guest still writes.
//!
//! Whatever a pass brings is an early copy, and counts only until the source says that it is
//! stale. A pass begins when the destination has taken in what is stale so far, and nothing of
//! the pass before is under way: so a copy is never overtaken by news that are older than it.
//! Its number goes with each page, because a channel that was given up may bring one late.
//! The last `Pass` says that memory is final, and is not waited for.

use super::super::NotNow;
use super::{Link, SourceAction, SourceEvent, SourceSession};
use crate::wire::{Capabilities, ControlFrame, MAX_PASS, Phase, Refusal, RefuseCode, SessionKind};

/// What the passes of a connection are at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// The destination has no early copies, and takes none.
    #[default]
    Off,
    /// A pass was said.
    Said,
    /// It was taken in: its pages may leave.
    Open,
    /// It was said that memory is final.
    Ending {
        /// The pass before was said too, and is not taken in.
        awaits_another: bool,
    },
}

impl SourceSession {
    /// Whether early copies may be sent: both sides can do it, in a migration.
    #[must_use]
    pub const fn can_precopy(&self) -> bool {
        matches!(self.config.kind, SessionKind::Migration) && self.common.has(Capabilities::PRECOPY)
    }

    /// What this side can do.
    #[must_use]
    pub const fn capabilities(&self) -> Capabilities {
        self.config.capabilities
    }

    /// Whether the destination keeps early copies that are not settled yet.
    #[must_use]
    pub const fn is_unsettled(&self) -> bool {
        !matches!(self.stage, Stage::Off)
    }

    /// All of a pass has been acknowledged and what was written since is known: the next one
    /// may begin, and [`SourceAction::TellStale`] follows, then [`SourceAction::OpenPass`].
    ///
    /// # Errors
    /// [`NotNow`] if no pass is open, or memory is final.
    pub fn next_pass(&mut self) -> Result<(), NotNow> {
        let call = "begin a pass";
        if self.frozen {
            return Err(NotNow { call, reason: "memory is final" });
        }
        if self.stage != Stage::Open {
            return Err(NotNow { call, reason: "no pass is open" });
        }
        if !self.has_passes_left() {
            return Err(NotNow { call, reason: "there were too many on this connection" });
        }
        self.say_pass();
        Ok(())
    }

    /// Between a pass that is said and the answer, acknowledgements are of copies that may be
    /// stale by now, and that belong to pages which are acknowledged or open already.
    pub(super) const fn ignores_acks(&self) -> bool {
        matches!(self.stage, Stage::Said | Stage::Ending { awaits_another: true })
    }

    /// Whether this connection has numbers for another pass, and for the last.
    #[must_use]
    pub const fn has_passes_left(&self) -> bool {
        self.pass < MAX_PASS - 1
    }

    pub(super) fn begin_passes(&mut self, phase: Phase) {
        if phase == Phase::Early {
            self.pass = 0;
            self.say_pass();
        }
    }

    /// Memory has become final.
    pub(super) fn end_passes(&mut self) {
        if self.link == Link::Up && self.is_unsettled() {
            self.say_pass();
        }
    }

    fn say_pass(&mut self) {
        self.pass += 1;
        let awaits_another = self.stage == Stage::Said;
        self.stage = if self.frozen { Stage::Ending { awaits_another } } else { Stage::Said };
        self.actions.push_back(SourceAction::TellStale);
        self.send(ControlFrame::Pass { number: self.pass, last: self.frozen });
    }

    pub(super) fn pass_taken(&mut self, number: u16, last: bool) -> Result<(), Refusal> {
        match self.stage {
            Stage::Said if number == self.pass && !last => {
                self.stage = Stage::Open;
                self.actions.push_back(SourceAction::OpenPass { number });
            }
            Stage::Ending { awaits_another: false } if number == self.pass && last => {
                self.stage = Stage::Off;
                self.actions.push_back(SourceAction::Settled);
            }
            // Of the pass that was ended by the switchover.
            Stage::Ending { awaits_another: true } if number + 1 == self.pass && !last => {
                self.stage = Stage::Ending { awaits_another: false };
            }
            _ => {
                return Err(Refusal::new(
                    RefuseCode::Protocol,
                    format!("PassTaken is out of place here: pass {number} was not said"),
                ));
            }
        }
        Ok(())
    }

    /// Keeps the guest from being given away until [`proceed`](Self::proceed), though the
    /// destination is ready: whoever drives the migration has something to do in between.
    pub const fn hold(&mut self) {
        self.holds = true;
    }

    /// Ends a [`hold`](Self::hold).
    ///
    /// # Errors
    /// [`NotNow`] if nothing is held.
    pub fn proceed(&mut self) -> Result<(), NotNow> {
        if !self.holds {
            return Err(NotNow { call: "continue", reason: "nothing is held" });
        }
        (self.holds, self.told_held) = (false, false);
        if self.link == Link::Up && self.destination_ready && !self.was_given() {
            self.ready();
        }
        Ok(())
    }

    /// Whether the guest stays although the destination is ready. Says so once.
    pub(super) fn is_held(&mut self) -> bool {
        if self.holds && !self.told_held {
            self.told_held = true;
            self.actions.push_back(SourceAction::Event(SourceEvent::Held));
        }
        self.holds
    }
}
