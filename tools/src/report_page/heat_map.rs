//! Which parts of guest memory have arrived, over time.

use plotters::prelude::*;

use super::Picture;
use super::frame::{self, Axis, Canvas, Drawn, Swatch};
use crate::sampling::ArrivalSample;

const HEIGHT: u32 = 460;
/// Nothing, then tenths, then all of it.
const LEVELS: u8 = 12;
const NOTHING: RGBColor = RGBColor(243, 244, 246);
const LITTLE: (f64, f64, f64) = (214.0, 230.0, 244.0);
const ALL: (f64, f64, f64) = (8.0, 48.0, 107.0);

/// Guest memory from bottom to top, without the holes between its regions, time from left to right; the colour says how much of a
/// part is there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeatMap<'a> {
    /// The length of guest memory, in bytes.
    pub memory_bytes: u64,
    /// What 0 is on the axis of time, as "the source's vCPUs were stopped".
    pub since: &'a str,
    /// In the order of their times, which are from 0; all with as many parts.
    pub samples: &'a [ArrivalSample],
}

/// A part of memory while it had the same colour.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stripe {
    part: usize,
    from_us: u64,
    to_us: u64,
    level: u8,
}

/// The level of a share in percent: 0 only for nothing, the last only for all.
const fn level(percent: u8) -> u8 {
    match percent {
        0 => 0,
        1..100 => 1 + percent / 10,
        _ => LEVELS - 1,
    }
}

fn colour(level: u8) -> RGBColor {
    if level == 0 {
        return NOTHING;
    }
    let way = f64::from(level - 1) / f64::from(LEVELS - 2);
    let mix = |from: f64, to: f64| (from + (to - from) * way).round() as u8;
    RGBColor(mix(LITTLE.0, ALL.0), mix(LITTLE.1, ALL.1), mix(LITTLE.2, ALL.2))
}

impl HeatMap<'_> {
    fn parts(&self) -> usize {
        self.samples.iter().map(|sample| sample.arrived_percent.len()).max().unwrap_or(0)
    }

    /// All that is not empty. A sample is shown from the one before until itself.
    fn stripes(&self) -> Vec<Stripe> {
        let mut stripes = Vec::new();
        for part in 0..self.parts() {
            let mut at = 0;
            let mut open: Option<Stripe> = None;
            for sample in self.samples {
                let level = level(sample.arrived_percent.get(part).copied().unwrap_or(0));
                match &mut open {
                    Some(stripe) if stripe.level == level => stripe.to_us = sample.at_us,
                    _ => {
                        let next = Stripe { part, from_us: at, to_us: sample.at_us, level };
                        stripes.extend(open.replace(next));
                    }
                }
                at = sample.at_us;
            }
            stripes.extend(open);
        }
        stripes.retain(|stripe| stripe.level > 0 && stripe.to_us > stripe.from_us);
        stripes
    }

    fn y_axis(&self) -> Axis {
        let (unit, bytes) = if self.memory_bytes >= 8 << 30 { ("GiB", 30) } else { ("MiB", 20) };
        let length = (self.memory_bytes >> bytes).max(1);
        let step = (length / 8).max(1).next_power_of_two();
        let ticks = (0..=length).step_by(step as usize);
        let ticks = ticks.map(|at| (at as f64 / length as f64, at.to_string())).collect();
        Axis { title: format!("guest memory, {unit}"), low: 0.0, high: 1.0, ticks }
    }

    fn draw_stripes(&self, canvas: &Canvas<'_>) -> Drawn {
        let last = self.samples.last().map_or(0, |sample| sample.at_us);
        let x = Axis::time(&format!("time since {}", self.since), last as f64);
        let mut panel = frame::panel(canvas, &x, &self.y_axis())?;
        if self.parts() == 0 {
            return frame::nothing(&panel, "no sample was taken");
        }
        let parts = self.parts() as f64;
        let rectangle = |(from, to), (low, high), level| {
            Rectangle::new([(from, low), (to, high)], colour(level).filled())
        };
        panel.draw_series([rectangle((0.0, x.high), (0.0, 1.0), 0)])?;
        panel.draw_series(self.stripes().into_iter().map(|it| {
            let heights = (it.part as f64 / parts, (it.part + 1) as f64 / parts);
            rectangle((it.from_us as f64, it.to_us as f64), heights, it.level)
        }))?;
        Ok(())
    }
}

impl Picture for HeatMap<'_> {
    fn draw(&self) -> String {
        frame::draw(HEIGHT, |canvas| {
            let some = [(0, "nothing"), (1, "under 10 %"), (4, "30–40 %"), (7, "60–70 %")];
            let all = [(LEVELS - 2, "over 90 %"), (LEVELS - 1, "all has arrived")];
            let names = some.into_iter().chain(all);
            let names: Vec<_> =
                names.map(|(level, name)| (Swatch::Area(colour(level)), name)).collect();
            let rest = frame::legend(canvas, &names)?;
            self.draw_stripes(&rest)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_all_and_nothing_look_like_it() {
        assert_eq!([0, 1, 9, 10, 99, 100].map(level), [0, 1, 1, 2, 10, 11]);
    }
}
