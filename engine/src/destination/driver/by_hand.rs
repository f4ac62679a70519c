//! A destination's link, paused and recovered by hand.
//!
//! Invariant: while it is paused there is no connection, none is being made, and none is taken.

use super::super::DestinationEvent;
use super::{Driver, Input};
use crate::reconnect::{FirstConnection, Reconnect, is_paused_here};
use crate::source::{CallError, Endpoint};
use afterimage_protocol::session::NotNow;
use afterimage_protocol::wire::ControlFrame;

impl Driver {
    pub(super) fn pause(&mut self) -> Result<(), CallError> {
        if self.session.is_over() {
            return Err(NotNow { call: "pause", reason: "the session is over" }.into());
        }
        if !self.link.is_paused() {
            self.link.pause();
            self.link.send(&ControlFrame::Refuse(is_paused_here()));
            self.session.disconnected();
            self.act();
            self.events.send(DestinationEvent::Paused);
        }
        Ok(())
    }

    /// The link was lost, and everything of it has been given up.
    pub(super) fn pause_if_by_hand(&mut self) {
        if self.options.reconnect == Reconnect::ByHand && !self.link.is_paused() {
            self.link.pause();
            self.events.send(DestinationEvent::Paused);
        }
    }

    /// Nothing has been connected yet.
    pub(super) fn pause_if_to_wait(&mut self) {
        if self.options.first_connection == FirstConnection::OnRecover {
            self.link.pause();
        }
    }

    pub(super) fn recover(&mut self, endpoint: Option<Endpoint>) -> Result<(), CallError> {
        let call = "recover";
        if self.session.is_over() {
            return Err(NotNow { call, reason: "the session is over" }.into());
        }
        if self.arrivals.is_some() {
            let reason = "nothing is paused: the session is connected";
            return Err(NotNow { call, reason }.into());
        }
        if endpoint.is_none() && !self.link.is_paused() && self.link.has_connection() {
            // The sides are about to agree.
            return Ok(());
        }
        let line = endpoint.map(|endpoint| {
            let (plaintext, hook) = (self.options.plaintext, &self.options.threads);
            endpoint.line(&self.outlet, plaintext, hook, Input::Accepted, Input::Dialed)
        });
        let line = line.transpose().map_err(|error| CallError::of_endpoint(&error))?;
        self.session.disconnected();
        self.act();
        self.link.resume(line);
        Ok(())
    }
}
