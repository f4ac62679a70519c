//! The report of the peer: rounds, medians, and a table for people.

use std::fmt;
use std::path::PathBuf;

use afterimage_tools::qemu::guest::Filled;
use afterimage_tools::size::Size;
use serde::Serialize;

use super::figures::{GuestFigures, Observed, micros};
use super::machine::Machine;
use super::method::{Moved, Own};
use super::place::Place;
use super::rows::{self, Ratio};
use super::{EngineStatistics, Mode, PeerRam, QemuOptions, QemuStatistics};
use crate::machine::Machine as Host;
use crate::report::number;

/// All rounds, and what they were run with.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct QemuReport {
    /// Whether no guest read a wrong word, while it worked and when all was compared.
    pub verified: bool,
    /// As QEMU introduces itself.
    pub qemu_version: String,
    /// The version of its package.
    pub qemu_package: String,
    /// The suite of Debian that it is from.
    pub suite: String,
    /// The guest's kernel, as that calls itself.
    pub guest_kernel: String,
    /// The version of its package.
    pub guest_kernel_package: String,
    /// The clock that the guest measures with.
    pub guest_clocksource: String,
    /// How long a touch must take to be noted, in microseconds.
    pub gap_threshold_us: f64,
    /// What runs the guest's instructions.
    pub accelerator: &'static str,
    /// What the memory went over.
    pub transport: &'static str,
    /// What was behind the guest's RAM where QEMU itself moved it.
    pub peer_ram: PeerRam,
    /// The guest's memory, in bytes.
    pub memory: Size,
    /// What the guest dirties, in bytes.
    pub working_set: Size,
    /// QEMU's postcopy with preempt against the engine, where both were run.
    pub rows: Vec<Ratio>,
    /// The figures, by what moved the memory.
    pub modes: Vec<ModeReport>,
    /// The machine.
    pub machine: Host,
    /// The page with pictures, if one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<PathBuf>,
}

/// The rounds of one mode.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ModeReport {
    /// What moved the memory.
    pub mode: Mode,
    /// Over all rounds.
    pub summary: Summary,
    /// Each by itself, in the order in which they ran.
    pub rounds: Vec<QemuRound>,
}

/// One migration.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct QemuRound {
    /// From the stop of the source's vCPUs to the start of the destination's.
    pub blackout_us: u64,
    /// From the command to the word of both sides that it is over.
    pub total_us: u64,
    /// Of that, from the start of the destination's vCPUs on.
    pub postcopy_us: u64,
    /// Bytes sent in all, as the one says that sends them.
    pub bytes: u64,
    /// Bytes that crossed the network meanwhile, in both directions and with all headers;
    /// `None` without the right to a network namespace, where nobody else sends.
    pub wire_bytes: Option<u64>,
    /// Bytes sent after the switch, asked for or not, in each second of `postcopy_us`.
    pub background_bytes_per_s: u64,
    /// Touches at which the working guest read a wrong word, and pages that were found
    /// wrong when all were compared.
    pub pages_wrong: u64,
    /// Pages compared word by word at the end.
    pub pages_compared: u64,
    /// What it was to the guest.
    pub guest: GuestFigures,
    /// What QEMU says of it, if it was QEMU's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<QemuStatistics>,
    /// What the engine says of it, if it was that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineStatistics>,
}

/// A figure over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Spread {
    /// As many rounds were below as above.
    pub median: f64,
    /// The least of all rounds.
    pub least: f64,
    /// The most.
    pub most: f64,
}

/// The figures that are compared.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// Of [`QemuRound::blackout_us`].
    pub blackout_us: Spread,
    /// Of [`QemuRound::total_us`].
    pub total_us: Spread,
    /// Of [`QemuRound::background_bytes_per_s`].
    pub background_bytes_per_s: Spread,
    /// Of [`QemuRound::bytes`].
    pub bytes: Spread,
    /// Of [`QemuRound::wire_bytes`].
    pub wire_bytes: Option<Spread>,
    /// Faults as the guest sees them: how many.
    pub faults: Spread,
    /// Their mean.
    pub fault_mean_us: Spread,
    /// Their median.
    pub fault_p50_us: Spread,
    /// The 99th of a hundred.
    pub fault_p99_us: Spread,
    /// Of [`GuestFigures::first_touch_us`].
    pub first_touch_us: Spread,
    /// Of [`GuestFigures::work_lost_us`].
    pub work_lost_us: Spread,
    /// Of [`QemuStatistics::fault_mean_us`], where the version has it.
    pub qemu_fault_mean_us: Option<Spread>,
    /// Of [`EngineStatistics::fault_mean_us`].
    pub engine_fault_mean_us: Option<Spread>,
}

impl QemuReport {
    pub(super) fn new(options: &QemuOptions, place: &Place) -> Self {
        Self {
            verified: true,
            qemu_version: String::new(),
            qemu_package: place.versions.qemu_package.clone(),
            suite: place.versions.suite.clone(),
            guest_kernel: String::new(),
            guest_kernel_package: place.versions.kernel_package.clone(),
            guest_clocksource: String::new(),
            gap_threshold_us: 0.0,
            accelerator: "tcg",
            transport: "tcp loopback",
            memory: options.memory,
            working_set: options.working_set,
            peer_ram: options.peer_ram,
            rows: Vec::new(),
            modes: Vec::new(),
            machine: Host::look("tcp".into()),
            report: None,
        }
    }

    /// What only a running QEMU and its guest can say.
    pub(super) fn describe(&mut self, machine: &Machine, filled: &Filled) {
        self.qemu_version.clone_from(&machine.qmp.version);
        self.guest_kernel.clone_from(&filled.kernel);
        self.guest_clocksource.clone_from(&filled.clocksource);
        self.gap_threshold_us = filled.gap_ns as f64 / 1e3;
    }

    pub(super) fn add(&mut self, mode: Mode, round: QemuRound) {
        self.verified &= round.pages_wrong == 0;
        match self.modes.iter_mut().find(|of| of.mode == mode) {
            Some(of) => of.rounds.push(round),
            None => self.modes.push(ModeReport {
                mode,
                summary: Summary::default(),
                rounds: vec![round],
            }),
        }
    }

    pub(super) fn summarise(&mut self) {
        for mode in &mut self.modes {
            mode.summary = Summary::of(&mode.rounds);
        }
        let of = |mode: Mode| self.modes.iter().find(|it| it.mode == mode);
        if let Some((theirs, ours)) = of(Mode::Preempt).zip(of(Mode::Afterimage)) {
            self.rows = rows::compare(theirs, ours);
        }
        self.machine.look_again();
    }

    /// What was moved by what.
    pub(super) fn lead(&self) -> String {
        format!(
            "QEMU {}, guest of {} under {} with Linux {}, dirtying {}, {}",
            self.qemu_version,
            self.memory,
            self.accelerator,
            self.guest_kernel,
            self.working_set,
            self.transport
        )
    }

    /// On which machine.
    pub(super) fn machine_line(&self) -> String {
        let machine = &self.machine;
        format!(
            "{} processors ({}), Linux {}; load {:.1} before, {:.1} after",
            machine.processors,
            machine.processor,
            machine.kernel,
            machine.load_before,
            machine.load_after
        )
    }

    /// A table's rows: what, and for each mode its figure.
    pub(super) fn cells(&self) -> impl Iterator<Item = (&'static str, Vec<String>)> {
        rows().into_iter().map(|(name, scale, figure)| {
            let cell = |mode: &ModeReport| {
                figure(&mode.summary).map_or("not told".to_owned(), |spread| {
                    let Spread { median, least, most } = spread;
                    format!("{:.1} ({:.1}-{:.1})", median / scale, least / scale, most / scale)
                })
            };
            (name, self.modes.iter().map(cell).collect())
        })
    }
}

impl QemuRound {
    pub(super) fn new(moved: Moved, wire_bytes: Option<u64>, observed: &Observed) -> Self {
        let postcopy_us = micros(moved.finished.saturating_sub(moved.resumed));
        let rate = moved.postcopy_bytes as f64 * 1e6 / postcopy_us.max(1) as f64;
        let guest = GuestFigures::new(&moved, observed);
        let (qemu, engine) = match moved.own {
            Own::Qemu(own) => (Some(own), None),
            Own::Engine(own) => (None, Some(own)),
        };
        Self {
            blackout_us: micros(moved.resumed.saturating_sub(moved.stopped)),
            total_us: micros(moved.finished.saturating_sub(moved.started)),
            postcopy_us,
            bytes: moved.bytes,
            wire_bytes,
            background_bytes_per_s: rate as u64,
            pages_wrong: observed.after.wrong + observed.verified.wrong,
            pages_compared: observed.verified.pages,
            guest,
            qemu,
            engine,
        }
    }
}

impl Summary {
    fn of(rounds: &[QemuRound]) -> Self {
        let over = |figure: fn(&QemuRound) -> f64| Spread::of(rounds.iter().map(figure).collect());
        let where_told = |figure: fn(&QemuRound) -> Option<f64>| {
            let told: Vec<_> = rounds.iter().filter_map(figure).collect();
            (!told.is_empty()).then(|| Spread::of(told))
        };
        Self {
            blackout_us: over(|round| round.blackout_us as f64),
            total_us: over(|round| round.total_us as f64),
            background_bytes_per_s: over(|round| round.background_bytes_per_s as f64),
            bytes: over(|round| round.bytes as f64),
            wire_bytes: where_told(|round| round.wire_bytes.map(|bytes| bytes as f64)),
            faults: over(|round| round.guest.fault_latency_us.count as f64),
            fault_mean_us: over(|round| round.guest.fault_latency_us.mean),
            fault_p50_us: over(|round| round.guest.fault_latency_us.p50),
            fault_p99_us: over(|round| round.guest.fault_latency_us.p99),
            first_touch_us: over(|round| round.guest.first_touch_us as f64),
            work_lost_us: over(|round| round.guest.work_lost_us as f64),
            qemu_fault_mean_us: where_told(|round| round.qemu.as_ref()?.fault_mean_us),
            engine_fault_mean_us: where_told(|round| round.engine.as_ref()?.fault_mean_us),
        }
    }
}

impl Spread {
    pub(super) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(&least), Some(&most)) = (values.first(), values.last()) else {
            return Self::default();
        };
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Self { median, least, most }
    }
}

impl fmt::Display for QemuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.lead())?;
        writeln!(f, "{}", self.machine_line())?;
        let rounds = self.modes.first().map_or(0, |mode| mode.rounds.len());
        write!(f, "{:30}", format!("median (least-most) of {rounds}"))?;
        for mode in &self.modes {
            write!(f, "{:>26}", mode.mode.name())?;
        }
        for (name, cells) in self.cells() {
            write!(f, "\n{name:30}")?;
            cells.iter().try_for_each(|cell| write!(f, "{cell:>26}"))?;
        }
        if !self.rows.is_empty() {
            writeln!(f, "\n\nQEMU with preempt ÷ the engine, round by round")?;
            let header = ("row", "value", "reach", "lowest to highest", "theirs", "ours");
            let (row, value, reach, spread, theirs, ours) = header;
            write!(f, "{row:24}{value:>8}{reach:>10}  {:5}{spread:>18}{theirs:>14}{ours:>14}", "")?;
        }
        self.rows.iter().try_for_each(|row| write!(f, "\n{row}"))?;
        let verdict = if self.verified { "no page was wrong" } else { "PAGES WERE WRONG" };
        write!(f, "\n\n{verdict}")?;
        self.report.iter().try_for_each(|page| write!(f, "\npictures: {}", page.display()))
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((value, spread)) = self.value.zip(self.spread) else {
            return write!(f, "{:24}{:>8}", self.name, "missing");
        };
        let ok = if value >= self.reach { "ok" } else { "short" };
        let (value, reach) = (number(value), format!("≥ {}", number(self.reach)));
        let spread = format!("{} to {}", number(spread[0]), number(spread[1]));
        let [theirs, ours] =
            [self.theirs, self.ours].map(|it| number(it.unwrap_or_default().median));
        let name = self.name;
        write!(f, "{name:24}{value:>8}{reach:>10}  {ok:5}{spread:>18}{theirs:>14}{ours:>14}")
    }
}

type Row = (&'static str, f64, fn(&Summary) -> Option<Spread>);

fn rows() -> [Row; 12] {
    [
        ("blackout, ms", 1e3, |of| Some(of.blackout_us)),
        ("total, ms", 1e3, |of| Some(of.total_us)),
        ("background, MB/s", 1e6, |of| Some(of.background_bytes_per_s)),
        ("over the network, MB", 1e6, |of| of.wire_bytes),
        ("faults, seen by the guest", 1.0, |of| Some(of.faults)),
        ("  mean, us", 1.0, |of| Some(of.fault_mean_us)),
        ("  p50, us", 1.0, |of| Some(of.fault_p50_us)),
        ("  p99, us", 1.0, |of| Some(of.fault_p99_us)),
        ("fault mean by QEMU, us", 1.0, |of| of.qemu_fault_mean_us),
        ("fault mean by the engine, us", 1.0, |of| of.engine_fault_mean_us),
        ("first touch ends after, ms", 1e3, |of| Some(of.first_touch_us)),
        ("guest's work lost, ms", 1e3, |of| Some(of.work_lost_us)),
    ]
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn an_even_number_of_rounds_has_its_median_between_two() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(spread, Spread { median: 2.5, least: 1.0, most: 4.0 });
        assert_eq!(Spread::of(vec![7.0]), Spread { median: 7.0, least: 7.0, most: 7.0 });
    }
}
