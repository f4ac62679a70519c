//! Everything at once: two hosts, a guest, a network, and whoever manages them.
//!
//! One [`World`] is one run. Until `chaos` steps have passed anything may break; then the
//! network is healed, whoever is dead is started again, and everything has to come to an end
//! within a bound. What died silently before stays so: the hosts have to notice.

use crate::checks::{self, Violation};
use crate::coverage::{Coverage, Happening, State, Transition};
use crate::destination::DestinationHost;
use crate::guest::Guest;
use crate::mutant::Mutant;
use crate::network::{Network, Side};
use crate::plan::Plan;
use crate::random::Random;
use crate::source::SourceHost;
use crate::trouble::Kill;
use crate::{Setup, Tracing};
use afterimage_protocol::layout::PageNumber;
use std::time::Duration;

/// How long a step takes.
const STEP: Duration = Duration::from_millis(10);
/// In how many steps everything must have ended once the network is healed.
const BOUND: u64 = 60_000;
/// How long nothing goes wrong at most, where the guest is to run first.
const BEGINNING: u64 = 3000;
/// After a kill something may still be taken back or fenced for so long.
const AFTERMATH: u64 = 100;

pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) mutant: Option<Mutant>,
    kill: Option<Kill>,
    pub(crate) random: Random,
    pub(crate) network: Network,
    pub(crate) source: SourceHost,
    pub(crate) destination: DestinationHost,
    pub(crate) guest: Guest,
    pub(crate) now: Duration,
    pub(crate) steps: u64,
    pub(crate) is_healed: bool,
    /// Nothing goes wrong yet.
    pub(crate) is_spared: bool,
    /// By side: a signal has stopped the process, an operator has paused it, nothing fits on
    /// its disk.
    pub(crate) stopped_until: [u64; 2],
    pub(crate) paused_until: [u64; 2],
    pub(crate) disk_full_until: [u64; 2],
    pub(crate) violation: Option<Violation>,
    pub(crate) coverage: Coverage,
    tracing: Tracing,
    pub(crate) trace: Vec<String>,
}

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let mut random = Random::new(setup.seed);
        let drawn = Plan::draw(&mut random);
        let plan = match setup.kill {
            Some(kill) => drawn.calm(kill.step + AFTERMATH),
            None if setup.is_calm => drawn.calm(0),
            None => drawn,
        };
        let source = SourceHost::new(&plan, &mut random);
        let guest = Guest::new(&source.memory);
        let mut world = Self {
            destination: DestinationHost::new(&plan, setup.mutant, 1),
            source,
            guest,
            plan,
            mutant: setup.mutant,
            kill: setup.kill,
            random,
            network: Network::new(plan.latency),
            now: Duration::ZERO,
            steps: 0,
            is_healed: false,
            is_spared: false,
            stopped_until: [0; 2],
            paused_until: [0; 2],
            disk_full_until: [0; 2],
            violation: None,
            coverage: Coverage::default(),
            tracing: setup.tracing,
            trace: Vec::new(),
        };
        world.note(|| format!("{plan:?}"));
        world.hold_if_wanted();
        world
    }

    pub(crate) fn breaks(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.tracing == Tracing::On {
            self.trace.push(format!("{:>6} {}", self.steps, text()));
        }
    }

    /// Something came about that is worth seeing.
    pub(crate) fn situation(&mut self, situation: &'static str) {
        self.note(|| format!("({situation})"));
        self.coverage.note_situation(situation);
    }

    /// A machine went from one state to the one it is in.
    pub(crate) fn cover(&mut self, side: Side, from: State, happening: Happening) {
        let to = match side {
            Side::Source => self.source_state(),
            Side::Destination => self.destination_state(),
        };
        let kind = self.plan.kind as u8;
        self.coverage.note(Transition { side, kind, from, happening, to });
    }

    pub(crate) fn violated(&mut self, rule: &'static str, what: impl Into<String>) {
        if self.violation.is_none() {
            let violation = Violation { rule, what: what.into(), step: self.steps };
            self.note(|| format!("VIOLATION {violation}"));
            self.violation = Some(violation);
        }
    }

    pub(crate) fn all_pages(&self) -> impl Iterator<Item = PageNumber> + use<> {
        (0..self.plan.pages).map(PageNumber)
    }

    /// Whether a side's process does nothing now: dead, stopped, or at its disk.
    pub(crate) fn is_idle(&self, side: Side) -> bool {
        let is_away = match side {
            Side::Source => !self.source.is_alive || self.source.pending.is_some(),
            Side::Destination => !self.destination.is_alive || self.destination.pending.is_some(),
        };
        is_away || self.steps < self.stopped_until[side as usize]
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(&mut self) {
        self.run_well();
        let chaos = self.steps + self.plan.chaos;
        while self.steps < chaos && self.violation.is_none() {
            self.step();
        }
        self.heal();
        let end = self.steps + BOUND;
        while self.violation.is_none() && !self.is_done() {
            if self.steps >= end {
                let state = self.where_it_stands();
                return self.violated("i4_progress", format!("nothing ends: {state}"));
            }
            self.step();
        }
        if self.violation.is_none() {
            checks::at_the_end(self);
        }
    }

    /// Until the guest runs at the destination, if it is to begin so.
    fn run_well(&mut self) {
        self.is_spared = true;
        let may_go_on = |world: &Self| world.steps < BEGINNING && world.violation.is_none();
        while self.plan.begins_well && !self.destination.runs && may_go_on(self) {
            self.step();
        }
        self.is_spared = false;
    }

    fn step(&mut self) {
        self.steps += 1;
        self.now += STEP;
        self.network.advance_to(self.steps);
        self.tick();
        match self.random.below(100) {
            0..27 => self.deliver(Side::Destination),
            27..44 => self.deliver(Side::Source),
            44..53 if self.random.chance(self.plan.sends_per_mille) => self.send_background(),
            53..61 if self.random.chance(self.plan.receives_per_mille) => self.advance_piece(),
            44..61 => {}
            61..66 => self.acknowledge(),
            66..75 => self.guest_step(),
            75..83 => self.answer_fault(),
            83..86 => self.resolve_persist(Side::Source),
            86..89 => self.resolve_persist(Side::Destination),
            89..97 => self.manage(),
            97 => self.watch(),
            _ => self.release(),
        }
        if !self.is_healed && !self.is_spared {
            self.break_something();
        }
        if let Some(kill) = self.kill.filter(|kill| kill.step == self.steps) {
            self.note(|| format!("killed: {kill}"));
            self.kill(kill.party);
        }
        self.spread_wakes();
        checks::each_step(self);
    }

    fn heal(&mut self) {
        self.is_healed = true;
        self.note(|| "the network is healed".to_owned());
        self.network.heal();
        self.stopped_until = [0; 2];
        self.paused_until = [0; 2];
        self.disk_full_until = [0; 2];
    }

    fn is_done(&self) -> bool {
        // A snapshot's source keeps no record of having served it.
        let is_served = self.destination.session.is_over() && !self.is_migration();
        self.source.pending.is_none()
            && self.destination.pending.is_none()
            && self.source.is_alive
            && self.destination.is_alive
            && (self.source.session.is_over() || is_served)
            && self.destination.session.is_over()
            && !self.guest.somebody_waits()
    }

    fn where_it_stands(&self) -> String {
        let complete = self.destination.memory.planes.complete_count();
        format!(
            "source {} {:?}, destination {} {:?}, {complete} of {} pages complete, guest {:?}, \
             faults {:?}",
            self.source.session.link_name(),
            self.source.session.record().ownership,
            self.destination.session.link_name(),
            self.destination.session.record().ownership,
            self.plan.pages,
            self.guest.vcpus,
            self.destination.faults,
        )
    }
}
