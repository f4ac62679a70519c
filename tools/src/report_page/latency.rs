//! How long faults took.

use plotters::prelude::*;

use super::frame::{self, Axis, Drawn, Swatch};
use super::{Mark, Picture};

const HEIGHT: u32 = 360;
/// More labels than this do not fit side by side.
const MOST_LABELS: usize = 16;

/// Counts of one series, by buckets of powers of two.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BucketSeries {
    /// The name, in the legend.
    pub name: String,
    /// How many took at least 2ⁿ and less than 2ⁿ⁺¹ microseconds (the first: less than 2),
    /// by n.
    pub counts: Vec<u64>,
}

/// The distribution of fault latencies: bars, in percent of the faults of each series.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LatencyBuckets {
    /// The series, side by side in each bucket.
    pub series: Vec<BucketSeries>,
    /// Latencies to point out, as the percentiles.
    pub marks: Vec<Mark>,
}

impl LatencyBuckets {
    /// The first and the last bucket with something in it, and one more at each side.
    fn span(&self) -> (usize, usize) {
        let filled = self.series.iter().flat_map(|series| {
            series.counts.iter().enumerate().filter(|(_, count)| **count > 0).map(|(n, _)| n)
        });
        let first = filled.clone().min().unwrap_or(1);
        let last = filled.max().unwrap_or(8);
        (first.saturating_sub(1), last + 2)
    }

    fn axis(&self) -> Axis {
        let (first, end) = self.span();
        let step = (end - first).div_ceil(MOST_LABELS);
        let ticks = (first..=end).step_by(step).map(|n| (n as f64, border(n))).collect();
        let title = "fault latency, logarithmic".to_owned();
        Axis { title, low: first as f64, high: end as f64, ticks }
    }
}

/// Where bucket `n` begins.
fn border(n: usize) -> String {
    match n {
        0 => "0".to_owned(),
        1..10 => format!("{} µs", 1u64 << n),
        10..20 => format!("{} ms", 1u64 << (n - 10)),
        _ => format!("{} s", 1u64 << (n - 20).min(40)),
    }
}

impl Picture for LatencyBuckets {
    fn draw(&self) -> String {
        frame::draw(HEIGHT, |canvas| {
            let totals: Vec<u64> =
                self.series.iter().map(|series| series.counts.iter().sum()).collect();
            let share = |series: usize, n: usize| {
                let count = self.series[series].counts.get(n).copied().unwrap_or(0);
                count as f64 * 100.0 / totals[series].max(1) as f64
            };
            let (first, end) = self.span();
            let all =
                (0..self.series.len()).flat_map(|series| (first..end).map(move |n| (series, n)));
            let highest = all.clone().map(|(series, n)| share(series, n)).fold(0.0, f64::max);
            let names: Vec<_> = self
                .series
                .iter()
                .enumerate()
                .map(|(index, it)| (Swatch::Area(frame::series_colour(index)), it.name.as_str()))
                .collect();
            let rest = frame::legend(canvas, if names.len() > 1 { &names } else { &[] })?;
            // The names of the marks stand above the bars.
            let room = 1.0 + 0.08 * self.marks.len() as f64;
            let y = Axis::from_zero("share of the faults, %", (highest * room).min(100.0));
            let mut panel = frame::panel(&rest, &self.axis(), &y)?;
            let width = 0.84 / self.series.len().max(1) as f64;
            panel.draw_series(all.filter(|(series, n)| share(*series, *n) > 0.0).map(
                |(series, n)| {
                    let left = n as f64 + 0.08 + series as f64 * width;
                    let corners = [(left, 0.0), (left + width, share(series, n))];
                    Rectangle::new(corners, frame::series_colour(series).filled())
                },
            ))?;
            self.draw_words(&panel, highest)
        })
    }
}

impl LatencyBuckets {
    fn draw_words(&self, panel: &frame::Panel<'_, '_>, highest: f64) -> Drawn {
        if highest <= 0.0 {
            return frame::nothing(panel, "no fault needed a page of the source");
        }
        frame::marks(panel, &self.marks, |micros| micros.max(1.0).log2())
    }
}
