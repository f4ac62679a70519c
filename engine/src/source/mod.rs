//! The side that has the memory: serves page requests and sends the rest in background.

mod background;
mod by_hand;
pub(crate) mod driver;
mod hands;
mod memory;
mod options;
mod pacing;
mod precopy;
mod release;
mod request;
mod serving;
mod snapshot;

pub use memory::{MemoryLifetime, SourceMemory, SourceMemoryError, SourceRegion};
pub use options::{Checksums, SourceOptions, StartError};
pub use pacing::Background;
pub use precopy::{PassReport, Passes, Precopy, SwitchoverCause};
pub use release::{Release, ReleaseError, ReleaseLedger};
pub use snapshot::{SnapshotServer, SnapshotStats};

use crate::agreed::{Agreed, AgreedCell};
use crate::events::{self, Events};
use crate::inbox::{Inbox, Outlet};
use crate::ledger::Record;
use crate::session_link::{INBOX, Line, SessionLink, forward};
use crate::stats::{SourceCounters, SourceStats};
use crate::sys::words::LazyWords;
use crate::threads::{self, ThreadHook, ThreadRole};
use crate::transport::{Acceptor, Address, Dialer, Listener, Plaintext};
use afterimage_protocol::layout::{PageNumber, PageRange};
pub use afterimage_protocol::session::{AfterRefusal, SourceOwnership, SourcePages, SourceRecord};
use afterimage_protocol::session::{Book, NotNow, SourceSession};
use afterimage_protocol::wire::SessionKind;
pub use afterimage_protocol::wire::{Incarnation, SessionId};
use driver::{Call, Driver, Input, Passing};
use mio::Poll;
use pacing::Pace;
use release::Released;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A named piece of device state; what is in it is the VMM's affair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// Its name, 1 to 255 bytes.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// Its content.
    pub bytes: Vec<u8>,
}

impl StateSection {
    fn check(&self) -> Result<(), CallError> {
        match self.name.len() {
            1..=255 => Ok(()),
            length => Err(CallError::SectionName { length }),
        }
    }
}

/// Makes a source's ownership record durable; called on a thread of its own
/// ([`ThreadRole::Ledger`]). The session waits for it and goes on sending heartbeats; what the
/// destination asks for is answered meanwhile.
pub struct SourceLedger(pub(crate) Record<SourceRecord>);

impl SourceLedger {
    /// A ledger that calls `function`, which must return only when the record would survive
    /// a power failure.
    pub fn new(function: impl FnMut(&SourceRecord) -> io::Result<()> + Send + 'static) -> Self {
        Self(Some(Box::new(function)))
    }

    /// Remembers nothing. For a source whose process takes the guest with it when it dies:
    /// a guest in private memory that has not been given away ends with the process, and
    /// one that has been must not be started from the same image again by anybody.
    #[must_use]
    pub const fn volatile() -> Self {
        Self(None)
    }
}

impl std::fmt::Debug for SourceLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SourceLedger")
    }
}

/// What happens to a source, as told to the VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// A destination is connected and has been accepted.
    Attached(Incarnation),
    /// The connection is gone; nothing is lost, and it is made again, unless
    /// [`Paused`](Self::Paused) follows.
    Disconnected,
    /// There is no connection, and none is made or taken until [`Source::recover`]: by
    /// [`Source::pause`], or because the link was lost under
    /// [`Reconnect::ByHand`](crate::Reconnect::ByHand).
    Paused,
    /// A precopy pass has ended: everything that belongs to it has arrived.
    PassEnded(PassReport),
    /// It is time to stop the guest's vCPUs and call [`Source::switch_over`]; told once.
    /// Precopy goes on, where that helps, until it is called.
    SwitchoverDue(SwitchoverCause),
    /// The vCPUs are stopped: memory is final.
    Stopped,
    /// The destination is ready, and the guest is held: [`Source::proceed`] gives it away.
    Held,
    /// The destination has restored the device state.
    Ready,
    /// The guest was given away: from here this side may not run it.
    Given,
    /// The destination runs the guest.
    Running,
    /// The guest is this side's again, for good.
    Reclaimed,
    /// The destination will not run the guest, on record there, and was not asked:
    /// [`Reclaimed`](Self::Reclaimed) follows, or the next destination may have it
    /// ([`SourceOptions::after_refusal`]).
    Refused,
    /// The destination runs the guest already and keeps it.
    ReclaimDenied,
    /// The destination of a snapshot needs nothing more, although it lacks pages: its VM has ended.
    Left,
    /// Everything has arrived; the session is over.
    Finished,
    /// The ownership record could not be made durable; what needed it did not happen, and
    /// is tried again with the next connection, or in a while.
    PersistFailed,
    /// The destination lacks pages that were freed here, and is refused: not all the memory
    /// in which the guest ran has come back. Told once, however often it comes.
    Lost {
        /// The first of them, as the destination numbers them.
        first: PageNumber,
        /// How many of its pages.
        count: u64,
    },
}

/// A call that could not be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// Not in this state of the session.
    #[error(transparent)]
    NotNow(#[from] NotNow),
    /// A section of device state whose name is too short or too long.
    #[error("a section of device state has a name of {length} bytes: 1 to 255 are allowed")]
    SectionName {
        /// Bytes in its name.
        length: usize,
    },
    /// The endpoint to recover at cannot be used; the one before is as it was.
    #[error("the new endpoint cannot be used ({0}): free descriptors or threads, then try again")]
    Endpoint(io::ErrorKind),
    /// The session's thread has ended.
    #[error("the session has been shut down")]
    ShutDown,
}

impl CallError {
    pub(crate) fn of_endpoint(error: &io::Error) -> Self {
        tracing::error!(%error, "the new endpoint cannot be used");
        Self::Endpoint(error.kind())
    }
}

/// Where a session's connections come from.
#[derive(Debug)]
#[non_exhaustive]
pub enum Endpoint {
    /// The other side connects here.
    Listen(Listener),
    /// This side connects there, again and again until the session is over.
    Connect(Address),
}

impl Endpoint {
    pub(crate) fn line<T: Send + 'static>(
        self,
        outlet: &Outlet<T>,
        plaintext: Plaintext,
        hook: &ThreadHook,
        accepted: impl Fn(crate::transport::Accepted) -> T + Send + 'static,
        dialed: impl Fn(crate::transport::Dialed) -> T + Send + 'static,
    ) -> io::Result<Line> {
        let outlet = outlet.clone();
        Ok(match self {
            Self::Listen(listener) => {
                let acceptor = Acceptor::start(listener, hook, forward(outlet, accepted))?;
                Line::Listens { _acceptor: acceptor }
            }
            Self::Connect(address) => {
                let deliver = move |outcome| {
                    outlet.send(dialed(outcome));
                };
                Line::Dials(Dialer::start(address, plaintext, hook, deliver)?)
            }
        })
    }
}

/// How fast the background is, and which of both counts.
#[derive(Debug, Default)]
struct Rates {
    /// Before the switchover; as after it if nothing else was said.
    before: Option<Background>,
    after: Background,
    is_final: bool,
}

/// What the session thread and the handle share.
#[derive(Debug, Default)]
pub(crate) struct SourceShared {
    pub(crate) counters: Arc<SourceCounters>,
    pub(crate) pace: Arc<Pace>,
    book: Mutex<Option<Arc<Book<LazyWords>>>>,
    /// Whether the last connection has gone, even if it never came as far as attaching.
    is_away: AtomicBool,
    rates: Mutex<Rates>,
    agreed: AgreedCell,
    /// Which pages were freed, where that is wanted.
    pub(crate) released: Option<Arc<Released>>,
}

impl SourceShared {
    fn book(&self) -> Option<Arc<Book<LazyWords>>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_rates(&self, change: impl FnOnce(&mut Rates)) {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut rates);
        let before = rates.before.filter(|_| !rates.is_final);
        // Under the lock, so that the last change is the one that counts.
        self.pace.set(before.unwrap_or(rates.after));
    }

    fn set_away(&self, is_away: bool) {
        self.is_away.store(is_away, Ordering::Release);
    }

    fn is_away(&self) -> bool {
        self.is_away.load(Ordering::Acquire)
    }

    fn set_book(&self, book: Arc<Book<LazyWords>>) {
        *self.book.lock().unwrap_or_else(PoisonError::into_inner) = Some(book);
    }

    fn acknowledge(&self, pages: PageRange) {
        if let Some(book) = self.book() {
            book.acknowledge(pages);
        }
    }

    fn stats(&self) -> SourceStats {
        let counters = &self.counters;
        let book = self.book();
        let of = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        SourceStats {
            pages_total: book.as_ref().map_or(0, |book| book.pages()),
            pages_acknowledged: book.as_ref().map_or(0, |book| book.acked_pages()),
            pages_requested: of(&counters.requested),
            pages_background: of(&counters.background),
            pages_precopy: of(&counters.early),
            bytes_sent: of(&counters.bytes),
            pages_zero: of(&counters.zero),
            pages_unreadable: of(&counters.unreadable),
            frames_stale: of(&counters.stale),
            recoveries: of(&counters.recoveries),
            pages_released: self.released.as_ref().map_or(0, |released| released.freed()),
        }
    }
}

/// A source of one migration.
///
/// Its threads serve until the session is over or the handle is dropped. Dropping it before
/// the destination has everything cuts the destination off: a guest that runs there waits in
/// its next fault until a source serves the same session again.
///
/// All methods may be called from any thread.
#[derive(Debug)]
pub struct Source {
    outlet: Outlet<Input>,
    shared: Arc<SourceShared>,
    session: SessionId,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    /// Starts serving `memory` in a migration session. Unless [`SourceOptions::precopy`] says
    /// otherwise, nothing is sent before [`switch_over`](Self::switch_over), but connections are made and checked, so that the
    /// switch itself is short.
    ///
    /// If memory goes with this process ([`MemoryLifetime::Process`]), a warning by `tracing`
    /// says what that costs.
    ///
    /// # Errors
    /// [`StartError`].
    pub fn start(
        memory: Arc<SourceMemory>,
        endpoint: Endpoint,
        options: SourceOptions,
    ) -> Result<(Self, Events<SourceEvent>), StartError> {
        options.check(&memory)?;
        memory.warn_if_it_goes_with_the_process();
        let poll = Poll::new()?;
        let (inbox, outlet) = Inbox::new(&poll, INBOX)?;
        let line = endpoint.line(
            &outlet,
            options.plaintext,
            &options.threads,
            Input::Accepted,
            Input::Dialed,
        )?;
        Self::run(
            memory,
            SessionKind::Migration,
            SessionLink::new(poll, line),
            inbox,
            outlet,
            options,
        )
    }

    /// A session thread on a link that is there.
    fn run(
        memory: Arc<SourceMemory>,
        kind: SessionKind,
        link: SessionLink,
        inbox: Inbox<Input>,
        outlet: Outlet<Input>,
        mut options: SourceOptions,
    ) -> Result<(Self, Events<SourceEvent>), StartError> {
        let (sender, events) = events::channel()?;
        let released = options.release.open(&options.record, &memory)?;
        let shared = Arc::new(SourceShared { released, ..SourceShared::default() });
        shared.set_rates(|rates| {
            *rates = Rates {
                before: options.precopy_background,
                after: options.background,
                is_final: options.precopy.is_none(),
            };
        });
        let mut session = SourceSession::new(options.config(kind, &memory), options.record);
        if options.hold {
            session.hold();
        }
        let passing = match options.precopy.take() {
            None => None,
            Some(precopy) => {
                let hook = &options.threads;
                Some(Passing::new(precopy, memory.layout(), outlet.clone(), hook)?)
            }
        };
        let id = options.record.session;
        let hook = options.threads.clone();
        let driver = Driver::new(
            session,
            link,
            inbox,
            outlet.clone(),
            memory,
            options,
            Arc::clone(&shared),
            sender,
            passing,
        );
        let thread = threads::spawn(&hook, ThreadRole::Control, 0, move || driver.run())?;
        Ok((Self { outlet, shared, session: id, thread: Some(thread) }, events))
    }

    /// The session's id.
    #[must_use]
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// The vCPUs are stopped: sends device state and, if [`stopped`](Self::stopped) has not been
    /// called, begins to send final memory. From here the
    /// guest may run on this side again only after [`SourceEvent::Reclaimed`].
    ///
    /// # Errors
    /// [`CallError`] if it has been called before, the session is over, or a section has a
    /// name that is empty or longer than 255 bytes.
    pub fn switch_over(&self, state: Vec<StateSection>) -> Result<(), CallError> {
        state.iter().try_for_each(StateSection::check)?;
        self.call(Call::SwitchOver(state))
    }

    /// The vCPUs are stopped, and memory is final: [`SourceEvent::Stopped`] follows at once.
    /// Device state may be given later, by [`switch_over`](Self::switch_over), so that it can be
    /// collected while the destination already hears what is left.
    ///
    /// # Errors
    /// [`CallError`] if it has been called before, or the session is over.
    pub fn stopped(&self) -> Result<(), CallError> {
        self.call(Call::Stopped)
    }

    /// Sends a section of device state ahead of the others, once the vCPUs are
    /// [`stopped`](Self::stopped): the destination may restore it meanwhile. May be called many
    /// times; [`switch_over`](Self::switch_over) gives the rest, and says that it was all.
    ///
    /// # Errors
    /// [`CallError`] before `stopped` and after `switch_over`, if the session is over, or if the
    /// section's name is empty or longer than 255 bytes.
    pub fn send_section(&self, section: StateSection) -> Result<(), CallError> {
        section.check()?;
        self.call(Call::Section(section))
    }

    /// Holds the guest where it is although the destination is ready, until
    /// [`proceed`](Self::proceed): [`SourceEvent::Held`] tells when that is the only thing that
    /// it waits for. No effect once the guest was given away.
    ///
    /// # Errors
    /// [`CallError::ShutDown`].
    pub fn hold(&self) -> Result<(), CallError> {
        self.call(Call::Hold)
    }

    /// Ends a [`hold`](Self::hold).
    ///
    /// # Errors
    /// [`CallError`] if nothing is held.
    pub fn proceed(&self) -> Result<(), CallError> {
        self.call(Call::Proceed)
    }

    /// Asks for the guest back. Before it was given away this takes effect at once and ends
    /// the migration; afterwards the destination must agree, which
    /// [`SourceEvent::Reclaimed`] or [`SourceEvent::ReclaimDenied`] tells when it is
    /// connected.
    ///
    /// # Errors
    /// [`CallError`] if the destination is known to run the guest, the session is over, or
    /// pages may have been freed ([`Release`]).
    pub fn reclaim(&self) -> Result<(), CallError> {
        self.call(Call::Reclaim)
    }

    /// Takes the guest back from a destination that is dead for sure, and refuses it for ever.
    /// If it is not dead there will be two guests.
    ///
    /// # Errors
    /// [`CallError`] if the session is over, or pages may have been freed ([`Release`]): the
    /// guest cannot go on here.
    pub fn fence(&self) -> Result<(), CallError> {
        self.call(Call::Fence)
    }

    /// Changes how fast what nobody has asked for is sent, at once: what a stream is sending
    /// at this moment still leaves, and streams that wait go on by the new rate. Kept when the
    /// connection is made again. Does not wait, and may be called at any time.
    pub fn set_background(&self, background: Background) {
        self.shared.set_rates(|rates| rates.after = background);
    }

    /// The same for precopy passes alone, which have the rate of [`set_background`](Self::set_background)
    /// otherwise.
    pub fn set_precopy_background(&self, background: Background) {
        self.shared.set_rates(|rates| rates.before = Some(background));
    }

    /// What this side and its peer have agreed on in the present connection, or the last;
    /// `None` before the first.
    #[must_use]
    pub fn agreed(&self) -> Option<Agreed> {
        self.shared.agreed.get()
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> SourceStats {
        self.shared.stats()
    }

    fn call(&self, call: Call) -> Result<(), CallError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        if !self.outlet.send(Input::Call(call, reply)) {
            return Err(CallError::ShutDown);
        }
        answer.recv().map_err(|_| CallError::ShutDown)?
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.outlet.send(Input::Stop);
        if let Some(thread) = self.thread.take() {
            threads::join(thread);
        }
    }
}
