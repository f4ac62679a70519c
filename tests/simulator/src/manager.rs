//! Whoever runs the two hosts: connects them, switches over, takes back, fences, restarts.
//! And whatever breaks them: the network, the power, the disks.

use crate::network::{Read, Side};
use crate::world::World;
use afterimage_protocol::session::{
    DestinationOwnership, DestinationSession, SourceOwnership, SourceSession,
};

impl World {
    /// Reads one frame, or the end, of one of a side's connections.
    pub(crate) fn deliver(&mut self, side: Side) {
        let is_idle = match side {
            Side::Source => !self.source.is_alive || self.source.pending.is_some(),
            Side::Destination => !self.destination.is_alive || self.destination.pending.is_some(),
        };
        let held = self.network.of(side);
        let Some(&id) = self.random.pick(&held) else { return };
        if is_idle || (side == Side::Destination && self.is_busy(id)) {
            return;
        }
        let Some(channel) = self.network.get(id).map(|connection| connection.channel) else {
            return;
        };
        match (self.network.read(id, side), side) {
            (Read::Nothing, _) => {}
            (Read::End, Side::Source) => self.source_reads_end(id, channel),
            (Read::End, Side::Destination) => self.destination_reads_end(id, channel),
            (Read::Packet(packet), Side::Source) => {
                self.note(|| format!("→ source, {channel}: {packet:?}"));
                self.source_receives(id, channel, packet);
            }
            (Read::Packet(packet), Side::Destination) => {
                self.note(|| format!("→ destination, {channel}: {packet:?}"));
                self.destination_receives(id, channel, packet);
            }
        }
    }

    /// Time passes for both sessions.
    pub(crate) fn tick(&mut self) {
        let is_due = |next: Option<std::time::Duration>, now| next.is_some_and(|next| next <= now);
        if self.source.is_alive
            && self.source.pending.is_none()
            && is_due(self.source.session.next_tick(), self.now)
        {
            self.with_source("tick", SourceSession::tick);
        }
        if self.destination.is_alive
            && self.destination.pending.is_none()
            && is_due(self.destination.session.next_tick(), self.now)
        {
            self.with_destination("tick", DestinationSession::tick);
        }
    }

    pub(crate) fn resolve_persist(&mut self, side: Side) {
        // A side says nothing while it records: a disk slower than the silence that the
        // other bears is one that has to be healed too.
        if !self.is_healed && !self.random.chance(self.plan.records_per_mille) {
            return;
        }
        let fails = !self.is_healed && self.plan.disks_fail && self.random.chance(150);
        let writes = !fails || self.random.chance(500);
        match side {
            Side::Source => self.source_disk_answers(writes, !fails),
            Side::Destination => self.destination_disk_answers(writes, !fails),
        }
    }

    /// One thing that an operator or a VMM does.
    pub(crate) fn manage(&mut self) {
        match self.random.below(8) {
            0 | 1 => self.connect(),
            2 => self.switch_over(),
            3 => self.say_ready(),
            4 => self.say_complete(),
            5 => self.reopen_if_alive(),
            6 => self.take_back_or_fence(),
            _ => self.start_again(),
        }
    }

    fn connect(&mut self) {
        let both_live = self.source.is_alive && self.destination.is_alive;
        let is_idle = self.source.pending.is_none() && self.destination.pending.is_none();
        if !both_live || !is_idle || self.destination.session.is_over() {
            return;
        }
        // Now and then somebody gives up a connection that the other still holds for good.
        let gives_up = !self.is_healed && self.random.chance(30);
        if self.plan.destination_connects {
            if self.destination.control.is_none() || gives_up {
                self.destination_opens();
            }
        } else if !self.source.is_connecting() || gives_up {
            self.with_source("open", |session, _| session.open());
        }
    }

    fn switch_over(&mut self) {
        let may = self.source.is_alive && self.source.pending.is_none() && self.is_migration();
        if may && !self.source.gave_state && self.random.chance(400) {
            self.source.gave_state = true;
            let frozen = self.with_source("freeze", |session, _| session.freeze());
            self.source.was_frozen |= frozen.is_ok();
        }
    }

    fn say_ready(&mut self) {
        let may = self.destination.is_alive && self.destination.pending.is_none();
        if may && self.random.chance(self.plan.restores_per_mille) {
            let _ = self.with_destination("ready", |session, _| session.ready());
        }
    }

    fn say_complete(&mut self) {
        let destination = &self.destination;
        let is_complete = destination.memory.planes.complete_count() == self.plan.pages;
        if destination.is_alive
            && destination.pending.is_none()
            && is_complete
            && !destination.knows_it_is_complete
        {
            self.destination.knows_it_is_complete = true;
            self.with_destination("all complete", |session, _| session.all_complete());
        }
    }

    fn reopen_if_alive(&mut self) {
        if self.destination.is_alive && self.destination.pending.is_none() {
            self.reopen_data();
        }
    }

    fn take_back_or_fence(&mut self) {
        if !self.source.is_alive || self.source.pending.is_some() || !self.is_migration() {
            return;
        }
        let is_given = self.source.session.record().ownership == SourceOwnership::Given;
        let wants_now = is_given || !self.plan.waits_until_given;
        if self.plan.wants_guest_back && wants_now && !self.is_healed && self.random.chance(500) {
            let _ = self.with_source("reclaim", |session, _| session.reclaim());
            return;
        }
        let record = *self.source.session.record();
        let was_given = record.ownership == SourceOwnership::Given;
        let has_lost = record.incarnation != self.destination.disk.incarnation;
        let is_dead = !self.destination.is_alive && self.random.chance(300);
        // Only what is dead for good, or dead this moment, is fenced. Once pages may have
        // been freed, the session refuses.
        let is_lost = has_lost && self.random.chance(60);
        let is_given_up = is_dead && self.plan.wants_guest_back;
        if was_given && (is_lost || is_given_up) {
            let fenced = self.with_source("fence", |session, _| session.fence());
            if fenced.is_ok() && self.source.memory.contains(&None) {
                self.violated("i2_kept", "a guest is fenced of which pages were freed");
            }
        }
    }

    fn start_again(&mut self) {
        if !self.source.is_alive {
            self.restart_source();
        } else if !self.destination.is_alive {
            // Whoever loses memory that was released has lost the guest.
            let is_only_copy = self.plan.releases
                && self.destination.disk.ownership == DestinationOwnership::Running;
            let may_lose = self.plan.may_lose_memory && !is_only_copy;
            let loses = !self.is_healed && may_lose && self.random.chance(600);
            if loses {
                self.replace_destination();
            } else {
                self.restart_destination();
            }
        }
    }

    /// Whatever can go wrong.
    pub(crate) fn break_something(&mut self) {
        if self.random.chance(self.plan.breaks_per_mille) {
            let mut ids = self.network.ids();
            let controls = self.source.control.into_iter().chain(self.destination.control);
            if self.random.chance(400) {
                ids = controls.collect();
            }
            if let Some(&id) = self.random.pick(&ids) {
                match self.random.below(4) {
                    0 => self.network.sever(id, false),
                    1 => self.network.sever(id, true),
                    _ => self.slip_in(id),
                }
            }
        }
        if self.random.chance(self.plan.breaks_per_mille) {
            self.give_up_a_channel();
        }
        if self.random.chance(self.plan.crashes_per_mille) {
            if self.random.chance(500) && self.source.is_alive {
                self.power_off(Side::Source);
                self.crash_source();
            } else if self.destination.is_alive {
                self.power_off(Side::Destination);
                self.crash_destination();
            }
        }
    }

    fn slip_in(&mut self, id: usize) {
        let random = &mut self.random;
        if self.network.slip_in(id, |limit| random.below(limit as u64) as usize) {
            self.note(|| format!("a frame of before is slipped into connection {id}"));
        }
    }

    /// A record that was being written is on the disk, or is not.
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
    }
}
