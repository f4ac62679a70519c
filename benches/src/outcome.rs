//! What a measuring process found out.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use afterimage_tools::sampling::ArrivalSample;
use serde::{Deserialize, Serialize};

use crate::latency::Latencies;
use crate::sys;

/// A figure of one process, of one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// How long the transfer or loop took.
    Seconds,
    /// Processor time of the whole process meanwhile.
    CpuSeconds,
    /// Bytes of pages that were moved or placed.
    Bytes,
    /// Of these, by background streams.
    BackgroundBytes,
    /// Of these, because they were asked for.
    RequestedBytes,
    /// Pages that came although another copy was first.
    DuplicatePages,
    /// When the source began to switch over, or the destination was told to run;
    /// nanoseconds of `CLOCK_MONOTONIC`.
    AtNanoseconds,
    /// The most memory in use at a time beside guest RAM, page tables included.
    ExtraBytes,
    /// Pages of 4 KiB in the guest.
    Pages,
    /// Bytes that crossed the sockets, in both directions.
    WireBytes,
    /// Pages that travelled as zeros.
    ZeroPages,
    /// Operations that the guest did.
    Operations,
    /// Connecting, and 16 bytes there and back, in microseconds.
    RoundTripUs,
    /// From the return of a link to the first new connection, in microseconds.
    PauseUs,
    /// From there to the first new data channel: greetings, planes.
    AgreementUs,
    /// From there to the page that somebody waited for.
    RequestUs,
    /// Faults that were answered with a page from the source.
    RemoteFaults,
    /// How long the guest's vCPUs waited for memory, all together, in microseconds.
    StallUs,
    /// From [`Source::stopped`](afterimage::Source::stopped) to its event, on a thread that
    /// waited for the descriptor, in microseconds.
    StoppedUs,
    /// From writing an eventfd to its reader, in microseconds.
    WakeUs,
}

/// What one process measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    figures: BTreeMap<Figure, f64>,
    /// How long faults, or round trips, took.
    pub latencies: Option<Latencies>,
    /// What arrived when, if that was watched.
    pub samples: Vec<ArrivalSample>,
    /// What was left at the source when, if that was watched.
    pub resident: Vec<ResidentSample>,
    /// What limits of background held when, before the switchover, after it, and changed.
    pub limits: Vec<RateWindow>,
    /// What a relay had counted when, if that is of use.
    pub wire: Vec<WireSample>,
}

/// A time in which a limit of background held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateWindow {
    /// Since when; nanoseconds of `CLOCK_MONOTONIC`.
    pub from_ns: u64,
    /// Until when.
    pub until_ns: u64,
    /// The limit.
    pub bytes_per_second: u64,
}

/// Bytes that had crossed a relay at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireSample {
    /// Nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// Bytes in both directions by then.
    pub bytes: u64,
}

/// Guest memory of a source that frees what has arrived, at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidentSample {
    /// Seconds since the switchover.
    pub seconds: f64,
    /// The part of the guest that is acknowledged, 0 to 1.
    pub acknowledged: f64,
    /// The part that is still in memory at the source, of what was at the switchover.
    pub resident: f64,
}

impl Outcome {
    /// With these latencies.
    #[must_use]
    pub fn of(latencies: Latencies) -> Self {
        Self { latencies: Some(latencies), ..Self::default() }
    }

    /// The figure, if it was measured.
    #[must_use]
    pub fn get(&self, figure: Figure) -> Option<f64> {
        self.figures.get(&figure).copied()
    }

    /// All of them.
    #[must_use]
    pub const fn figures(&self) -> &BTreeMap<Figure, f64> {
        &self.figures
    }

    /// Notes a figure.
    #[must_use]
    pub fn with(mut self, figure: Figure, value: f64) -> Self {
        self.figures.insert(figure, value);
        self
    }

    /// Notes time and processor time since `meter` began, until `end`.
    #[must_use]
    pub fn metered(self, meter: Reading) -> Self {
        self.with(Figure::Seconds, meter.time.as_secs_f64())
            .with(Figure::CpuSeconds, meter.cpu_seconds)
    }
}

/// A clock that also counts processor time.
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    started: Instant,
    cpu_seconds: f64,
}

/// What it showed.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    time: Duration,
    cpu_seconds: f64,
}

impl Meter {
    /// Begins.
    #[must_use]
    pub fn start() -> Self {
        Self { started: Instant::now(), cpu_seconds: sys::cpu_seconds() }
    }

    /// What has passed since.
    #[must_use]
    pub fn read(&self) -> Reading {
        let time = self.started.elapsed();
        Reading { time, cpu_seconds: sys::cpu_seconds() - self.cpu_seconds }
    }
}
