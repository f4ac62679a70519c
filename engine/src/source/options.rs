//! How a source is asked to serve, and why it cannot start so.

use super::AfterRefusal;
use super::pacing::Background;
use super::precopy::Precopy;
use super::release::{Release, ReleaseError};
use super::{SessionId, SourceLedger, SourceMemory, SourceRecord};
use crate::reconnect::Reconnect;
use crate::threads::ThreadHook;
use crate::transport::Plaintext;
use afterimage_protocol::session::SourceConfig;
use afterimage_protocol::wire::{Capabilities, Channel, SessionKind};
use std::io;
use std::time::Duration;

/// How a source serves.
#[derive(Debug)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Background streams, 1 to 16.
    pub streams: u16,
    /// How fast what nobody has asked for is sent; in a snapshot, to each destination.
    pub background: Background,
    /// The same before the switchover, if it is to be another.
    pub precopy_background: Option<Background>,
    /// Whether memory is sent while the guest still runs here. Where one side cannot do it,
    /// [`SourceEvent::SwitchoverDue`](super::SourceEvent::SwitchoverDue) says so at once.
    pub precopy: Option<Precopy>,
    /// Holds the guest from the start: see [`Source::hold`](super::Source::hold).
    pub hold: bool,
    /// How long a thread that answers requests polls before it blocks; zero never polls.
    pub polling: Duration,
    /// How often a side that has nothing to say says so.
    pub heartbeat: Duration,
    /// How long a side may be silent before its connection is taken for dead. At the default,
    /// 800 ms, a link that breaks without a word is noticed within a second; longer than the
    /// longest time that either side may get no core.
    pub silence: Duration,
    /// What happens when the link is lost. Sessions of a snapshot server are always automatic.
    pub reconnect: Reconnect,
    /// Whether frames carry checksums, if the destination can do it too.
    pub checksums: Checksums,
    /// Whether memory may travel unencrypted beyond this machine.
    pub plaintext: Plaintext,
    /// What to continue after a restart; a new session with a random id otherwise.
    pub record: SourceRecord,
    /// Where the ownership record goes.
    pub ledger: SourceLedger,
    /// Whether pages are freed here once they have arrived, while the migration runs.
    pub release: Release,
    /// What becomes of a guest that the destination refuses
    /// ([`Destination::refuse`](crate::Destination::refuse)).
    pub after_refusal: AfterRefusal,
    /// Called on every thread of the engine.
    pub threads: ThreadHook,
}

/// Whether frames carry a CRC-32C.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Checksums {
    /// TCP's own must do.
    #[default]
    Off,
    /// On every frame, verified before a page is complete.
    On,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            streams: 1,
            background: Background::default(),
            precopy_background: None,
            precopy: None,
            hold: false,
            polling: Duration::from_micros(50),
            heartbeat: Duration::from_millis(200),
            silence: Duration::from_millis(800),
            reconnect: Reconnect::Automatic,
            checksums: Checksums::Off,
            plaintext: Plaintext::LoopbackOnly,
            record: SourceRecord::new(SessionId(crate::sys::random_id())),
            ledger: SourceLedger::volatile(),
            release: Release::Keep,
            after_refusal: AfterRefusal::TakeBack,
            threads: ThreadHook::default(),
        }
    }
}

impl SourceOptions {
    pub(crate) fn capabilities(&self) -> Capabilities {
        let checksums = match self.checksums {
            Checksums::Off => Capabilities::default(),
            Checksums::On => Capabilities::CHECKSUMS,
        };
        match self.precopy {
            Some(_) => checksums.with(Capabilities::PRECOPY),
            None => checksums,
        }
    }

    /// The data channels of a session.
    pub(crate) fn channels(&self) -> impl Iterator<Item = Channel> + use<> {
        std::iter::once(Channel::Request(0)).chain((0..self.streams).map(Channel::Background))
    }

    pub(super) fn config(&self, kind: SessionKind, memory: &SourceMemory) -> SourceConfig {
        SourceConfig {
            kind,
            layout: memory.layout().clone(),
            streams: self.streams,
            shards: 1,
            heartbeat: self.heartbeat,
            silence: self.silence,
            capabilities: self.capabilities(),
            releasing: self.release.releasing(),
            after_refusal: self.after_refusal,
        }
    }

    pub(super) fn check(&self, memory: &SourceMemory) -> Result<(), StartError> {
        if !(1..=16).contains(&self.streams) {
            return Err(StartError::Streams { streams: self.streams });
        }
        if self.heartbeat.as_millis() == 0 || self.silence.as_millis() <= self.heartbeat.as_millis()
        {
            return Err(StartError::Heartbeat { heartbeat: self.heartbeat, silence: self.silence });
        }
        let offer = self.config(SessionKind::Migration, memory).offer();
        offer.check().map_err(|error| StartError::Offer { reason: error.to_string() })
    }
}

/// Why a session could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A number of background streams that is not allowed.
    #[error("{streams} background streams: 1 to 16 are allowed")]
    Streams {
        /// How many were asked for.
        streams: u16,
    },
    /// Times that cannot work.
    #[error(
        "a heartbeat each {heartbeat:?} and death after {silence:?} of silence: the heartbeat must \
         be at least 1 ms and the silence longer"
    )]
    Heartbeat {
        /// Between heartbeats.
        heartbeat: Duration,
        /// Until death.
        silence: Duration,
    },
    /// Parameters or a layout that cannot travel.
    #[error("the session cannot be offered: {reason}")]
    Offer {
        /// What is wrong.
        reason: String,
    },
    /// The image is of other memory than the destination's, or not all of it is in files.
    #[error("the image cannot be used: {reason}")]
    Image {
        /// What is wrong; where memory differs, the image is called the source.
        reason: String,
    },
    /// Pages cannot be freed as was asked for, or some were and it is not known which.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// The system refuses something.
    #[error("could not start the session")]
    Io(#[from] io::Error),
}
