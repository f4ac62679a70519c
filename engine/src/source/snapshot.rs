//! Serving one image to any number of destinations.
//!
//! Each destination has a session thread of its own, with its own books; what they share is
//! the listener and the memory, which nobody writes. Nobody gives anything away: a
//! destination may run when it likes.

use super::driver::Input;
use super::{
    Background, Release, ReleaseError, Source, SourceEvent, SourceMemory, SourceOptions,
    SourceShared, StartError,
};
use crate::events::{self, EventSender, Events};
use crate::inbox::{Inbox, Outlet};
use crate::session_link::{INBOX, Line, SessionLink};
use crate::stats::SourceStats;
use crate::threads::{self, ThreadRole};
use crate::transport::{Accepted, Acceptor, Listener, refuse};
use afterimage_protocol::session::SourceRecord;
use afterimage_protocol::wire::{
    Channel, Incarnation, Refusal, RefuseCode, Role, SessionId, SessionKind,
};
use mio::Poll;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the destinations of a snapshot have got so far.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SnapshotStats {
    /// One entry a destination that is or was connected.
    pub destinations: Vec<(Incarnation, SourceStats)>,
}

/// Serves an image to many destinations. Dropped, it cuts them off.
#[derive(Debug)]
pub struct SnapshotServer {
    session: SessionId,
    room: Arc<Mutex<Room>>,
    acceptor: Option<Acceptor>,
}

#[derive(Debug)]
struct Guest {
    outlet: Outlet<Input>,
    shared: Arc<SourceShared>,
    source: Source,
    presence: Presence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Presence {
    Connected,
    /// Its connection is gone; it may come back, unless its place is needed.
    Away,
    /// It has everything that it needs.
    Done,
}

#[derive(Debug)]
struct Room {
    guests: BTreeMap<Incarnation, Guest>,
    most: usize,
    /// Of each destination, those that are still to come included.
    background: Background,
}

fn lock(room: &Mutex<Room>) -> MutexGuard<'_, Room> {
    room.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What each destination's session is started with.
#[derive(Debug)]
struct Template {
    memory: Arc<SourceMemory>,
    options: SourceOptions,
    events: EventSender<(Incarnation, SourceEvent)>,
}

impl SnapshotServer {
    /// Serves `memory` to at most `most` destinations at a time. `options.record` names the
    /// session; its ledger is not used, because there is no ownership, and nothing may be freed
    /// ([`Release::Keep`]).
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        memory: Arc<SourceMemory>,
        listener: Listener,
        options: SourceOptions,
        most: usize,
    ) -> Result<(Self, Events<(Incarnation, SourceEvent)>), StartError> {
        options.check(&memory)?;
        if !matches!(options.release, Release::Keep) {
            return Err(ReleaseError::Snapshot.into());
        }
        let (sender, events) = events::channel()?;
        let background = options.background;
        let room = Arc::new(Mutex::new(Room { guests: BTreeMap::new(), most, background }));
        let session = options.record.session;
        let hook = options.threads.clone();
        let template = Template { memory, options, events: sender };
        let shared = Arc::clone(&room);
        let acceptor = Acceptor::start(listener, &hook, move |accepted| {
            template.route(&shared, accepted);
        })?;
        Ok((Self { session, room, acceptor: Some(acceptor) }, events))
    }

    /// The session's id.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// Changes how fast what nobody has asked for is sent to each destination, at once, also
    /// to those that are still to come. It is each one's own rate: `n` destinations together
    /// may get `n` times as much. See [`Source::set_background`].
    pub fn set_background(&self, background: Background) {
        let mut room = lock(&self.room);
        room.background = background;
        for guest in room.guests.values() {
            guest.source.set_background(background);
        }
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> SnapshotStats {
        let room = lock(&self.room);
        let destinations =
            room.guests.iter().map(|(name, guest)| (*name, guest.shared.stats())).collect();
        SnapshotStats { destinations }
    }

    /// How many destinations still lack pages.
    #[must_use]
    pub fn unfinished(&self) -> usize {
        lock(&self.room).guests.values().filter(|guest| guest.presence != Presence::Done).count()
    }
}

impl Drop for SnapshotServer {
    fn drop(&mut self) {
        // Nobody new first; then the sessions end, each joining its threads.
        drop(self.acceptor.take());
        let guests = std::mem::take(&mut lock(&self.room).guests);
        drop(guests);
    }
}

impl Template {
    /// Finds or makes the session of the destination that a connection belongs to.
    fn route(&self, room: &Arc<Mutex<Room>>, accepted: Accepted) {
        let incarnation = accepted.hello.incarnation;
        let known = lock(room).guests.get(&incarnation).map(|guest| guest.outlet.clone());
        if let Some(outlet) = known {
            outlet.send(Input::Accepted(accepted));
            return;
        }
        if let Err(refusal) = self.admits(room, &accepted) {
            refuse(&accepted.stream, refusal);
            return;
        }
        match self.seat(room, incarnation) {
            Ok(outlet) => drop(outlet.send(Input::Accepted(accepted))),
            Err(error) => {
                tracing::error!(%error, "a destination cannot be served");
                let reason = "the server is short of something it needs; see its log";
                refuse(&accepted.stream, Refusal::new(RefuseCode::Failed, reason));
            }
        }
    }

    fn admits(&self, room: &Mutex<Room>, accepted: &Accepted) -> Result<(), Refusal> {
        let hello = &accepted.hello;
        if hello.role != Role::Destination {
            return Err(Refusal::new(RefuseCode::Role, "a snapshot is served to destinations"));
        }
        let session = self.options.record.session;
        if hello.session != SessionId::UNKNOWN && hello.session != session {
            let reason = format!("session {} is not served here, {session} is", hello.session);
            return Err(Refusal::new(RefuseCode::UnknownSession, reason));
        }
        if hello.channel != Channel::Control {
            let reason = "a session begins with its control channel";
            return Err(Refusal::new(RefuseCode::Protocol, reason));
        }
        let mut room = lock(room);
        if room.guests.len() >= room.most {
            // Those who have everything or have gone make room. One that comes back begins
            // anew, from its planes.
            room.guests.retain(|_, guest| {
                guest.presence == Presence::Connected && !guest.shared.is_away()
            });
        }
        if room.guests.len() >= room.most {
            let reason = format!("{} destinations are being served already", room.most);
            return Err(Refusal::new(RefuseCode::TooMany, reason));
        }
        Ok(())
    }

    fn seat(
        &self,
        room: &Arc<Mutex<Room>>,
        name: Incarnation,
    ) -> Result<Outlet<Input>, StartError> {
        let poll = Poll::new()?;
        let (inbox, outlet) = Inbox::new(&poll, INBOX)?;
        let options = SourceOptions {
            streams: self.options.streams,
            polling: self.options.polling,
            heartbeat: self.options.heartbeat,
            silence: self.options.silence,
            checksums: self.options.checksums,
            plaintext: self.options.plaintext,
            record: SourceRecord::new(self.options.record.session),
            threads: self.options.threads.clone(),
            ..SourceOptions::default()
        };
        let (source, events) = Source::run(
            Arc::clone(&self.memory),
            SessionKind::Snapshot,
            SessionLink::new(poll, Line::Fed),
            inbox,
            outlet.clone(),
            options,
        )?;
        let shared = Arc::clone(&source.shared);
        let presence = Presence::Connected;
        let mut seats = lock(room);
        // Before its first connection is handed to it: nothing has left at another rate.
        source.set_background(seats.background);
        let guest = Guest { outlet: outlet.clone(), shared, source, presence };
        seats.guests.insert(name, guest);
        drop(seats);
        self.relay(room, name, events)?;
        Ok(outlet)
    }

    /// Tells the events of one destination with its name.
    fn relay(
        &self,
        room: &Arc<Mutex<Room>>,
        name: Incarnation,
        events: Events<SourceEvent>,
    ) -> io::Result<()> {
        let sender = self.events.clone();
        let room = Arc::downgrade(room);
        let relay = move || {
            // Ends with the session's thread.
            while let Some(event) = events.next() {
                let presence = match event {
                    SourceEvent::Finished | SourceEvent::Left => Some(Presence::Done),
                    SourceEvent::Disconnected => Some(Presence::Away),
                    SourceEvent::Attached(_) => Some(Presence::Connected),
                    _ => None,
                };
                if let (Some(presence), Some(room)) = (presence, room.upgrade())
                    && let Some(guest) = lock(&room).guests.get_mut(&name)
                    && guest.presence != Presence::Done
                {
                    guest.presence = presence;
                }
                sender.send((name, event));
            }
        };
        threads::spawn(&self.options.threads, ThreadRole::Control, 1, relay).map(drop)
    }
}
