//! The guest's workload: dirties random pages for ever, checks all that it reads, and
//! notes by the guest's own clock how long each touch took.
//!
//! One file without dependencies, built by `tests/qemu/guest/get` into the guest's initrd.
//! There is one worker for each vCPU, which has pages of its own; their figures are added up.
//! It speaks over the serial port named by its first argument, one line each way, and the
//! workers stand still while it does:
//!
//! | from the driver | to the driver |
//! | --- | --- |
//! | | `{"filled":2,…}` once, when the memory has its content |
//! | `mark` | `{"marked_us":…}`: forgets all figures so far; times count from here |
//! | `report` | the figures since the last mark |
//! | `verify` | every word of every page compared, which takes seconds |
//!
//! What it keeps of its own is small: it lies in the guest's memory and moves with it.
//!
//! Options, from the kernel's command line: `afterimage.mib=N`, the size of the working
//! set; `afterimage.gap_us=N`, from which on a touch is noted one by one.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, Mutex, MutexGuard};
use std::time::Instant;
use std::{process, thread};

/// Bumped when a line changes its meaning; the driver refuses another.
const VERSION: u32 = 2;
const WORDS: usize = 512;
/// In a page: how often it was dirtied, when last, and a checksum over both; then content
/// that never changes.
const COUNTER: usize = 0;
const TOUCHED: usize = 1;
const CHECK: usize = 2;
const CONTENT: usize = 3;

const SLOT_NS: u64 = 10_000_000;
const SLOTS: usize = 12_000;
const GAPS: usize = 1 << 18;

/// Set while a command waits, so that the workers look at a flag, not at a channel.
static COMMANDED: AtomicBool = AtomicBool::new(false);

fn main() -> io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "/dev/ttyS1".into());
    let mut port = OpenOptions::new().read(true).write(true).open(&path)?;
    let workers = thread::available_parallelism()?.get();
    let pages = option("mib", 64) as usize * 256;
    let gap_ns = option("gap_us", 20) * 1000;

    let guest = Guest::new(workers, pages, gap_ns);
    let clocksource = line_of("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let kernel = line_of("/proc/sys/kernel/osrelease");
    writeln!(
        port,
        r#"{{"filled":{VERSION},"workers":{workers},"pages":{pages},"gap_ns":{gap_ns},"clocksource":"{clocksource}","kernel":"{kernel}"}}"#
    )?;
    let mut commands = BufReader::new(port.try_clone()?).lines();
    thread::scope(|scope| {
        for worker in &guest.workers {
            scope.spawn(|| guest.work(worker));
        }
        let spoken = commands.try_for_each(|command| guest.obey(command?.trim(), &mut port));
        // The workers do not end by themselves.
        eprintln!("nobody speaks with the workload any more: {spoken:?}");
        process::exit(1)
    })
}

/// An option of the kernel's command line.
fn option(name: &str, default: u64) -> u64 {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let prefix = format!("afterimage.{name}=");
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(&prefix)?.parse().ok())
        .unwrap_or(default)
}

fn line_of(path: &str) -> String {
    fs::read_to_string(path).map_or_else(|_| "unknown".into(), |text| text.trim().to_owned())
}

/// All workers. One that works has its lock; while a command is obeyed nobody else has.
struct Guest {
    workers: Vec<Mutex<Worker>>,
    /// All workers and whoever commands them: passed when all stand still, and again when
    /// they go on.
    barrier: Barrier,
}

impl Guest {
    /// Fills `pages` of memory, each worker its own.
    fn new(workers: usize, pages: usize, gap_ns: u64) -> Self {
        let clock = Instant::now();
        let first = |worker| pages * worker / workers;
        let workers: Vec<_> = thread::scope(|scope| {
            let fill = |worker| {
                let own = first(worker)..first(worker + 1);
                scope.spawn(move || Mutex::new(Worker::new(worker, own, clock, gap_ns)))
            };
            let all: Vec<_> = (0..workers).map(fill).collect();
            all.into_iter().map(|it| it.join().expect("a worker does not panic")).collect()
        });
        let guest = Self { barrier: Barrier::new(workers.len() + 1), workers };
        guest.mark();
        guest
    }

    fn work(&self, worker: &Mutex<Worker>) {
        loop {
            let mut working = lock(worker);
            // What speaking took is no gap.
            working.now();
            while !COMMANDED.load(Ordering::Acquire) {
                working.touch();
            }
            drop(working);
            self.barrier.wait();
            self.barrier.wait();
        }
    }

    fn obey(&self, command: &str, port: &mut impl Write) -> io::Result<()> {
        COMMANDED.store(true, Ordering::Release);
        self.barrier.wait();
        let answer = match command {
            "mark" => format!(r#"{{"marked_us":{}}}"#, self.mark() / 1000),
            "report" => self.report(),
            "verify" => self.verify(),
            other => format!(r#"{{"error":"no command {}"}}"#, other.escape_default()),
        };
        port.write_all(answer.as_bytes())?;
        port.write_all(b"\n")?;
        COMMANDED.store(false, Ordering::Release);
        self.barrier.wait();
        Ok(())
    }

    /// Returns by the workers' clock when it was.
    fn mark(&self) -> u64 {
        let marks: Vec<_> = self.all().map(|mut worker| worker.mark()).collect();
        marks[0]
    }

    fn report(&self) -> String {
        let all: Vec<_> = self.all().collect();
        let sum = |of: fn(&Worker) -> u64| all.iter().map(|worker| of(worker)).sum::<u64>();
        let length = all.iter().map(|worker| worker.slots.len()).max().unwrap_or_default();
        let slot = |number| all.iter().filter_map(|it| it.slots.get(number)).sum::<u32>();
        let slots: Vec<_> = (0..length).map(|number| slot(number).to_string()).collect();
        let gap = |gap: &Gap| format!("[{},{},{}]", gap.at_ns / 1000, gap.took_ns, gap.age_ns / 1000);
        let gaps: Vec<_> = all.iter().flat_map(|worker| worker.gaps.iter().map(gap)).collect();
        format!(
            r#"{{"elapsed_us":{},"operations":{},"wrong":{},"slot_us":{},"slots":[{}],"gaps_lost":{},"gaps":[{}]}}"#,
            (all[0].now_ns - all[0].mark_ns) / 1000,
            sum(|worker| worker.operations),
            sum(|worker| worker.wrong),
            SLOT_NS / 1000,
            slots.join(","),
            sum(|worker| worker.gaps_lost),
            gaps.join(",")
        )
    }

    fn verify(&self) -> String {
        let wrong: usize = thread::scope(|scope| {
            let compare = |worker| scope.spawn(move || lock(worker).count_wrong_pages());
            let all: Vec<_> = self.workers.iter().map(compare).collect();
            all.into_iter().map(|it| it.join().expect("comparing does not panic")).sum()
        });
        let pages: usize = self.all().map(|worker| worker.pages.len()).sum();
        format!(r#"{{"verified":{pages},"wrong":{wrong}}}"#)
    }

    fn all(&self) -> impl Iterator<Item = MutexGuard<'_, Worker>> {
        self.workers.iter().map(lock)
    }
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().expect("whoever has it does not panic")
}

#[derive(Clone)]
#[repr(align(4096))]
struct Page([u64; WORDS]);

/// A touch that took long.
struct Gap {
    /// When it began, since the mark.
    at_ns: u64,
    took_ns: u64,
    /// How long before that the same page had last been touched.
    age_ns: u64,
}

struct Worker {
    pages: Vec<Page>,
    /// Where they lie among those of all workers.
    first: usize,
    /// The counter that each page should have: kept apart, so that an old version of a
    /// page, right in itself, is found too.
    expected: Vec<u32>,
    random: u64,
    wrong: u64,
    clock: Instant,
    /// When the touch before this one ended, by `clock`.
    now_ns: u64,
    mark_ns: u64,
    operations: u64,
    /// Touches in each 10 ms since the mark.
    slots: Vec<u32>,
    gaps: Vec<Gap>,
    gaps_lost: u64,
    gap_ns: u64,
}

impl Worker {
    fn new(index: usize, own: Range<usize>, clock: Instant, gap_ns: u64) -> Self {
        let (first, count) = (own.start, own.len());
        let mut pages = Vec::with_capacity(count);
        for number in own {
            let mut page = Page([0; WORDS]);
            page.0[CHECK] = check(number, 0, 0);
            for (word, value) in page.0.iter_mut().enumerate().skip(CONTENT) {
                *value = content(number, word);
            }
            pages.push(page);
        }
        Self {
            pages,
            first,
            expected: vec![0; count],
            // Not 0 for any worker, for it would stay so.
            random: 0x9e37_79b9_7f4a_7c15 ^ index as u64,
            wrong: 0,
            clock,
            now_ns: 0,
            mark_ns: 0,
            operations: 0,
            slots: Vec::with_capacity(SLOTS),
            gaps: Vec::with_capacity(GAPS),
            gaps_lost: 0,
            gap_ns,
        }
    }

    /// Reads a random page, checks it, and writes to it.
    fn touch(&mut self) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let index = self.random as usize % self.pages.len();
        let word = CONTENT + (self.random >> 40) as usize % (WORDS - CONTENT);
        let number = self.first + index;
        let page = &mut self.pages[index].0;
        let (counter, touched) = (page[COUNTER], page[TOUCHED]);
        if counter != u64::from(self.expected[index])
            || page[CHECK] != check(number, counter, touched)
            || page[word] != content(number, word)
        {
            self.wrong += 1;
        }
        let began_ns = self.now_ns;
        page[COUNTER] = counter + 1;
        page[TOUCHED] = began_ns;
        page[CHECK] = check(number, counter + 1, began_ns);
        self.expected[index] += 1;

        self.now();
        self.count(began_ns, began_ns.saturating_sub(touched));
    }

    fn count(&mut self, began_ns: u64, age_ns: u64) {
        self.operations += 1;
        let slot = ((self.now_ns - self.mark_ns) / SLOT_NS) as usize;
        if slot < SLOTS {
            if slot >= self.slots.len() {
                self.slots.resize(slot + 1, 0);
            }
            self.slots[slot] += 1;
        }
        let took_ns = self.now_ns - began_ns;
        if took_ns < self.gap_ns {
            return;
        }
        if self.gaps.len() == GAPS {
            self.gaps_lost += 1;
            return;
        }
        // A touch may have begun before the mark was set.
        let at_ns = began_ns.saturating_sub(self.mark_ns);
        self.gaps.push(Gap { at_ns, took_ns, age_ns });
    }

    fn mark(&mut self) -> u64 {
        self.now();
        self.mark_ns = self.now_ns;
        self.operations = 0;
        self.slots.clear();
        self.gaps.clear();
        self.gaps_lost = 0;
        self.mark_ns
    }

    fn now(&mut self) {
        self.now_ns = self.clock.elapsed().as_nanos() as u64;
    }

    fn count_wrong_pages(&self) -> usize {
        (0..self.pages.len()).filter(|&index| !self.is_whole(index)).count()
    }

    fn is_whole(&self, index: usize) -> bool {
        let (page, number) = (&self.pages[index].0, self.first + index);
        page[COUNTER] == u64::from(self.expected[index])
            && page[CHECK] == check(number, page[COUNTER], page[TOUCHED])
            && (CONTENT..WORDS).all(|word| page[word] == content(number, word))
    }
}

fn content(page: usize, word: usize) -> u64 {
    mix((page * WORDS + word) as u64)
}

fn check(page: usize, counter: u64, touched: u64) -> u64 {
    mix(page as u64 ^ counter.rotate_left(32) ^ mix(touched))
}

/// The finaliser of splitmix64: content that neither compresses nor repeats.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
