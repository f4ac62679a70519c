//! What a run says: one JSON object, or a table.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::figures::Summary;
use crate::latency::Latencies;
use crate::machine::Machine;
use crate::run::Measurements;
use crate::suite::{Better, Over, Row, Step};
use crate::unit::Unit;

/// Of the JSON object. It grows when a key changes its meaning or goes.
pub const SCHEMA_VERSION: u32 = 1;

/// Figures by the name of what they are of.
pub type Details = BTreeMap<String, BTreeMap<&'static str, Summary>>;

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    schema_version: u32,
    /// Whether every page of every unit had the content that it must have.
    pub verified: bool,
    /// The rows.
    pub rows: Vec<RowReport>,
    /// The floors' figures, by name.
    pub floors: Details,
    /// The engine's figures, by name.
    pub scenarios: Details,
    /// Latencies of all rounds together, by name.
    pub histograms: BTreeMap<String, Buckets>,
    /// The machine.
    pub machine: Machine,
    /// What could not be measured here, and why.
    pub lacking: BTreeMap<String, String>,
    /// What failed, and how.
    pub failed: BTreeMap<String, String>,
    /// The page with pictures, if one was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<PathBuf>,
}

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct RowReport {
    /// Its name.
    pub name: &'static str,
    /// What it says.
    pub what: &'static str,
    /// The median of the rounds; `None` if it could not be measured.
    pub value: Option<f64>,
    /// What it is to reach; `None` where nothing is asked.
    pub reach: Option<f64>,
    /// `lower` or `higher`.
    pub better: &'static str,
    /// Whether it is reached; `None` where nothing is asked.
    pub ok: Option<bool>,
    /// Round by round.
    pub rounds: Vec<f64>,
    /// The smallest and the largest.
    pub spread: Option<[f64; 2]>,
}

/// Latencies as counts by powers of two.
#[derive(Clone, Debug, Serialize)]
pub struct Buckets {
    /// How many.
    pub count: u64,
    /// Their mean, in microseconds, like the others.
    pub mean_us: f64,
    /// The median.
    pub p50_us: f64,
    /// 99 % are no longer.
    pub p99_us: f64,
    /// 99.9 % are no longer.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// How many took at least 2ⁿ and less than 2ⁿ⁺¹ microseconds (the first: less than 2).
    pub buckets: Vec<u64>,
}

impl From<&Latencies> for Buckets {
    fn from(latencies: &Latencies) -> Self {
        Self {
            count: latencies.count(),
            mean_us: latencies.mean_us(),
            p50_us: latencies.quantile_us(0.5),
            p99_us: latencies.quantile_us(0.99),
            p999_us: latencies.quantile_us(0.999),
            max_us: latencies.max_us(),
            buckets: latencies.buckets(),
        }
    }
}

impl Report {
    /// Puts together what was measured.
    #[must_use]
    pub fn of(rows: &[Row], measurements: &Measurements, machine: Machine) -> Self {
        let mut floors = BTreeMap::new();
        let mut scenarios = BTreeMap::new();
        for step in measurements.steps() {
            let place = if is_floor(step.unit) { &mut floors } else { &mut scenarios };
            place.insert(name(step), measurements.summaries(step));
        }
        let named = |steps: &BTreeMap<Step, String>| {
            steps.iter().map(|(step, why)| (name(*step), why.clone())).collect()
        };
        let histograms = measurements.latencies.iter();
        Self {
            schema_version: SCHEMA_VERSION,
            verified: true,
            rows: rows.iter().map(|row| RowReport::of(row, measurements)).collect(),
            floors,
            scenarios,
            histograms: histograms.map(|(step, all)| (name(*step), all.into())).collect(),
            machine,
            lacking: named(&measurements.lacking),
            failed: named(&measurements.failed),
            report: None,
        }
    }
}

/// The name of a step in the report.
#[must_use]
pub fn name(step: Step) -> String {
    match step.over {
        Over::Chosen => step.unit.to_string(),
        Over::Gigabit => format!("{}, over 1 Gbit/s", step.unit),
    }
}

const fn is_floor(unit: Unit) -> bool {
    matches!(
        unit,
        Unit::PingPong(_)
            | Unit::LocalFault(_)
            | Unit::RemoteFault(_)
            | Unit::Stream(..)
            | Unit::Fill(_)
            | Unit::Place(..)
    )
}

impl RowReport {
    /// What it is to reach, as people read it; empty where nothing is asked.
    #[must_use]
    pub fn reach_text(&self) -> String {
        let sign = if self.better == "lower" { "≤" } else { "≥" };
        self.reach.map_or_else(String::new, |reach| format!("{sign} {}", number(reach)))
    }

    fn of(row: &Row, measurements: &Measurements) -> Self {
        let values = measurements.rounds.iter().filter_map(|round| (row.work_out)(round));
        let (values, reaches): (Vec<f64>, Vec<Option<f64>>) =
            values.map(|it| (it.value, it.reach)).unzip();
        let reach = Summary::of(reaches.into_iter().flatten().collect()).map(|it| it.median);
        let summary = Summary::of(values);
        let value = summary.as_ref().map(|it| it.median);
        let ok = value.zip(reach).map(|(value, reach)| match row.better {
            Better::Lower => value <= reach,
            Better::Higher => value >= reach,
        });
        Self {
            name: row.name,
            what: row.what,
            value,
            reach,
            better: match row.better {
                Better::Lower => "lower",
                Better::Higher => "higher",
            },
            ok,
            spread: summary.as_ref().map(|it| it.spread),
            rounds: summary.map_or_else(Vec::new, |it| it.rounds),
        }
    }
}

impl Measurements {
    fn steps(&self) -> Vec<Step> {
        let mut steps: Vec<Step> =
            self.rounds.iter().flat_map(|round| round.keys().copied()).collect();
        steps.sort_unstable();
        steps.dedup();
        steps
    }

    /// The figures of a step over all rounds.
    #[must_use]
    pub fn summaries(&self, step: Step) -> BTreeMap<&'static str, Summary> {
        let mut rounds: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        for figures in self.rounds.iter().filter_map(|round| round.get(&step)) {
            for (name, value) in figures {
                rounds.entry(name).or_default().push(*value);
            }
        }
        let summary = |(name, values)| Some((name, Summary::of(values)?));
        rounds.into_iter().filter_map(summary).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n", self.lead())?;
        self.rows(f)?;
        details(f, "Floors", &self.floors)?;
        details(f, "Engine", &self.scenarios)?;
        for (what, list) in [("not measured here", &self.lacking), ("FAILED", &self.failed)] {
            for (name, why) in list {
                writeln!(f, "{what}: {name}: {why}")?;
            }
        }
        if let Some(page) = &self.report {
            writeln!(f, "pictures: {}", page.display())?;
        }
        Ok(())
    }
}

impl Report {
    /// What was measured where.
    #[must_use]
    pub fn lead(&self) -> String {
        let machine = &self.machine;
        format!(
            "{} processors ({}), Linux {}, {}; load {:.1} before, {:.1} after. Every page was \
             verified.",
            machine.processors,
            machine.processor,
            machine.kernel,
            machine.network,
            machine.load_before,
            machine.load_after
        )
    }

    fn rows(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<28} {:>9} {:>11}  {:<5} {:>19}",
            "row", "value", "reach", "", "lowest to highest"
        )?;
        for row in &self.rows {
            let Some((value, spread)) = row.value.zip(row.spread) else {
                writeln!(f, "{:<28} {:>9}", row.name, "missing")?;
                continue;
            };
            let reach = row.reach_text();
            let ok = match row.ok {
                None => "",
                Some(true) => "ok",
                Some(false) => "short",
            };
            let spread = format!("{} to {}", number(spread[0]), number(spread[1]));
            let value = number(value);
            writeln!(f, "{:<28} {value:>9} {reach:>11}  {ok:<5} {spread:>19}", row.name)?;
        }
        Ok(())
    }
}

fn details(f: &mut fmt::Formatter<'_>, title: &str, all: &Details) -> fmt::Result {
    if all.is_empty() {
        return Ok(());
    }
    writeln!(f, "\n{title}")?;
    for (name, figures) in all {
        writeln!(f, "  {name}\n      {}", line(figures))?;
    }
    writeln!(f)
}

/// The figures of a unit as people read them.
#[must_use]
pub fn line(figures: &BTreeMap<&'static str, Summary>) -> String {
    // Where faults are measured, what they move is not the point, nor what that costs.
    let are_faults = figures.contains_key("p50_us");
    let is_about_faults =
        |key: &str| key.ends_with("_us") || ["count", "background_bytes_per_s"].contains(&key);
    let all = figures.iter().filter(|(key, it)| match **key {
        "background_bytes_per_s" => are_faults && it.median > 0.0,
        key => !are_faults || is_about_faults(key),
    });
    let texts: Vec<String> = all.filter_map(|(key, it)| figure(key, it)).collect();
    texts.join(", ")
}

/// A figure as people read it; `None` for what only the JSON has.
fn figure(key: &str, summary: &Summary) -> Option<String> {
    let value = summary.median;
    Some(match key {
        "p50_us" => format!("half in {} µs", number(value)),
        "p99_us" => format!("99 % in {} µs", number(value)),
        "p999_us" => format!("99.9 % in {} µs", number(value)),
        "count" => format!("{value:.0} a round"),
        "bytes_per_s" => format!("{} MB/s", number(value / 1e6)),
        "background_bytes_per_s" => format!("background {} MB/s", number(value / 1e6)),
        "operations_per_s" => format!("{} million operations/s", number(value / 1e6)),
        "round_trip_us" => format!("round trip {} µs", number(value)),
        "pause_us" => format!("pause {} µs", number(value)),
        "agreement_us" => format!("greetings and planes {} µs", number(value)),
        "request_us" => format!("request {} µs", number(value)),
        "remote_faults" => format!("{value:.0} remote faults"),
        "stall_us" => format!("stalled for {} ms", number(value / 1e3)),
        "stopped_us" => format!("stopped after {} µs", number(value)),
        "wake_us" => format!("an eventfd wakes in {} µs", number(value)),
        "off_before_percent" => format!("{} % off before the switchover", number(value)),
        "off_after_percent" => format!("{} % after it", number(value)),
        "off_changed_percent" => format!("{} % after a change", number(value)),
        "resident_at_half" => format!("{value:.2} left at the half"),
        "resident_at_end" => format!("{value:.2} at the end"),
        "switchover_us" => format!("runs after {} µs", number(value)),
        "cpu_source_s_per_gib" => format!("source {value:.2} CPU s/GiB"),
        "cpu_destination_s_per_gib" => format!("destination {value:.2} CPU s/GiB"),
        _ => return None,
    })
}

/// Three digits that matter.
#[must_use]
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        0.1.. => 2,
        _ => 4,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_matter() {
        for (value, text) in [(0.0123, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (1234.5, "1234")]
        {
            assert_eq!(number(value), text);
        }
    }
}
