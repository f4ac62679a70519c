//! Progress on the terminal: what is being done, how much memory has come, and how.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::messages::Progress;
use super::report::time;

/// The bars; on standard error, and only where that is a terminal.
pub(super) struct Bars {
    all: MultiProgress,
    step: ProgressBar,
    memory: ProgressBar,
    pages: ProgressBar,
    faults: ProgressBar,
    guest: ProgressBar,
    page_bytes: u64,
    last: Progress,
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
            last: Progress::default(),
        }
    }

    /// Says what is being done now.
    pub(super) fn step(&self, what: &'static str) {
        self.step.set_message(what);
    }

    /// Shows how far the destination is.
    pub(super) fn show(&mut self, now: Progress) {
        let complete = now.pages_requested + now.pages_background + now.pages_zero;
        self.memory.set_length(now.pages_total * self.page_bytes);
        self.memory.set_position(complete * self.page_bytes);
        self.pages.set_message(format!(
            "{} by fault, {} in background, {} zero",
            now.pages_requested, now.pages_background, now.pages_zero
        ));
        let seconds = now.at_us.saturating_sub(self.last.at_us) as f64 / 1e6;
        if self.last.at_us > 0 && seconds > 0.0 {
            let rate = |now: u64, last: u64| now.saturating_sub(last) as f64 / seconds;
            self.faults.set_message(format!(
                "{:.0}/s; half in {}, 99 % in {}",
                rate(now.faults, self.last.faults),
                time(now.p50_us),
                time(now.p99_us),
            ));
            let operations = rate(now.operations, self.last.operations);
            self.guest.set_message(format!("{:.3} million operations/s", operations / 1e6));
        }
        self.last = now;
    }

    /// Takes everything off the terminal again.
    pub(super) fn clear(&self) {
        // A terminal that has gone needs no clearing.
        let _ = self.all.clear();
    }
}
