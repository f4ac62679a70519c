//! What is drawn once for a run: how large the guest is, how fast everything goes, and what
//! may go wrong.

use crate::network::Side;
use crate::random::Random;
use afterimage_protocol::layout::{Backing, GuestAddress, GuestLayout, PageSize, Region};
use afterimage_protocol::session::AfterRefusal;
use afterimage_protocol::wire::{Capabilities, SessionKind};

/// What is drawn once for a run.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent draws")]
pub(crate) struct Plan {
    pub(crate) kind: SessionKind,
    pub(crate) pages: u64,
    pub(crate) first_alias: u64,
    pub(crate) streams: u16,
    /// By side: whether it can do precopy.
    pub(crate) can_precopy: [bool; 2],
    /// How many precopy passes are wanted before the switchover.
    pub(crate) passes: u64,
    /// How soon the switchover comes before that, in 1000 of the soonest.
    pub(crate) hurry_per_mille: u64,
    /// Whoever drives the migration holds the guest back for a while.
    pub(crate) holds: bool,
    /// Otherwise the source does.
    pub(crate) destination_connects: bool,
    pub(crate) releases: bool,
    pub(crate) wants_guest_back: bool,
    /// The destination cannot run the guest, and finds out at some moment.
    pub(crate) refuses: bool,
    pub(crate) may_lose_memory: bool,
    pub(crate) disks_fail: bool,
    /// How fast background streams are, in 1000 of the most.
    pub(crate) sends_per_mille: u64,
    pub(crate) receives_per_mille: u64,
    pub(crate) discards_per_mille: u64,
    /// How quickly disks answer and a VMM restores, in 1000 of the quickest.
    pub(crate) records_per_mille: u64,
    pub(crate) restores_per_mille: u64,
    /// How often a vCPU touches a page, of 1000 chances.
    pub(crate) touches_per_mille: u64,
    /// The guest touches every page, or one in so many.
    pub(crate) touches_one_in: u64,
    /// The guest touches nothing any more once the network is healed: background alone has
    /// to bring what is missing.
    pub(crate) guest_rests: bool,
    /// The guest is wanted back only once it was given.
    pub(crate) waits_until_given: bool,
    /// An operator fences a destination that is dead this moment.
    pub(crate) is_fenced: bool,
    /// Nothing goes wrong until the guest runs at the destination.
    pub(crate) begins_well: bool,
    /// Only data channels break, and whoever is connected stays so: nothing is mended by a
    /// reconnection.
    pub(crate) spares_control: bool,
    /// How rough the network is, of 1000 steps.
    pub(crate) breaks_per_mille: u64,
    pub(crate) crashes_per_mille: u64,
    /// How many steps a frame takes, to the source and to the destination.
    pub(crate) latency: [u64; 2],
    /// A middlebox may swallow what goes over a data channel, and answer for the peer: no
    /// kernel notices, both hosts watch their channels themselves.
    pub(crate) channels_get_stuck: bool,
    /// How soon a data connection that ended is made again, in 1000 of the soonest.
    pub(crate) redials_per_mille: u64,
    pub(crate) chaos: u64,
}

impl Plan {
    pub(crate) fn draw(random: &mut Random) -> Self {
        let first_alias = 8 + random.below(24);
        let kind = if random.chance(250) { SessionKind::Snapshot } else { SessionKind::Migration };
        let is_migration = kind == SessionKind::Migration;
        let most_crashes = if random.chance(250) { 30 } else { 10 };
        let releases = is_migration && random.chance(300);
        let spares_control = random.chance(250);
        let most_breaks = if random.chance(500) { 30 } else { 8 };
        let is_slow = random.chance(300);
        let mut latency = || if is_slow { random.below(40) } else { 0 };
        let latency = [latency(), latency()];
        let can_precopy = [random.chance(800), random.chance(800)];
        let does_precopy = is_migration && can_precopy == [true; 2];
        // All of memory comes more than once then.
        let slowest = if does_precopy { 250 } else { 50 };
        let passes = if does_precopy { random.below(4) } else { 0 };
        let plan = Self {
            kind,
            first_alias,
            pages: first_alias + 8 + random.below(24),
            streams: 1 + random.below(3) as u16,
            can_precopy,
            passes,
            hurry_per_mille: if random.chance(300) { 100 } else { 8 },
            holds: is_migration && random.chance(250),
            destination_connects: random.chance(600),
            releases,
            wants_guest_back: is_migration && random.chance(300),
            refuses: false,
            may_lose_memory: random.chance(400),
            disks_fail: random.chance(400),
            sends_per_mille: slowest / 2 + random.below(1000 - slowest / 2),
            receives_per_mille: slowest + random.below(1000 - slowest),
            discards_per_mille: random.below(500),
            records_per_mille: 50 + random.below(950),
            restores_per_mille: 20 + random.below(980),
            touches_per_mille: 20 + random.below(980),
            touches_one_in: 1 << random.below(4),
            guest_rests: random.chance(500),
            waits_until_given: random.chance(700),
            is_fenced: is_migration && random.chance(300),
            begins_well: random.chance(if passes > 0 { 250 } else { 500 }),
            spares_control,
            breaks_per_mille: random.below(most_breaks),
            crashes_per_mille: if spares_control { 0 } else { random.below(most_crashes) },
            latency,
            channels_get_stuck: random.chance(600),
            redials_per_mille: if random.chance(300) { 150 } else { 1000 },
            chaos: 200 + random.below(1800) + passes * 1000,
        };
        // Not drawn by itself: the seeds that catch the rarest broken rules stay what they are.
        Self { refuses: is_migration && plan.chaos.is_multiple_of(8), ..plan }
    }

    /// What becomes of a guest that was refused.
    pub(crate) const fn after_refusal(&self) -> AfterRefusal {
        match self.chaos % 16 {
            8 => AfterRefusal::OfferAgain,
            _ => AfterRefusal::TakeBack,
        }
    }

    /// What a side can do.
    pub(crate) fn capabilities(&self, side: Side) -> Capabilities {
        if self.can_precopy[side as usize] {
            Capabilities::CHECKSUMS.with(Capabilities::PRECOPY)
        } else {
            Capabilities::CHECKSUMS
        }
    }

    /// The same, but nothing goes wrong by itself, for `chaos` steps.
    pub(crate) fn calm(self, chaos: u64) -> Self {
        Self {
            disks_fail: false,
            begins_well: false,
            breaks_per_mille: 0,
            crashes_per_mille: 0,
            channels_get_stuck: false,
            sends_per_mille: 1000,
            receives_per_mille: 1000,
            records_per_mille: 700,
            restores_per_mille: 1000,
            latency: [0; 2],
            chaos,
            ..self
        }
    }
}

/// The guest's memory: a region that is copied and one that is written through an alias.
pub(crate) fn layout(plan: &Plan) -> GuestLayout {
    let first = plan.first_alias * 4096;
    let copied = Region::new(GuestAddress(0), first, PageSize::KIB_4, Backing::Anonymous);
    let rest = (plan.pages - plan.first_alias) * 4096;
    let aliased = Region::new(GuestAddress(1 << 32), rest, PageSize::KIB_4, Backing::Shared);
    GuestLayout::new(vec![copied, aliased]).expect("two regions that do not touch")
}
