//! The data channels of a destination: made or accepted in their epoch, and replaced one by
//! one.

use super::super::arrivals::Arrivals;
use super::super::faults::{Image, Order};
use super::super::receive::Receiver;
use super::{Driver, Input};
use crate::slots::Party;
use crate::threads::{self, ThreadRole};
use crate::transport::{Stream, answer_with, refuse};
use afterimage_protocol::wire::{
    Channel, ControlFrame, Epoch, Generation, Hello, Refusal, Role, Stamp,
};
use std::io;
use std::thread::JoinHandle;

/// A background channel of the present epoch.
pub(super) struct Background {
    generation: Generation,
    stream: Stream,
    thread: JoinHandle<()>,
}

impl Driver {
    pub(super) fn open_channels(&mut self, stamp: Stamp, streams: u16) {
        self.arrivals =
            Some(self.arrived.on(stamp.epoch, self.link.checksums(), self.session.can_precopy()));
        self.link.watch(self.silence());
        if self.session.is_snapshot()
            && let Some(image) = self.options.image.take()
        {
            self.faults.send(Order::TakeFrom(Image::new(image)));
        }
        let background = (0..streams).map(Channel::Background);
        self.slots.open(stamp.epoch, std::iter::once(Channel::Request(0)).chain(background));
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
            role: Role::Destination,
            channel,
            stamp,
            capabilities: self.session.capabilities(),
            session: record.session,
            incarnation: record.incarnation,
        }
    }

    pub(super) fn accept_data(&mut self, stream: Stream, hello: Hello) {
        let record = self.session.record();
        let (session, incarnation) = (record.session, Some(record.incarnation));
        let party = Party { role: Role::Destination, session, incarnation };
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
        let Some(arrivals) = self.arrivals.clone().filter(|_| self.slots.is_present(stamp.epoch))
        else {
            stream.shut_down();
            return;
        };
        self.link.data.opened(channel);
        if let Err(error) = stream.watch(self.silence()) {
            tracing::debug!(%error, %channel, "a data channel cannot be watched");
        }
        let generation = stamp.generation;
        if matches!(channel, Channel::Request(_)) {
            let silence = self.silence();
            self.faults.send(Order::Ask { stream, arrivals, generation, silence });
            return;
        }
        if let Some(old) = self.background.remove(&channel) {
            old.stream.shut_down();
            self.ended.retain(|thread| !thread.is_finished());
            self.ended.push(old.thread);
        }
        match self.start_background(arrivals, channel, &stream, generation) {
            Ok(thread) => {
                self.background.insert(channel, Background { generation, stream, thread });
            }
            Err(error) => {
                tracing::error!(%error, %channel, "a data channel cannot be received");
                stream.shut_down();
                self.replace(channel, stamp);
            }
        }
    }

    fn start_background(
        &self,
        arrivals: Arrivals,
        channel: Channel,
        stream: &Stream,
        generation: Generation,
    ) -> io::Result<JoinHandle<()>> {
        let stream = stream.clone();
        stream.prepare_background(self.silence())?;
        let driver = self.outlet.clone();
        let slot = match channel {
            Channel::Background(slot) => usize::from(slot),
            _ => 0,
        };
        threads::spawn(&self.options.threads, ThreadRole::Background, slot, move || {
            if let Err(error) = Receiver::new(&arrivals, stream.clone(), generation).run() {
                tracing::info!(%error, %channel, "a data channel ended");
            }
            stream.shut_down();
            let stamp = arrivals.stamp(generation);
            driver.send(Input::DataEnded { channel, stamp });
        })
    }

    pub(super) fn data_ended(&mut self, channel: Channel, stamp: Stamp) {
        if !self.slots.is_present(stamp.epoch) {
            return;
        }
        if matches!(channel, Channel::Background(_)) {
            let present = self.background.get(&channel);
            if present.is_none_or(|present| present.generation != stamp.generation) {
                return;
            }
            if let Some(ended) = self.background.remove(&channel) {
                threads::join(ended.thread);
            }
        } else if !self.slots.is_newest(channel, stamp) {
            return;
        }
        if !self.session.is_over() {
            self.replace(channel, stamp);
        }
    }

    /// A channel has ended, or could not be used: another one is made.
    fn replace(&mut self, channel: Channel, stamp: Stamp) {
        if self.link.dials() {
            self.link.data.ended(channel, stamp.epoch);
        } else {
            // The source may not have noticed.
            let generation = stamp.generation;
            self.link.send(&ControlFrame::Renew { channel, generation });
        }
    }

    /// The source has given a channel up.
    pub(super) fn renew(&self, channel: Channel, generation: Generation) {
        if matches!(channel, Channel::Request(_)) {
            self.faults.send(Order::GiveUp(generation));
        } else if let Some(background) = self.background.get(&channel)
            && background.generation == generation
        {
            tracing::info!(%channel, "the source has given a data channel up");
            background.stream.shut_down();
        }
    }

    pub(super) fn hang_up(&mut self, refusal: Option<Refusal>) {
        let refuses = refusal.is_some();
        if let Some(refusal) = refusal {
            self.link.send(&ControlFrame::Refuse(refusal));
        }
        self.link.disconnect();
        self.slots.close();
        self.arrivals = None;
        self.faults.send(Order::Wait);
        for (_, channel) in std::mem::take(&mut self.background) {
            channel.stream.shut_down();
            self.ended.push(channel.thread);
        }
        // Their sockets are shut down: they do not wait.
        for thread in self.ended.drain(..) {
            threads::join(thread);
        }
        if !self.session.is_over() {
            if refuses {
                self.link.redial_refused();
            } else {
                self.link.redial_later();
            }
        }
    }
}
