//! The guest's workload: dirties random pages for ever, checks all that it reads, and
//! notes by the guest's own clock how long each touch took.
//!
//! One file without dependencies, built by `tests/qemu/guest/get` into the guest's initrd.
//! It speaks over the serial port named by its first argument, one line each way:
//!
//! | from the driver | to the driver |
//! | --- | --- |
//! | | `{"filled":1,…}` once, when the memory has its content |
//! | `mark` | `{"marked_us":…}`: forgets all figures so far; times count from here |
//! | `report` | the figures since the last mark |
//! | `verify` | every word of every page compared, which takes seconds |
//!
//! What it keeps of its own is small: it lies in the guest's memory and moves with it.
//!
//! Options, from the kernel's command line: `afterimage.mib=N`, the size of the working
//! set; `afterimage.gap_us=N`, from which on a touch is noted one by one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

/// Bumped when a line changes its meaning; the driver refuses another.
const VERSION: u32 = 1;
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

/// Set while a command waits, so that the loop looks at a flag, not at a channel.
static COMMANDED: AtomicBool = AtomicBool::new(false);

fn main() -> io::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "/dev/ttyS1".into());
    let mut port = OpenOptions::new().read(true).write(true).open(&path)?;
    let pages = option("mib", 64) as usize * 256;
    let gap_ns = option("gap_us", 20) * 1000;

    let mut guest = Guest::new(pages, gap_ns);
    let commands = listen(port.try_clone()?);
    let clocksource = line_of("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    let kernel = line_of("/proc/sys/kernel/osrelease");
    writeln!(
        port,
        r#"{{"filled":{VERSION},"pages":{pages},"gap_ns":{gap_ns},"clocksource":"{clocksource}","kernel":"{kernel}"}}"#
    )?;
    loop {
        guest.touch();
        if COMMANDED.swap(false, Ordering::Acquire) {
            for command in commands.try_iter() {
                guest.obey(&command, &mut port)?;
            }
        }
    }
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

fn listen(port: File) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(port).lines() {
            let Ok(line) = line else { return };
            if sender.send(line.trim().to_owned()).is_err() {
                return;
            }
            COMMANDED.store(true, Ordering::Release);
        }
    });
    receiver
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

struct Guest {
    pages: Vec<Page>,
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

impl Guest {
    fn new(count: usize, gap_ns: u64) -> Self {
        let mut pages = Vec::with_capacity(count);
        for number in 0..count {
            let mut page = Page([0; WORDS]);
            page.0[CHECK] = check(number, 0, 0);
            for (word, value) in page.0.iter_mut().enumerate().skip(CONTENT) {
                *value = content(number, word);
            }
            pages.push(page);
        }
        let mut guest = Self {
            pages,
            expected: vec![0; count],
            random: 0x9e37_79b9_7f4a_7c15,
            wrong: 0,
            clock: Instant::now(),
            now_ns: 0,
            mark_ns: 0,
            operations: 0,
            slots: Vec::with_capacity(SLOTS),
            gaps: Vec::with_capacity(GAPS),
            gaps_lost: 0,
            gap_ns,
        };
        guest.mark();
        guest
    }

    /// Reads a random page, checks it, and writes to it.
    fn touch(&mut self) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let number = self.random as usize % self.pages.len();
        let word = CONTENT + (self.random >> 40) as usize % (WORDS - CONTENT);
        let page = &mut self.pages[number].0;
        let (counter, touched) = (page[COUNTER], page[TOUCHED]);
        if counter != u64::from(self.expected[number])
            || page[CHECK] != check(number, counter, touched)
            || page[word] != content(number, word)
        {
            self.wrong += 1;
        }
        let began_ns = self.now_ns;
        page[COUNTER] = counter + 1;
        page[TOUCHED] = began_ns;
        page[CHECK] = check(number, counter + 1, began_ns);
        self.expected[number] += 1;

        self.now_ns = self.clock.elapsed().as_nanos() as u64;
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

    fn mark(&mut self) {
        self.now_ns = self.clock.elapsed().as_nanos() as u64;
        self.mark_ns = self.now_ns;
        self.operations = 0;
        self.slots.clear();
        self.gaps.clear();
        self.gaps_lost = 0;
    }

    fn obey(&mut self, command: &str, port: &mut File) -> io::Result<()> {
        let answer = match command {
            "mark" => {
                self.mark();
                format!(r#"{{"marked_us":{}}}"#, self.mark_ns / 1000)
            }
            "report" => self.report(),
            "verify" => self.verify(),
            other => format!(r#"{{"error":"no command {}"}}"#, other.escape_default()),
        };
        port.write_all(answer.as_bytes())?;
        port.write_all(b"\n")?;
        // What speaking took is no gap.
        self.now_ns = self.clock.elapsed().as_nanos() as u64;
        Ok(())
    }

    fn report(&self) -> String {
        let slots: Vec<_> = self.slots.iter().map(u32::to_string).collect();
        let gaps: Vec<_> = self
            .gaps
            .iter()
            .map(|gap| format!("[{},{},{}]", gap.at_ns / 1000, gap.took_ns, gap.age_ns / 1000))
            .collect();
        format!(
            r#"{{"elapsed_us":{},"operations":{},"wrong":{},"slot_us":{},"slots":[{}],"gaps_lost":{},"gaps":[{}]}}"#,
            (self.now_ns - self.mark_ns) / 1000,
            self.operations,
            self.wrong,
            SLOT_NS / 1000,
            slots.join(","),
            self.gaps_lost,
            gaps.join(",")
        )
    }

    fn verify(&self) -> String {
        let wrong = (0..self.pages.len()).filter(|&number| !self.is_whole(number)).count();
        format!(r#"{{"verified":{},"wrong":{wrong}}}"#, self.pages.len())
    }

    fn is_whole(&self, number: usize) -> bool {
        let page = &self.pages[number].0;
        page[COUNTER] == u64::from(self.expected[number])
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
