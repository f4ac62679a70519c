//! A guest that writes all the time while its memory is sent.

use super::memory::PAGE;
use super::proxy::Proxy;
use super::{Kind, Memory, Pair, Random, Setup, Toucher};
use afterimage::dirty::{DirtyBitmap, DirtyTracker};
use afterimage::{GuestAddress, Passes, Precopy, SourceEvent, SourceOptions, SwitchoverCause};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A guest of some threads that write to random pages, hot ones more often.
pub struct Writers {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    pub written: Arc<AtomicU64>,
}

impl Writers {
    pub fn start(memory: &Arc<Memory>, dirty: &Arc<DirtyBitmap>, random: &mut Random) -> Self {
        let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..2)
            .map(|_| {
                let (memory, dirty) = (Arc::clone(memory), Arc::clone(dirty));
                let (stop, written) = (Arc::clone(&stop), Arc::clone(&written));
                let mut random = random.fork();
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        write_one(&memory, &dirty, &mut random);
                        written.fetch_add(1, Ordering::Relaxed);
                        if random.below(64) == 0 {
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        Self { threads, stop, written }
    }

    /// When it returns, nobody writes.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("a writer");
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Writes a page in part, or makes it zero. The last quarter is left alone.
fn write_one(memory: &Memory, dirty: &DirtyBitmap, random: &mut Random) {
    let pages = memory.small_pages() / 4 * 3;
    let hot = random.below(4) > 0;
    let page = random.below(if hot { pages.div_ceil(10) } else { pages });
    let words = PAGE / 8;
    if random.below(8) == 0 {
        (0..words).for_each(|word| memory.word(page, word).store(0, Ordering::Relaxed));
    } else {
        for _ in 0..3 {
            let word = random.below(words);
            memory.word(page, word).store(random.next() | 1, Ordering::Relaxed);
        }
    }
    // After the writes: whoever collects this has them, or hears of them again.
    dirty.mark(memory.guest_address(page), PAGE);
}

pub fn tracker_of(memory: &Memory, setup: &Setup) -> Arc<DirtyBitmap> {
    let mut page = 0;
    let mut ranges: Vec<(GuestAddress, u64)> = Vec::new();
    for (_, length) in &setup.kinds {
        ranges.push((memory.guest_address(page), *length));
        page += length / PAGE;
    }
    Arc::new(DirtyBitmap::new(&ranges).expect("ranges"))
}

pub fn precopy(dirty: &Arc<DirtyBitmap>, passes: Passes) -> Precopy {
    let tracker: Box<dyn DirtyTracker> = Box::new(Arc::clone(dirty));
    let mut precopy = Precopy::new(tracker);
    precopy.passes = passes;
    precopy.longest = Duration::from_secs(2);
    precopy
}

/// Two sides, and a guest that writes.
pub struct Moving {
    pub writers: Writers,
    pub pair: Pair,
}

impl Moving {
    pub fn start(
        setup: &Setup,
        passes: Passes,
        random: &mut Random,
        change: impl FnOnce(&mut SourceOptions),
        proxy: Option<&mut Option<Proxy>>,
    ) -> Option<Self> {
        Self::start_with(setup, passes, random, |source, _| change(source), proxy)
    }

    /// The same where the change needs to know what the guest marks.
    pub fn start_with(
        setup: &Setup,
        passes: Passes,
        random: &mut Random,
        change: impl FnOnce(&mut SourceOptions, &Arc<DirtyBitmap>),
        proxy: Option<&mut Option<Proxy>>,
    ) -> Option<Self> {
        let mut tracker = None;
        let started = Pair::start_on(
            setup,
            |old, source, _| {
                let dirty = tracker_of(old, setup);
                source.precopy = Some(precopy(&dirty, passes));
                change(source, &dirty);
                tracker = Some(dirty);
            },
            |address| match proxy {
                Some(place) => place.insert(Proxy::start(&address)).address(),
                None => address,
            },
        );
        let pair = started?;
        let writers = Writers::start(&pair.old, &tracker.expect("made at the start"), random);
        Some(Self { writers, pair })
    }

    pub fn wait_due(&self) -> SwitchoverCause {
        let due = self.pair.at_source.wait(
            "the time to switch over",
            || self.pair.dump(),
            |event| matches!(event, SourceEvent::SwitchoverDue(_)),
        );
        let SourceEvent::SwitchoverDue(cause) = due else { unreachable!("just matched") };
        cause
    }

    pub fn wait_pass(&self) {
        self.pair.at_source.wait(
            "the end of a pass",
            || self.pair.dump(),
            |event| matches!(event, SourceEvent::PassEnded(_)),
        );
    }

    /// Stops the guest, moves it, and compares all of memory while it is touched from the end.
    pub fn switch_and_check(&mut self) {
        self.writers.stop();
        self.pair.switch(&[]);
        let (old, new) = (Arc::clone(&self.pair.old), Arc::clone(&self.pair.new));
        let reader = Toucher::start(move || {
            for page in (0..new.small_pages()).rev() {
                new.check_page_same(&old, page);
            }
        });
        reader.finish("the guest reads its memory", || self.pair.dump());
        self.pair.finish();
        self.pair.check_counts();
        self.pair.new.check_same(&self.pair.old);
    }
}
