//! How pages came, and how long the guest waited for them, over time.

use plotters::prelude::*;

use super::frame::{self, Axis, Drawn, Swatch};
use super::{Mark, Picture};
use crate::sampling::ArrivalSample;

const HEIGHT: u32 = 540;
/// What of it the stall has, below.
const STALL_HEIGHT: u32 = 190;

/// The pages that have arrived, by the way they came, and below them the stall.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimeLine<'a> {
    /// Pages of the guest.
    pub pages_total: u64,
    /// How many vCPUs can wait at a time; at least 1.
    pub vcpus: u32,
    /// What 0 is on the axis of time, as "the source's vCPUs were stopped".
    pub since: &'a str,
    /// In the order of their times, which are from 0.
    pub samples: &'a [ArrivalSample],
    /// Moments to point out.
    pub marks: &'a [Mark],
}

/// Pages of a sample that are counted together.
type Count = fn(&ArrivalSample) -> u64;

/// All pages of which content was sent.
fn sent(sample: &ArrivalSample) -> u64 {
    sample.pages_requested + sample.pages_background + sample.pages_precopy
}

impl TimeLine<'_> {
    /// Whether anything came before the switchover.
    fn has_precopy(&self) -> bool {
        self.samples.iter().any(|sample| sample.pages_precopy > 0)
    }

    /// Pages of one way, in percent of all, on top of what comes below it.
    fn percent(&self, pages: u64) -> f64 {
        pages as f64 * 100.0 / self.pages_total.max(1) as f64
    }

    fn x_axis(&self) -> Axis {
        let last = self.samples.last().map_or(0, |sample| sample.at_us);
        Axis::time(&format!("time since {}", self.since), last as f64)
    }

    /// The share of their time that the vCPUs waited, in percent, from sample to sample:
    /// from, to, share. A wait is known when it ends: what does not fit between two samples
    /// was before.
    fn stalls(&self) -> Vec<(f64, f64, f64)> {
        let start = ArrivalSample::default();
        let pairs: Vec<_> = [&start].into_iter().chain(self.samples).zip(self.samples).collect();
        let mut stalls = Vec::new();
        let mut carried = 0.0;
        for (previous, sample) in pairs.into_iter().rev() {
            let (from, to) = (previous.at_us as f64, sample.at_us as f64);
            let stalled = sample.stall_us - previous.stall_us + carried;
            let time = ((to - from) * f64::from(self.vcpus.max(1))).max(0.0);
            carried = (stalled - time).max(0.0);
            if time > 0.0 {
                stalls.push((from, to, stalled.clamp(0.0, time) * 100.0 / time));
            }
        }
        stalls.reverse();
        stalls
    }

    fn draw_pages(&self, canvas: &frame::Canvas<'_>) -> Drawn {
        let x = Axis { title: String::new(), ..self.x_axis() };
        let y = Axis::from_zero("pages arrived, % of all", 100.0);
        let mut panel = frame::panel(canvas, &x, &y)?;
        if self.samples.is_empty() {
            return frame::nothing(&panel, "no sample was taken");
        }
        // Each area reaches down to 0, and the next ones are drawn over it.
        let ways: [(RGBColor, Count); 4] = [
            (frame::GREY, |it| sent(it) + it.pages_zero),
            (frame::GREEN, sent),
            (frame::BLUE, |it| it.pages_requested + it.pages_background),
            (frame::VERMILION, |it| it.pages_requested),
        ];
        for (colour, pages) in ways {
            let tops = self.samples.iter().map(|it| (it.at_us as f64, self.percent(pages(it))));
            let outline = [(0.0, 0.0)].into_iter().chain(tops).chain([(x.high, 0.0)]);
            panel.draw_series([Polygon::new(outline.collect::<Vec<_>>(), colour)])?;
        }
        // Few pages make an area that is too thin to be seen.
        let tops =
            self.samples.iter().map(|it| (it.at_us as f64, self.percent(it.pages_requested)));
        panel.draw_series(LineSeries::new(tops, frame::VERMILION.stroke_width(2)))?;
        frame::marks(&panel, self.marks, |micros| micros)
    }

    fn draw_stall(&self, canvas: &frame::Canvas<'_>) -> Drawn {
        let stalls = self.stalls();
        let highest = stalls.iter().map(|stall| stall.2).fold(0.0, f64::max);
        let y = Axis::from_zero("stalled, %", highest.max(10.0));
        let x = self.x_axis();
        let mut panel = frame::panel(canvas, &x, &y)?;
        if stalls.is_empty() {
            return Ok(());
        }
        let steps = stalls.iter().flat_map(|&(from, to, share)| [(from, share), (to, share)]);
        let outline = [(0.0, 0.0)].into_iter().chain(steps).chain([(x.high, 0.0)]);
        panel.draw_series([Polygon::new(outline.collect::<Vec<_>>(), frame::PURPLE)])?;
        Ok(())
    }
}

impl Picture for TimeLine<'_> {
    fn draw(&self) -> String {
        frame::draw(HEIGHT, |canvas| {
            let precopy = (Swatch::Area(frame::GREEN), "in precopy");
            let names: Vec<_> = [
                (Swatch::Area(frame::VERMILION), "by fault"),
                (Swatch::Area(frame::BLUE), "in background"),
            ]
            .into_iter()
            .chain(self.has_precopy().then_some(precopy))
            .chain([
                (Swatch::Area(frame::GREY), "zero, not sent"),
                (Swatch::Area(frame::PURPLE), "vCPU time stalled"),
            ])
            .collect();
            let rest = frame::legend(canvas, &names)?;
            let height = rest.dim_in_pixel().1;
            let (pages, stall) = rest.split_vertically(height - STALL_HEIGHT);
            self.draw_pages(&pages)?;
            self.draw_stall(&stall)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stalls(samples: &[(u64, f64)]) -> Vec<(f64, f64, f64)> {
        let sample = |&(at_us, stall_us)| ArrivalSample { at_us, stall_us, ..Default::default() };
        let samples: Vec<_> = samples.iter().map(sample).collect();
        let since = "the start";
        TimeLine { pages_total: 1, vcpus: 2, since, samples: &samples, marks: &[] }.stalls()
    }

    #[test]
    fn stall_is_a_share_of_the_time_of_all_vcpus() {
        let stalls = stalls(&[(100, 20.0), (100, 20.0), (300, 220.0), (400, 220.0)]);
        assert_eq!(stalls, [(0.0, 100.0, 10.0), (100.0, 300.0, 50.0), (300.0, 400.0, 0.0)]);
    }

    #[test]
    fn a_wait_longer_than_an_interval_began_before_it() {
        let stalls = stalls(&[(100, 0.0), (200, 0.0), (300, 300.0)]);
        assert_eq!(stalls, [(0.0, 100.0, 0.0), (100.0, 200.0, 50.0), (200.0, 300.0, 100.0)]);
    }
}
