//! The report as a page with a picture of the guest's work while it moved.

use std::path::{Path, PathBuf};

use afterimage_tools::report_page::{Page, PageError, Scaling, Section, Series, Table, Verdict};

use super::figures::Work;
use super::report::{ModeReport, QemuReport};
use crate::report::number;

/// What is shown before the stop and after the slowest end.
const MARGIN_US: f64 = 200e3;

/// Writes the page into `directory` and says where it is.
///
/// # Errors
/// If it cannot be written there.
pub fn write(directory: &Path, report: &QemuReport) -> Result<PathBuf, PageError> {
    let mut page = Page::new("Afterimage and QEMU's own postcopy").lead(report.lead());
    page = page.lead(report.machine_line());
    if !report.rows.is_empty() {
        page = page.section(rows(report));
    }
    page = page.section(work(report)).section(modes(report));
    // Numbers, strings and lists of them: this cannot fail.
    let data = serde_json::to_value(report).expect("plain data serialises");
    page.data(&data).write(directory)
}

fn rows(report: &QemuReport) -> Section {
    let mut table = Table::new(["row", "value", "reach", "theirs", "ours", "what it says"]);
    for row in &report.rows {
        let Some((value, ok)) = row.value.zip(row.ok) else {
            table = table.row([row.name, "missing", "", "", "", row.what]);
            continue;
        };
        let median = |of: Option<super::Spread>| number(of.unwrap_or_default().median);
        let verdict = if ok { Verdict::Ok } else { Verdict::Short };
        table = table.judged_row(
            verdict,
            [
                row.name.to_owned(),
                number(value),
                // Does not break in a narrow column.
                format!("≥\u{a0}{}", number(row.reach)),
                median(row.theirs),
                median(row.ours),
                row.what.to_owned(),
            ],
        );
    }
    Section::new("Rows")
        .text(
            "QEMU's own postcopy with preempt, divided by the engine, round by round; the value is \
             the median. Theirs and ours are medians in microseconds, or bytes.",
        )
        .table(&table)
}

fn modes(report: &QemuReport) -> Section {
    let header =
        std::iter::once("median (least-most)").chain(report.modes.iter().map(|it| it.mode.name()));
    let mut table = Table::new(header);
    for (name, cells) in report.cells() {
        table = table.row(std::iter::once(name.to_owned()).chain(cells));
    }
    Section::new("Figures").table(&table)
}

fn work(report: &QemuReport) -> Section {
    let chosen: Vec<_> =
        report.modes.iter().filter_map(|mode| Some((mode, middle(mode)?))).collect();
    let longest = chosen.iter().map(|(_, work)| since_stop(work, work.finished_us));
    let until = longest.fold(0.0, f64::max) + MARGIN_US;
    let series = chosen.iter().map(|(mode, work)| Series {
        name: mode.mode.name().to_owned(),
        points: points(work, until),
    });
    let slot_ms = chosen.first().map_or(10, |(_, work)| work.slot_us / 1000);
    let picture = Scaling {
        x_title: "ms since the guest was stopped at the source".into(),
        y_title: format!("pages touched in {slot_ms} ms"),
        series: series.collect(),
        floor: None,
    };
    Section::new("The guest's work while it moved").picture(
        "work",
        &picture,
        "Pages that the guest touched, of the round of each mode whose total is the middle one. \
         Before 0 it is undisturbed at the source; what it does after that is what postcopy \
         leaves it.",
    )
}

/// The work of the round whose total is in the middle.
fn middle(mode: &ModeReport) -> Option<&Work> {
    let mut rounds: Vec<_> = mode.rounds.iter().collect();
    rounds.sort_by_key(|round| round.total_us);
    rounds.get(rounds.len().checked_sub(1)? / 2).map(|round| &round.guest.work)
}

fn since_stop(work: &Work, at_us: u64) -> f64 {
    at_us as f64 - work.stopped_us as f64
}

/// Milliseconds since the stop, and what was done in the slot that began then. The guest did
/// not see the blackout, in which it did nothing.
fn points(work: &Work, until_us: f64) -> Vec<(f64, f64)> {
    let blackout = since_stop(work, work.resumed_us);
    // The last one was broken off.
    let whole = work.operations.split_last().map_or(&[][..], |(_, whole)| whole);
    let slots = whole.iter().enumerate().map(|(index, &count)| {
        let at = since_stop(work, index as u64 * work.slot_us);
        (if at < 0.0 { at } else { at + blackout }, f64::from(count))
    });
    let still = [(0.0, 0.0), (blackout, 0.0)];
    let shown = slots.chain(still).filter(|(at, _)| (-MARGIN_US..=until_us).contains(at));
    // To the nearest slot, so that all modes have the same.
    let slot = work.slot_us.max(1) as f64;
    shown.map(|(at, count)| ((at / slot).round() * slot / 1e3, count)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blackout_is_shown_although_the_guest_did_not_see_it() {
        let work = Work {
            slot_us: 10_000,
            started_us: 5_000,
            stopped_us: 20_000,
            resumed_us: 50_000,
            finished_us: 70_000,
            operations: vec![7, 8, 1, 2, 1],
        };
        let mut points = points(&work, 40e3);
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        let all = [(-20.0, 7.0), (-10.0, 8.0), (0.0, 0.0), (30.0, 1.0), (30.0, 0.0), (40.0, 2.0)];
        assert_eq!(points, all);
    }
}
