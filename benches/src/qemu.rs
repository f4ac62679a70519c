//! The peer: QEMU's own postcopy, with a Linux guest that dirties memory under TCG; and the
//! engine, with the same guest under the same QEMU.
//!
//! This module runs the rounds; what it needs of the machine is in `place` and `scene`, one
//! QEMU process in `machine`; the guest is spoken with by [`afterimage_tools::qemu::guest`]. How
//! the memory is moved is one part by itself, `method` (QEMU's own ways) with `engine` and `tool`
//! (the engine's): boot, workload, figures, `rows` and report are the same for whatever moves it.
//! docs/benchmarking.md says what each figure means.
//!
//! Invariants: every wait has a limit, QEMU processes end with the value that started
//! them, and a round whose guest read one wrong word is reported as not verified.

mod engine;
mod figures;
mod machine;
mod method;
pub mod page;
mod place;
mod report;
mod rows;
mod scene;
mod tool;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use afterimage_tools::qemu::QmpError;
use afterimage_tools::size::Size;
use clap::{Args, ValueEnum};
use serde::Serialize;

pub use engine::EngineStatistics;
pub use figures::{Baseline, GuestFigures, Latency, Work};
pub use method::QemuStatistics;
pub use report::{ModeReport, QemuReport, QemuRound, Spread, Summary};
pub use rows::Ratio;

use figures::Observed;
use machine::{Machine, Setup, Side};
use place::Place;
use scene::{Loopback, Scene};

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
    /// What moves the guest.
    #[arg(long, value_enum, default_value_t = ModeChoice::All)]
    pub mode: ModeChoice,
    /// What is behind the guest's RAM where QEMU itself moves it. The engine's is shared.
    #[arg(long, value_enum, default_value_t = PeerRam::Shared)]
    pub peer_ram: PeerRam,
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
        let modes = u64::from(self.rounds) * self.mode.modes().len() as u64;
        write!(
            f,
            "QEMU boots and moves a guest of {}, {} times; each takes ten to twenty seconds",
            self.memory, modes
        )
    }
}

/// What to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ModeChoice {
    /// QEMU's `postcopy-ram` alone
    Plain,
    /// QEMU's `postcopy-ram` with `postcopy-preempt`
    Preempt,
    /// Both of QEMU's, round by round in turn
    Both,
    /// The engine: page-client and afterimage-qemu
    Afterimage,
    /// All three, round by round in turn, compared in rows
    All,
}

impl ModeChoice {
    const fn modes(self) -> &'static [Mode] {
        match self {
            Self::Plain => &[Mode::Plain],
            Self::Preempt => &[Mode::Preempt],
            Self::Both => &[Mode::Plain, Mode::Preempt],
            Self::Afterimage => &[Mode::Afterimage],
            Self::All => &[Mode::Plain, Mode::Preempt, Mode::Afterimage],
        }
    }
}

/// What is behind the guest's RAM where QEMU itself moves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum PeerRam {
    /// A file on tmpfs, shared, as for the engine
    Shared,
    /// Private memory, as QEMU makes it by itself
    Private,
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
    /// The engine, by page-client and afterimage-qemu.
    Afterimage,
}

impl Mode {
    /// As JSON and tables have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Preempt => "preempt",
            Self::Afterimage => "afterimage",
        }
    }
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
    /// The engine's commands are not there.
    #[error(
        "no {what} in {}: build it there by `cargo build --workspace`, with --release if this \
         program is", directory.display()
    )]
    Unbuilt {
        /// The thing.
        what: String,
        /// Where this program is.
        directory: PathBuf,
    },
    /// The guest's RAM would not fit.
    #[error(
        "{available} are free in /dev/shm, and both sides' RAM may take {needed}: free some, or \
         give --memory"
    )]
    Room {
        /// What can be had.
        available: Size,
        /// What may be used.
        needed: Size,
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
    // A thread of its own, because its network is not the caller's.
    thread::scope(|scope| {
        let rounds = scope.spawn(|| rounds(options, &place));
        rounds.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn rounds(options: &QemuOptions, place: &Place) -> Result<QemuReport, QemuError> {
    let loopback = Loopback::enter()?;
    let mut report = QemuReport::new(options, place);
    for number in 1..=options.rounds {
        for &mode in options.mode.modes() {
            tracing::info!(round = number, mode = mode.name(), "starting");
            let round = round(place, options, mode, loopback.as_ref(), &mut report)?;
            tracing::info!(blackout_us = round.blackout_us, total_us = round.total_us, "done");
            report.add(mode, round);
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

/// One guest, from its boot on one side to the check of its memory on the other.
fn round(
    place: &Place,
    options: &QemuOptions,
    mode: Mode,
    loopback: Option<&Loopback>,
    report: &mut QemuReport,
) -> Result<QemuRound, QemuError> {
    let scene = Scene::new(options)?;
    let method = method::prepare(mode, &scene)?;
    let setup = |side| Setup {
        side,
        memory: options.memory,
        working_set: options.working_set,
        ram: method.ram(&scene, side),
        preload: method.preload(&scene, side),
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
    let before = loopback.map(Loopback::bytes).transpose()?;
    let moved = method.carry(&mut source, &mut destination)?;
    let wire_bytes = loopback.map(Loopback::bytes).transpose()?.zip(before);
    let wire_bytes = wire_bytes.map(|(after, before)| after - before);
    thread::sleep(MARGIN);
    let after = destination.guest.report()?;
    let marked_again = destination.guest.mark()?;
    let verified = destination.guest.verify()?;
    destination.quit()?;
    source.quit()?;
    let observed = Observed { marked, marked_again, baseline, after, verified };
    Ok(QemuRound::new(moved, wire_bytes, &observed))
}
