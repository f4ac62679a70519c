//! The invariants, each by its name, looked at after every step.

use crate::network::Side;
use crate::world::World;
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{
    DestinationOwnership, MAX_IN_FLIGHT_RUNS, SourceOwnership, SourcePages, SourceRecord,
};
use afterimage_protocol::wire::{Channel, SessionKind};
use std::fmt;

/// A rule that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant.
    pub rule: &'static str,
    /// What was seen.
    pub what: String,
    /// At which step.
    pub step: u64,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at step {}: {}", self.rule, self.step, self.what)
    }
}

type Check = (&'static str, fn(&World) -> Result<(), String>);

const EACH_STEP: [Check; 10] = [
    ("i1_once_and_i8_gone", i1_once_and_i8_gone),
    ("i1_early_copies", i1_early_copies),
    ("i2_kept", i2_kept),
    ("i3_one_owner", i3_one_owner),
    ("i3_given_to_whom", i3_given_to_whom),
    ("i4_nobody_forgotten", i4_nobody_forgotten),
    ("i4_given_back_is_asked_for", i4_given_back_is_asked_for),
    ("i4_in_flight_remembered", i4_in_flight_remembered),
    ("i6_rebuilt", i6_rebuilt),
    ("i7_bounded", i7_bounded),
];

pub(crate) fn each_step(world: &mut World) {
    for (rule, check) in EACH_STEP {
        if let Err(what) = check(world) {
            world.violated(rule, what);
        }
    }
}

/// What the guest can read without a fault is what it must read: the content at switchover,
/// what it wrote since, or zero where it discarded.
fn i1_once_and_i8_gone(world: &World) -> Result<(), String> {
    let host = &world.destination;
    let is_settled = !world.is_migration() || (host.is_alive && host.session.is_settled());
    if host.runs && host.is_alive && !is_settled {
        return Err("the guest runs, and its memory is not final".to_owned());
    }
    // Early copies may be mapped before that, where no guest runs.
    let is_read =
        |page: &PageNumber| is_settled || host.runs || host.memory.planes.is_complete(*page);
    for page in world.all_pages().filter(is_read) {
        let truth = world.guest.truth[page.0 as usize];
        match world.destination.memory.visible(page) {
            Some(seen) if seen != truth => {
                return Err(format!("page {page} reads {seen:#x}, it must read {truth:#x}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// What the source holds for arrived, and its guest has not written since, is at the
/// destination as it is at the source, also where it is an early copy. A destination that has
/// refused the guest for good is not told what is stale.
fn i1_early_copies(world: &World) -> Result<(), String> {
    let (source, memory) = (&world.source, &world.destination.memory);
    let is_known = source.is_alive
        && source.passes.is_told
        && source.known_memory == Some(world.destination.disk.incarnation);
    let is_refused = world.destination.disk.ownership == DestinationOwnership::Refused;
    if !is_known || source.session.is_over() || is_refused {
        return Ok(());
    }
    for &page in &memory.early.current {
        let is_due = source.book.is_acked(page) && !source.passes.written.contains(&page);
        let (lies, wanted) = (memory.lies(page), source.memory[page.0 as usize].unwrap_or(0));
        if is_due && lies != wanted {
            return Err(format!("the early copy of page {page} is {lies:#x}, not {wanted:#x}"));
        }
    }
    Ok(())
}

/// A released page has arrived, and only a migration releases; what is freed is on record, and
/// the guest ran elsewhere by then.
fn i2_kept(world: &World) -> Result<(), String> {
    let source = &world.source;
    let is_noted = |page: PageNumber| source.released[page.0 as usize];
    for page in world.all_pages() {
        if source.memory[page.0 as usize].is_none() && !is_noted(page) {
            return Err(format!("page {page} was freed, which is not noted"));
        }
        if is_noted(page) && source.disk.pages != SourcePages::Released {
            return Err(format!("page {page} is noted as freed, which is not on record"));
        }
        if is_noted(page) && world.destination.disk.ownership != DestinationOwnership::Running {
            return Err(format!("page {page} was freed before the guest ran elsewhere"));
        }
    }
    for page in world.all_pages().filter(|page| world.source.released[page.0 as usize]) {
        if !world.destination.memory.planes.is_complete(page) {
            return Err(format!("page {page} was released and has not arrived"));
        }
        if world.plan.kind == SessionKind::Snapshot {
            return Err(format!("page {page} of a snapshot was released"));
        }
    }
    Ok(())
}

fn i3_one_owner(world: &World) -> Result<(), String> {
    if world.plan.kind == SessionKind::Snapshot {
        return Ok(());
    }
    let session_may = world.source.is_alive && world.source.session.may_run();
    let source_may = session_may || world.source.vmm_runs;
    let destination_may = world.destination.runs
        || (world.destination.is_alive
            && !world.destination.session.is_over()
            && !world.source.is_fenced()
            && world.destination.session.record().ownership == DestinationOwnership::Running);
    if source_may && destination_may {
        return Err("both sides may run the guest".to_owned());
    }
    Ok(())
}

/// The guest runs in the memory that it was given to, on record.
fn i3_given_to_whom(world: &World) -> Result<(), String> {
    if !world.destination.runs || world.plan.kind == SessionKind::Snapshot {
        return Ok(());
    }
    let record = world.source.disk;
    if !matches!(record.ownership, SourceOwnership::Given | SourceOwnership::Finished) {
        return Err(format!("the guest runs at the destination, on record is {record:?}"));
    }
    if record.incarnation != world.destination.disk.incarnation {
        return Err("the guest runs in memory that it was not given to".to_owned());
    }
    if world.guest.lost_in.is_some_and(|memory| memory != world.destination.disk.incarnation) {
        return Err("a guest that ran and was lost runs again".to_owned());
    }
    if world.destination.disk.ownership != DestinationOwnership::Running {
        return Err("the destination runs the guest without a record".to_owned());
    }
    Ok(())
}

/// Whoever waits for a page is known to somebody who will answer.
fn i4_nobody_forgotten(world: &World) -> Result<(), String> {
    if !world.destination.is_alive {
        return Ok(());
    }
    let memory = &world.destination.memory;
    for page in world.guest.waited_for() {
        let is_known = world.destination.faults.contains_key(&page)
            || world.destination.unread_faults.contains(&page);
        let is_written = memory.is_alias(page)
            && memory.planes.state(page) == PageState::Claimed
            && world.destination.is_receiving(page);
        if !is_known && !is_written {
            return Err(format!("page {page} is waited for and nobody knows"));
        }
    }
    Ok(())
}

/// A page that was given back is asked for until it is complete, or somebody brings it: the
/// source may hold it for under way on a channel that lives.
fn i4_given_back_is_asked_for(world: &World) -> Result<(), String> {
    let host = &world.destination;
    if !host.is_alive {
        return Ok(());
    }
    let free = |page: &&PageNumber| host.memory.planes.state(**page) == PageState::Free;
    for page in host.memory.given_back.iter().filter(free) {
        if !host.wanted.contains_key(page) && !host.faults.contains_key(page) {
            return Err(format!("page {page} was given back and nobody asks for it"));
        }
    }
    Ok(())
}

/// A page that was handed out and is not acknowledged is in flight on a channel that lives.
fn i4_in_flight_remembered(world: &World) -> Result<(), String> {
    let source = &world.source;
    if !source.is_alive {
        return Ok(());
    }
    let unsent: u64 = source.book.unsent();
    let missing = world.all_pages().filter(|page| !source.book.is_acked(*page)).collect::<Vec<_>>();
    let remembered = missing.iter().filter(|page| source.is_in_flight(**page)).count() as u64;
    if unsent + remembered < missing.len() as u64 {
        return Err(format!(
            "{} pages are missing, {unsent} are unsent and {remembered} in flight",
            missing.len()
        ));
    }
    Ok(())
}

/// What the source holds for arrived has arrived.
fn i6_rebuilt(world: &World) -> Result<(), String> {
    if !world.source.is_alive
        || world.source.known_memory != Some(world.destination.disk.incarnation)
    {
        return Ok(());
    }
    for page in world.all_pages() {
        let memory = &world.destination.memory;
        let has_come = memory.is_here(page) || memory.early.forgotten.contains(&page);
        if world.source.book.is_acked(page) && !has_come {
            return Err(format!("page {page} is acknowledged and has not arrived"));
        }
    }
    Ok(())
}

fn i7_bounded(world: &World) -> Result<(), String> {
    for (channel, data) in &world.source.channels {
        if data.in_flight.runs() > MAX_IN_FLIGHT_RUNS + 1 {
            return Err(format!("{channel} has {} runs in flight", data.in_flight.runs()));
        }
    }
    let memory = &world.destination.memory;
    let set = memory.discarded_in_flight.len();
    if world.destination.is_alive && set > world.destination.pages_being_received() {
        return Err(format!("{set} pages are noted as discarded in flight, fewer are in flight"));
    }
    let faults = world.destination.faults.len() + world.destination.unread_faults.len();
    let events = memory.unread.len() + faults;
    if events > world.guest.vcpus.len() {
        return Err(format!("{events} events are kept for {} vCPUs", world.guest.vcpus.len()));
    }
    let wanted = world.destination.wanted.len() as u64;
    if wanted > world.plan.pages {
        return Err(format!("{wanted} pages are asked for of {}", world.plan.pages));
    }
    Ok(())
}

/// I5: a frame of another epoch or generation must have been dropped.
pub(crate) fn i5_fenced(world: &mut World, side: Side, is_stale: bool) {
    if is_stale {
        world.violated("i5_fenced", format!("the {side:?} took a frame of a passed connection"));
    }
}

/// I5: a connection of an epoch or generation that has passed is turned away.
pub(crate) fn i5_newer(world: &mut World, side: Side, is_newer: bool) {
    if !is_newer {
        world.violated("i5_fenced", format!("the {side:?} let a passed connection in"));
    }
}

/// I6: nothing that was acknowledged is sent again.
pub(crate) fn i6_not_again(world: &mut World, pages: PageRange) {
    for page in pages.iter() {
        if world.source.ever_acked.contains(&page) {
            world.violated("i6_rebuilt", format!("page {page} was acknowledged and is sent again"));
        }
    }
}

/// I6: no early copy leaves before the destination knows of its pass.
pub(crate) fn i6_early_after_its_pass(world: &mut World, pass: u16, newest: Option<u16>) {
    if newest.is_some_and(|newest| newest < pass) {
        world.violated("i6_early_after_its_pass", format!("a copy of pass {pass} is too soon"));
    }
}

/// I4: what is under way when a pass begins is of the one before, and dropped: nobody would
/// bring it.
pub(crate) fn i4_nothing_under_way(world: &mut World) {
    let mut channels = world.source.channels.iter();
    let is_background = |channel: &Channel| matches!(channel, Channel::Background(_));
    let found =
        channels.find(|(channel, data)| is_background(channel) && !data.in_flight.is_empty());
    if let Some((channel, _)) = found {
        let what = format!("a pass begins, and pages of the one before are under way on {channel}");
        world.violated("i4_nothing_under_way", what);
    }
}

/// I3: a guest that is held is not given away.
pub(crate) fn i3_held(world: &mut World, record: &SourceRecord) {
    let is_given = record.ownership == SourceOwnership::Given
        && world.source.session.record().ownership == SourceOwnership::Owner;
    if world.source.holds && is_given {
        world.violated("i3_held", "a guest is given away that is held");
    }
}

/// When everything has ended: whoever has the guest has all of it.
pub(crate) fn at_the_end(world: &mut World) {
    let ownership = world.source.session.record().ownership;
    match ownership {
        SourceOwnership::Reclaimed | SourceOwnership::Fenced => {
            if !world.source.session.may_run() || world.destination.runs {
                world.violated("i3_one_owner", format!("{ownership:?}, and nobody may run"));
            }
            if world.source.released.contains(&true) {
                world.violated("i2_kept", "the guest is back, some of its pages were freed");
            }
        }
        SourceOwnership::Given => world.violated("i4_progress", "over, and given still"),
        // A guest that has everything dies as on any machine.
        SourceOwnership::Finished
            if world.guest.lost_whole == Some(world.source.disk.incarnation) => {}
        SourceOwnership::Finished | SourceOwnership::Owner => {
            if world.plan.guest_rests {
                world.situation("background alone brought what was missing");
            }
            for page in world.all_pages() {
                check_last_read(world, page);
            }
        }
    }
}

fn check_last_read(world: &mut World, page: PageNumber) {
    if !world.destination.memory.planes.is_complete(page) {
        return world.violated("i4_progress", format!("finished without page {page}"));
    }
    world.destination.memory.answer(page);
    if let Err(what) = i1_once_and_i8_gone(world) {
        world.violated("i1_once_and_i8_gone", what);
    }
}
