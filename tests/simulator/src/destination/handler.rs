//! The handler: the fault thread, and what happens when the handler dies and another takes
//! over from the keeper.

use super::{DestinationHost, config};
use crate::guest::{VCPUS, Vcpu};
use crate::memory::Stage;
use crate::mutant::Mutant;
use crate::network::{Body, Side};
use crate::patience::Patience;
use crate::world::World;
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::session::{DestinationOwnership, DestinationSession};
use afterimage_protocol::wire::Channel;

/// After so many steps a page is asked for again.
const RETRY: u64 = 150;

impl World {
    /// The fault thread does one thing: enters a discard that was read, reads one, reads a
    /// fault, or looks at one page that is wanted.
    pub(crate) fn answer_fault(&mut self) {
        if self.is_idle(Side::Destination) {
            return;
        }
        if let Some(page) = self.destination.memory.enter_removal() {
            return self.note(|| format!("the discard of page {page} is entered"));
        }
        if let Some((removal, is_zero)) = self.destination.memory.read_removal() {
            self.note(|| format!("the discard is read, zero {is_zero}: {removal:?}"));
            self.guest.vcpus[removal.vcpu] = Vcpu::Idle;
            if is_zero {
                self.guest.truth[removal.page.0 as usize] = 0;
            }
            return;
        }
        if let Some(page) = self.destination.unread_faults.pop_first() {
            self.destination.faults.insert(page, None);
            return;
        }
        let destination = &self.destination;
        let pages: Vec<PageNumber> =
            destination.faults.keys().chain(destination.wanted.keys()).copied().collect();
        let Some(&page) = self.random.pick(&pages) else { return };
        match self.destination.memory.planes.state(page) {
            PageState::Complete => {
                self.destination.wanted.remove(&page);
                if self.destination.faults.remove(&page).is_some() {
                    self.destination.memory.answer(page);
                }
            }
            PageState::Claimed if self.destination.memory.is_alias(page) => {
                if self.destination.faults.remove(&page).is_none() {
                    self.ask(page);
                }
            }
            PageState::Claimed | PageState::Free => self.ask(page),
        }
    }

    fn ask(&mut self, page: PageNumber) {
        let Some(data) = self.destination.channels.get(&Channel::Request(0)) else { return };
        let (id, stamp, step) = (data.connection, data.stamp, self.steps);
        let waits = self.asks();
        let host = &mut self.destination;
        let lists = [host.faults.get_mut(&page), host.wanted.get_mut(&page)];
        let mut is_asked = false;
        for asked in lists.into_iter().flatten() {
            is_asked |= asked.is_some_and(|at| step < at + RETRY);
            if !is_asked {
                *asked = Some(step);
            }
        }
        if !is_asked {
            if let Some(data) = host.channels.get_mut(&Channel::Request(0)) {
                // What was waited for before may have come in another way.
                data.waits_since = data.waits_since.filter(|_| waits).or(Some(step));
            }
            self.network.send(id, Side::Source, stamp, Body::Request(PageRange::one(page)));
        }
    }

    /// The handler dies; memory, planes and the guest that runs in it stay.
    pub(crate) fn crash_handler(&mut self) {
        self.note(|| "the handler dies".to_owned());
        if let Some(id) = self.destination.control.take() {
            self.network.close(id, Side::Destination);
        }
        for id in self.destination.slots.close() {
            self.network.close(id, Side::Destination);
        }
        for (_, data) in std::mem::take(&mut self.destination.channels) {
            self.network.close(data.connection, Side::Destination);
            if let Some(piece) = data.piece {
                let pages = piece.won.iter().flat_map(PageRange::iter);
                self.destination.memory.interrupted = pages.collect();
            }
        }
        if self.destination.memory.is_gated() {
            self.situation("a handler died with a discard read and not entered");
        }
        if !self.destination.faults.is_empty() {
            self.situation("a handler died with faults read and not answered");
        }
        self.destination.faults.clear();
        self.destination.wanted.clear();
        self.destination.is_alive = false;
        self.destination.pending = None;
    }

    /// The same, in the middle of placing a page, if one can be placed.
    pub(crate) fn crash_handler_midway(&mut self) {
        let memory = &mut self.destination.memory;
        let may_place = !memory.is_gated() && !memory.has_unread();
        let pieces = self.destination.channels.values().filter_map(|data| data.piece.as_ref());
        let found = pieces.filter(|_| may_place).find(|piece| piece.stage == Stage::Received);
        if let Some(piece) = found.cloned() {
            self.destination.memory.place_half(&piece);
            self.note(|| format!("the handler dies in the middle of placing {:?}", piece.won));
            self.situation(if self.destination.memory.is_alias(piece.pages.start) {
                "a handler died between complete and CONTINUE"
            } else {
                "a handler died between COPY and complete"
            });
        }
        self.crash_handler();
    }

    /// The VMM dies, and with it its memory and the handler that serves it.
    pub(crate) fn crash_vmm(&mut self) {
        self.note(|| "the VMM dies".to_owned());
        self.crash_handler();
        if self.destination.runs {
            self.situation("a VMM died whose guest ran");
        }
        self.destination.runs = false;
        self.destination.has_lost_memory = true;
        self.guest.vcpus = [Vcpu::Idle; VCPUS];
        self.destination.unread_faults.clear();
        self.destination.memory.unread.clear();
    }

    /// Another handler takes over memory, planes and record from the keeper.
    pub(crate) fn restart_handler(&mut self) {
        let plan = self.plan;
        let record = self.destination.disk;
        self.note(|| format!("the handler begins again with {record:?}"));
        self.destination.session = DestinationSession::new(config(&plan), record);
        let may_run = self.destination.runs || record.ownership == DestinationOwnership::Running;
        self.destination.memory.take_over(!may_run);
        self.destination.knows_it_is_complete = false;
        self.destination.patience = Patience::default();
        self.destination.is_alive = true;
        if !self.breaks(Mutant::NoWakeAtTakeover) {
            self.guest.wake_all();
            self.destination.unread_faults.clear();
        }
    }

    /// Memory is gone with the process; another begins with none.
    pub(crate) fn replace_destination(&mut self) {
        let plan = self.plan;
        let next = self.destination.disk.incarnation.0[0].wrapping_add(1);
        self.note(|| format!("the destination begins again with empty memory {next}"));
        if self.destination.disk.ownership == DestinationOwnership::Running {
            self.guest.lost_in = Some(self.destination.disk.incarnation);
        }
        if self.destination.memory.planes.complete_count() == self.plan.pages {
            self.guest.lost_whole = Some(self.destination.disk.incarnation);
        }
        self.destination = DestinationHost::new(&plan, self.mutant, next);
        self.guest.begin_again(&self.source.memory);
    }
}
