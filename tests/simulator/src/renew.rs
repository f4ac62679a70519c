//! Data channels that end or are given up, and how the other side hears of it: whoever makes
//! the connections of the session makes the next one, who does not says `Renew`, because the
//! other may not have noticed.

use crate::mutant::Mutant;
use crate::network::Side;
use crate::world::World;
use afterimage_protocol::wire::{Channel, ControlFrame, Generation, Stamp};

impl World {
    /// A side gives up one of its channels that may be as good as any: it was slow, or failed
    /// in another way.
    pub(crate) fn lose_patience(&mut self, side: Side) {
        let channels: Vec<_> = match side {
            Side::Source => self.source.channels.keys().copied().collect(),
            Side::Destination => self.destination.channels.keys().copied().collect(),
        };
        if let Some(&channel) = self.random.pick(&channels)
            && !self.is_idle(side)
        {
            self.note(|| format!("the {side:?} gives {channel} up"));
            self.end_data(side, channel);
        }
    }

    fn data_stamp(&self, side: Side, channel: Channel) -> Option<Stamp> {
        match side {
            Side::Source => self.source.channels.get(&channel).map(|data| data.stamp),
            Side::Destination => self.destination.channels.get(&channel).map(|data| data.stamp),
        }
    }

    /// A side's channel has ended, or is given up.
    pub(crate) fn end_data(&mut self, side: Side, channel: Channel) {
        let Some(stamp) = self.data_stamp(side, channel) else { return };
        match side {
            Side::Source => self.lose_source_channel(channel),
            Side::Destination => self.lose_destination_channel(channel),
        }
        let may_not_know = !self.dials(side) && !self.breaks(Mutant::RenewNotSaid);
        if may_not_know {
            let frame = ControlFrame::Renew { channel, generation: stamp.generation };
            match side {
                Side::Source => self.send_control_from_source(frame),
                Side::Destination => self.send_control_from_destination(frame),
            }
        }
    }

    /// The other side has given a channel up: it is closed, unless it is a newer one.
    pub(crate) fn renew(&mut self, side: Side, channel: Channel, generation: Generation) {
        let present = self.data_stamp(side, channel);
        if present.is_some_and(|stamp| stamp.generation == generation) {
            self.situation("a channel was closed because the other side had given it up");
            self.end_data(side, channel);
        }
    }
}
