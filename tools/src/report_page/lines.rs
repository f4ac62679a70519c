//! Lines through measured points: latency against rate, and how a value scales.

use plotters::prelude::*;

use super::Picture;
use super::frame::{self, Axis, Drawn, Panel, Swatch};

const HEIGHT: u32 = 380;
/// More labels than this do not fit side by side.
const MOST_LABELS: usize = 12;
/// So that no point is drawn over the border.
const HEADROOM: f64 = 1.02;
const FLOOR: RGBColor = RGBColor(110, 118, 129);

/// Measured points with a name, joined by a line in the order of their x.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// The name, in the legend.
    pub name: String,
    /// The points, x and y; those that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// How the vertical axis counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum YScale {
    /// Evenly, from 0.
    #[default]
    Linear,
    /// By powers; for values that differ by more than one. What is not above 0 is left out.
    Log,
}

/// Fault latency against the rate at which the background sends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RateCurve {
    /// Usually one a percentile: x in MiB/s, y in microseconds.
    pub series: Vec<Series>,
    /// How the latency is counted.
    pub y_scale: YScale,
}

/// A value against streams, memory, or whatever else grows by doubling.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scaling {
    /// What grows, with its unit.
    pub x_title: String,
    /// What is measured, with its unit.
    pub y_title: String,
    /// The measurements. If all x are above 0, they stand as far apart as their logarithms.
    pub series: Vec<Series>,
    /// A value to reach.
    pub floor: Option<Floor>,
}

/// A value that is to be reached, drawn across the picture.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Floor {
    /// Its name, in the legend.
    pub name: String,
    /// The value.
    pub value: f64,
}

impl Picture for RateCurve {
    fn draw(&self) -> String {
        let is_log = self.y_scale == YScale::Log;
        let y_place = if is_log { f64::log10 } else { |y| y };
        let series = placed(&self.series, |x| x, y_place);
        let y = if is_log {
            log_axis("fault latency", &series)
        } else {
            Axis::from_zero("fault latency, µs", HEADROOM * most(&series, |point| point.1))
        };
        let mut x = Axis::from_zero("background rate, MiB/s", most(&series, |point| point.0));
        // A rate of 0 is measured too, and its points have some width.
        x.low = -0.012 * x.high;
        draw(&self.series, &series, &x, &y, None)
    }
}

impl Picture for Scaling {
    fn draw(&self) -> String {
        let is_log =
            self.series.iter().flat_map(|series| &series.points).all(|point| point.0 > 0.0);
        let x_place = if is_log { f64::log2 } else { |x| x };
        let series = placed(&self.series, x_place, |y| y);
        let floor = self.floor.as_ref().filter(|floor| floor.value.is_finite());
        let highest = most(&series, |point| point.1).max(floor.map_or(0.0, |floor| floor.value));
        let y = Axis::from_zero(&self.y_title, HEADROOM * highest);
        let x = self.x_axis(&series, is_log);
        draw(&self.series, &series, &x, &y, floor)
    }
}

impl Scaling {
    /// With labels where points are.
    fn x_axis(&self, series: &[Vec<(f64, f64)>], is_log: bool) -> Axis {
        let mut at: Vec<f64> = series.iter().flatten().map(|point| point.0).collect();
        at.sort_by(f64::total_cmp);
        at.dedup_by(|one, other| (*one - *other).abs() < 1e-9);
        let (Some(first), Some(last)) = (at.first(), at.last()) else {
            return Axis::from_zero(&self.x_title, 1.0);
        };
        let air = ((last - first) * 0.04).max(0.1);
        let (low, high) = (first - air, last + air);
        let value = |place: f64| if is_log { place.exp2() } else { place };
        let label = |place: f64| (place, number(value(place)));
        let step = at.len().div_ceil(MOST_LABELS);
        let ticks = at.into_iter().step_by(step).map(label).collect();
        Axis { title: self.x_title.clone(), low, high, ticks }
    }
}

/// A number with few digits.
fn number(value: f64) -> String {
    let rounded = (value * 100.0).round() / 100.0;
    format!("{rounded}")
}

/// The points as they are drawn, in order.
fn placed(
    series: &[Series],
    x_place: impl Fn(f64) -> f64,
    y_place: impl Fn(f64) -> f64,
) -> Vec<Vec<(f64, f64)>> {
    let place = |series: &Series| {
        let points = series.points.iter().map(|&(x, y)| (x_place(x), y_place(y)));
        let mut points: Vec<_> = points.filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        points
    };
    series.iter().map(place).collect()
}

fn most(series: &[Vec<(f64, f64)>], of: impl Fn(&(f64, f64)) -> f64) -> f64 {
    series.iter().flatten().map(of).fold(0.0, f64::max)
}

/// Latencies by their logarithms to base 10.
fn log_axis(title: &str, series: &[Vec<(f64, f64)>]) -> Axis {
    let values = || series.iter().flatten().map(|point| point.1);
    let (low, high) = if values().next().is_some() {
        (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max))
    } else {
        (0.0, 3.0)
    };
    let steps: &[f64] = if high - low < 2.5 { &[1.0, 2.0, 5.0] } else { &[1.0] };
    let powers = low.floor() as i32 - 1..=high.ceil() as i32 + 1;
    let all: Vec<f64> =
        powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power))).collect();
    let below = all.iter().rposition(|value| value.log10() <= low + 1e-9).unwrap_or(0);
    let above = all.iter().position(|value| value.log10() >= high - 1e-9);
    let above = above.unwrap_or(all.len() - 1).max(below + 1);
    let tick = |value: &f64| (value.log10(), frame::short_time(*value));
    let ticks: Vec<_> = all[below..=above].iter().map(tick).collect();
    let title = format!("{title}, logarithmic");
    Axis { title, low: all[below].log10(), high: all[above].log10(), ticks }
}

fn draw(
    measured: &[Series],
    series: &[Vec<(f64, f64)>],
    x: &Axis,
    y: &Axis,
    floor: Option<&Floor>,
) -> String {
    frame::draw(HEIGHT, |canvas| {
        let lines = measured.iter().enumerate();
        let mut names: Vec<_> =
            lines.map(|(index, it)| (Swatch::Line(index), it.name.as_str())).collect();
        names.extend(floor.map(|floor| (Swatch::Dashes(FLOOR), floor.name.as_str())));
        let rest = frame::legend(canvas, &names)?;
        let mut panel = frame::panel(&rest, x, y)?;
        if series.iter().all(Vec::is_empty) {
            return frame::nothing(&panel, "nothing was measured");
        }
        if let Some(floor) = floor {
            let line = [(x.low, floor.value), (x.high, floor.value)];
            panel.draw_series(DashedLineSeries::new(line, 7, 5, FLOOR.stroke_width(2)))?;
        }
        for (index, points) in series.iter().enumerate() {
            draw_line(&mut panel, index, points)?;
        }
        Ok(())
    })
}

/// A line, with a mark at each point that differs from series to series.
fn draw_line(panel: &mut Panel<'_, '_>, index: usize, points: &[(f64, f64)]) -> Drawn {
    let colour = frame::series_colour(index);
    panel.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?;
    let (canvas, pixel) = frame::inside(panel);
    points.iter().try_for_each(|&point| frame::draw_point(&canvas, index, pixel(point)))
}
