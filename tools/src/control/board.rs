//! What is known of the session: written by whoever hears of it, read by whoever is asked.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::Instant;

use crossbeam_channel::Sender;
use mio::Waker;
use serde_json::Value;

use super::Identity;
use super::controlled::{Controlled, Counts, Parameters};
use super::happening::Happening;
use super::state::{Image, Now, Phase, State};
use super::words::{self, Greeting, Refusal, SCHEMA_VERSION};
use crate::logging;

/// To the thread that talks to clients.
#[derive(Clone, Debug)]
pub(super) struct Outlet {
    sender: Sender<News>,
    waker: Arc<Waker>,
}

/// What that thread is told.
#[derive(Debug)]
pub(super) enum News {
    /// An event, as a line, with its number.
    Happened { sequence: u64, line: String },
    /// The answer to a client's request, as a line.
    Answered { client: usize, line: String },
    /// Nothing more is to be done; with how it ended.
    Stop(String),
    /// Nothing is under way any more.
    AllAnswered,
}

impl Outlet {
    pub(super) const fn new(sender: Sender<News>, waker: Arc<Waker>) -> Self {
        Self { sender, waker }
    }

    pub(super) fn tell(&self, news: News) {
        // Nobody listens any more when it is over.
        if self.sender.send(news).is_ok()
            && let Err(error) = self.waker.wake()
        {
            tracing::error!(%error, "the control socket's thread cannot be woken");
        }
    }

    pub(super) fn stop(&self, outcome: &str) {
        self.tell(News::Stop(outcome.to_owned()));
    }
}

/// The state, and who can be asked for more and told to do things.
pub(super) struct Board {
    identity: Identity,
    begun: Instant,
    /// Held while something happens whose place among the events matters.
    order: Mutex<()>,
    state: Mutex<State>,
    /// Held for reading while it is used, so that who takes it away has the last handle.
    subject: RwLock<Option<Arc<dyn Controlled>>>,
    /// What it said last.
    counted: Mutex<(Option<Counts>, Parameters)>,
    outlet: Option<Outlet>,
}

impl fmt::Debug for Board {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Board").field("identity", &self.identity).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    pub(super) fn new(identity: Identity, outlet: Option<Outlet>) -> Self {
        Self {
            identity,
            begun: Instant::now(),
            order: Mutex::new(()),
            state: Mutex::new(State::new()),
            subject: RwLock::new(None),
            counted: Mutex::new((None, Parameters::default())),
            outlet,
        }
    }

    pub(super) fn greeting(&self) -> Greeting {
        Greeting {
            schema_version: SCHEMA_VERSION,
            tool: self.identity.tool.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            role: self.identity.role.to_owned(),
            session: lock(&self.state).session.clone(),
        }
    }

    /// All that is known now, and the number of the last event in it. Does not wait: where the
    /// session is being taken apart, the counts are those before.
    pub(super) fn image(&self) -> Image {
        match self.subject.try_read() {
            Ok(subject) => self.count(subject.as_deref()),
            Err(TryLockError::Poisoned(subject)) => self.count(subject.into_inner().as_deref()),
            Err(TryLockError::WouldBlock) => {}
        }
        let (counts, parameters) = lock(&self.counted).clone();
        let state = lock(&self.state).clone();
        let now = Now::since(self.begun);
        Image { identity: self.identity, state, counts, parameters, now }
    }

    fn count(&self, subject: Option<&dyn Controlled>) {
        if let Some(subject) = subject {
            *lock(&self.counted) = (Some(subject.counts()), subject.parameters());
        }
    }

    /// The number of the last event in `image`.
    pub(super) fn sequence(image: &Image) -> u64 {
        image.state.sequence
    }

    /// How things stand, as an event of no importance to the state.
    pub(super) fn progress(&self) -> String {
        let image = self.image();
        let mut told = image.to_json();
        told["event"] = Value::from("progress");
        words::line(&told)
    }

    /// Asks the side to do something. May wait.
    pub(super) fn ask<T>(
        &self,
        what: impl FnOnce(&dyn Controlled) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let subject = self.subject.read().unwrap_or_else(PoisonError::into_inner);
        let subject = subject.as_deref().ok_or_else(|| {
            Refusal::not_now("there is no session here now: it has not begun, or is over")
        })?;
        what(subject)
    }

    /// The same for something that is an event itself, which comes before all that follows
    /// from it. What is asked must not wait for whoever tells events.
    pub(super) fn ask_in_order(
        &self,
        what: impl FnOnce(&dyn Controlled) -> Result<(), Refusal>,
        event: impl FnOnce(&dyn Controlled) -> Happening,
    ) -> Result<(), Refusal> {
        let _order = lock(&self.order);
        let happening = self.ask(|subject| what(subject).map(|()| event(subject)))?;
        self.happened(happening, |_| {});
        Ok(())
    }

    fn note(&self, happening: Happening) {
        let _order = lock(&self.order);
        self.happened(happening, |_| {});
    }

    /// The last event, which is not told to whoever talks to clients, because it asks for it.
    pub(super) fn closing(&self, outcome: &str) -> (u64, String) {
        let mut state = lock(&self.state);
        let told = Happening::closing(outcome).apply(&mut state, Now::since(self.begun));
        (state.sequence, words::line(&told))
    }

    fn happened(&self, happening: Happening, before: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        before(&mut state);
        let told = happening.apply(&mut state, Now::since(self.begun));
        // Under the lock, so that events leave in the order of their numbers.
        if let Some(outlet) = &self.outlet {
            outlet.tell(News::Happened { sequence: state.sequence, line: words::line(&told) });
        }
    }
}

/// Where happenings are told, and where the session is that can be driven.
#[derive(Clone, Debug)]
pub struct Desk(Arc<Board>);

impl Desk {
    pub(super) fn new(board: Board) -> Self {
        Self(Arc::new(board))
    }

    pub(super) const fn shared(board: Arc<Board>) -> Self {
        Self(board)
    }

    /// A session has begun over so many bytes of guest memory, and can be driven. Its id, if it
    /// is known, is told before by [`name`](Self::name).
    pub fn begin(&self, phase: Phase, bytes: u64, subject: Arc<dyn Controlled>) {
        *self.0.subject.write().unwrap_or_else(PoisonError::into_inner) = Some(subject);
        let _order = lock(&self.0.order);
        self.0.happened(Happening::begun(phase), |state| state.memory_bytes = bytes);
    }

    /// The session's id is known; a destination learns it from its source.
    pub fn name(&self, session: &str) {
        logging::set_session(session);
        lock(&self.0.state).session = Some(session.to_owned());
    }

    /// Something has happened.
    pub fn note(&self, happening: impl Into<Happening>) {
        self.0.note(happening.into());
    }

    /// The session is going to be taken apart: waits for what is being done with it, and lets
    /// go of it.
    pub fn detach(&self) {
        self.0.image();
        let subject = self.0.subject.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(subject);
    }
}
