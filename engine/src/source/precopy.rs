//! Precopy at a source: what the guest writes while its memory is sent, and when it is time to
//! stop.

use crate::dirty::DirtyTracker;
use crate::inbox::Outlet;
use crate::source::driver::Input;
use crate::sys::words::LazyWords;
use crate::threads::{self, ThreadHook, ThreadRole};
use afterimage_protocol::bitmap::Bitmap;
use afterimage_protocol::layout::{GuestAddress, GuestLayout, PageNumber, PageRange};
use crossbeam_channel::{Receiver, Sender};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How memory is sent while the guest still runs at the source.
#[derive(Debug)]
#[non_exhaustive]
pub struct Precopy {
    /// Says what the guest has written.
    pub tracker: Box<dyn DirtyTracker>,
    /// When to stop.
    pub passes: Passes,
    /// What is left may take so long to send, at the rate of the last pass, for it to be time to
    /// stop the guest. With [`Passes::Automatic`] and [`Passes::Converged`].
    pub downtime: Duration,
    /// How long passes may go on before it is time to stop the guest in any case. With
    /// [`Passes::Automatic`].
    pub longest: Duration,
}

impl Precopy {
    /// Automatic passes: until what is left takes no longer than 300 ms, or another pass would
    /// not shrink it, or for a minute.
    #[must_use]
    pub fn new(tracker: Box<dyn DirtyTracker>) -> Self {
        Self {
            tracker,
            passes: Passes::default(),
            downtime: Duration::from_millis(300),
            longest: Duration::from_mins(1),
        }
    }
}

/// When precopy has done what it can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Passes {
    /// When what is left can be sent in the downtime, or another pass would not shrink it, or
    /// after the longest time.
    #[default]
    Automatic,
    /// After so many passes. The first sends all of memory.
    Count(u32),
    /// Only when what is left can be sent in the downtime, however long that takes; and the
    /// destination runs the guest only once it has everything: precopy without postcopy, which
    /// survives the loss of either host. A page that cannot be read here keeps it from running;
    /// [`Source::proceed`](crate::Source::proceed) runs it all the same.
    Converged,
}

/// Why it is time to stop the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SwitchoverCause {
    /// What is left can be sent in the downtime.
    Converged,
    /// Another pass would not shrink what is left: the guest writes as fast as pages leave.
    NotShrinking,
    /// The number of passes that was asked for is done.
    PassesDone,
    /// Passes have gone on for the longest time.
    TimeIsUp,
    /// One side cannot do precopy, or writes cannot be tracked any more: everything goes after
    /// the switchover.
    NoPrecopy,
}

/// What a precopy pass has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PassReport {
    /// Counts the passes of the session, from 1.
    pub number: u32,
    /// Bytes of guest memory that it sent, zero pages left out.
    pub bytes_sent: u64,
    /// How long it took.
    pub time: Duration,
    /// Pages, as the destination numbers them, that the guest has written meanwhile.
    pub pages_written: u64,
    /// Bytes in them.
    pub bytes_written: u64,
}

impl PassReport {
    /// How long it takes to send what was written, at the rate of this pass; `None` if it sent
    /// nothing.
    #[must_use]
    pub fn time_left(&self) -> Option<Duration> {
        let rate = self.bytes_sent as f64 / self.time.as_secs_f64();
        let left = self.bytes_written as f64 / rate;
        if self.bytes_written == 0 {
            Some(Duration::ZERO)
        } else {
            Duration::try_from_secs_f64(left).ok().filter(|_| self.bytes_sent > 0)
        }
    }
}

/// What another pass would have to shrink to: more is no progress worth the time.
const SHRINKS_TO: f64 = 0.9;

/// Whether it is time to stop, after this pass and the one before.
pub(super) fn is_due(
    wanted: (Passes, Duration, Duration),
    report: &PassReport,
    before: Option<&PassReport>,
    since_begin: Duration,
) -> Option<SwitchoverCause> {
    let (passes, downtime, longest) = wanted;
    let converges = report.time_left().is_some_and(|left| left <= downtime);
    match passes {
        Passes::Count(count) => (report.number >= count).then_some(SwitchoverCause::PassesDone),
        _ if converges => Some(SwitchoverCause::Converged),
        Passes::Converged => None,
        Passes::Automatic if since_begin >= longest => Some(SwitchoverCause::TimeIsUp),
        Passes::Automatic => {
            let least = before.map(|before| before.bytes_written as f64 * SHRINKS_TO);
            let shrinks = least.is_none_or(|least| (report.bytes_written as f64) < least);
            (!shrinks).then_some(SwitchoverCause::NotShrinking)
        }
    }
}

/// The tracker, and what it has said. Invariant: what a call of `collect` reports is in
/// `written` before anybody else gets the lock, so that nothing that was written is forgotten,
/// whatever becomes of the connection meanwhile.
#[derive(Debug)]
pub(super) struct Tracking(Mutex<Inside>);

#[derive(Debug)]
struct Inside {
    tracker: Box<dyn DirtyTracker>,
    is_started: bool,
    /// In which `written` is numbered.
    layout: GuestLayout,
    written: Arc<Written>,
}

/// What the guest has written, in the destination's page sizes.
#[derive(Debug)]
pub(super) struct Written {
    /// Since the destination was last told.
    pub(super) latest: Bitmap<LazyWords>,
    /// In the pass before.
    pub(super) before: Bitmap<LazyWords>,
}

impl Written {
    fn new(pages: u64) -> io::Result<Self> {
        let bits = || LazyWords::new(pages).map(|words| Bitmap::over(words, pages));
        Ok(Self { latest: bits()?, before: bits()? })
    }

    fn all(&self) -> PageRange {
        PageRange::new(PageNumber(0), self.latest.pages())
    }

    /// Nobody knows what was written.
    pub(super) fn is_all(&self) {
        self.latest.set(self.all(), |_| ());
    }

    /// The destination knows of the latest: they belong to the pass before now.
    pub(super) fn told(&self) {
        self.before.clear(self.all(), |_| ());
        for run in self.latest.runs() {
            self.before.set(run, |_| ());
        }
        self.latest.clear(self.all(), |_| ());
    }
}

impl Tracking {
    pub(super) fn new(tracker: Box<dyn DirtyTracker>, layout: &GuestLayout) -> io::Result<Self> {
        let written = Arc::new(Written::new(layout.page_count())?);
        let layout = layout.clone();
        Ok(Self(Mutex::new(Inside { tracker, is_started: false, layout, written })))
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether pages are numbered as in this layout.
    pub(super) fn is_numbered_as(&self, layout: &GuestLayout) -> bool {
        let inside = self.lock();
        let sizes = |layout: &GuestLayout| {
            let regions = layout.regions().iter();
            regions.map(|region| region.page_size).collect::<Vec<_>>()
        };
        sizes(&inside.layout) == sizes(layout)
    }

    /// Calls `tell` with what was written; nothing is added to it meanwhile.
    pub(super) fn tell<T>(&self, tell: impl FnOnce(&Arc<Written>) -> T) -> T {
        tell(&self.lock().written)
    }

    /// What was written, as of now.
    pub(super) fn written(&self) -> Arc<Written> {
        Arc::clone(&self.lock().written)
    }

    /// Another destination, with other page sizes: nothing that was sent counts for it, so that
    /// what was written by now does not either.
    pub(super) fn renumber(&self, layout: &GuestLayout) -> io::Result<()> {
        let mut inside = self.lock();
        inside.written = Arc::new(Written::new(layout.page_count())?);
        inside.layout = layout.clone();
        Ok(())
    }

    fn start(&self) -> io::Result<()> {
        let mut inside = self.lock();
        if !inside.is_started {
            inside.tracker.start()?;
            inside.is_started = true;
        }
        Ok(())
    }

    /// Adds what was written since the last call. Where that is not known, it is everything.
    ///
    /// # Errors
    /// The tracker's: nothing that it says from now on can be relied on.
    pub(super) fn collect(&self) -> io::Result<()> {
        let mut inside = self.lock();
        let Inside { tracker, is_started, layout, written } = &mut *inside;
        if !*is_started {
            return Ok(());
        }
        let collected = tracker.collect(&mut |start: GuestAddress, length: u64| {
            for run in layout.pages_touching_guest(start, length) {
                written.latest.set(run.pages, |_| ());
            }
        });
        if collected.is_err() {
            written.is_all();
        }
        collected
    }

    fn stop(&self) {
        let mut inside = self.lock();
        if std::mem::take(&mut inside.is_started)
            && let Err(error) = inside.tracker.stop()
        {
            tracing::error!(%error, "tracking of writes cannot be ended cleanly");
        }
    }
}

/// What the thread beside the session does.
enum Task {
    Start,
    Collect,
    /// For the last time; then nothing is tracked any more.
    Last(Sender<io::Result<()>>),
    Stop,
}

/// Calls the tracker where nobody waits for it: a look at all of memory takes its time.
#[derive(Debug)]
pub(super) struct Collector {
    tasks: Sender<Task>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    pub(super) fn new(
        tracking: Arc<Tracking>,
        driver: Outlet<Input>,
        hook: &ThreadHook,
    ) -> io::Result<Self> {
        let (tasks, orders) = crossbeam_channel::unbounded();
        let thread = threads::spawn(hook, ThreadRole::Precopy, 0, move || {
            for task in orders {
                match task {
                    Task::Start => driver.send(Input::TrackingStarted(tracking.start())),
                    Task::Collect => driver.send(Input::Collected(tracking.collect())),
                    Task::Last(reply) => {
                        // Whoever asked has gone if nobody takes it.
                        let _ = reply.send(tracking.collect());
                        break;
                    }
                    Task::Stop => break,
                };
            }
            tracking.stop();
        })?;
        Ok(Self { tasks, thread: Some(thread) })
    }

    /// [`Input::TrackingStarted`] follows.
    pub(super) fn start(&self) {
        // Its thread lasts as long as this.
        let _ = self.tasks.send(Task::Start);
    }

    /// [`Input::Collected`] follows.
    pub(super) fn collect(&self) {
        let _ = self.tasks.send(Task::Collect);
    }

    /// What was written up to now, and the end of tracking.
    pub(super) fn last(&self) -> Receiver<io::Result<()>> {
        let (reply, last) = crossbeam_channel::bounded(1);
        // Without its thread the other end is dropped, which says so.
        let _ = self.tasks.send(Task::Last(reply));
        last
    }

    fn stop(&self) {
        let _ = self.tasks.send(Task::Stop);
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            threads::join(thread);
        }
    }
}
