//! The peer: QEMU's own postcopy, with a Linux guest that dirties memory under TCG.
//!
//! This module runs the rounds; what it needs of the machine is in `place`, one QEMU
//! process in `machine`, the guest and its clock in `guest`. How the memory is moved
//! is one part by itself, `method`: boot, workload, figures and report are the same for
//! whatever moves it. docs/benchmarking.md says what each figure means.
//!
//! Invariants: every wait has a limit, QEMU processes end with the value that started
//! them, and a round whose guest read one wrong word is reported as not verified.

mod figures;
mod guest;
mod machine;
mod method;
mod place;
mod report;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use afterimage_tools::qemu::QmpError;
use afterimage_tools::size::Size;
use clap::{Args, ValueEnum};
use serde::Serialize;

pub use figures::{Baseline, GuestFigures, Latency, Work};
pub use method::QemuStatistics;
pub use report::{ModeReport, QemuReport, QemuRound, Spread, Summary};

use figures::Observed;
use machine::{Machine, Setup, Side};
use method::{Method, QemuPostcopy};
use place::Place;

/// How long the guest's noise is measured before anything moves.
const BASELINE: Duration = Duration::from_secs(2);
/// What is measured before the migration begins and after it has ended, for the picture.
const MARGIN: Duration = Duration::from_millis(500);
/// QEMU, the kernel and this guest's programs need this much beside the working set.
const GUEST_OVERHEAD: u64 = 128 << 20;

/// What to run.
#[derive(Args, Clone, Debug)]
pub struct QemuOptions {
    /// The guest's memory.
    #[arg(long, default_value = "1G", value_name = "SIZE")]
    pub memory: Size,
    /// How much of it the guest dirties, at random.
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    pub working_set: Size,
    /// Which of QEMU's ways.
    #[arg(long, value_enum, default_value_t = ModeChoice::Both)]
    pub mode: ModeChoice,
    /// Migrations in each mode; the modes take turns.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub rounds: u32,
    /// Where benches/qemu/get has put QEMU [default: `$AFTERIMAGE_QEMU`, else
    /// afterimage-qemu in `$XDG_CACHE_HOME` or ~/.cache]
    #[arg(long, value_name = "DIRECTORY")]
    pub directory: Option<PathBuf>,
}

impl fmt::Display for QemuOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modes = if self.mode == ModeChoice::Both { 2 } else { 1 };
        write!(
            f,
            "QEMU boots and moves a guest of {}, {} times; each takes ten to twenty seconds",
            self.memory,
            modes * self.rounds
        )
    }
}

/// Which of QEMU's ways to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeChoice {
    /// `postcopy-ram` alone.
    Plain,
    /// `postcopy-ram` with `postcopy-preempt`.
    Preempt,
    /// Both, round by round in turn.
    Both,
}

/// What moved the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mode {
    /// QEMU's postcopy: requested pages share the background's socket.
    Plain,
    /// QEMU's postcopy with `postcopy-preempt`: requested pages have their own socket.
    Preempt,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QemuError {
    /// What `benches/qemu/get` brings is not there.
    #[error("no {what} in {}: run benches/qemu/get as root, or name its directory", directory.display())]
    Missing {
        /// The thing.
        what: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The options fit no guest.
    #[error("{0}")]
    Options(String),
    /// A system call of the driver failed.
    #[error("cannot {operation}")]
    Io {
        /// What was tried, and with what.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A QEMU, or its guest, did not say what it should.
    #[error(transparent)]
    Talk(#[from] QmpError),
}

/// Runs the rounds, one migration at a time. Takes about half a minute each.
///
/// # Errors
/// [`QemuError::Missing`] where `benches/qemu/get` has not been run; else whatever broke
/// a round off. Wrong pages are not an error but [`QemuReport::verified`].
pub fn run(options: &QemuOptions) -> Result<QemuReport, QemuError> {
    check(options)?;
    let place = Place::open(options.directory.clone())?;
    let methods = methods(options.mode);
    let mut report = QemuReport::new(options, &place);
    for number in 1..=options.rounds {
        for method in &methods {
            tracing::info!(round = number, mode = ?method.mode(), "starting");
            let round = round(&place, options, method, &mut report)?;
            tracing::info!(blackout_us = round.blackout_us, total_us = round.total_us, "done");
            report.add(method.mode(), round);
        }
    }
    report.summarise();
    Ok(report)
}

fn check(options: &QemuOptions) -> Result<(), QemuError> {
    let (memory, working_set) = (options.memory, options.working_set);
    if working_set.0 == 0 || memory.0 < working_set.0.saturating_add(GUEST_OVERHEAD) {
        return Err(QemuError::Options(format!(
            "a working set of {working_set} in a guest of {memory}: the guest's system needs \
             {} beside it",
            Size(GUEST_OVERHEAD)
        )));
    }
    if options.rounds == 0 {
        return Err(QemuError::Options("no rounds: --rounds is 1 or more".into()));
    }
    Ok(())
}

fn methods(choice: ModeChoice) -> Vec<QemuPostcopy> {
    match choice {
        ModeChoice::Plain => vec![QemuPostcopy::Plain],
        ModeChoice::Preempt => vec![QemuPostcopy::Preempt],
        ModeChoice::Both => vec![QemuPostcopy::Plain, QemuPostcopy::Preempt],
    }
}

/// One guest, from its boot on one side to the check of its memory on the other.
fn round(
    place: &Place,
    options: &QemuOptions,
    method: &dyn Method,
    report: &mut QemuReport,
) -> Result<QemuRound, QemuError> {
    let setup = |side| Setup {
        side,
        memory: options.memory,
        working_set: options.working_set,
        ram: method.ram(side, options.memory),
    };
    let mut source = Machine::start(place, &setup(Side::Source))?;
    let mut destination = Machine::start(place, &setup(Side::Destination))?;
    let filled = source.guest.wait_filled()?;
    report.describe(&source, &filled);

    source.guest.mark()?;
    thread::sleep(BASELINE);
    let baseline = source.guest.report()?;

    let marked = source.guest.mark()?;
    thread::sleep(MARGIN);
    let moved = method.carry(&mut source, &mut destination)?;
    thread::sleep(MARGIN);
    let after = destination.guest.report()?;
    let marked_again = destination.guest.mark()?;
    let verified = destination.guest.verify()?;
    destination.quit()?;
    source.quit()?;
    Ok(QemuRound::new(moved, &Observed { marked, marked_again, baseline, after, verified }))
}
