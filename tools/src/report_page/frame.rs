//! What all pictures have in common: canvas, axes, legend, colours.

use std::io;
use std::ops::Range;

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::drawing::DrawingAreaErrorKind;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Mark;

/// The width of all pictures, in pixels.
pub(super) const WIDTH: u32 = 960;
/// Room for what stands left of an axis, and below it.
const LEFT: u32 = 84;
const BELOW: u32 = 50;
const LEGEND_ROW: u32 = 26;

/// plotters divides sizes of text by 1.24.
const TEXT: f64 = 13.0 * 1.24;

pub(super) const INK: RGBColor = RGBColor(31, 41, 51);
const PALE_INK: RGBColor = RGBColor(75, 85, 99);
const GRID: RGBColor = RGBColor(228, 231, 235);

pub(super) const BLUE: RGBColor = RGBColor(0, 114, 178);
pub(super) const GREEN: RGBColor = RGBColor(0, 158, 115);
pub(super) const VERMILION: RGBColor = RGBColor(213, 94, 0);
pub(super) const PURPLE: RGBColor = RGBColor(170, 68, 136);
pub(super) const GREY: RGBColor = RGBColor(176, 184, 193);
/// Colours that can be told apart with any eyes (Okabe and Ito), for series.
const SERIES: [RGBColor; 6] = [
    BLUE,
    VERMILION,
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

pub(super) type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Panel<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>;
pub(super) type Drawn<T = ()> = Result<T, DrawingAreaErrorKind<io::Error>>;

/// The colour of the series of this number.
pub(super) const fn series_colour(index: usize) -> RGBColor {
    SERIES[index % SERIES.len()]
}

/// Draws a picture of this height into a string.
pub(super) fn draw(height: u32, content: impl FnOnce(&Canvas<'_>) -> Drawn) -> String {
    let mut svg = String::new();
    let canvas = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
    // Only files and fonts fail, and here there are neither.
    content(&canvas).and_then(|()| canvas.present()).expect("a string takes every drawing");
    drop(canvas);
    svg
}

/// What an axis shows: its title with the unit, and where it has labels.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Axis {
    pub(super) title: String,
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From 0 to a round number that is at least `high`.
    pub(super) fn from_zero(title: &str, high: f64) -> Self {
        let mut axis = Self::scaled(title, high, 1.0);
        let step = axis.ticks.get(1).map_or(axis.high, |(second, _)| *second);
        axis.high = (axis.high / step - 1e-9).ceil() * step;
        Self::scaled(title, axis.high, 1.0)
    }

    /// Time from 0 to `high`, in microseconds, labelled in the unit that fits.
    pub(super) fn time(title: &str, high: f64) -> Self {
        let (unit, micros) = match high {
            _ if high < 2e3 => ("µs", 1.0),
            _ if high < 1e7 => ("ms", 1e3),
            _ => ("s", 1e6),
        };
        Self::scaled(&format!("{title}, {unit}"), high, micros)
    }

    /// From 0 to `high`, with labels at round multiples of `unit`.
    fn scaled(title: &str, high: f64, unit: f64) -> Self {
        let high = if high.is_finite() && high > 0.0 { high } else { unit };
        let step = round_up(high / unit / 6.0) * unit;
        let digits = (-(step / unit).log10().floor()).max(0.0) as usize;
        let count = (high / step + 1e-9) as u32;
        let tick = |index: u32| f64::from(index) * step;
        let label = |at: f64| (at, format!("{:.digits$}", at / unit));
        let ticks = (0..=count).map(tick).map(label).collect();
        Self { title: title.to_owned(), low: 0.0, high, ticks }
    }

    fn label(&self, value: f64) -> String {
        let found = self.ticks.iter().find(|(at, _)| (at - value).abs() < f64::EPSILON);
        found.map_or_else(String::new, |(_, label)| label.clone())
    }
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let way = (value - self.low) / (self.high - self.low);
        first + (way * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|(at, _)| *at).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

/// The next of 1, 2, 5, 10, 20, …
pub(super) fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0].map(|step| step * power);
    steps.into_iter().find(|step| *step >= value * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// A duration in microseconds, as short as a label of an axis has to be.
pub(super) fn short_time(micros: f64) -> String {
    match micros {
        _ if micros < 1e3 => format!("{micros} µs"),
        _ if micros < 1e6 => format!("{} ms", micros / 1e3),
        _ => format!("{} s", micros / 1e6),
    }
}

/// Draws axes and grid, and returns the panel between them.
pub(super) fn panel<'a, 'b>(canvas: &'a Canvas<'b>, x: &Axis, y: &Axis) -> Drawn<Panel<'a, 'b>> {
    let mut panel = ChartBuilder::on(canvas)
        .margin_top(10)
        .margin_right(24)
        .x_label_area_size(BELOW)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(x.clone(), y.clone())?;
    panel
        .configure_mesh()
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .axis_style(PALE_INK)
        .label_style(text(PALE_INK))
        .axis_desc_style(text(INK))
        .x_labels(x.ticks.len())
        .y_labels(y.ticks.len())
        .x_label_formatter(&|value| x.label(*value))
        .y_label_formatter(&|value| y.label(*value))
        .x_desc(x.title.as_str())
        .y_desc(y.title.as_str())
        .draw()?;
    Ok(panel)
}

/// Text of the usual size.
pub(super) fn text(colour: RGBColor) -> TextStyle<'static> {
    ("sans-serif", TEXT).into_font().color(&colour)
}

/// How something is shown in the legend.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Swatch {
    Area(RGBColor),
    /// A line of the series of this number.
    Line(usize),
    Dashes(RGBColor),
}

/// Draws a legend at the top, in as many rows as it needs, and returns what is left.
pub(super) fn legend<'b>(canvas: &Canvas<'b>, items: &[(Swatch, &str)]) -> Drawn<Canvas<'b>> {
    // Nobody here knows how wide a letter will be; most are narrower than this.
    let width = |name: &str| 28 + name.chars().count() as u32 * 15 / 2 + 18;
    let (mut x, mut y) = (LEFT, 0);
    for (swatch, name) in items {
        if x > LEFT && x + width(name) > WIDTH {
            (x, y) = (LEFT, y + LEGEND_ROW);
        }
        let (left, middle) = (x as i32, (y + LEGEND_ROW / 2) as i32);
        match swatch {
            Swatch::Area(colour) => canvas.draw(&Rectangle::new(
                [(left, middle - 6), (left + 20, middle + 6)],
                colour.filled(),
            ))?,
            Swatch::Line(series) => {
                let line = [(left, middle), (left + 20, middle)];
                canvas.draw(&PathElement::new(line, series_colour(*series).stroke_width(2)))?;
                draw_point(canvas, *series, (left + 10, middle))?;
            }
            Swatch::Dashes(colour) => {
                for start in [left, left + 12] {
                    let dash = [(start, middle), (start + 8, middle)];
                    canvas.draw(&PathElement::new(dash, colour.stroke_width(2)))?;
                }
            }
        }
        let style = text(INK).pos(Pos::new(HPos::Left, VPos::Center));
        canvas.draw(&Text::new((*name).to_owned(), (left + 28, middle), style))?;
        x += width(name);
    }
    let used = if items.is_empty() { 0 } else { y + LEGEND_ROW };
    Ok(canvas.split_vertically(used).1)
}

/// Draws a point of the series of this number: each has a form as well as a colour.
pub(super) fn draw_point(canvas: &Canvas<'_>, series: usize, (x, y): (i32, i32)) -> Drawn {
    let style = series_colour(series).filled();
    match series % 3 {
        0 => canvas.draw(&Circle::new((x, y), 4, style)),
        1 => canvas.draw(&Rectangle::new([(x - 4, y - 4), (x + 4, y + 4)], style)),
        _ => canvas.draw(&Polygon::new([(x - 5, y + 4), (x + 5, y + 4), (x, y - 5)], style)),
    }
}

/// The inside of a panel, in pixels, and where its points are there.
pub(super) fn inside<'b>(panel: &Panel<'_, 'b>) -> (Canvas<'b>, impl Fn((f64, f64)) -> (i32, i32)) {
    let area = panel.plotting_area().clone();
    let canvas = area.strip_coord_spec();
    let (across, down) = area.get_pixel_range();
    let place = move |point| {
        let (x, y) = area.map_coordinate(&point);
        (x - across.start, y - down.start)
    };
    (canvas, place)
}

/// Draws vertical lines with their names, which stand at the side where there is room.
pub(super) fn marks(panel: &Panel<'_, '_>, marks: &[Mark], place: impl Fn(f64) -> f64) -> Drawn {
    let (canvas, pixel) = inside(panel);
    let (width, height) = canvas.dim_in_pixel();
    let range = panel.x_range();
    let places = marks.iter().map(|mark| (place(mark.at_us), mark));
    // Names that stand at the same place would hide each other: a row for each.
    for (row, (at, mark)) in places.filter(|(at, _)| range.contains(at)).enumerate() {
        let (x, y) = (pixel((at, 0.0)).0, row as i32 * 18 + 12);
        canvas.draw(&PathElement::new([(x, 0), (x, height as i32)], INK.stroke_width(1)))?;
        let is_at_right = x > width as i32 * 3 / 4;
        let (side, x) = if is_at_right { (HPos::Right, x - 6) } else { (HPos::Left, x + 6) };
        let style = text(INK).pos(Pos::new(side, VPos::Center));
        canvas.draw(&Text::new(mark.label.clone(), (x, y), style))?;
    }
    Ok(())
}

/// Says in the middle that there is nothing to show.
pub(super) fn nothing(panel: &Panel<'_, '_>, what: &str) -> Drawn {
    let canvas = panel.plotting_area().strip_coord_spec();
    let (width, height) = canvas.dim_in_pixel();
    let style = text(PALE_INK).pos(Pos::new(HPos::Center, VPos::Center));
    canvas.draw(&Text::new(what.to_owned(), (width as i32 / 2, height as i32 / 2), style))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn axes_have_round_labels_and_hold_every_value() {
        let axis = Axis::from_zero("pages", 47.0);
        assert_eq!(labels(&axis), ["0", "10", "20", "30", "40", "50"]);
        assert!((axis.high - 50.0).abs() < 1e-9);
        assert_eq!(labels(&Axis::from_zero("share", 0.3)).last(), Some(&"0.30"));
        for nothing in [0.0, f64::NAN, f64::INFINITY, -1.0] {
            let axis = Axis::from_zero("nothing", nothing);
            assert!(axis.high > axis.low && axis.ticks.len() > 2, "{axis:?}");
        }
    }

    #[test]
    fn time_has_the_unit_that_fits() {
        for (micros, title, last) in
            [(900.0, "time, µs", "800"), (61_000.0, "time, ms", "60"), (3e7, "time, s", "30")]
        {
            let axis = Axis::time("time", micros);
            assert_eq!((axis.title.as_str(), labels(&axis).pop()), (title, Some(last)));
            assert!((axis.high - micros).abs() < 1e-9, "nothing is drawn after the end");
        }
    }
}
