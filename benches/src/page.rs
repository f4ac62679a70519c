//! The report as a page with pictures.

use std::path::{Path, PathBuf};

use afterimage_tools::ram::Backing;
use afterimage_tools::report_page::{
    BucketSeries, Floor, HeatMap, LatencyBuckets, Page, PageError, RateCurve, Scaling, Section,
    Series, Table, TimeLine, Verdict, YScale,
};

use crate::outcome::ResidentSample;
use crate::report::{self, Report, number};
use crate::run::Measurements;
use crate::suite::{Step, Units, sparse, sweeps};
use crate::unit::{Mechanism, Shape, Think, Unit, Wait};

const GIB: f64 = (1u64 << 30) as f64;
const MIB: f64 = (1u64 << 20) as f64;
/// Points of a line that was sampled.
const MOST_POINTS: usize = 200;

/// Writes the page into `directory` and says where it is.
///
/// # Errors
/// If it cannot be written there.
pub fn write(
    directory: &Path,
    report: &Report,
    measurements: &Measurements,
    units: &Units,
) -> Result<PathBuf, PageError> {
    let pictures = Pictures { measurements, units };
    let mut page = Page::new("Afterimage against this machine").lead(report.lead());
    page = page.section(rows(report));
    for section in [
        pictures.latencies(),
        pictures.rates(),
        pictures.one_run(),
        pictures.streams(),
        pictures.switchover(),
        pictures.resident_source(),
    ] {
        page = page.section(section);
    }
    for (heading, all) in [("Floors", &report.floors), ("Engine", &report.scenarios)] {
        page = page.section(details(heading, all));
    }
    // Numbers, strings and lists of them: this cannot fail.
    let data = serde_json::to_value(report).expect("plain data serialises");
    page.data(&data).write(directory)
}

fn rows(report: &Report) -> Section {
    let mut table = Table::new(["row", "value", "reach", "lowest to highest", "what it says"]);
    for row in &report.rows {
        let Some((value, spread)) = row.value.zip(row.spread) else {
            table = table.row([row.name, "missing", "", "", row.what]);
            continue;
        };
        // Does not break in a narrow column.
        let reach = row.reach_text().replace(' ', "\u{a0}");
        let spread = format!("{} to {}", number(spread[0]), number(spread[1]));
        let cells = [row.name.to_owned(), number(value), reach, spread, row.what.to_owned()];
        table = match row.ok {
            None => table.row(cells),
            Some(true) => table.judged_row(Verdict::Ok, cells),
            Some(false) => table.judged_row(Verdict::Short, cells),
        };
    }
    Section::new("Rows")
        .text(
            "Ratios to floors that were measured by turns in the same run; the value is the \
             median of the rounds. A floor is the smallest loop that does the same job.",
        )
        .table(&table)
}

fn details(heading: &str, all: &report::Details) -> Section {
    let mut table = Table::new(["what", "figures"]);
    for (name, figures) in all {
        table = table.row([name.clone(), report::line(figures)]);
    }
    Section::new(heading).table(&table)
}

struct Pictures<'a> {
    measurements: &'a Measurements,
    units: &'a Units,
}

impl Pictures<'_> {
    fn median(&self, unit: Unit, figure: &str) -> Option<f64> {
        Some(self.measurements.summaries(Step::from(unit)).get(figure)?.median)
    }

    fn buckets(&self, series: impl IntoIterator<Item = (&'static str, Unit)>) -> LatencyBuckets {
        let series = series.into_iter().filter_map(|(name, unit)| {
            let latencies = self.measurements.latencies.get(&unit.into())?;
            Some(BucketSeries { name: name.to_owned(), counts: latencies.buckets() })
        });
        LatencyBuckets { series: series.collect(), marks: Vec::new() }
    }

    fn latencies(&self) -> Section {
        let (blocking, polling) = (self.units.idle(Wait::Blocking), self.units.idle(Wait::Polling));
        let idle = self.buckets([
            ("L blocking", Unit::RemoteFault(blocking)),
            ("engine blocking", Unit::Faults(blocking)),
            ("L polling", Unit::RemoteFault(polling)),
            ("engine polling", Unit::Faults(polling)),
        ]);
        let under_load = |think| {
            let plan = self.units.loaded(think);
            self.buckets([("L", Unit::RemoteFault(plan)), ("engine", Unit::Faults(plan))])
        };
        Section::new("Fault latency")
            .text(
                "How long a thread waits that touches a missing page. L is the floor: event, \
                 request, answer, COPY and wake, and nothing else.",
            )
            .picture("idle", &idle, "Without load, one fault after the other.")
            .picture(
                "loaded",
                &under_load(Think::BackToBack),
                "Under saturating background, one fault after the other.",
            )
            .picture(
                "busy",
                &under_load(Think::Computing),
                "Under saturating background, 500 faults a second with computing in between: the \
                 scheduler favours such a thread less.",
            )
    }

    fn rates(&self) -> Section {
        let mut section = Section::new("Fault latency by rate of background");
        for (id, think, caption) in [
            ("rate", Think::BackToBack, "One fault after the other."),
            ("rate-busy", Think::Computing, "500 faults a second, with computing in between."),
        ] {
            let mut series = Vec::new();
            for (quantile, figure) in [("p50", "p50_us"), ("p99", "p99_us")] {
                for (name, make) in
                    [("L", Unit::RemoteFault as fn(_) -> _), ("engine", Unit::Faults as fn(_) -> _)]
                {
                    let plans = sweeps::RATES.map(|rate| sweeps::at_rate(rate, think));
                    let all = plans.into_iter().chain([self.units.loaded(think)]).map(make);
                    let points = all.filter_map(|unit| {
                        let rate = self.median(unit, "background_bytes_per_s")? / MIB;
                        Some((rate, self.median(unit, figure)?))
                    });
                    let points = points.collect();
                    series.push(Series { name: format!("{name} {quantile}"), points });
                }
            }
            section = section.picture(id, &RateCurve { series, y_scale: YScale::Log }, caption);
        }
        section.text("The right end of each line is the load as fast as it goes.")
    }

    fn one_run(&self) -> Section {
        let plan = self.units.loaded(Think::BackToBack);
        let samples = self.measurements.samples.get(&Unit::Trace(plan).into());
        let samples = samples.map_or(&[][..], Vec::as_slice);
        let since = "since the guest runs";
        let pages_total = plan.bytes / crate::memory::PAGE;
        let time_line = TimeLine { pages_total, vcpus: 1, since, samples, marks: &[] };
        let map = HeatMap { memory_bytes: plan.bytes, since, samples };
        Section::new("One run")
            .text("A thread faults on pages by chance, one after the other, until all is there.")
            .picture("time-line", &time_line, "How pages arrived, and how long the thread waited.")
            .picture("heat-map", &map, "Which parts of guest RAM had arrived when.")
    }

    fn streams(&self) -> Section {
        let kinds = [
            ("anonymous", Backing::Anonymous, Mechanism::Copy),
            ("memfd", Backing::Memfd, Mechanism::ContinueMemfd),
            ("hugetlb", Backing::Hugetlb, Mechanism::ContinueHugetlb),
        ];
        let mut section = Section::new("Background by number of streams");
        for (name, backing, mechanism) in kinds {
            let points = sweeps::STREAMS.into_iter().filter_map(|count| {
                let unit = self.units.background(backing, Shape::Dense, count);
                Some((f64::from(count), self.median(unit, "bytes_per_s")? / MIB))
            });
            let series = vec![Series { name: name.to_owned(), points: points.collect() }];
            let floor = self.median(self.units.place(mechanism), "bytes_per_s");
            let floor = floor.map(|rate| Floor {
                name: format!("receive and {mechanism}, one stream"),
                value: rate / MIB,
            });
            let scaling =
                Scaling { x_title: "streams".into(), y_title: "MiB/s".into(), series, floor };
            let caption = format!("Dense {name} memory; the line is floor 6.");
            section = section.picture(&format!("streams-{name}"), &scaling, &caption);
        }
        section
    }

    fn switchover(&self) -> Section {
        let series = |name: &str, units: Vec<(u64, Unit)>| {
            let points = units.into_iter().filter_map(|(bytes, unit)| {
                Some((bytes as f64 / GIB, self.median(unit, "switchover_us")?))
            });
            Series { name: name.to_owned(), points: points.collect() }
        };
        let of = |plan: fn(u64) -> crate::unit::MemoryPlan| {
            sweeps::RAM.map(|bytes| (bytes, Unit::Switchover(plan(bytes)))).to_vec()
        };
        let largest = self.median(Unit::Switchover(sparse(sweeps::LARGEST_RAM)), "switchover_us");
        let largest = largest.map(|time| format!(" With 1 TiB, sparse: {} µs.", number(time)));
        let caption = format!(
            "From the stop at the source until the guest may run.{}",
            largest.unwrap_or_default()
        );
        let scaling = Scaling {
            x_title: "GiB of guest RAM".into(),
            y_title: "µs".into(),
            series: vec![
                series("dense", of(crate::floors::anonymous)),
                series("sparse", of(sparse)),
            ],
            floor: self
                .median(Unit::PingPong(Wait::Blocking), "p50_us")
                .map(|value| Floor { name: "one round trip".into(), value }),
        };
        Section::new("Switchover by size of RAM").picture("switchover", &scaling, &caption)
    }

    fn resident_source(&self) -> Section {
        let kinds = [("anonymous", Backing::Anonymous), ("memfd", Backing::Memfd)];
        let mut series = Vec::new();
        for (name, backing) in kinds {
            let step = self.units.resident_source(backing).into();
            let samples = self.measurements.resident.get(&step).map_or(&[][..], Vec::as_slice);
            let line = |name: String, part: fn(&ResidentSample) -> f64| {
                let thin = samples.iter().step_by(samples.len().div_ceil(MOST_POINTS).max(1));
                let points = thin.map(|sample| (sample.seconds, 100.0 * part(sample))).collect();
                Series { name, points }
            };
            series.push(line(format!("in memory, {name}"), |sample| sample.resident));
            series.push(line(format!("not arrived, {name}"), |it| 1.0 - it.acknowledged));
        }
        let scaling = Scaling {
            x_title: "seconds since the switchover".into(),
            y_title: "% of the guest".into(),
            series,
            floor: None,
        };
        Section::new("What is left at a source that frees").picture(
            "resident-source",
            &scaling,
            "Guest memory that the source still has, and what the destination has not yet \
             acknowledged. What has arrived is gathered for a quarter of a second, then freed.",
        )
    }
}
