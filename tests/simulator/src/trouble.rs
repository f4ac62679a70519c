//! Whatever breaks the two hosts: the network, the power, the disks, an operator's hand; at
//! random, or one party at one step.

use crate::network::{Body, Connection, Side};
use crate::source::PIECE;
use crate::world::World;
use afterimage_protocol::session::{DestinationOwnership, SourceOwnership};
use afterimage_protocol::wire::{Refusal, RefuseCode};
use std::fmt;
use std::str::FromStr;

/// Who can be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    /// The source's process: a page server, or the engine in its VMM.
    Source,
    /// The destination's handler, whose memory, bits and events a keeper holds.
    Handler,
    /// The same, in the middle of placing a page, if it is at that.
    HandlerMidway,
    /// The destination's VMM: its memory dies with it.
    Vmm,
}

impl Party {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Source, Self::Handler, Self::HandlerMidway, Self::Vmm];

    const fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Handler => "handler",
            Self::HandlerMidway => "handler-midway",
            Self::Vmm => "vmm",
        }
    }
}

/// One party, killed at one step of a run in which nothing else goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kill {
    /// Who.
    pub party: Party,
    /// At the end of which step, from 1.
    pub step: u64,
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.party.name(), self.step)
    }
}

impl FromStr for Kill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (name, step) = text.split_once('@')?;
            let party = Party::ALL.into_iter().find(|party| party.name() == name)?;
            Some(Self { party, step: step.parse().ok()? })
        };
        parse().ok_or_else(|| {
            let names = Party::ALL.map(Party::name).join(", ");
            format!("{text:?} is no PARTY@STEP; parties are {names}")
        })
    }
}

impl World {
    /// Whatever can go wrong.
    pub(crate) fn break_something(&mut self) {
        if self.random.chance(self.plan.breaks_per_mille) {
            self.break_network();
        }
        if self.random.chance(self.plan.breaks_per_mille / 2) {
            let side = self.one_side();
            self.lose_patience(side);
        }
        if self.random.chance(self.plan.crashes_per_mille) {
            match self.random.below(16) {
                0..7 => self.kill(Party::Source),
                7..11 => self.kill(Party::Handler),
                11..14 => self.kill(Party::HandlerMidway),
                _ => self.kill(Party::Vmm),
            }
        }
        if self.random.chance(self.plan.crashes_per_mille / 4) {
            self.hinder();
        }
        self.break_at_an_awkward_moment();
    }

    /// Where much hangs on the next step, more goes wrong.
    fn break_at_an_awkward_moment(&mut self) {
        let begins_to_run = self.destination.pending.is_some_and(|record| {
            record.ownership == DestinationOwnership::Running
                && self.destination.disk.ownership == DestinationOwnership::Waiting
        });
        let is_given = self.source.session.record().ownership == SourceOwnership::Given;
        let memory = &self.destination.memory;
        let is_awkward = memory.is_gated()
            || !memory.discarded_in_flight.is_empty()
            || (is_given && !self.destination.runs);
        if is_awkward && self.random.chance(2 * self.plan.crashes_per_mille) {
            self.kill(Party::Handler);
        }
        if is_given && !self.destination.runs {
            self.refuse_guest(60);
        }
        // What a channel still carries that is given up may come when its pass has ended.
        let source = &self.source;
        let is_ending =
            source.passes.open.is_some() && source.book.acked_pages() + PIECE >= self.plan.pages;
        if is_ending && self.random.chance(10 * self.plan.breaks_per_mille) {
            self.lose_patience(Side::Source);
        }
        if begins_to_run
            && self.plan.wants_guest_back
            && !self.is_idle(Side::Source)
            && self.random.chance(30)
        {
            let _ = self.with_source("reclaim", |session, _| session.reclaim());
        }
    }

    fn break_network(&mut self) {
        let Some(id) = self.one_connection() else { return };
        let side = self.one_side();
        if self.plan.channels_get_stuck && self.random.chance(300) {
            if self.network.get_stuck(id, side) {
                self.situation("a data channel got stuck");
            }
            return;
        }
        match self.random.below(if self.plan.spares_control { 8 } else { 16 }) {
            0..3 => self.network.cut(id),
            3 | 4 => {
                let left = self.random.below(4) as usize;
                self.network.kill_way(id, side, left);
            }
            5 => {
                for side in [side, side.other()] {
                    self.network.kill_way(id, side, 0);
                }
            }
            8 => self.part(),
            9..12 => self.repeat_hello(),
            _ => self.slip_in(id),
        }
    }

    fn one_connection(&mut self) -> Option<usize> {
        let mut ids = self.network.ids();
        let controls = self.source.control.into_iter().chain(self.destination.control);
        if self.plan.spares_control {
            let is_data = |id: &usize| self.network.get(*id).is_some_and(Connection::is_data);
            ids.retain(is_data);
        } else if self.random.chance(300) {
            ids = controls.collect();
        }
        // The most awkward one is in the middle of a piece.
        let busy: Vec<usize> = ids.iter().copied().filter(|id| self.is_busy(*id)).collect();
        if self.random.chance(300) && !busy.is_empty() {
            ids = busy;
        }
        self.random.pick(&ids).copied()
    }

    fn one_side(&mut self) -> Side {
        if self.random.chance(500) { Side::Source } else { Side::Destination }
    }

    fn part(&mut self) {
        let steps = 20 + self.random.below(600);
        let side = self.one_side();
        self.network.part(side, steps);
        if self.random.chance(600) {
            self.network.part(side.other(), steps);
            self.situation("the hosts were parted");
        } else {
            self.situation("one host did not hear the other");
        }
    }

    fn repeat_hello(&mut self) {
        let is_quiet = self.random.chance(400);
        let random = &mut self.random;
        if self.network.repeat_hello(is_quiet, |limit| random.below(limit as u64) as usize) {
            self.note(|| "a hello of before comes once more".to_owned());
            self.situation("a connection attempt came twice");
        }
    }

    fn slip_in(&mut self, id: usize) {
        let random = &mut self.random;
        if self.network.slip_in(id, |limit| random.below(limit as u64) as usize) {
            self.note(|| format!("a frame of before is slipped into connection {id}"));
        }
    }

    /// A host is stopped for a while, by a signal or by hand, or its disk is full.
    fn hinder(&mut self) {
        let until = self.steps + 10 + self.random.below(500);
        let side = self.one_side();
        match self.random.below(3) {
            0 => self.stopped_until[side as usize] = until,
            1 => self.disk_full_until[side as usize] = until,
            _ => self.pause(side, until),
        }
    }

    /// An operator pauses a side: it hangs up, and refuses connections until it recovers.
    fn pause(&mut self, side: Side, until: u64) {
        if self.is_idle(side) {
            return;
        }
        self.note(|| format!("{side:?} is paused by hand"));
        self.situation("a side was paused by hand");
        self.paused_until[side as usize] = until;
        match side {
            Side::Source => self.with_source("pause", |session, _| session.disconnected()),
            Side::Destination => {
                self.with_destination("pause", |session, _| session.disconnected());
            }
        }
    }

    pub(crate) fn is_paused(&self, side: Side) -> bool {
        self.steps < self.paused_until[side as usize]
    }

    /// Whether a side that was paused has refused a connection.
    pub(crate) fn refuses_by_hand(&mut self, side: Side, id: usize) -> bool {
        if !self.is_paused(side) {
            return false;
        }
        let stamp = match side {
            Side::Source => self.source.session.stamp(),
            Side::Destination => self.destination.session.stamp(),
        };
        let refusal = Refusal::new(RefuseCode::Failed, "paused by hand");
        self.network.send(id, side.other(), stamp, Body::Refused(refusal));
        self.network.close(id, side);
        true
    }

    /// Kills a party, if it is alive.
    pub(crate) fn kill(&mut self, party: Party) {
        match party {
            Party::Source if self.source.is_alive => {
                self.power_off(Side::Source);
                self.crash_source();
            }
            Party::Handler if self.destination.is_alive => {
                self.power_off(Side::Destination);
                self.crash_handler();
            }
            Party::HandlerMidway if self.destination.is_alive => {
                self.power_off(Side::Destination);
                self.crash_handler_midway();
            }
            Party::Vmm if self.may_lose_memory() => {
                self.power_off(Side::Destination);
                self.crash_vmm();
            }
            _ => {}
        }
    }

    /// Whether the VMM may die: it has not, and if the source frees pages the guest is not there
    /// alone yet. Whoever loses memory that was released has lost the guest.
    fn may_lose_memory(&self) -> bool {
        let is_only_copy =
            self.plan.releases && self.destination.disk.ownership == DestinationOwnership::Running;
        self.plan.may_lose_memory && !is_only_copy && !self.destination.has_lost_memory
    }

    /// A record that was being written is on the disk, or is not. What the kernel holds of
    /// its connections is lost or is sent yet.
    fn power_off(&mut self, side: Side) {
        let is_written = self.random.chance(500);
        match side {
            Side::Source => {
                if let Some(record) = self.source.pending.take().filter(|_| is_written) {
                    self.source.disk = record;
                }
            }
            Side::Destination => {
                if let Some(record) = self.destination.pending.take().filter(|_| is_written) {
                    self.destination.disk = record;
                }
            }
        }
        if self.random.chance(300) {
            for id in self.network.of(side) {
                self.network.cut(id);
            }
        }
    }
}
