//! Which transitions of the two machines a run has seen.

use crate::network::Side;
use std::collections::BTreeSet;

/// What happened to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    Frame(u16),
    Call(&'static str),
    Refused(u16),
    Recorded,
    NotRecorded,
}

/// (side, link, ownership, kind of session, what happened)
type Transition = (Side, &'static str, u8, u8, Happening);

/// A set of transitions.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    seen: BTreeSet<Transition>,
}

impl Coverage {
    pub(crate) fn note(
        &mut self,
        side: Side,
        link: &'static str,
        ownership: u8,
        kind: u8,
        happening: Happening,
    ) {
        self.seen.insert((side, link, ownership, kind, happening));
    }

    /// Adds those of another run.
    pub fn merge(&mut self, other: &Self) {
        self.seen.extend(&other.seen);
    }

    /// How many different ones.
    #[must_use]
    pub fn count(&self) -> usize {
        self.seen.len()
    }

    /// One line each, sorted.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        self.seen.iter().map(|(side, link, ownership, kind, happening)| {
            format!("{side:?} {link} ownership {ownership} kind {kind}: {happening:?}")
        })
    }
}
