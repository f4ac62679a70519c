//! Which states and transitions of the two machines a run has seen, and which situations.

use crate::network::Side;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What happened to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Happening {
    Frame(u16),
    Call(&'static str),
    Refused(u16),
    Recorded,
    NotRecorded,
}

/// Where a machine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct State {
    pub(crate) link: &'static str,
    pub(crate) ownership: u8,
    /// What may be done with pages.
    pub(crate) pages: &'static str,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ownership {} {}", self.link, self.ownership, self.pages)
    }
}

/// From where, by what, to where; and in which kind of session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Transition {
    pub(crate) side: Side,
    pub(crate) kind: u8,
    pub(crate) from: State,
    pub(crate) happening: Happening,
    pub(crate) to: State,
}

/// Sets of states, transitions and situations.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    seen: BTreeSet<Transition>,
    situations: BTreeMap<&'static str, u64>,
}

impl Coverage {
    pub(crate) fn note(&mut self, transition: Transition) {
        self.seen.insert(transition);
    }

    pub(crate) fn note_situation(&mut self, situation: &'static str) {
        *self.situations.entry(situation).or_default() += 1;
    }

    /// Adds those of another run.
    pub fn merge(&mut self, other: &Self) {
        self.seen.extend(&other.seen);
        for (situation, count) in &other.situations {
            *self.situations.entry(situation).or_default() += count;
        }
    }

    /// How many different transitions.
    #[must_use]
    pub fn transitions(&self) -> usize {
        self.seen.len()
    }

    /// How many different states of both machines, by side and kind of session.
    #[must_use]
    pub fn states(&self) -> usize {
        self.all_states().len()
    }

    fn all_states(&self) -> BTreeSet<(Side, u8, State)> {
        let ends = |it: &Transition| [(it.side, it.kind, it.from), (it.side, it.kind, it.to)];
        self.seen.iter().flat_map(ends).collect()
    }

    /// How often each situation came about that is worth seeing.
    #[must_use]
    pub const fn situations(&self) -> &BTreeMap<&'static str, u64> {
        &self.situations
    }

    /// One line each, sorted: states, transitions, situations.
    pub fn lines(&self) -> impl Iterator<Item = String> + '_ {
        let kind = |kind: u8| if kind == 1 { "migration" } else { "snapshot" };
        let states = self
            .all_states()
            .into_iter()
            .map(move |(side, of, state)| format!("state {side:?} {} {}", kind(of), state));
        let transitions = self.seen.iter().map(move |it| {
            let Transition { side, from, happening, to, .. } = it;
            format!("transition {side:?} {} {from}: {happening:?}: {to}", kind(it.kind))
        });
        let situations =
            self.situations.iter().map(|(name, count)| format!("situation {name}: {count}"));
        states.chain(transitions).chain(situations)
    }
}
