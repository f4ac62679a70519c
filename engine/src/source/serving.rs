//! What the threads of a source share while they serve one connection of a session.

mod underway;

pub(super) use underway::Underway;

use super::SourceShared;
use super::hands::Hands;
use super::memory::SourceMemory;
use super::pacing::{Pace, Permit};
use super::precopy::Written;
use crate::inbox::Outlet;
use crate::source::driver::Input;
use crate::stats::SourceCounters;
use crate::sys::words::LazyWords;
use crate::transport::Stream;
use afterimage_protocol::layout::GuestLayout;
use afterimage_protocol::session::Book;
use afterimage_protocol::wire::{Channel, Epoch, Generation, Stamp};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// No page was asked for since the last look.
pub(super) const NO_HINT: u64 = u64::MAX;

/// How often a thread that has nothing to send looks whether its connection is there.
pub(super) const LOOK_AFTER: Duration = Duration::from_millis(50);

/// How long whoever stands back for requests does so at most: some answers long. A guest that
/// asks all the time would keep the background away otherwise, which brings what it asks for next.
const STAND_BACK_FOR: Duration = Duration::from_micros(100);

/// How long the background stands back for device state at most, and for whoever restores it: the
/// guest stands still meanwhile, and a core or a link that is shared would keep it waiting.
const STATE_FIRST_FOR: Duration = Duration::from_millis(100);

/// How often is looked whether a channel has taken its pages.
const LOOK_AT_HANDS_AFTER: Duration = Duration::from_millis(1);

/// What may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Nothing.
    Closed,
    /// Early copies, of this precopy pass, in background.
    Early(u16),
    /// Memory is final; only what was asked for.
    Answers,
    /// Everything.
    Final,
}

/// One epoch of one destination.
#[derive(Debug)]
pub(super) struct Serving {
    pub(super) memory: Arc<SourceMemory>,
    /// In the destination's page sizes.
    pub(super) layout: GuestLayout,
    pub(super) book: Arc<Book<LazyWords>>,
    pub(super) epoch: Epoch,
    pub(super) checksums: bool,
    pub(super) polling: Duration,
    pub(super) pace: Arc<Pace>,
    pub(super) counters: Arc<SourceCounters>,
    pub(super) driver: Outlet<Input>,
    /// Requests that have been read and not answered: background stands back.
    pub(super) urgent: AtomicU32,
    /// The page after the last one asked for, where background goes next.
    pub(super) hint: AtomicU64,
    pub(super) signal: Signal,
    mode: RwLock<Mode>,
    /// What the guest has written last: it goes before the rest.
    hot: OnceLock<Arc<Written>>,
    /// Pages that could not be read in a precopy pass.
    pub(super) unreadable_early: AtomicU64,
    /// Which channels are reading memory.
    pub(super) hands: Hands,
    closing: AtomicBool,
    /// Held while a few pages are freed.
    freeing: Mutex<()>,
}

/// Things that threads wait for: another [`Mode`], pages to be handed out again, acks
/// that make room, the end.
#[derive(Debug, Default)]
pub(super) struct Signal {
    state: Mutex<SignalState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SignalState {
    /// Grows with each reason to look again.
    changes: u64,
    /// Device state goes first until then.
    state_first: Option<Instant>,
}

impl Signal {
    fn lock(&self) -> MutexGuard<'_, SignalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever waits shall look again.
    pub(super) fn look_again(&self) {
        self.lock().changes += 1;
        self.changed.notify_all();
    }

    /// How often there was a reason to look again.
    pub(super) fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Device state is about to leave, and goes before the background, for a while at most.
    pub(super) fn state_goes_first(&self) {
        self.lock().state_first = Some(Instant::now() + STATE_FIRST_FOR);
    }

    /// The guest runs: nothing goes before the background any more.
    pub(super) fn state_is_restored(&self) {
        self.lock().state_first = None;
        self.changed.notify_all();
    }

    /// Waits as long as device state goes first, or until it is time to stop.
    pub(super) fn wait_for_state(&self, is_closing: impl Fn() -> bool) {
        let mut state = self.lock();
        while let Some(until) = state.state_first
            && !is_closing()
        {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Serving {
    pub(super) fn new(
        memory: Arc<SourceMemory>,
        layout: GuestLayout,
        book: Arc<Book<LazyWords>>,
        epoch: Epoch,
        options: ServingOptions,
        shared: &SourceShared,
        driver: Outlet<Input>,
    ) -> Self {
        Self {
            memory,
            layout,
            book,
            epoch,
            checksums: options.checksums,
            polling: options.polling,
            pace: Arc::clone(&shared.pace),
            counters: Arc::clone(&shared.counters),
            driver,
            urgent: AtomicU32::new(0),
            hint: AtomicU64::new(NO_HINT),
            signal: Signal::default(),
            mode: RwLock::new(Mode::Closed),
            hot: OnceLock::new(),
            unreadable_early: AtomicU64::new(0),
            hands: Hands::default(),
            closing: AtomicBool::new(false),
            freeing: Mutex::default(),
        }
    }

    pub(super) fn stamp(&self, generation: Generation) -> Stamp {
        Stamp { epoch: self.epoch, generation }
    }

    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Everybody stops at the next look.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.signal.look_again();
        self.pace.wake();
    }

    /// Frees a few pages by `free`, unless it is time to stop.
    pub(super) fn while_open<T>(&self, free: impl FnOnce() -> T) -> Option<T> {
        let _freeing = self.freeing.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.is_closing()).then(free)
    }

    /// After [`close`](Self::close): waits for the pages that are being freed at the moment.
    /// None is freed after that, whatever the thread that does so is waiting for.
    pub(super) fn wait_for_freeing(&self) {
        drop(self.freeing.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits until a piece of at most `most` bytes may leave in background; `None` if it is
    /// time to stop instead.
    pub(super) fn permit(&self, stream: &Stream, most: u64) -> Option<Permit> {
        self.pace.permit(most, LOOK_AFTER, || self.is_closing(), || stream.has_ended())
    }

    /// What may leave from now on. When it returns nobody takes pages by the mode before.
    pub(super) fn set_mode(&self, mode: Mode) {
        *self.mode.write().unwrap_or_else(PoisonError::into_inner) = mode;
        self.signal.look_again();
    }

    /// What may leave, as long as the guard lives. Whoever holds it waits for nothing but memory.
    pub(super) fn mode(&self) -> RwLockReadGuard<'_, Mode> {
        self.mode.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages go first.
    pub(super) fn set_hot(&self, written: Arc<Written>) {
        // There is one switchover.
        let _ = self.hot.set(written);
    }

    pub(super) fn hot(&self) -> Option<&Written> {
        self.hot.get().map(Arc::as_ref)
    }

    /// Waits until memory is final, so that requests may be answered; `false` if it is time to
    /// stop instead.
    pub(super) fn wait_final(&self, stream: &Stream) -> bool {
        self.wait_while(stream, |_| !matches!(*self.mode(), Mode::Answers | Mode::Final))
    }

    /// Waits until there is a reason to look again since `seen` was read; `false` if it is
    /// time to stop instead.
    pub(super) fn wait_change(&self, stream: &Stream, seen: u64) -> bool {
        self.wait_while(stream, |state| state.changes == seen)
    }

    /// A thread that has nothing to send does not notice when its connection breaks: it
    /// looks every now and then, or what it has under way would never be sent again.
    fn wait_while(&self, stream: &Stream, condition: impl Fn(&SignalState) -> bool) -> bool {
        let mut state = self.signal.lock();
        while condition(&state) && !self.is_closing() {
            let (locked, waited) = self
                .signal
                .changed
                .wait_timeout(state, LOOK_AFTER)
                .unwrap_or_else(PoisonError::into_inner);
            state = locked;
            if waited.timed_out() && stream.has_ended() {
                return false;
            }
        }
        !self.is_closing()
    }

    /// Lets requests go first, but not for ever: their answers may be stuck.
    pub(super) fn stand_back(&self) {
        let mut since = None;
        while self.urgent.load(Ordering::Acquire) > 0
            && !self.is_closing()
            && since.get_or_insert_with(Instant::now).elapsed() < STAND_BACK_FOR
        {
            std::thread::yield_now();
        }
    }

    /// Lets some time pass; `false` if it is time to stop.
    pub(super) fn pause(&self, time: Duration) -> bool {
        let (_state, _) = self
            .signal
            .changed
            .wait_timeout_while(self.signal.lock(), time, |_| !self.is_closing())
            .unwrap_or_else(PoisonError::into_inner);
        !self.is_closing()
    }

    /// Waits until nobody reads a page that the caller has seen acknowledged, but for those
    /// that are being [sent](Hands::sending); `false` if it is time to stop instead.
    pub(super) fn wait_for_hands(&self) -> bool {
        let mut busy = self.hands.busy();
        while !busy.is_over() {
            if !self.pause(LOOK_AT_HANDS_AFTER) {
                return false;
            }
        }
        !self.is_closing()
    }

    /// A data channel is at its end.
    pub(super) fn ended(&self, channel: Channel, generation: Generation) {
        let stamp = self.stamp(generation);
        self.driver.send(Input::DataEnded { channel, stamp });
    }
}

/// How to serve.
#[derive(Clone, Copy, Debug)]
pub(super) struct ServingOptions {
    pub(super) checksums: bool,
    pub(super) polling: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn the_background_waits_for_device_state_and_for_no_longer() {
        let signal = Signal::default();
        // Nothing goes first.
        signal.wait_for_state(|| false);

        signal.state_goes_first();
        let began = Instant::now();
        signal.wait_for_state(|| false);
        assert!(
            began.elapsed() + Duration::from_millis(1) > STATE_FIRST_FOR,
            "nobody has restored it"
        );

        // As if it took for ever.
        let forever = || Some(Instant::now() + Duration::from_hours(1));
        signal.lock().state_first = forever();
        thread::scope(|scope| {
            scope.spawn(|| signal.wait_for_state(|| false));
            signal.state_is_restored();
        });

        signal.lock().state_first = forever();
        let closing = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| signal.wait_for_state(|| closing.load(Ordering::Acquire)));
            closing.store(true, Ordering::Release);
            signal.look_again();
        });
    }
}
