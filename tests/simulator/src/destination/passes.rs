//! Precopy at the destination: what the source says of early copies, and the copies themselves.

use crate::memory::Memory;
use crate::mutant::Mutant;
use crate::world::World;
use afterimage_protocol::bitmap::Segment;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{Channel, ControlFrame};

impl World {
    pub(super) fn take_stale(&mut self, range: PageRange, segment: &Segment) {
        let memory = &mut self.destination.memory;
        // What comes until the next pass may be older than this.
        if !self.mutant.is_some_and(|mutant| mutant == Mutant::EarlyAfterStale) {
            memory.begin_pass(None);
        }
        let is_read = segment.decode(range, |run| memory.stale(run)).is_ok();
        debug_assert!(is_read, "the source encodes what can be read");
    }

    pub(super) fn take_pass(&mut self, number: u16, last: bool) {
        let runs = std::mem::take(&mut self.destination.memory.to_acknowledge);
        if !runs.is_empty() {
            self.send_control_from_destination(ControlFrame::Ack(runs));
        }
        let memory = &mut self.destination.memory;
        if last {
            memory.settle();
        } else {
            memory.begin_pass(Some(number));
        }
    }

    /// An early copy comes over a background channel.
    pub(super) fn take_early(
        &mut self,
        channel: Channel,
        pages: PageRange,
        values: Vec<u64>,
        pass: u16,
    ) {
        let newest = self.destination.memory.newest_pass();
        if self.destination.session.is_settled() {
            self.situation("an early copy came after memory was final");
            if self.breaks(Mutant::EarlyAfterSettled) {
                self.take_final(channel, pages, values);
            }
            return;
        }
        crate::checks::i6_early_after_its_pass(self, pass, newest);
        match newest {
            Some(newest) if newest != pass => {
                self.situation("an early copy came after its pass had ended");
            }
            None => self.situation("an early copy came while it was told what is stale"),
            _ => {}
        }
        let claimed = |page: PageNumber| self.destination.is_receiving(page);
        if pages.iter().any(claimed) {
            self.situation("an early copy came whose page is being received");
        }
        if let Some(data) = self.destination.channels.get_mut(&channel) {
            data.piece = Some(Memory::begin_early(pages, values, pass));
        }
    }
}
