//! The side that gets the memory.
//!
//! [`DestinationMemory`] says which memory it is and registers it; `Pages` decides who puts
//! which page in place, and does it; the fault thread, the receivers and the session thread
//! bring the pages and tell the source what has arrived.

mod arrivals;
mod by_hand;
pub(crate) mod driver;
mod faults;
mod kept;
mod memory;
mod pages;
mod receive;

pub use afterimage_protocol::session::{DestinationOwnership, DestinationRecord};
pub use memory::{DestinationMemory, DestinationRegion, DiscardNotice, MemoryError};

use crate::agreed::Agreed;
use crate::events::{self, Events};
use crate::inbox::{Inbox, Outlet};
use crate::ledger::Record;
use crate::reconnect::{FirstConnection, Reconnect};
use crate::session_link::{INBOX, SessionLink};
use crate::source::{
    CallError, Checksums, Endpoint, Incarnation, SessionId, SourceMemory, StartError, StateSection,
};
use crate::stats::DestinationStats;
use crate::threads::{self, ThreadHook, ThreadRole};
use crate::transport::Plaintext;
use afterimage_protocol::layout::{GuestAddress, RegisteredAddress};
use afterimage_protocol::session::{DestinationConfig, DestinationSession};
use afterimage_protocol::wire::{Capabilities, Epoch};
use arrivals::Arrived;
use driver::{Driver, Input, Reply};
use faults::{FaultThread, Order};
use mio::Poll;
use pages::Pages;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Makes a destination's ownership record durable; called on a thread of its own
/// ([`ThreadRole::Ledger`]). The session waits for it and goes on sending heartbeats; faults
/// are answered meanwhile.
pub struct DestinationLedger(pub(crate) Record<DestinationRecord>);

impl DestinationLedger {
    /// A ledger that calls `function`, which must return only when the record would survive
    /// a power failure.
    pub fn new(
        function: impl FnMut(&DestinationRecord) -> io::Result<()> + Send + 'static,
    ) -> Self {
        Self(Some(Box::new(function)))
    }

    /// Remembers nothing. For a destination whose process takes the guest with it when it
    /// dies.
    #[must_use]
    pub const fn volatile() -> Self {
        Self(None)
    }
}

impl std::fmt::Debug for DestinationLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DestinationLedger")
    }
}

/// What becomes of pages that the source cannot read (a file cut short, poisoned memory).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnreadablePages {
    /// Whoever touches one waits. The migration does not end, and the source can still be made
    /// to read them.
    #[default]
    Wait,
    /// They become memory that has failed (`UFFDIO_POISON`, Linux 6.6): whoever touches one
    /// gets SIGBUS, a system call EFAULT, and the migration ends without them. Only for a VMM
    /// that handles this: one that does not know it may let its guest on KVM read zeros.
    Poison,
}

/// When the VMM gets device state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StateDelivery {
    /// All of it at once ([`DestinationEvent::State`]), 1 GiB at most.
    #[default]
    Whole,
    /// Each section when it is there ([`DestinationEvent::Section`]), 1 GiB at most each, so
    /// that restoring overlaps the transfer.
    BySection,
}

/// How a destination gets its memory.
#[derive(Debug)]
#[non_exhaustive]
pub struct DestinationOptions {
    /// How long the fault thread polls before it blocks; zero never polls.
    pub polling: Duration,
    /// How long the source may be silent before it has said how often it speaks.
    pub silence: Duration,
    /// What happens when the link is lost.
    pub reconnect: Reconnect,
    /// When the first connection is made or taken. A source may stop its guest as soon as it is
    /// connected: who cannot restore it yet lets it wait.
    pub first_connection: FirstConnection,
    /// Whether frames carry checksums, if the source can do it too.
    pub checksums: Checksums,
    /// Whether memory may travel unencrypted beyond this machine.
    pub plaintext: Plaintext,
    /// What to continue after a restart; any session with a new incarnation otherwise.
    pub record: DestinationRecord,
    /// Where the ownership record goes.
    pub ledger: DestinationLedger,
    /// Whether pages are taken while the guest still runs at the source, if the source sends
    /// them and the memory can keep them ([`DestinationMemory::precopy_lack`]). Then nobody may
    /// touch guest memory before [`DestinationEvent::State`].
    pub precopy: bool,
    /// When the VMM gets device state.
    pub state: StateDelivery,
    /// What becomes of pages that the source cannot read.
    pub unreadable: UnreadablePages,
    /// The memory of the same snapshot, where this machine has it: a page that somebody waits for
    /// is taken from its files if it is in the page cache (or in a file in memory), and asked for
    /// only if it is not. All that nobody waits for comes from the source. Not used for a guest that
    /// moves. It must hold what the source holds, and not change. All of it must be in files; those
    /// of a file system that does not say what is cached (overlayfs, FUSE) bring nothing.
    pub image: Option<Arc<SourceMemory>>,
    /// Called on every thread of the engine.
    pub threads: ThreadHook,
}

impl Default for DestinationOptions {
    fn default() -> Self {
        Self {
            polling: Duration::from_micros(50),
            silence: Duration::from_millis(800),
            reconnect: Reconnect::Automatic,
            first_connection: FirstConnection::AtOnce,
            checksums: Checksums::Off,
            plaintext: Plaintext::LoopbackOnly,
            record: DestinationRecord {
                session: SessionId::UNKNOWN,
                incarnation: Incarnation(crate::sys::random_id()),
                epoch: Epoch::default(),
                ownership: DestinationOwnership::Waiting,
            },
            ledger: DestinationLedger::volatile(),
            precopy: true,
            state: StateDelivery::default(),
            unreadable: UnreadablePages::default(),
            image: None,
            threads: ThreadHook::default(),
        }
    }
}

impl DestinationOptions {
    pub(crate) fn capabilities(&self) -> Capabilities {
        match self.checksums {
            Checksums::Off => Capabilities::default(),
            Checksums::On => Capabilities::CHECKSUMS,
        }
    }
}

/// What happens to a destination, as told to the VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationEvent {
    /// A source is connected.
    Attached(SessionId),
    /// The connection is gone. What has arrived stays; whoever needs another page waits. It is
    /// made again, unless [`Paused`](Self::Paused) follows.
    Disconnected,
    /// There is no connection, and none is made or taken until [`Destination::recover`]: by
    /// [`Destination::pause`], or because the link was lost under [`Reconnect::ByHand`]. Not told
    /// of a session that was started so.
    Paused,
    /// The guest's vCPUs have been stopped at the source; device state follows. Not told where
    /// one side cannot do precopy.
    SourceStopped,
    /// A section of device state, with [`StateDelivery::BySection`]. It may be restored while
    /// others are still to come.
    Section(StateSection),
    /// The connection broke before all device state was there: every section comes again.
    StateRestarted,
    /// All device state is there; with [`StateDelivery::BySection`], in what was told before.
    /// Restore it, then call [`Destination::ready`].
    State(Vec<StateSection>),
    /// The guest may run from now on. Past the point of no return.
    Run,
    /// The guest must not run here, which is on record: the source takes it back, or
    /// [`Destination::refuse`] was called. [`Ended`](Self::Ended) follows when the source knows it.
    Refused,
    /// The guest must not run here, or not any more: an operator declared this side dead.
    Fenced,
    /// The source has ended the session, with its reason: perhaps it has the guest back. What has
    /// not arrived never will; whoever needs it waits.
    Ended(String),
    /// The two sides do not fit (another layout), or somebody at the source's address refuses
    /// a guest that runs here already. With the reason, told once. It is tried again: the
    /// right source may come back.
    TurnedAway(String),
    /// Every page is in place. Faults are the kernel's from here.
    AllArrived,
    /// The source knows that every page is in place: the session is over.
    Finished,
    /// The source cannot read these pages (a file cut short, poisoned memory). Whoever
    /// touches one waits, or as [`DestinationOptions::unreadable`] says.
    Unreadable {
        /// The first, by its number in the layout.
        first_page: u64,
        /// How many.
        pages: u64,
    },
    /// Something failed that this side cannot mend; faults it cannot answer wait.
    Failed(String),
    /// The ownership record could not be made durable; the guest does not run here.
    PersistFailed,
    /// The destination was dropped before every page had arrived. Its userfaultfd is kept
    /// open: whoever touches a missing page waits for ever, rather than read zeros.
    Abandoned,
}

/// A destination of one session: serves the faults of registered memory until every page has
/// arrived.
///
/// Dropping it joins its threads but never closes a userfaultfd with missing pages; see
/// [`DestinationEvent::Abandoned`]. All methods may be called from any thread.
#[derive(Debug)]
pub struct Destination {
    outlet: Outlet<Input>,
    arrived: Arc<Arrived>,
    faults: Outlet<Order>,
    threads: Vec<JoinHandle<()>>,
}

impl Destination {
    /// Starts serving. From here a fault on `memory` is answered as soon as the source has
    /// switched over and is connected.
    ///
    /// # Errors
    /// [`StartError`]. The memory is kept registered then, so that nobody reads zeros.
    pub fn start(
        memory: DestinationMemory,
        endpoint: Endpoint,
        options: DestinationOptions,
    ) -> Result<(Self, Events<DestinationEvent>), StartError> {
        memory.check_presence()?;
        if let Some(image) = &options.image {
            let compared = image.layout().serving(&memory.layout).map_err(|it| it.to_string());
            compared
                .and_then(|_| image.check_files())
                .map_err(|reason| StartError::Image { reason })?;
        }
        let poll = Poll::new()?;
        let (inbox, outlet) = Inbox::new(&poll, INBOX)?;
        let (sender, events) = events::channel()?;
        let mut capabilities = options.capabilities();
        match memory.precopy_lack() {
            _ if !options.precopy => {}
            None => capabilities = capabilities.with(Capabilities::PRECOPY),
            Some(lack) => tracing::info!(lack, "no precopy into this memory"),
        }
        let config = DestinationConfig {
            layout: memory.layout.clone(),
            capabilities,
            silence: options.silence,
        };
        let session = DestinationSession::new(config, options.record);
        // Events that another handler has read come again.
        memory.wake_all();
        let arrived = Arc::new(Arrived::new(Pages::new(memory)?, outlet.clone()));
        let (fault_thread, faults) =
            FaultThread::new(Arc::clone(&arrived), options.polling, outlet.clone())?;
        let line = endpoint.line(
            &outlet,
            options.plaintext,
            &options.threads,
            Input::Accepted,
            Input::Dialed,
        )?;
        let hook = options.threads.clone();
        let mut destination = Self { outlet: outlet.clone(), arrived, faults, threads: Vec::new() };
        let thread = threads::spawn(&hook, ThreadRole::Fault, 0, move || fault_thread.run())?;
        destination.threads.push(thread);
        let driver = Driver::new(
            session,
            SessionLink::new(poll, line),
            inbox,
            outlet,
            Arc::clone(&destination.arrived),
            destination.faults.clone(),
            options,
            sender,
        );
        let thread = threads::spawn(&hook, ThreadRole::Control, 0, move || driver.run())?;
        destination.threads.push(thread);
        Ok((destination, events))
    }

    /// The device state is restored and the guest could run. [`DestinationEvent::Run`]
    /// follows when the source has given it away; vCPUs must not run before.
    ///
    /// # Errors
    /// [`CallError`] before [`DestinationEvent::State`], or if the guest will not run here.
    pub fn ready(&self) -> Result<(), CallError> {
        self.ask(Input::Ready)
    }

    /// The guest will not run here: its state could not be restored, or the VMM that was to run it
    /// has ended. [`DestinationEvent::Refused`] follows when that is on record; the source gets the
    /// guest back as soon as it is connected, even if it had given it away already, and
    /// [`DestinationEvent::Ended`] tells that it has. Until then this side is kept: a source that
    /// does not hear of it does not run the guest. A record that could not be written is tried
    /// again with the next connection.
    ///
    /// # Errors
    /// [`CallError`] once it is on record that the guest runs here (it does then, or its memory is
    /// lost with whoever was to run it), if the session is over, before a source has offered a
    /// guest, or for a snapshot.
    pub fn refuse(&self) -> Result<(), CallError> {
        self.ask(Input::Refuse)
    }

    /// Nobody needs the rest of a snapshot, because its VM has ended: the server is told so, if it is
    /// connected, and does not wait for this destination to come back. Pages that are missing stay
    /// so.
    ///
    /// # Errors
    /// [`CallError`] for a migration, or if the session is over.
    pub fn leave(&self) -> Result<(), CallError> {
        self.ask(Input::Leave)
    }

    fn ask(&self, call: impl FnOnce(Reply) -> Input) -> Result<(), CallError> {
        let (reply, answer) = crossbeam_channel::bounded(1);
        if !self.outlet.send(call(reply)) {
            return Err(CallError::ShutDown);
        }
        answer.recv().map_err(|_| CallError::ShutDown)?
    }

    /// The guest gives up the whole pages in `length` bytes from `start` (balloon, free page
    /// reporting): those that have not arrived are zero from now on, and nothing that is
    /// under way brings them back. Pages that have arrived are left as they are; to drop
    /// them is the VMM's affair, after this call. Before it, a copy that is under way could
    /// still be placed where the VMM has just dropped the page.
    ///
    /// Waits for copies of background pieces under way, some microseconds.
    pub fn discard(&self, start: GuestAddress, length: u64) {
        let pages = &self.arrived.pages;
        for run in pages.layout().pages_at_guest(start, length) {
            pages.discard(run.pages);
            self.arrived.acknowledge_complete(run.pages);
        }
    }

    /// The same by registered address.
    pub fn discard_registered(&self, start: RegisteredAddress, length: u64) {
        let pages = &self.arrived.pages;
        for run in pages.layout().pages_at_registered(start, length) {
            pages.discard(run.pages);
            self.arrived.acknowledge_complete(run.pages);
        }
    }

    /// What this side and its peer have agreed on in the present connection, or the last;
    /// `None` before the first.
    #[must_use]
    pub fn agreed(&self) -> Option<Agreed> {
        self.arrived.agreed.get()
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> DestinationStats {
        self.arrived.stats()
    }

    /// Which share of each part of the memory is in place, 0 to 1, where the pages, in the
    /// order of the layout, are cut into `parts` parts of equal length; fewer if there are
    /// fewer pages. A share is 1 only when nothing of that part is missing.
    ///
    /// To be sampled while memory arrives: reads one bit a page (32 KiB for a GiB), takes no
    /// lock, and no fault waits for it.
    #[must_use]
    pub fn arrived_shares(&self, parts: usize) -> Vec<f64> {
        self.arrived.pages.complete_shares(parts)
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        self.outlet.send(Input::Stop);
        // The session thread first: it still gives orders to the fault thread.
        if let Some(control) = (self.threads.len() > 1).then(|| self.threads.pop()).flatten() {
            threads::join(control);
        }
        self.faults.send(Order::Stop);
        for thread in self.threads.drain(..) {
            threads::join(thread);
        }
    }
}
