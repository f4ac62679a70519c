//! Who brings the guest's pages to the destination: the engine in its own process, or a
//! page-client.
//!
//! Invariant: memory that a page-client serves stays registered until that says that every page
//! is in place.

use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage::{
    CallError, Destination, DestinationEvent, DestinationMemory, DestinationOptions, Endpoint,
    Events, NoEvent, Plaintext, StateSection,
};

use super::error::DemoError;
use super::messages::{Setup, Stats, now_us};
use super::source::checksums;
use crate::attachment::{Attachment, AttachmentEvent};
use crate::control::{Desk, DestinationControl, Phase};

/// What the guest is called by its VMM.
const NAME: &str = "demo";

/// Whoever brings the pages.
pub(super) enum Served {
    /// The engine.
    Here {
        destination: Arc<Destination>,
        events: Events<DestinationEvent>,
        started_at_us: u64,
        desk: Desk,
    },
    /// A page-client. The memory goes when all of it is there.
    Elsewhere { attachment: Attachment, memory: RefCell<Option<DestinationMemory>> },
}

/// What a VMM has to know of either.
pub(super) enum Happening {
    State(Vec<StateSection>),
    Run,
    AllArrived,
    Finished,
    Attached,
    /// The guest must not run here, and why.
    NotHere(String),
    /// Nothing that concerns the guest.
    Other,
}

impl Served {
    /// By the engine, from a source at this address.
    pub(super) fn here(
        memory: DestinationMemory,
        address: &str,
        setup: &Setup,
        desk: Desk,
    ) -> Result<Self, DemoError> {
        let address = address
            .parse()
            .map_err(|error| DemoError::failed("cannot connect to the source", &error))?;
        let mut options = DestinationOptions::default();
        options.checksums = checksums(setup);
        let bytes = memory.layout().bytes();
        let started_at_us = now_us();
        let (destination, events) = Destination::start(memory, Endpoint::Connect(address), options)
            .map_err(|error| DemoError::failed("cannot start the destination", &error))?;
        let destination = Arc::new(destination);
        let subject = DestinationControl {
            destination: Arc::clone(&destination),
            plaintext: Plaintext::LoopbackOnly,
        };
        desk.begin(Phase::Connecting, bytes, Arc::new(subject));
        Ok(Self::Here { destination, events, started_at_us, desk })
    }

    /// By the page-client at this socket.
    pub(super) fn elsewhere(memory: DestinationMemory, path: &Path) -> Result<Self, DemoError> {
        let attachment = Attachment::attach(path, NAME, &memory)
            .map_err(|error| DemoError::failed("cannot have the memory served", &error))?;
        Ok(Self::Elsewhere { attachment, memory: RefCell::new(Some(memory)) })
    }

    /// The engine's destination, if it is in this process.
    pub(super) fn destination(&self) -> Option<&Destination> {
        match self {
            Self::Here { destination, .. } => Some(destination),
            Self::Elsewhere { .. } => None,
        }
    }

    /// What has arrived, if it is known here.
    pub(super) fn stats(&self) -> Option<Stats> {
        match self {
            Self::Here { destination, started_at_us, .. } => {
                Some(Stats::of(&destination.stats(), *started_at_us))
            }
            Self::Elsewhere { .. } => None,
        }
    }

    /// The guest could run.
    pub(super) fn ready(&self) -> Result<(), DemoError> {
        match self {
            Self::Here { destination, .. } => match destination.ready() {
                // It was taken back meanwhile, as an event says that is on its way.
                Err(CallError::NotNow(why)) => {
                    tracing::info!(%why, "the guest is not wanted here");
                    Ok(())
                }
                answer => answer.map_err(|error| DemoError::failed("cannot get ready", &error)),
            },
            Self::Elsewhere { attachment, .. } => {
                attachment.ready();
                Ok(())
            }
        }
    }

    /// What happens next, if it does within this time.
    pub(super) fn next(&self, most: Duration) -> Result<Option<Happening>, DemoError> {
        match self {
            Self::Here { events, desk, .. } => match events.next_timeout(most) {
                Ok(event) => {
                    if let DestinationEvent::Attached(session) = &event {
                        desk.name(&session.to_string());
                    }
                    desk.note(&event);
                    of_the_engine(event).map(Some)
                }
                Err(NoEvent::NotInTime) => Ok(None),
                Err(NoEvent::Ended) => {
                    Err(DemoError::Failed("the engine ended too early".to_owned()))
                }
            },
            Self::Elsewhere { attachment, memory } => {
                let begun = Instant::now();
                let Some(event) = attachment.next(most) else {
                    // It answers at once where nothing comes any more.
                    std::thread::sleep(most.saturating_sub(begun.elapsed()));
                    return Ok(None);
                };
                of_page_client(event, memory).map(Some)
            }
        }
    }
}

fn of_the_engine(event: DestinationEvent) -> Result<Happening, DemoError> {
    Ok(match event {
        DestinationEvent::State(sections) => Happening::State(sections),
        DestinationEvent::Run => Happening::Run,
        DestinationEvent::AllArrived => Happening::AllArrived,
        DestinationEvent::Finished => Happening::Finished,
        DestinationEvent::Attached(_) => Happening::Attached,
        DestinationEvent::Disconnected
        | DestinationEvent::Paused
        | DestinationEvent::SourceStopped => Happening::Other,
        DestinationEvent::Refused => {
            Happening::NotHere("the source has taken the guest back".to_owned())
        }
        DestinationEvent::Ended(reason) => Happening::NotHere(reason),
        event => return Err(DemoError::Failed(format!("the engine said {event:?}"))),
    })
}

fn of_page_client(
    event: AttachmentEvent,
    memory: &RefCell<Option<DestinationMemory>>,
) -> Result<Happening, DemoError> {
    Ok(match event {
        AttachmentEvent::State(sections) => Happening::State(sections),
        AttachmentEvent::Run => Happening::Run,
        AttachmentEvent::AllArrived => {
            if let Some(memory) = memory.take() {
                memory.all_arrived();
            }
            Happening::AllArrived
        }
        AttachmentEvent::Finished => Happening::Finished,
        event @ (AttachmentEvent::Lost | AttachmentEvent::Back) => {
            tracing::info!(?event, "page-client");
            Happening::Other
        }
        event @ (AttachmentEvent::Attached | AttachmentEvent::Refused(_)) => {
            return Err(DemoError::Failed(format!("page-client says {event:?} to a VMM")));
        }
        AttachmentEvent::NotHere(reason) => Happening::NotHere(reason),
        AttachmentEvent::Failed(reason) => {
            return Err(DemoError::Failed(format!("page-client has failed: {reason}")));
        }
    })
}
