//! The data channels of the source: served, and what was under way on one that ended handed
//! out again.

use super::PIECE;
use crate::mutant::Mutant;
use crate::network::{Body, Side};
use crate::world::World;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::Channel;

impl World {
    pub(crate) fn lose_source_channel(&mut self, channel: Channel) {
        if let Some(mut data) = self.source.channels.remove(&channel) {
            self.network.close(data.connection, Side::Source);
            if !self.breaks(Mutant::RequeueForgotten) {
                data.in_flight.requeue(&self.source.book);
            }
        }
    }

    /// A background stream sends its next run.
    pub(crate) fn send_background(&mut self) {
        let session = &self.source.session;
        let is_final = session.is_frozen() && !session.is_unsettled();
        let pass = self.source.passes.open;
        let may = is_final || pass.is_some() || self.breaks(Mutant::ServeBeforeFrozen);
        if self.is_idle(Side::Source) || !may {
            return;
        }
        let slot = self.random.below(u64::from(self.plan.streams)) as u16;
        let channel = Channel::Background(slot);
        let is_ready =
            self.source.channels.get(&channel).is_some_and(|data| !data.in_flight.is_full());
        if !is_ready {
            return;
        }
        let from = PageNumber(self.random.below(self.plan.pages));
        let limit = 1 + self.random.below(PIECE);
        let book = &self.source.book;
        let take = |from| book.take_in(PageRange::new(book.peek(from)?, limit));
        if let Some(run) = take(from).or_else(|| take(PageNumber(0))) {
            self.send_pages(channel, run, pass);
        }
    }

    pub(super) fn serve(&mut self, channel: Channel, pages: PageRange) {
        // An answer is for good. Whoever asks before that asks again.
        if !self.source.session.is_frozen() {
            self.situation("a page was asked for before memory was final");
            if !self.breaks(Mutant::AnsweredBeforeFrozen) {
                return;
            }
        }
        for page in pages.iter() {
            // A request may be overtaken by the ack, and the ack be followed by the release:
            // a late request for what has arrived is nothing to complain of.
            if self.source.book.take_urgent(page) {
                self.send_pages(channel, PageRange::one(page), None);
            }
        }
    }

    fn send_pages(&mut self, channel: Channel, run: PageRange, pass: Option<u16>) {
        crate::checks::i6_not_again(self, run);
        self.note(|| format!("source sends {run} on {channel}, pass {pass:?}"));
        let Some(data) = self.source.channels.get_mut(&channel) else { return };
        if data.in_flight.is_empty() {
            data.moved = self.steps;
        }
        data.in_flight.push(run);
        data.shadow.extend(run.iter());
        let (id, stamp) = (data.connection, data.stamp);
        for pages in self.alike(run) {
            let mut values = Vec::new();
            for page in pages.iter() {
                match self.source.memory[page.0 as usize] {
                    Some(value) => values.push(value),
                    None => {
                        return self.violated("i2_kept", format!("page {page} is sent and freed"));
                    }
                }
            }
            let body = if values.iter().all(|value| *value == 0) {
                Body::Zero(pages, pass)
            } else {
                Body::Content(pages, values, pass)
            };
            self.network.send(id, Side::Destination, stamp, body);
        }
    }

    /// Cuts a run where the region ends, and where zeros begin and end.
    fn alike(&self, run: PageRange) -> Vec<PageRange> {
        let class = |page: PageNumber| {
            let is_zero = self.source.memory[page.0 as usize] == Some(0);
            (is_zero, page.0 >= self.plan.first_alias)
        };
        let mut pieces: Vec<PageRange> = Vec::new();
        for page in run.iter() {
            match pieces.last_mut() {
                Some(last) if class(last.start) == class(page) => last.count += 1,
                _ => pieces.push(PageRange::one(page)),
            }
        }
        pieces
    }
}
