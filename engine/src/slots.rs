//! The slots of a session's data channels in one epoch: which there are, and which connection
//! of each is the newest.

use afterimage_protocol::wire::{
    Channel, Epoch, Generation, Hello, Incarnation, Refusal, RefuseCode, Role, SessionId, Stamp,
};
use std::collections::BTreeMap;

/// Who this side is, and whom it expects on a data channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Party {
    /// This side.
    pub(crate) role: Role,
    /// The session.
    pub(crate) session: SessionId,
    /// The destination's memory; `None` at a source to which none is attached.
    pub(crate) incarnation: Option<Incarnation>,
}

/// The slots of one side.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    epoch: Option<Epoch>,
    channels: Vec<Channel>,
    generations: BTreeMap<Channel, Generation>,
}

impl Slots {
    /// A new epoch: every slot is empty.
    pub(crate) fn open(&mut self, epoch: Epoch, channels: impl IntoIterator<Item = Channel>) {
        self.epoch = Some(epoch);
        self.channels = channels.into_iter().collect();
        self.generations.clear();
    }

    /// No data channel may be open.
    pub(crate) fn close(&mut self) {
        self.epoch = None;
    }

    /// All of them.
    pub(crate) fn channels(&self) -> Vec<Channel> {
        self.channels.clone()
    }

    /// Whether this is the present epoch.
    pub(crate) fn is_present(&self, epoch: Epoch) -> bool {
        self.epoch == Some(epoch)
    }

    /// Whether this is the newest connection of its slot.
    pub(crate) fn is_newest(&self, channel: Channel, stamp: Stamp) -> bool {
        self.is_present(stamp.epoch) && self.generations.get(&channel) == Some(&stamp.generation)
    }

    /// The stamp of the next connection of a slot, if the epoch is still this one.
    pub(crate) fn next(&mut self, channel: Channel, epoch: Epoch) -> Option<Stamp> {
        if !self.is_present(epoch) {
            return None;
        }
        let generation = self.generations.entry(channel).or_default();
        generation.0 += 1;
        Some(Stamp { epoch, generation: *generation })
    }

    /// A peer's connection has been accepted.
    pub(crate) fn accepted(&mut self, channel: Channel, generation: Generation) {
        self.generations.insert(channel, generation);
    }

    /// Whether a peer that says hello may have a slot.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub(crate) fn admits(&self, hello: &Hello, party: Party) -> Result<(), Refusal> {
        let refusal = |code, reason: String| Err(Refusal::new(code, reason));
        if hello.role == party.role {
            let name = if hello.role == Role::Source { "sources" } else { "destinations" };
            return refusal(RefuseCode::Role, format!("both sides are {name}"));
        }
        if hello.session != party.session {
            let reason =
                format!("session {} is not served here, {} is", hello.session, party.session);
            return refusal(RefuseCode::UnknownSession, reason);
        }
        // A source that connects for the first time after a restart may not know it.
        if hello.role == Role::Destination && party.incarnation != Some(hello.incarnation) {
            let known = party.incarnation.map_or("none".to_owned(), |known| known.to_string());
            let reason =
                format!("destination memory {} is not attached, {known} is", hello.incarnation);
            return refusal(RefuseCode::Incarnation, reason);
        }
        let epoch = hello.stamp.epoch;
        if !self.is_present(epoch) {
            let present = self.epoch.map_or("none".to_owned(), |epoch| epoch.0.to_string());
            let reason = format!("epoch {} is not the present one, {present}", epoch.0);
            return refusal(RefuseCode::Stale, reason);
        }
        let channel = hello.channel;
        if !self.channels.contains(&channel) {
            let reason = format!("there is no channel {channel} in this session");
            return refusal(RefuseCode::TooMany, reason);
        }
        let last = self.generations.get(&channel).copied().unwrap_or_default();
        let generation = hello.stamp.generation;
        if generation <= last {
            let reason = format!(
                "generation {} of channel {channel} has passed, {} is the last",
                generation.0, last.0
            );
            return refusal(RefuseCode::Stale, reason);
        }
        Ok(())
    }
}
