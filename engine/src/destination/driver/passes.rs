//! Precopy at a destination: what the source says of early copies is carried out.

use super::{Driver, push_acks};
use crate::session_link::Beat;
use crate::threads::{self, ThreadRole};
use afterimage_protocol::bitmap::Segment;
use afterimage_protocol::layout::{PageNumber, PageRange};
use afterimage_protocol::wire::{Refusal, RefuseCode};
use std::io;
use std::sync::Arc;
use std::time::Duration;

impl Driver {
    /// What is here is about to be told to the source. An error has ended the connection.
    pub(super) fn prepare_received(&mut self) -> io::Result<()> {
        let pages = &self.arrived.pages;
        if self.session.is_settled() {
            pages.promote(PageRange::new(PageNumber(0), pages.planes().pages()));
            return Ok(());
        }
        let taking = pages.take_early();
        if let Err(error) = &taking {
            self.cannot_take_early(error, "early copies cannot be noted at the destination");
        }
        taking
    }

    pub(super) fn stale(&mut self, range: PageRange, segment: &Segment) {
        let mut beat = self.session.pulse().map(Beat::after);
        let link = &mut self.link;
        let result = self.arrived.pages.stale(range, segment, || {
            // An error of the wait is met again in the next one.
            let _ = link.stay_alive(&mut beat, Some(Duration::ZERO));
        });
        if let Err(error) = result {
            self.cannot_empty(&error);
        }
    }

    pub(super) fn forget_early(&mut self) {
        if let Err(error) = self.arrived.pages.forget_early() {
            self.cannot_empty(&error);
        }
    }

    fn cannot_empty(&mut self, error: &io::Error) {
        self.cannot_take_early(error, "early copies cannot be dropped at the destination");
    }

    fn cannot_take_early(&mut self, error: &io::Error, reason: &'static str) {
        tracing::error!(%error, "{reason}");
        self.session.disconnected();
        self.hang_up(Some(Refusal::new(RefuseCode::Failed, reason)));
    }

    pub(super) fn pass(&mut self, number: u16, last: bool) {
        // Whatever was acknowledged of the pass before was so before the source hears that
        // another begins, or that no more are taken.
        self.arrived.pages.begin_pass(0);
        let mut is_read = true;
        while is_read && self.arrived.has_acks() {
            push_acks(&self.arrived, &mut self.link);
            is_read = self.link.flush().is_ok() && self.link.has_room();
        }
        if last {
            self.settle();
        } else {
            self.arrived.pages.begin_pass(number);
        }
        if !is_read {
            tracing::warn!("the source does not read acknowledgements: it is hung up on");
            self.session.disconnected();
            self.hang_up(None);
        }
    }

    fn settle(&mut self) {
        self.arrived.pages.settle();
        let arrived = Arc::clone(&self.arrived);
        let mapper = threads::spawn(&self.options.threads, ThreadRole::Map, 0, move || {
            arrived.pages.map_early();
            arrived.note_progress();
        });
        match mapper {
            Ok(mapper) => self.mapper = Some(mapper),
            Err(error) => {
                tracing::warn!(%error, "no thread to map pages; it is done here");
                self.arrived.pages.map_early();
            }
        }
    }

    pub(super) fn stop_mapping(&mut self) {
        self.arrived.pages.stop_mapping();
        if let Some(mapper) = self.mapper.take() {
            threads::join(mapper);
        }
    }
}
