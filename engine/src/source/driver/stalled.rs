//! Background channels of which nothing comes: given up one by one, while the session goes on.
//!
//! Invariant: what was under way on a channel that is given up is handed out again, and only
//! acknowledgements that had come before anybody looked are missed by nobody.

use super::Driver;
use crate::patience::Patience;
use afterimage_protocol::wire::{Channel, ControlFrame, Generation, Stamp};
use std::time::Instant;

impl Driver {
    /// Gives up each background channel on which something was under way and nothing of it had
    /// been acknowledged for too long when the control channel was read, which was after
    /// `looked`.
    pub(super) fn give_up_stalled(&mut self, looked: Instant) {
        let silence = self.options.silence;
        for (channel, data) in &mut self.data {
            if !matches!(channel, Channel::Background(_)) || data.is_given_up {
                continue;
            }
            let patience = self.patience.entry(*channel).or_insert_with(|| Patience::new(silence));
            if let Some(pause) = data.underway.take_pause() {
                patience.rewarded(pause);
            }
            let since = data.underway.waits_since();
            let waited = since.map(|since| looked.saturating_duration_since(since));
            if waited.is_some_and(|waited| waited >= patience.lasts()) {
                tracing::warn!(%channel, ?waited, "nothing is acknowledged; the channel is replaced");
                patience.exhausted();
                data.is_given_up = true;
                data.stream.shut_down();
            }
        }
    }

    /// A channel has ended, or could not be served: another one is made.
    pub(super) fn replace(&mut self, channel: Channel, stamp: Stamp) {
        if self.link.dials() {
            self.link.data.ended(channel, stamp.epoch);
        } else {
            // The destination may not have noticed.
            let generation = stamp.generation;
            self.link.send(&ControlFrame::Renew { channel, generation });
        }
    }

    /// The destination has given a channel up.
    pub(super) fn renew(&self, channel: Channel, generation: Generation) {
        if let Some(data) = self.data.get(&channel)
            && data.generation == generation
        {
            tracing::info!(%channel, "the destination has given a data channel up");
            data.stream.shut_down();
        }
    }
}
