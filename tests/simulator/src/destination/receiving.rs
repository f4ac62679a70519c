//! The data channels of the destination: what arrives on them is taken in, and what one that
//! ends gives back is asked for.

use super::DestinationHost;
use crate::memory::{Piece, Stage};
use crate::mutant::Mutant;
use crate::network::{Body, Side};
use crate::world::World;
use afterimage_protocol::bitmap::PageState;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{Channel, ControlFrame};

impl DestinationHost {
    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.channels.values().filter_map(|data| data.piece.as_ref())
    }

    pub(crate) fn is_receiving(&self, page: PageNumber) -> bool {
        self.pieces().flat_map(|piece| &piece.won).any(|run| run.contains(page))
    }

    pub(crate) fn one_being_received(&self) -> Option<PageNumber> {
        self.pieces().flat_map(|piece| &piece.won).map(|run| run.start).next()
    }

    pub(crate) fn pages_being_received(&self) -> usize {
        self.pieces().flat_map(|piece| &piece.won).map(|run| run.count as usize).sum()
    }
}

impl World {
    pub(crate) fn lose_destination_channel(&mut self, channel: Channel) {
        let Some(data) = self.destination.channels.remove(&channel) else { return };
        self.network.close(data.connection, Side::Destination);
        let Some(piece) = data.piece else { return };
        self.note(|| format!("destination gives {:?} back", piece.won));
        self.situation("a channel broke in the middle of a piece");
        self.destination.memory.give_back(&piece);
        let source = &self.source;
        let mut pages = piece.won.iter().flat_map(PageRange::iter);
        if pages.any(|page| source.is_in_flight_beside(channel, page)) {
            self.situation("pages that were given back had been dropped elsewhere");
        }
        if self.breaks(Mutant::GivenBackNotAsked) {
            return;
        }
        // The source may have sent them elsewhere meanwhile, where they were dropped.
        let planes = &self.destination.memory.planes;
        let pages = piece.won.iter().flat_map(PageRange::iter);
        self.destination
            .wanted
            .extend(pages.filter(|page| !planes.is_complete(*page)).map(|page| (page, None)));
    }

    /// Whether a page was asked for and has not come.
    pub(crate) fn asks(&self) -> bool {
        let host = &self.destination;
        let mut pages = host.faults.iter().chain(&host.wanted);
        pages.any(|(page, asked)| asked.is_some() && !host.memory.planes.is_complete(*page))
    }

    /// Something has come over a channel.
    pub(super) fn has_heard(&mut self, channel: Channel) {
        let (step, asks) = (self.steps, self.asks());
        let host = &mut self.destination;
        if let Some(data) = host.channels.get_mut(&channel)
            && let Some(since) = data.waits_since.take()
        {
            host.patience.rewarded(step - since);
            data.waits_since = asks.then_some(step);
        }
    }

    pub(super) fn take_pages(&mut self, channel: Channel, body: Body) {
        self.note(|| format!("destination takes {body:?} on {channel}"));
        let is_urgent = matches!(channel, Channel::Request(_));
        let is_settled = self.destination.session.is_settled();
        let memory = &mut self.destination.memory;
        let zeros = |pages: PageRange| vec![0; pages.count as usize];
        match body {
            Body::Content(pages, values, Some(pass)) => {
                self.take_early(channel, pages, values, pass);
            }
            Body::Zero(pages, Some(pass)) => self.take_early(channel, pages, zeros(pages), pass),
            // It is asked for again.
            Body::Content(..) | Body::Zero(..) if is_urgent && !is_settled => {
                self.situation("an answer came before memory was final");
            }
            Body::Content(..) | Body::Zero(..) if !is_settled => {
                self.violated("i1_once_and_i8_gone", "a page came for good before it was final");
            }
            Body::Content(pages, values, None) if is_urgent => {
                for (page, value) in pages.iter().zip(values) {
                    memory.urgent(page, value);
                }
            }
            Body::Content(pages, values, None) => self.take_final(channel, pages, values),
            Body::Zero(pages, None) => {
                memory.zero(pages);
                if is_urgent {
                    memory.woken.extend(pages.iter());
                }
            }
            _ => {}
        }
    }

    /// A page that is final comes over a background channel.
    pub(super) fn take_final(&mut self, channel: Channel, pages: PageRange, values: Vec<u64>) {
        let memory = &mut self.destination.memory;
        let planes = &memory.planes;
        let is_late = pages.iter().any(|page| planes.state(page) == PageState::Claimed);
        let piece = memory.begin(pages, values);
        if let Some(data) = self.destination.channels.get_mut(&channel) {
            data.piece = Some(piece);
        }
        if is_late {
            self.situation("a copy came whose page is being received");
        }
    }

    /// Whether a channel still works at a piece, so that its next frame has to wait.
    pub(crate) fn is_busy(&self, id: usize) -> bool {
        let mut channels = self.destination.channels.values();
        channels.any(|data| data.connection == id && data.piece.is_some())
    }

    /// Whether nothing can be placed that comes over a channel: a discard was read and is not
    /// entered, or, for what was asked for, waits to be read.
    pub(crate) fn is_held(&self, channel: Channel) -> bool {
        let memory = &self.destination.memory;
        match channel {
            Channel::Control => false,
            Channel::Request(_) => memory.is_gated() || memory.has_unread(),
            Channel::Background(_) => memory.is_gated(),
        }
    }

    /// More of a background piece arrives, or it is placed.
    pub(crate) fn advance_piece(&mut self) {
        if self.is_idle(Side::Destination) {
            return;
        }
        let slot = self.random.below(u64::from(self.plan.streams)) as u16;
        let channel = Channel::Background(slot);
        let Some(data) = self.destination.channels.get_mut(&channel) else { return };
        let has_all = |piece: &Piece| !matches!(piece.stage, Stage::Claimed | Stage::Half);
        let arrives = self.network.flows(data.connection, Side::Destination);
        let Some(mut piece) = data.piece.take_if(|piece| arrives || has_all(piece)) else {
            return;
        };
        let is_placed = self.destination.memory.advance(&mut piece);
        data.piece = Some(piece).filter(|_| !is_placed);
    }

    /// What has become complete is acknowledged.
    pub(crate) fn acknowledge(&mut self) {
        let is_idle = self.is_idle(Side::Destination);
        let runs = &mut self.destination.memory.to_acknowledge;
        if is_idle || !self.destination.slots.is_open() || runs.is_empty() {
            return;
        }
        let runs = std::mem::take(runs);
        self.send_control_from_destination(ControlFrame::Ack(runs));
    }
}
