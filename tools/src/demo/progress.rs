//! Progress on the terminal: what is being done, how much memory has come, and how.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::messages::{Progress, Stats};
use super::precopy::Pass;
use super::report::time;

/// Between rates: over a shorter time they jump.
const SHORTEST_US: u64 = 40_000;

/// The bars; on standard error, and only where that is a terminal.
pub(super) struct Bars {
    all: MultiProgress,
    step: ProgressBar,
    memory: ProgressBar,
    pages: ProgressBar,
    faults: ProgressBar,
    guest: ProgressBar,
    page_bytes: u64,
    /// When something was shown, and what had been counted then.
    faults_before: (u64, u64),
    operations: (u64, u64),
}

impl Bars {
    /// Shows the step that comes first.
    pub(super) fn new(page_bytes: u64) -> Self {
        let all = MultiProgress::new();
        let line = |template: &str| {
            let style = ProgressStyle::with_template(template).expect("the template is valid");
            all.add(ProgressBar::new(0).with_style(style.progress_chars("=> ")))
        };
        let step = line("{spinner} {wide_msg}");
        step.enable_steady_tick(Duration::from_millis(100));
        Self {
            memory: line(
                "  memory  [{wide_bar}] {percent:>3} %  {binary_bytes} of {binary_total_bytes}",
            ),
            pages: line("  pages   {wide_msg}"),
            faults: line("  faults  {wide_msg}"),
            guest: line("  guest   {wide_msg}"),
            step,
            all,
            page_bytes,
            faults_before: (0, 0),
            operations: (0, 0),
        }
    }

    /// Says what is being done now.
    pub(super) fn step(&self, what: &'static str) {
        self.step.set_message(what);
    }

    /// Shows what a precopy pass has done.
    pub(super) fn pass(&self, pass: &Pass) {
        self.pages.set_message(pass.to_string());
    }

    /// Shows how far the destination is.
    pub(super) fn show(&mut self, now: &Progress) {
        if let Some(stats) = &now.stats {
            self.show_pages(now.at_us, stats);
        }
        if let Some(operations) = now.operations
            && let Some(rate) = rate((now.at_us, operations), &mut self.operations)
        {
            self.guest.set_message(format!("{:.3} million operations/s", rate / 1e6));
        }
    }

    fn show_pages(&mut self, at_us: u64, stats: &Stats) {
        self.memory.set_length(stats.pages_total * self.page_bytes);
        self.memory.set_position(stats.pages_complete * self.page_bytes);
        self.pages.set_message(format!(
            "{} by fault, {} in background, {} in precopy, {} zero",
            stats.pages_requested, stats.pages_background, stats.pages_precopy, stats.pages_zero
        ));
        let latency = &stats.latency;
        if let Some(rate) = rate((at_us, latency.count), &mut self.faults_before) {
            self.faults.set_message(format!(
                "{rate:.0}/s; half in {}, 99 % in {}",
                time(latency.p50),
                time(latency.p99),
            ));
        }
    }

    /// Takes everything off the terminal again.
    pub(super) fn clear(&self) {
        // A terminal that has gone needs no clearing.
        let _ = self.all.clear();
    }
}

/// How fast a count has grown since the last time, in a second; `None` for a look too soon after
/// it, which is not noted.
fn rate(now: (u64, u64), last: &mut (u64, u64)) -> Option<f64> {
    let micros = now.0.saturating_sub(last.0);
    if micros < SHORTEST_US {
        return None;
    }
    let (at, before) = std::mem::replace(last, now);
    (at > 0).then(|| now.1.saturating_sub(before) as f64 * 1e6 / micros as f64)
}
