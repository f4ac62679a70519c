//! Data channels that a side gives up because nothing comes of them, and tells the other so.

use crate::network::Side;
use crate::world::World;
use afterimage_protocol::wire::{Channel, ControlFrame, Generation};

impl World {
    /// A side has lost its patience with one of its channels, rightly or not.
    pub(crate) fn lose_patience(&mut self) {
        if self.random.chance(500) {
            let of_source = self.source.channels.keys();
            let is_background = |channel: &&Channel| matches!(channel, Channel::Background(_));
            let channels: Vec<_> = of_source.filter(is_background).copied().collect();
            if let Some(&channel) = self.random.pick(&channels)
                && !self.is_idle(Side::Source)
            {
                self.source_gives_up(channel);
            }
        } else {
            let channels: Vec<_> = self.destination.channels.keys().copied().collect();
            if let Some(&channel) = self.random.pick(&channels)
                && !self.is_idle(Side::Destination)
            {
                self.destination_gives_up(channel);
            }
        }
    }

    pub(crate) fn source_gives_up(&mut self, channel: Channel) {
        let Some(data) = self.source.channels.get(&channel) else { return };
        let generation = data.stamp.generation;
        self.note(|| format!("source gives {channel} up"));
        self.lose_source_channel(channel);
        self.send_control_from_source(ControlFrame::Renew { channel, generation });
    }

    pub(crate) fn destination_gives_up(&mut self, channel: Channel) {
        let Some(data) = self.destination.channels.get(&channel) else { return };
        let generation = data.stamp.generation;
        self.note(|| format!("destination gives {channel} up"));
        self.lose_destination_channel(channel);
        self.send_control_from_destination(ControlFrame::Renew { channel, generation });
    }

    /// The other side has given a channel up: it is closed, unless it is a newer one.
    pub(crate) fn renew(&mut self, side: Side, channel: Channel, generation: Generation) {
        let stamp = match side {
            Side::Source => self.source.channels.get(&channel).map(|data| data.stamp),
            Side::Destination => self.destination.channels.get(&channel).map(|data| data.stamp),
        };
        if stamp.is_none_or(|stamp| stamp.generation != generation) {
            return;
        }
        match side {
            Side::Source => self.lose_source_channel(channel),
            Side::Destination => self.lose_destination_channel(channel),
        }
    }
}
