//! The data channels of a source: made or accepted in their epoch, replaced one by one, and
//! what was under way on one that ended handed out again.

use super::super::background::Streamer;
use super::super::request::Responder;
use super::super::serving::{Serving, ServingOptions, Underway};
use super::Driver;
use super::stalled::Movement;
use crate::slots::Party;
use crate::threads::{self, ThreadRole};
use crate::transport::{Stream, answer_with, refuse};
use afterimage_protocol::layout::GuestLayout;
use afterimage_protocol::wire::{
    Channel, ControlFrame, Epoch, Generation, Hello, Refusal, Role, Stamp,
};
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

/// One data channel of the present epoch.
pub(super) struct DataChannel {
    pub(super) generation: Generation,
    pub(super) stream: Stream,
    pub(super) underway: Underway,
    thread: JoinHandle<()>,
    /// It was shut down because nothing came of it; its thread has not ended yet.
    pub(super) is_given_up: bool,
    pub(super) movement: Movement,
}

impl Driver {
    pub(super) fn open_channels(&mut self, stamp: Stamp, layout: GuestLayout) {
        let Some(book) = self.shared.book() else { return };
        let options =
            ServingOptions { checksums: self.link.checksums(), polling: self.options.polling };
        let serving = Arc::new(Serving::new(
            Arc::clone(&self.memory),
            layout,
            book,
            stamp.epoch,
            options,
            &self.shared,
            self.outlet.clone(),
        ));
        self.serving = Some(serving);
        if self.session.is_frozen() {
            self.open_final();
        }
        self.slots.open(stamp.epoch, self.options.channels());
        if self.link.dials() {
            for channel in self.slots.channels() {
                self.dial_data(channel, stamp.epoch);
            }
        }
    }

    /// Makes the next connection of a data channel's slot, if the epoch is still the same.
    pub(super) fn dial_data(&mut self, channel: Channel, epoch: Epoch) {
        if let Some(stamp) = self.slots.next(channel, epoch) {
            self.link.dial(self.data_hello(channel, stamp));
        }
    }

    fn data_hello(&self, channel: Channel, stamp: Stamp) -> Hello {
        let record = self.session.record();
        Hello {
            role: Role::Source,
            channel,
            stamp,
            capabilities: self.capabilities,
            session: record.session,
            incarnation: self.session.incarnation().unwrap_or_default(),
        }
    }

    pub(super) fn accept_data(&mut self, stream: Stream, hello: Hello) {
        let party = Party {
            role: Role::Source,
            session: self.session.record().session,
            incarnation: self.session.incarnation(),
        };
        if let Err(refusal) = self.slots.admits(&hello, party) {
            refuse(&stream, refusal);
            return;
        }
        if let Err(error) = answer_with(&stream, self.data_hello(hello.channel, hello.stamp)) {
            tracing::info!(%error, channel = %hello.channel, "a data channel broke at once");
            return;
        }
        self.slots.accepted(hello.channel, hello.stamp.generation);
        self.open_data(hello.channel, stream, hello.stamp);
    }

    pub(super) fn open_data(&mut self, channel: Channel, stream: Stream, stamp: Stamp) {
        let Some(serving) = self.serving.clone().filter(|_| self.slots.is_present(stamp.epoch))
        else {
            stream.shut_down();
            return;
        };
        self.link.data.opened(channel);
        if let Some(old) = self.data.remove(&channel) {
            old.stream.shut_down();
            self.retired.push((channel, old));
        }
        let underway = Underway::default();
        let started = self.start_data(&serving, channel, &stream, stamp.generation, &underway);
        match started {
            Ok(thread) => {
                let generation = stamp.generation;
                let (is_given_up, movement) = (false, Movement::default());
                let data =
                    DataChannel { generation, stream, underway, thread, is_given_up, movement };
                self.data.insert(channel, data);
            }
            Err(error) => {
                tracing::error!(%error, %channel, "a data channel cannot be served");
                stream.shut_down();
                self.replace(channel, stamp);
            }
        }
    }

    fn start_data(
        &self,
        serving: &Arc<Serving>,
        channel: Channel,
        stream: &Stream,
        generation: Generation,
        underway: &Underway,
    ) -> io::Result<JoinHandle<()>> {
        let (serving, stream, underway) = (Arc::clone(serving), stream.clone(), underway.clone());
        let streams = self.options.streams;
        let (role, slot) = match channel {
            Channel::Background(slot) => {
                stream.prepare_background(self.options.silence)?;
                (ThreadRole::Background, slot)
            }
            Channel::Request(slot) => {
                stream.watch(self.options.silence)?;
                (ThreadRole::Request, slot)
            }
            Channel::Control => {
                return Err(io::Error::other("a control channel is no data channel"));
            }
        };
        threads::spawn(&self.options.threads, role, usize::from(slot), move || {
            let ended = if role == ThreadRole::Request {
                Responder::new(&serving, stream.clone(), generation, underway).run()
            } else {
                Streamer::new(&serving, stream.clone(), slot, streams, generation, underway).run()
            };
            if let Err(error) = ended
                && !serving.is_closing()
            {
                tracing::info!(%error, %channel, "a data channel ended");
            }
            stream.shut_down();
            serving.ended(channel, generation);
        })
    }

    /// A channel's thread has ended, so that nothing more is added to what it has under way.
    pub(super) fn data_ended(&mut self, channel: Channel, stamp: Stamp) {
        let is_present = self.slots.is_present(stamp.epoch)
            && self.data.get(&channel).is_some_and(|it| it.generation == stamp.generation);
        let ended = if is_present {
            self.data.remove(&channel)
        } else {
            let at = self
                .retired
                .iter()
                .position(|(retired, it)| *retired == channel && it.generation == stamp.generation);
            at.map(|at| self.retired.swap_remove(at).1)
        };
        let Some(ended) = ended else { return };
        threads::join(ended.thread);
        if let Some(book) = self.shared.book() {
            ended.underway.requeue(&book);
        }
        if let Some(serving) = &self.serving {
            serving.signal.look_again();
        }
        if is_present {
            self.replace(channel, stamp);
        }
    }

    pub(super) fn hang_up(&mut self, refusal: Option<Refusal>) {
        let refuses = refusal.is_some();
        if let Some(refusal) = refusal {
            self.link.send(&ControlFrame::Refuse(refusal));
        }
        self.link.disconnect();
        self.shared.set_away(true);
        self.slots.close();
        self.close_pass();
        if let Some(serving) = self.serving.take() {
            serving.close();
            serving.wait_for_freeing();
        }
        self.stop_releasing();
        // Their sockets are shut down and they are told to close: they do not wait. What
        // they had under way is learnt from the destination's planes.
        let retired = self.retired.drain(..);
        for (_, channel) in std::mem::take(&mut self.data).into_iter().chain(retired) {
            channel.stream.shut_down();
            threads::join(channel.thread);
        }
        if self.wants_link() {
            if refuses {
                self.link.redial_refused();
            } else {
                self.link.redial_later();
            }
        }
    }
}
