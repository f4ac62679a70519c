//! The report as a page with pictures.

use std::path::Path;

use serde::Serialize;

use super::outages::OutageReport;
use super::{DemoError, Report, plural, time};
use crate::report_page::{
    BucketSeries, FILE_NAME, HeatMap, LatencyBuckets, Mark, Page, Section, Table, TimeLine, Verdict,
};
use crate::sampling::ArrivalSample;
use crate::size::Size;

/// What 0 is on the axes of time.
const SINCE: &str = "the vCPUs were stopped";

/// What the page has for programs to read.
#[derive(Debug, Serialize)]
struct Data<'a> {
    #[serde(flatten)]
    report: &'a Report,
    samples: &'a [ArrivalSample],
}

impl Report {
    /// Writes the page, and says from then on where it is.
    pub(in crate::demo) fn write_page(
        &mut self,
        directory: &Path,
        samples: &[ArrivalSample],
    ) -> Result<(), DemoError> {
        self.page = Some(directory.join(FILE_NAME).display().to_string());
        let written = self.page(samples).and_then(|page| {
            page.write(directory)
                .map_err(|error| DemoError::failed("the guest moved, but there is no page", &error))
        });
        if written.is_err() {
            self.page = None;
        }
        written.map(drop)
    }

    fn page(&self, samples: &[ArrivalSample]) -> Result<Page, DemoError> {
        let data = serde_json::to_value(Data { report: self, samples })
            .map_err(|error| DemoError::failed("cannot put numbers into the page", &error))?;
        let memory = Size(self.asked.memory_bytes);
        let page = Page::new(format!("Postcopy migration of a running guest of {memory}"))
            .lead(self.title())
            .section(Section::new("The migration").table(&self.table()));
        let page = match self.passes_section() {
            Some(section) => page.section(section),
            None => page,
        };
        Ok(page
            .section(self.latency_section())
            .section(self.time_section(samples))
            .section(self.memory_section(samples))
            .data(&data))
    }

    fn table(&self) -> Table {
        let verdict = if self.verified { Verdict::Ok } else { Verdict::Short };
        self.rows().into_iter().fold(Table::new([""; 0]), |table, row| {
            let is_verdict = row.name == "verified";
            let cells = [row.name.to_owned(), row.value, row.what];
            if is_verdict { table.judged_row(verdict, cells) } else { table.row(cells) }
        })
    }

    /// The precopy passes, if there were any.
    fn passes_section(&self) -> Option<Section> {
        let cause = self.switchover_cause?;
        let heads = ["pass", "sent", "time", "pages written meanwhile"];
        let table = self.passes.iter().fold(Table::new(heads), |table, pass| {
            table.row([
                pass.number.to_string(),
                Size(pass.bytes_sent).to_string(),
                time(pass.time_us as f64),
                pass.pages_written.to_string(),
            ])
        });
        let text = format!("Memory was sent while the guest ran, until {}.", cause.words());
        Some(Section::new("Before the switchover").text(text).table(&table))
    }

    fn latency_section(&self) -> Section {
        let latency = &self.fault_latency_us;
        let mark = |name: &str, micros: f64| Mark {
            at_us: micros,
            label: format!("{name}: {}", time(micros)),
        };
        let marks = if latency.count == 0 {
            Vec::new()
        } else {
            vec![mark("half", latency.p50), mark("99 %", latency.p99)]
        };
        let counts = latency.buckets.clone();
        let series = vec![BucketSeries { name: "faults".to_owned(), counts }];
        let caption = format!(
            "{} fault{} for which a page came from the source, each from the reading of the fault \
             to the waking of the vCPU. A bar is the share of the faults that took as long as the \
             labels at its sides say; each bar covers twice the time of the one before. Lines mark \
             the latency within which half of the faults were answered, and 99 %.",
            latency.count,
            plural(latency.count)
        );
        Section::new("How long a vCPU waited for a page").picture(
            "latency",
            &LatencyBuckets { series, marks },
            &caption,
        )
    }

    fn time_section(&self, samples: &[ArrivalSample]) -> Section {
        let label = format!("the guest runs again, after {}", time(self.blackout_us as f64));
        let mut marks = vec![Mark { at_us: self.blackout_us as f64, label }];
        marks.extend(self.outages.iter().flat_map(OutageReport::marks));
        let line = TimeLine {
            pages_total: self.pages_total,
            vcpus: self.asked.vcpus,
            since: SINCE,
            samples,
            marks: &marks,
        };
        let caption = format!(
            "Above: pages that had arrived, in percent of all {}, stacked by the way they came. \
             Below, on the same axis: the share of the vCPUs' time that went by in waiting for \
             pages, from sample to sample ({} in all).{}",
            self.pages_total,
            samples.len(),
            self.outages.as_ref().map(OutageReport::caption).unwrap_or_default()
        );
        Section::new("How the pages came").picture("time-line", &line, &caption)
    }

    fn memory_section(&self, samples: &[ArrivalSample]) -> Section {
        let memory_bytes = self.asked.memory_bytes;
        let map = HeatMap { memory_bytes, since: SINCE, samples };
        let parts = samples.last().map_or(1, |sample| sample.arrived_percent.len().max(1));
        let caption = format!(
            "Guest memory from its first address, at the bottom, to its last, in {parts} part{} of \
             {}: a part grows darker as its pages arrive. Slopes are the background on its way \
             through memory, which goes on from where vCPUs last asked; what is coloured apart \
             from them a vCPU asked for, or it is zero.",
            plural(parts as u64),
            Size(memory_bytes / parts as u64)
        );
        Section::new("Where the pages came").picture("heat-map", &map, &caption)
    }
}
