//! Whoever runs the two hosts: connects them, switches over, takes back, fences, restarts.

use crate::mutant::Mutant;
use crate::network::{Body, Read, Side};
use crate::world::World;
use afterimage_protocol::session::{DestinationOwnership, SourceOwnership};
use afterimage_protocol::wire::{Channel, ControlFrame};

/// How many heartbeats are read at once.
const BEATS: usize = 16;

impl World {
    /// Reads one frame, or the end, of one of a side's connections, and heartbeats before it:
    /// they are no work.
    pub(crate) fn deliver(&mut self, side: Side) {
        let held = self.network.of(side);
        let Some(&id) = self.random.pick(&held) else { return };
        self.take_back_while_recording(side);
        if self.is_idle(side) {
            return;
        }
        let Some(channel) = self.network.get(id).map(|connection| connection.channel) else {
            return;
        };
        // Who is at a piece, or may not place anything, reads no further; but a connection
        // that broke in the middle of a piece is noticed.
        let has_to_wait = side == Side::Destination && (self.is_busy(id) || self.is_held(channel));
        if has_to_wait && !self.network.has_broken(id, side) {
            return;
        }
        for _ in 0..BEATS {
            let read = self.network.read(id, side);
            let is_beat = matches!(&read, Read::Packet(packet) if packet.is_beat());
            self.take(read, id, channel, side);
            if !is_beat || self.is_idle(side) {
                return;
            }
        }
    }

    fn take(&mut self, read: Read, id: usize, channel: Channel, side: Side) {
        match (read, side) {
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

    /// Only with [`Mutant::TakeBackWhileRecording`]: somebody else than the session answers.
    fn take_back_while_recording(&mut self, side: Side) {
        let records = self.destination.pending.is_some_and(|record| {
            record.ownership == DestinationOwnership::Running
                && self.destination.disk.ownership == DestinationOwnership::Waiting
        });
        if side == Side::Source || !records || !self.breaks(Mutant::TakeBackWhileRecording) {
            return;
        }
        let Some(id) = self.destination.control else { return };
        if let Read::Packet(packet) = self.network.read(id, side)
            && matches!(packet.body, Body::Control(ControlFrame::TakeBack))
        {
            self.send_control_from_destination(ControlFrame::TakeBackAgreed);
        }
    }

    pub(crate) fn resolve_persist(&mut self, side: Side) {
        // A side says nothing while it records: a disk slower than the silence that the
        // other bears is one that has to be healed too.
        if !self.is_healed && !self.random.chance(self.plan.records_per_mille) {
            return;
        }
        let is_pending = match side {
            Side::Source => self.source.pending.is_some(),
            Side::Destination => self.destination.pending.is_some(),
        };
        let is_full = self.steps < self.disk_full_until[side as usize];
        let fails = !self.is_healed && self.plan.disks_fail && self.random.chance(150);
        let writes = !is_full && (!fails || self.random.chance(500));
        if is_full && is_pending {
            self.situation("a record did not fit on the disk");
        }
        match side {
            Side::Source => self.source_disk_answers(writes, !fails && !is_full),
            Side::Destination => self.destination_disk_answers(writes, !fails && !is_full),
        }
    }

    /// One thing that an operator or a VMM does.
    pub(crate) fn manage(&mut self) {
        self.end_pass();
        match self.random.below(8) {
            0 | 1 => self.connect(),
            2 => {
                self.switch_over();
                self.proceed();
            }
            3 => self.say_ready(),
            4 => self.say_complete(),
            5 => self.dial_again(),
            6 => self.take_back_or_fence(),
            _ => self.start_again(),
        }
    }

    fn connect(&mut self) {
        // Now and then somebody gives up a connection that the other still holds for good.
        let gives_up = !self.is_healed && self.random.chance(30);
        if self.plan.destination_connects {
            let may = !self.is_idle(Side::Destination)
                && !self.is_paused(Side::Destination)
                && !self.destination.session.is_over();
            if may && (self.destination.control.is_none() || gives_up) {
                self.destination_opens();
            }
        } else {
            // Nobody dials a destination that has everything, or was told that it is over.
            let is_wanted = !self.destination.is_alive || !self.destination.session.is_over();
            let may = is_wanted && !self.is_idle(Side::Source) && !self.is_paused(Side::Source);
            if may && (!self.source.is_connecting() || gives_up) {
                self.with_source("open", |session, _| session.open());
            }
        }
    }

    fn switch_over(&mut self) {
        let may = !self.is_idle(Side::Source) && self.is_migration() && !self.source.gave_state;
        let is_early = self.source.passes.ended < self.plan.passes;
        // A guest that was stopped before the source was restarted writes nothing any more.
        let waits = is_early && self.source.vmm_runs;
        if !may || !self.random.chance(if waits { self.plan.hurry_per_mille } else { 400 }) {
            return;
        }
        let frozen = if !self.source.session.is_frozen() && self.random.chance(500) {
            self.with_source("freeze", |session, _| session.freeze())
        } else {
            self.source.gave_state = true;
            self.with_source("bring state", |session, _| session.bring_state())
        };
        self.source.vmm_runs &= frozen.is_err();
    }

    /// Whoever holds the guest lets it go.
    fn proceed(&mut self) {
        if self.source.holds && !self.is_idle(Side::Source) && self.random.chance(200) {
            self.source.holds = false;
            let _ = self.with_source("proceed", |session, _| session.proceed());
        }
    }

    fn say_ready(&mut self) {
        self.refuse_guest(20);
        if !self.is_idle(Side::Destination) && self.random.chance(self.plan.restores_per_mille) {
            let _ = self.with_destination("ready", |session, _| session.ready());
        }
    }

    /// The destination's VMM finds that it cannot run the guest, at one of 1000 chances.
    pub(crate) fn refuse_guest(&mut self, per_mille: u64) {
        let may = self.plan.refuses && !self.is_idle(Side::Destination);
        if !may || !self.random.chance(per_mille) {
            return;
        }
        let is_waiting =
            self.destination.session.record().ownership == DestinationOwnership::Waiting;
        let was_given = self.source.disk.ownership == SourceOwnership::Given;
        let refused = self.with_destination("refuse", |session, _| session.refuse());
        if refused.is_ok() && is_waiting && was_given {
            self.situation("a destination refused a guest that was given to it");
        }
    }

    fn say_complete(&mut self) {
        let destination = &self.destination;
        let is_complete = destination.memory.planes.complete_count() == self.plan.pages;
        if is_complete && !destination.knows_it_is_complete && !self.is_idle(Side::Destination) {
            self.destination.knows_it_is_complete = true;
            self.with_destination("all complete", |session, _| session.all_complete());
        }
    }

    fn dial_again(&mut self) {
        for side in [Side::Source, Side::Destination] {
            if !self.is_idle(side) && self.random.chance(self.plan.redials_per_mille) {
                self.dial_missing(side);
            }
        }
    }

    fn take_back_or_fence(&mut self) {
        if self.is_idle(Side::Source) || !self.is_migration() {
            return;
        }
        let is_given = self.source.session.record().ownership == SourceOwnership::Given;
        let wants_now = is_given || !self.plan.waits_until_given;
        if self.plan.wants_guest_back && wants_now && !self.is_healed && self.random.chance(500) {
            let taken = self.with_source("reclaim", |session, _| session.reclaim());
            self.source.vmm_runs |=
                taken.is_err() && is_given && self.breaks(Mutant::DenialIgnored);
            return;
        }
        let record = *self.source.session.record();
        let was_given = record.ownership == SourceOwnership::Given;
        let has_lost = record.incarnation != self.destination.disk.incarnation;
        // Only what is dead for good, or dead this moment, is fenced. A guest that runs on
        // without its handler is not, but where pages were freed: there the session refuses.
        let is_refused = self.source.memory.contains(&None);
        let is_dead = !self.destination.is_alive
            && (!self.destination.runs || is_refused)
            && self.random.chance(300);
        let is_lost = has_lost && self.random.chance(60);
        let is_given_up = is_dead && (self.plan.wants_guest_back || self.plan.is_fenced);
        if was_given && (is_lost || is_given_up) {
            let fenced = self.with_source("fence", |session, _| session.fence());
            if is_refused && fenced.is_err() {
                self.situation("a fence was refused because pages were freed");
            }
            if is_refused && fenced.is_ok() {
                self.violated("i2_kept", "a guest is fenced of which pages were freed");
            }
        }
    }

    /// Whether the destination has refused, and knows that the guest is offered to another.
    fn has_refused_for_another(&self) -> bool {
        self.destination.session.is_over()
            && self.destination.disk.ownership == DestinationOwnership::Refused
            && self.source.is_alive
            && !self.source.session.is_over()
    }

    fn start_again(&mut self) {
        if !self.source.is_alive {
            self.restart_source();
        } else if self.destination.has_lost_memory {
            self.replace_destination();
        } else if !self.destination.is_alive {
            self.restart_handler();
        } else if self.has_refused_for_another() {
            self.situation("a guest that was refused was offered again");
            self.crash_vmm();
        }
    }
}
