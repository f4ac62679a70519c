//! What the parent and the roles say to each other: a line of JSON each, commands on
//! the role's standard input, messages on its standard output.
//!
//! Invariant: a role that cannot go on says why in its last message, and ends with its
//! parent.

use std::io::{self, BufRead, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use afterimage::{Address, DestinationStats};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use serde::{Deserialize, Serialize};

use super::error::{DemoError, Status};
use super::options::{HoldPoint, Role, Transport};
use super::precopy::{Cause, Pass, PrecopySetup};
use crate::bandwidth::Bandwidth;
use crate::control::ControlOptions;
use crate::guest::{GuestKind, Workload};
use crate::ram::Backing;
use crate::sampling::ArrivalSample;

/// All that a role must know; the first line that it gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(super) struct Setup {
    /// The parent, with which the role ends.
    pub(super) parent: i32,
    pub(super) memory_bytes: u64,
    pub(super) vcpus: u32,
    pub(super) workload: Workload,
    pub(super) backing: Backing,
    pub(super) guest: GuestKind,
    /// Whether the right to a full userfaultfd is missing.
    pub(super) user_faults_only: bool,
    pub(super) transport: Transport,
    pub(super) streams: u16,
    pub(super) bandwidth: Bandwidth,
    pub(super) precopy: Option<PrecopySetup>,
    pub(super) checksums: bool,
    pub(super) worked_fraction: f64,
    pub(super) zero_fraction: f64,
    /// Where the source listens, or the page server.
    pub(super) listen: String,
    /// The socket by which the guest is handed over, if it is.
    pub(super) handoff: Option<PathBuf>,
    /// The keeper's socket, if there is one.
    pub(super) keeper: Option<PathBuf>,
    /// The page server's state file, if it can be killed.
    pub(super) page_server_state: Option<PathBuf>,
    /// How the destination is served, if not by itself.
    pub(super) page_client: Option<PageClient>,
    /// Where the roles' control sockets are, if they can be driven.
    pub(super) control: Option<PathBuf>,
    /// Where the roles' metrics are, if there are any.
    pub(super) metrics: Option<PathBuf>,
    /// Where the source waits to be told to go on.
    pub(super) holds: Vec<HoldPoint>,
    /// How often is told how far things are.
    pub(super) progress_pause: Duration,
    /// Whether the destination tells how far it is while passes are sent, too.
    pub(super) tells_of_passes: bool,
    /// Whether the destination is to take samples of what arrives.
    pub(super) takes_samples: bool,
    /// How long any one step may take.
    pub(super) limit: Duration,
    pub(super) corrupt_one_byte: bool,
}

impl Setup {
    /// Whether the source waits there.
    pub(super) fn holds(&self, point: HoldPoint) -> bool {
        self.holds.contains(&point)
    }

    /// The sockets of a role.
    pub(super) fn control(&self, role: Role) -> ControlOptions {
        let at = |directory: &Option<PathBuf>, kind: &str| {
            let name = format!("{}{kind}.sock", role.name());
            directory.as_ref().map(|it| Address::Unix(it.join(name)))
        };
        let (control, metrics) = (at(&self.control, ""), at(&self.metrics, ".metrics"));
        ControlOptions { control, metrics, insecure_metrics: false }
    }

    /// The same on a command line.
    pub(super) fn control_arguments(&self, role: Role) -> impl Iterator<Item = String> {
        let ControlOptions { control, metrics, .. } = self.control(role);
        let control = control.map(|address| format!("--control={address}"));
        control.into_iter().chain(metrics.map(|address| format!("--metrics={address}")))
    }
}

/// What a page-client must know beside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct PageClient {
    /// Where the destination hands its memory over.
    pub(super) attach: PathBuf,
    pub(super) state: PathBuf,
    /// Where the pages come from; known once somebody listens there.
    pub(super) source: String,
}

/// What the parent says after that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Command {
    /// To a source that hands its guest over: do it now.
    HandOver,
    /// To the destination: the guest's memory is served here.
    Connect(String),
    /// To the destination: the page-client can be reached here.
    Attach(PathBuf),
    /// To the destination: the process that served has ended.
    SourceExited,
    /// To the destination: the guest was taken back, and will not come.
    StaysAtSource,
}

/// What a role says. Times are those of `CLOCK_MONOTONIC`, in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Message {
    /// What is being done now.
    Step(Step),
    /// Clients can connect here. If it is the source, its guest runs.
    Listening(String),
    /// The destination has registered its memory and can connect.
    Prepared,
    /// A precopy pass has ended.
    Pass(Pass),
    /// The source has stopped its guest and sent its state.
    Stopped(Stopped),
    /// The source has stopped its guest, and the page server has it.
    HandedOver { stopped: Stopped, at_us: u64, sha256: String },
    /// The source has served everything.
    Served { sha256: String },
    /// The guest runs at the destination.
    Running { at_us: u64 },
    /// How far the destination is, or whoever serves it.
    Progress(Box<Progress>),
    /// The side that gets the pages is connected, perhaps again. It has told before how far
    /// it was at this moment.
    Attached,
    /// Every page is at the destination.
    AllArrived { at_us: u64 },
    /// The destination has stopped its guest and looked at every page.
    Done(Box<Done>),
    /// The source has got its guest back, let it run on, and looked at every page.
    Stayed(Box<Stayed>),
    /// The role cannot go on.
    Failed(DemoError),
}

/// What a role does that takes a while.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Step {
    FillsMemory,
    RunsGuest,
    SendsPasses,
    VerifiesMemory,
    GoesOnAtSource,
    VerifiesAtSource,
}

impl Step {
    /// In words.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::FillsMemory => "the source fills guest memory",
            Self::RunsGuest => "the guest runs at the source",
            Self::SendsPasses => "the guest runs at the source, and its memory is sent in passes",
            Self::VerifiesMemory => "the destination verifies every page",
            Self::GoesOnAtSource => "the guest was taken back, and goes on at the source",
            Self::VerifiesAtSource => "the source verifies every page",
        }
    }
}

/// The guest at the source, when it was stopped.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stopped {
    /// When its vCPUs were told to stop.
    pub(super) at_us: u64,
    pub(super) rounds: u64,
    pub(super) state_bytes: u64,
    /// From the moment in which no vCPU ran any more until the engine's event of it was read.
    pub(super) event_us: Option<u64>,
    /// Why it was time, where there was precopy.
    pub(super) cause: Option<Cause>,
}

/// How far the destination is, told by whoever knows a part of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Progress {
    pub(super) at_us: u64,
    /// What its guest has done, once it runs there.
    pub(super) operations: Option<u64>,
    /// What has arrived.
    pub(super) stats: Option<Stats>,
}

/// The end of the story, as the destination has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Done {
    /// What verification said, or what was wrong.
    pub(super) verified: Result<String, String>,
    pub(super) sha256: String,
    pub(super) page_bytes: u64,
    pub(super) rounds: u64,
    pub(super) operations_at_source_exit: u64,
    pub(super) operations: u64,
    pub(super) stopped_at_us: u64,
    /// What had arrived when.
    pub(super) samples: Vec<ArrivalSample>,
}

/// The end of the story, where the guest was taken back.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stayed {
    /// What verification said, or what was wrong.
    pub(super) verified: Result<String, String>,
    /// When the source had it back.
    pub(super) taken_back_at_us: u64,
    /// From the stop of its vCPUs until they ran again, if they were stopped.
    pub(super) blackout_us: Option<u64>,
    pub(super) rounds_before: u64,
    pub(super) rounds: u64,
    /// Of the pages that no vCPU writes.
    pub(super) sha256: String,
}

/// The engine's statistics.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Stats {
    pub(super) pages_total: u64,
    /// What is in place, whoever has put it there.
    pub(super) pages_complete: u64,
    pub(super) pages_requested: u64,
    pub(super) pages_background: u64,
    pub(super) pages_precopy: u64,
    pub(super) pages_zero: u64,
    pub(super) pages_duplicate: u64,
    pub(super) bytes_received: u64,
    pub(super) recoveries: u64,
    /// When the first page was in place.
    pub(super) first_page_at_us: Option<u64>,
    pub(super) stall_us: f64,
    pub(super) latency: Latency,
}

impl Stats {
    /// Of a destination that began at a time in microseconds.
    pub(super) fn of(stats: &DestinationStats, started_at_us: u64) -> Self {
        let latency = &stats.fault_latency;
        Self {
            pages_total: stats.pages_total,
            pages_complete: stats.pages_complete,
            pages_requested: stats.pages_requested,
            pages_background: stats.pages_background,
            pages_precopy: stats.pages_precopy,
            pages_zero: stats.pages_zero,
            pages_duplicate: stats.pages_duplicate,
            bytes_received: stats.bytes_received,
            recoveries: stats.recoveries,
            first_page_at_us: stats
                .first_page
                .map(|since| started_at_us + since.as_micros() as u64),
            stall_us: micros(latency.total),
            latency: Latency {
                count: latency.count,
                mean: micros(latency.mean),
                p50: micros(latency.p50),
                p99: micros(latency.p99),
                p999: micros(latency.p999),
                max: micros(latency.max),
                buckets: latency.buckets.clone(),
            },
        }
    }
}

impl Stats {
    /// Of all processes that have served one destination, one after the other.
    pub(super) fn sum(all: impl Iterator<Item = Self>) -> Self {
        all.fold(Self::default(), |sum, it| Self {
            pages_total: it.pages_total,
            pages_complete: sum.pages_complete.max(it.pages_complete),
            pages_requested: sum.pages_requested + it.pages_requested,
            pages_background: sum.pages_background + it.pages_background,
            pages_precopy: sum.pages_precopy + it.pages_precopy,
            pages_zero: sum.pages_zero + it.pages_zero,
            pages_duplicate: sum.pages_duplicate + it.pages_duplicate,
            bytes_received: sum.bytes_received + it.bytes_received,
            recoveries: sum.recoveries + it.recoveries,
            first_page_at_us: sum.first_page_at_us.into_iter().chain(it.first_page_at_us).min(),
            stall_us: sum.stall_us + it.stall_us,
            latency: sum.latency.and(it.latency),
        })
    }
}

/// Fault latencies in microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Latency {
    pub(super) count: u64,
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
    pub(super) buckets: Vec<u64>,
}

impl Latency {
    /// Both together. Percentiles are known to a factor of two then: by the buckets.
    fn and(self, other: Self) -> Self {
        if self.count == 0 || other.count == 0 {
            return if self.count == 0 { other } else { self };
        }
        let (mut buckets, shorter) = if self.buckets.len() < other.buckets.len() {
            (other.buckets, self.buckets)
        } else {
            (self.buckets, other.buckets)
        };
        buckets.iter_mut().zip(shorter).for_each(|(sum, count)| *sum += count);
        let count = self.count + other.count;
        let of = |latency: f64, count: u64| latency * count as f64;
        let mean = (of(self.mean, self.count) + of(other.mean, other.count)) / count as f64;
        let max = self.max.max(other.max);
        let percentile = |share: f64| {
            let mut left = (count as f64 * share).ceil() as u64;
            let is_there = |bucket: &u64| {
                left = left.saturating_sub(*bucket);
                left == 0
            };
            let bucket = buckets.iter().position(is_there).unwrap_or(buckets.len());
            2f64.powi(bucket as i32 + 1).min(max)
        };
        let (p50, p99, p999) = (percentile(0.5), percentile(0.99), percentile(0.999));
        Self { count, mean, p50, p99, p999, max, buckets }
    }
}

/// A role's end of the lines.
#[derive(Clone, Debug)]
pub(super) struct Line {
    commands: Receiver<Command>,
    /// Whether it was said that the guest stays.
    stays: Arc<AtomicBool>,
    output: Arc<Mutex<io::Stdout>>,
}

impl Line {
    /// Says something to the parent. If it is gone, so will this process be at once.
    pub(super) fn say(&self, message: &Message) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write_line(&mut *output, message) {
            tracing::error!(%error, "the parent cannot be told anything any more");
        }
    }

    /// Whether the parent has said that the guest stays at the source.
    pub(super) fn stays_at_source(&self) -> bool {
        self.stays.load(Ordering::Relaxed)
    }

    /// Waits for the parent's next command.
    pub(super) fn command(&self, limit: Duration) -> Result<Command, DemoError> {
        self.commands.recv_timeout(limit).map_err(|error| {
            DemoError::Failed(match error {
                RecvTimeoutError::Timeout => {
                    format!("the parent said nothing for {} s", limit.as_secs())
                }
                RecvTimeoutError::Disconnected => "the parent has gone".to_owned(),
            })
        })
    }
}

/// Plays a role to its end.
pub(super) fn run_role(role: impl FnOnce(&Line, &Setup) -> Result<(), DemoError>) -> Status {
    let (sender, commands) = crossbeam_channel::unbounded();
    let stays = Arc::<AtomicBool>::default();
    let output = Arc::new(Mutex::new(io::stdout()));
    let line = Line { commands, stays: Arc::clone(&stays), output };
    let setup = match start_role() {
        Ok(setup) => setup,
        // There may be no parent to tell.
        Err(error) => {
            eprintln!("demo: {error}");
            return error.status();
        }
    };
    thread::spawn(move || {
        for command in io::stdin().lines().map_while(Result::ok) {
            let Ok(command) = serde_json::from_str(&command) else { break };
            stays.fetch_or(command == Command::StaysAtSource, Ordering::Relaxed);
            if sender.send(command).is_err() {
                break;
            }
        }
    });
    match role(&line, &setup) {
        Ok(()) => Status::Verified,
        Err(error) => {
            let status = error.status();
            line.say(&Message::Failed(error));
            status
        }
    }
}

/// Reads the setup, and arranges for the end of this process with that of its parent.
fn start_role() -> Result<Setup, DemoError> {
    let mut first = String::new();
    io::stdin()
        .lock()
        .read_line(&mut first)
        .map_err(|error| DemoError::failed("cannot read from the parent", &error))?;
    let setup: Setup = serde_json::from_str(&first).map_err(|error| {
        DemoError::failed("--role is for processes that the demo starts itself", &error)
    })?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|error| DemoError::failed("cannot be tied to the parent", &error))?;
    // A parent that ended before that will send no signal.
    if nix::unistd::getppid().as_raw() != setup.parent {
        return Err(DemoError::Failed("the parent has gone".to_owned()));
    }
    Ok(setup)
}

/// Writes one line, at once.
pub(super) fn write_line(output: &mut impl Write, what: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string(what).map_err(io::Error::other)?;
    text.push('\n');
    output.write_all(text.as_bytes())?;
    output.flush()
}

/// `CLOCK_MONOTONIC` in microseconds: the same for all processes of a machine.
pub(super) fn now_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` lives through the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// A duration as fractional microseconds.
pub(super) fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1000.0
}

/// A limit as an instant.
pub(super) fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit
}
