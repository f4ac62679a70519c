//! Data channels that a side gives up because nothing comes of them, and tells the other so.

use crate::network::Side;
use crate::world::World;
use afterimage_protocol::wire::{Channel, ControlFrame, Generation};

impl World {
    /// A side has lost its patience with one of its channels, rightly or not.
    pub(crate) fn give_up_a_channel(&mut self) {
        if self.random.chance(500) {
            self.source_gives_up();
        } else {
            self.destination_gives_up();
        }
    }

    fn source_gives_up(&mut self) {
        let source = &self.source;
        let may = source.is_alive && source.pending.is_none() && source.control.is_some();
        let is_background = |channel: &&Channel| matches!(channel, Channel::Background(_));
        let channels: Vec<_> = source.channels.keys().filter(is_background).copied().collect();
        let Some(&channel) = self.random.pick(&channels).filter(|_| may) else { return };
        let generation = self.source.channels[&channel].stamp.generation;
        self.note(|| format!("source gives {channel} up"));
        self.lose_source_channel(channel);
        self.send_control_from_source(ControlFrame::Renew { channel, generation });
    }

    fn destination_gives_up(&mut self) {
        let side = &self.destination;
        let may = side.is_alive && side.pending.is_none() && side.control.is_some();
        let channels: Vec<_> = side.channels.keys().copied().collect();
        let Some(&channel) = self.random.pick(&channels).filter(|_| may) else { return };
        let generation = self.destination.channels[&channel].stamp.generation;
        self.note(|| format!("destination gives {channel} up"));
        self.lose_destination_channel(channel);
        self.spread_wakes();
        self.send_control_from_destination(ControlFrame::Renew { channel, generation });
    }

    /// The other side has given a channel up: it is closed, unless it is a newer one.
    pub(crate) fn renew(&mut self, side: Side, channel: Channel, generation: Generation) {
        let is_it = |stamp: Option<Generation>| stamp == Some(generation);
        match side {
            Side::Source => {
                let data = self.source.channels.get(&channel);
                if is_it(data.map(|data| data.stamp.generation)) {
                    self.lose_source_channel(channel);
                }
            }
            Side::Destination => {
                let data = self.destination.channels.get(&channel);
                if is_it(data.map(|data| data.stamp.generation)) {
                    self.lose_destination_channel(channel);
                }
            }
        }
    }
}
