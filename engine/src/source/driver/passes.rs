//! Precopy passes at a source, as the session thread drives them.
//!
//! A pass is over when every page is acknowledged. Then the collector finds out what was written
//! meanwhile, and the next pass begins with telling the destination so. Invariants:
//!
//! - what a tracker has reported is reopened in the book before the destination is told of it,
//!   and told before the next pass, or final memory, is sent;
//! - this side vouches for a page only if its acknowledgement is in the book and it was not
//!   written since: after a new attachment everything else is told to be stale;
//! - until the destination has settled, no acknowledgement of a page in the last `Stale` counts.
//!
//! That it is time to stop the guest is told once the destination has taken in what the last pass
//! has found: it empties private memory of what is stale, and is not to do so in the blackout.

mod stale;

use super::super::precopy::{
    Collector, PassReport, Passes, Precopy, SwitchoverCause, Tracking, Written, is_due,
};
use super::super::serving::Mode;
use super::super::{CallError, SourceEvent};
use super::{Driver, Input};
use crate::inbox::Outlet;
use crate::session_link::Beat;
use crate::sys::words::LazyWords;
use crate::threads::ThreadHook;
use afterimage_protocol::layout::{GuestLayout, PageNumber, PageRange};
use afterimage_protocol::session::Book;
use afterimage_protocol::wire::Incarnation;
use crossbeam_channel::RecvTimeoutError;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often is looked whether the peer must hear something, while a tracker is waited for.
const BEAT_LOOK: Duration = Duration::from_millis(50);
/// Between passes, once it is time to stop the guest and it goes on running.
const IDLE_PAUSE: Duration = Duration::from_millis(100);

/// Precopy of one session.
#[derive(Debug)]
pub(in crate::source) struct Passing {
    tracking: Arc<Tracking>,
    collector: Collector,
    wanted: (Passes, Duration, Duration),
    stage: Stage,
    /// When the first pass began.
    begun: Option<Duration>,
    /// Writes are tracked: nothing may be sent before.
    is_tracking: bool,
    /// The present pass: when it began, and what had been sent by then.
    since: Duration,
    bytes_before: u64,
    done: u32,
    last: Option<PassReport>,
    /// Why it is time to stop the guest, until that is told.
    due: Option<SwitchoverCause>,
    is_told_due: bool,
    /// When to look again what was written, if nobody has stopped the guest by then.
    next_look: Option<Duration>,
    /// Which destination attached last.
    attached: Option<Incarnation>,
    /// The book of the connection before: what this side vouches for.
    vouched: Option<Arc<Book<LazyWords>>>,
    /// Nothing was told on this connection yet.
    is_fresh: bool,
    /// Pages of the last `Stale`, until the destination has settled.
    unsettled: Option<Arc<Written>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No pass is open.
    Closed,
    /// A pass is open at the destination, and tracking is being started.
    Starting(u16),
    /// The same, and nothing is sent before the next look, if there is one: the guest is about to
    /// be stopped.
    Waiting(u16),
    Open,
    /// The pass is over; what was written is being found out.
    Collecting,
    /// Nobody knows any more what was written, or memory is final.
    Ended,
}

impl Passing {
    pub(in crate::source) fn new(
        precopy: Precopy,
        layout: &GuestLayout,
        driver: Outlet<Input>,
        hook: &ThreadHook,
    ) -> io::Result<Self> {
        let Precopy { tracker, passes, downtime, longest } = precopy;
        let tracking = Arc::new(Tracking::new(tracker, layout)?);
        let collector = Collector::new(Arc::clone(&tracking), driver, hook)?;
        Ok(Self {
            tracking,
            collector,
            wanted: (passes, downtime, longest),
            stage: Stage::Closed,
            begun: None,
            is_tracking: false,
            since: Duration::ZERO,
            bytes_before: 0,
            done: 0,
            last: None,
            due: None,
            is_told_due: false,
            next_look: None,
            attached: None,
            vouched: None,
            is_fresh: true,
            unsettled: None,
        })
    }
}

impl Passing {
    /// When it is time to stop the guest in any case, if nobody was told that it is time.
    fn time_is_up_at(&self) -> Option<Duration> {
        let (passes, _, longest) = self.wanted;
        let is_open = !self.is_told_due && self.stage != Stage::Ended;
        self.begun.filter(|_| is_open && passes == Passes::Automatic).map(|begun| begun + longest)
    }
}

impl Driver {
    /// A destination has attached; `book` is what was sent to it before.
    pub(super) fn passes_attach(&mut self, book: Option<Arc<Book<LazyWords>>>) {
        let (served, incarnation) = (self.session.served(), self.session.incarnation());
        let Some(passing) = &mut self.passing else { return };
        passing.unsettled = None;
        // Of a connection that ended before anything was told, the book says what the
        // destination has, not what this side vouches for.
        if !std::mem::replace(&mut passing.is_fresh, true) {
            passing.vouched = book;
        }
        if passing.attached != incarnation {
            // Another memory: nothing is vouched for, and nobody was told when it is time.
            passing.attached = incarnation;
            (passing.vouched, passing.last) = (None, None);
            (passing.due, passing.is_told_due) = (None, false);
        }
        let same = passing.tracking.is_numbered_as(served);
        passing.vouched.take_if(|book| !same || book.pages() != served.page_count());
        if !same && let Err(error) = passing.tracking.renumber(served) {
            tracing::error!(%error, "no memory to note what is written");
            self.session.disconnected();
        }
    }

    /// The destination takes pages of a pass.
    pub(super) fn open_pass(&mut self, number: u16) {
        let now = self.link.now();
        let Some(passing) = &mut self.passing else { return };
        if passing.stage == Stage::Ended {
            return;
        }
        if let Some(cause) = passing.due.take() {
            passing.stage = Stage::Waiting(number);
            let is_last = matches!(passing.wanted.0, Passes::Count(_));
            passing.next_look = (!is_last).then_some(now + IDLE_PAUSE);
            self.tell_due(cause);
            return;
        }
        if passing.is_tracking {
            self.let_pass(number);
            return;
        }
        passing.stage = Stage::Starting(number);
        if passing.begun.is_none() {
            passing.begun = Some(now);
            passing.collector.start();
        }
    }

    pub(super) fn tracking_started(&mut self, result: io::Result<()>) {
        let Some(passing) = &mut self.passing else { return };
        if let Err(error) = result {
            tracing::error!(%error, "what the guest writes cannot be tracked: no precopy");
            self.give_up_passes();
            return;
        }
        passing.is_tracking = true;
        if let Stage::Starting(number) = passing.stage {
            self.let_pass(number);
        }
    }

    fn let_pass(&mut self, number: u16) {
        let now = self.link.now();
        let bytes = self.shared.counters.bytes.load(Ordering::Relaxed);
        let Some(passing) = &mut self.passing else { return };
        if passing.stage == Stage::Ended || self.session.is_frozen() {
            return;
        }
        (passing.stage, passing.since, passing.bytes_before) = (Stage::Open, now, bytes);
        if let Some(serving) = &self.serving {
            serving.set_mode(Mode::Early(number));
        }
        self.end_pass_if_over();
    }

    /// The connection is closing: what is under way is not known any more.
    pub(super) fn close_pass(&mut self) {
        if let Some(passing) = &mut self.passing
            && passing.stage != Stage::Ended
        {
            passing.stage = Stage::Closed;
            passing.next_look = None;
        }
    }

    /// Looks whether all that belongs to the present pass has arrived.
    pub(super) fn end_pass_if_over(&mut self) {
        let (Some(passing), Some(book), Some(serving)) =
            (&mut self.passing, self.shared.book(), &self.serving)
        else {
            return;
        };
        let unreadable = serving.unreadable_early.load(Ordering::Acquire);
        if passing.stage != Stage::Open || book.acked_pages() + unreadable < book.pages() {
            return;
        }
        // Whoever has taken a page says so before he lets the mode go.
        let mode = *serving.mode();
        serving.set_mode(Mode::Closed);
        let channels = self.data.values().chain(self.retired.iter().map(|(_, data)| data));
        let is_under_way = channels.into_iter().any(|data| !data.underway.is_settled(&book));
        if is_under_way || book.peek(PageNumber(0)).is_some() {
            serving.set_mode(mode);
            return;
        }
        passing.stage = Stage::Collecting;
        passing.collector.collect();
    }

    /// What was written is known, or nobody knows.
    pub(super) fn collected(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::error!(%error, "it is not known any more what the guest writes: no precopy");
            self.give_up_passes();
            return;
        }
        let (now, bytes) = (self.link.now(), self.shared.counters.bytes.load(Ordering::Relaxed));
        let served = self.session.served();
        let Some(passing) = &mut self.passing else { return };
        if passing.stage != Stage::Collecting || self.session.is_frozen() {
            return;
        }
        let written = passing.tracking.written();
        let (mut pages_written, mut bytes_written) = (0, 0);
        for run in written.latest.runs().flat_map(|run| served.split(run)) {
            pages_written += run.pages.count;
            bytes_written += run.length;
        }
        if passing.next_look.take().is_none() {
            passing.done += 1;
            let report = PassReport {
                number: passing.done,
                bytes_sent: bytes - passing.bytes_before,
                time: now.saturating_sub(passing.since),
                pages_written,
                bytes_written,
            };
            let since_begin = now.saturating_sub(passing.begun.unwrap_or_default());
            let due = is_due(passing.wanted, &report, passing.last.as_ref(), since_begin);
            passing.last = Some(report);
            passing.due = due.filter(|_| !passing.is_told_due);
            self.events.send(SourceEvent::PassEnded(report));
        }
        self.go_on_passing(pages_written);
    }

    /// A destination has attached.
    pub(super) fn note_lack_of_precopy(&mut self) {
        if !self.session.can_precopy() && !self.session.is_frozen() {
            self.tell_due(SwitchoverCause::NoPrecopy);
        }
    }

    fn tell_due(&mut self, cause: SwitchoverCause) {
        if let Some(passing) = &mut self.passing {
            passing.due = None;
            if !std::mem::replace(&mut passing.is_told_due, true) {
                self.events.send(SourceEvent::SwitchoverDue(cause));
            }
        }
    }

    /// Begins the next pass, or waits until somebody stops the guest.
    fn go_on_passing(&mut self, pages_written: u64) {
        let (now, is_all_sent) = (self.link.now(), self.runs_with_all_only());
        let Some(passing) = &mut self.passing else { return };
        passing.stage = Stage::Closed;
        if let Some(cause) = passing.due {
            // What such a guest writes until it is stopped is sent while it stands still.
            if pages_written > 0 && !is_all_sent && self.begin_next_pass() {
                return;
            }
            self.tell_due(cause);
        }
        let Some(passing) = &mut self.passing else { return };
        if passing.is_told_due && matches!(passing.wanted.0, Passes::Count(_)) {
            return;
        }
        let is_idle = passing.is_told_due || pages_written == 0;
        if is_idle && now.saturating_sub(passing.since) < IDLE_PAUSE {
            passing.next_look = Some(passing.since + IDLE_PAUSE);
            return;
        }
        if pages_written == 0 {
            passing.next_look = Some(now + IDLE_PAUSE);
            passing.since = now;
            return;
        }
        self.begin_next_pass();
    }

    /// Tells what is stale, and of another pass; `false` if that is not to be now.
    fn begin_next_pass(&mut self) -> bool {
        if !self.session.has_passes_left() {
            tracing::info!("the connection has no number for another pass: it is made again");
            self.session.disconnected();
            return true;
        }
        let begun = self.session.next_pass();
        begun.inspect_err(|error| tracing::debug!(%error, "no precopy pass now")).is_ok()
    }

    /// When [`look_again`](Self::look_again) is to be called.
    pub(super) fn next_look(&self) -> Option<Duration> {
        let passing = self.passing.as_ref()?;
        let waits = matches!(passing.stage, Stage::Closed | Stage::Waiting(_));
        let look = passing.next_look.filter(|_| waits);
        look.into_iter().chain(passing.time_is_up_at()).min()
    }

    /// Between passes: looks what was written meanwhile.
    pub(super) fn look_again(&mut self) {
        let now = self.link.now();
        if self.passing.as_ref().and_then(Passing::time_is_up_at).is_some_and(|at| at <= now) {
            self.tell_due(SwitchoverCause::TimeIsUp);
        }
        let Some(passing) = &mut self.passing else { return };
        if passing.next_look.is_none_or(|at| at > now) {
            return;
        }
        match passing.stage {
            Stage::Closed if self.session.is_unsettled() => {
                passing.stage = Stage::Collecting;
                passing.collector.collect();
            }
            Stage::Waiting(number) => {
                passing.next_look = None;
                self.let_pass(number);
            }
            _ => {}
        }
    }

    fn give_up_passes(&mut self) {
        if let Some(passing) = &mut self.passing {
            passing.stage = Stage::Ended;
            passing.next_look = None;
        }
        if let Some(serving) = &self.serving
            && !self.session.is_frozen()
        {
            serving.set_mode(Mode::Closed);
        }
        self.tell_due(SwitchoverCause::NoPrecopy);
    }

    /// The vCPUs are stopped: memory is final. Told before all of it is looked through.
    pub(super) fn memory_is_final(&mut self) -> Result<(), CallError> {
        if self.session.is_frozen() || self.session.is_over() {
            return Ok(self.session.freeze()?);
        }
        // Whoever waits for it does not wait for a look at all of memory.
        self.events.send(SourceEvent::Stopped);
        if let Some(serving) = &self.serving {
            // From here on no page is taken as an early one.
            serving.set_mode(Mode::Closed);
        }
        if let Some(passing) = &mut self.passing {
            passing.stage = Stage::Ended;
            passing.next_look = None;
            let last = passing.collector.last();
            let mut beat = self.session.pulse().map(Beat::after);
            // A reply that does not come is a thread that has ended: nothing is known then.
            let collected = loop {
                match last.recv_timeout(BEAT_LOOK) {
                    Ok(collected) => break collected,
                    Err(RecvTimeoutError::Disconnected) => {
                        break Err(io::ErrorKind::BrokenPipe.into());
                    }
                    Err(RecvTimeoutError::Timeout) => {
                        // An error of the wait is met again in the next one.
                        let _ = self.link.stay_alive(&mut beat, Some(Duration::ZERO));
                    }
                }
            };
            if let Err(error) = collected {
                tracing::error!(%error, "it is not known what the guest has written: all is sent");
                passing.tracking.tell(|written| written.is_all());
            }
        }
        self.session.freeze()?;
        if self.runs_with_all_only() {
            self.session.hold();
        }
        self.shared.set_rates(|rates| rates.is_final = true);
        // What a last pass has found is wanted as soon as the guest runs; and a guest that is held
        // stands still for as long as somebody else likes.
        if let Some(serving) = &self.serving
            && self.passing.is_none()
            && !self.is_held
        {
            serving.signal.state_goes_first();
        }
        self.open_final();
        Ok(())
    }

    /// The destination is to run the guest only once it has everything.
    fn runs_with_all_only(&self) -> bool {
        self.passing.as_ref().is_some_and(|passing| passing.wanted.0 == Passes::Converged)
    }

    /// Nobody holds the guest any more, unless its last pages are still to come.
    pub(super) fn proceed(&mut self) -> Result<(), CallError> {
        let was_held = std::mem::take(&mut self.is_held);
        if was_held && self.runs_with_all_only() {
            self.proceed_if_all_is_there();
            return Ok(());
        }
        // Also where the last pages do not come: somebody has decided not to wait for them.
        Ok(self.session.proceed()?)
    }

    pub(super) fn proceed_if_all_is_there(&mut self) {
        let is_all = self.shared.book().is_some_and(|book| book.acked_pages() == book.pages());
        if is_all
            && !self.is_held
            && self.session.is_frozen()
            && !self.session.is_unsettled()
            && self.runs_with_all_only()
        {
            // An error says that it has been done.
            let _ = self.session.proceed();
        }
    }

    /// How pages leave once memory is final.
    pub(super) fn open_final(&self) {
        let Some(serving) = &self.serving else { return };
        if let Some(passing) = &self.passing {
            serving.set_hot(passing.tracking.written());
        }
        let is_settled = !self.session.is_unsettled();
        serving.set_mode(if is_settled { Mode::Final } else { Mode::Answers });
    }

    /// The destination keeps no early copies any more.
    pub(super) fn settled(&mut self) {
        let Some(book) = self.shared.book() else { return };
        if let Some(passing) = &mut self.passing {
            passing.unsettled = None;
        }
        let retired = self.retired.iter().map(|(_, data)| data);
        for data in self.data.values().chain(retired) {
            data.underway.requeue(&book);
        }
        if let Some(serving) = &self.serving {
            serving.set_mode(Mode::Final);
        }
        self.proceed_if_all_is_there();
    }

    /// Calls `counts` with what of an acknowledged run may be believed.
    pub(super) fn believed(&self, run: PageRange, mut counts: impl FnMut(PageRange)) {
        let unsettled = self.passing.as_ref().and_then(|passing| passing.unsettled.as_ref());
        let Some(written) = unsettled else { return counts(run) };
        let end = run.start.0 + run.count;
        let mut rest = run;
        while let Some(sure) = written.latest.first_clear_in(rest) {
            counts(sure);
            let next = sure.start.0 + sure.count;
            rest = PageRange::new(PageNumber(next), end - next);
        }
    }

    /// The guest is this side's again: nothing is left of precopy when this returns.
    pub(super) fn drop_passes(&mut self) {
        self.passing = None;
    }
}
