//! Everything at once: two hosts, a guest, a network, and whoever manages them.
//!
//! One [`World`] is one run from one seed. Until `chaos` steps have passed anything may
//! break; then the network is healed, whoever is dead is started again, and everything has
//! to come to an end within a bound.

use crate::checks::{self, Violation};
use crate::coverage::Coverage;
use crate::destination::DestinationHost;
use crate::guest::Guest;
use crate::mutant::Mutant;
use crate::network::{Network, Side};
use crate::random::Random;
use crate::source::SourceHost;
use afterimage_protocol::layout::{
    Backing, GuestAddress, GuestLayout, PageNumber, PageSize, Region,
};
use afterimage_protocol::wire::SessionKind;
use std::time::Duration;

/// How long a step takes.
const STEP: Duration = Duration::from_millis(10);
/// In how many steps everything must have ended once the network is healed.
const BOUND: u64 = 60_000;

/// What is drawn once for a run.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent draws")]
pub(crate) struct Plan {
    pub(crate) kind: SessionKind,
    pub(crate) pages: u64,
    pub(crate) first_alias: u64,
    pub(crate) streams: u16,
    /// Otherwise the source does.
    pub(crate) destination_connects: bool,
    pub(crate) releases: bool,
    pub(crate) wants_guest_back: bool,
    pub(crate) may_lose_memory: bool,
    pub(crate) disks_fail: bool,
    /// How fast background streams are, in 1000 of the most.
    pub(crate) sends_per_mille: u64,
    pub(crate) receives_per_mille: u64,
    pub(crate) discards_per_mille: u64,
    /// How quickly disks answer and a VMM restores, in 1000 of the quickest.
    pub(crate) records_per_mille: u64,
    pub(crate) restores_per_mille: u64,
    /// The guest is wanted back only once it was given.
    pub(crate) waits_until_given: bool,
    /// How rough the network is, of 1000 steps.
    pub(crate) breaks_per_mille: u64,
    pub(crate) crashes_per_mille: u64,
    pub(crate) chaos: u64,
}

impl Plan {
    fn draw(random: &mut Random) -> Self {
        let first_alias = 8 + random.below(24);
        let kind = if random.chance(250) { SessionKind::Snapshot } else { SessionKind::Migration };
        let is_migration = kind == SessionKind::Migration;
        let most_crashes = if random.chance(250) { 30 } else { 10 };
        let releases = is_migration && random.chance(300);
        Self {
            kind,
            first_alias,
            pages: first_alias + 8 + random.below(24),
            streams: 1 + random.below(3) as u16,
            destination_connects: random.chance(600),
            releases,
            wants_guest_back: is_migration && random.chance(300),
            may_lose_memory: random.chance(400),
            disks_fail: random.chance(400),
            sends_per_mille: 20 + random.below(980),
            receives_per_mille: 50 + random.below(950),
            discards_per_mille: random.below(500),
            records_per_mille: 50 + random.below(950),
            restores_per_mille: 20 + random.below(980),
            waits_until_given: random.chance(700),
            breaks_per_mille: random.below(30),
            crashes_per_mille: random.below(most_crashes),
            chaos: 200 + random.below(1800),
        }
    }
}

pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) mutant: Option<Mutant>,
    pub(crate) random: Random,
    pub(crate) network: Network,
    pub(crate) source: SourceHost,
    pub(crate) destination: DestinationHost,
    pub(crate) guest: Guest,
    pub(crate) now: Duration,
    pub(crate) steps: u64,
    pub(crate) is_healed: bool,
    pub(crate) violation: Option<Violation>,
    pub(crate) coverage: Coverage,
    pub(crate) traces: bool,
    pub(crate) trace: Vec<String>,
}

pub(crate) fn layout(plan: &Plan) -> GuestLayout {
    let first = plan.first_alias * 4096;
    let copied = Region::new(GuestAddress(0), first, PageSize::KIB_4, Backing::Anonymous);
    let rest = (plan.pages - plan.first_alias) * 4096;
    let aliased = Region::new(GuestAddress(1 << 32), rest, PageSize::KIB_4, Backing::Shared);
    GuestLayout::new(vec![copied, aliased]).expect("two regions that do not touch")
}

impl World {
    pub(crate) fn new(seed: u64, mutant: Option<Mutant>, traces: bool) -> Self {
        let mut random = Random::new(seed);
        let plan = Plan::draw(&mut random);
        let source = SourceHost::new(&plan, &mut random);
        let guest = Guest::new(&source.memory);
        let mut world = Self {
            destination: DestinationHost::new(&plan, mutant, 1),
            source,
            guest,
            plan,
            mutant,
            random,
            network: Network::default(),
            now: Duration::ZERO,
            steps: 0,
            is_healed: false,
            violation: None,
            coverage: Coverage::default(),
            traces,
            trace: Vec::new(),
        };
        let plan = world.plan;
        world.note(|| format!("{plan:?}"));
        world
    }

    pub(crate) fn breaks(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.traces {
            self.trace.push(format!("{:>6} {}", self.steps, text()));
        }
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

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(&mut self) {
        while self.steps < self.plan.chaos && self.violation.is_none() {
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

    fn step(&mut self) {
        self.steps += 1;
        self.now += STEP;
        self.tick();
        match self.random.below(100) {
            0..27 => self.deliver(Side::Destination),
            27..44 => self.deliver(Side::Source),
            44..53 if self.random.chance(self.plan.sends_per_mille) => self.send_background(),
            53..61 if self.random.chance(self.plan.receives_per_mille) => self.advance_piece(),
            44..61 => {}
            61..66 => self.acknowledge(),
            66..76 => self.guest_step(),
            76..83 => self.answer_fault(),
            83..86 => self.resolve_persist(Side::Source),
            86..89 => self.resolve_persist(Side::Destination),
            89..98 => self.manage(),
            _ => self.release(),
        }
        self.spread_wakes();
        if !self.is_healed {
            self.break_something();
        }
        checks::each_step(self);
    }

    fn heal(&mut self) {
        self.is_healed = true;
        self.note(|| "the network is healed".to_owned());
        self.network.heal();
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
