//! What is said on the standard error while serving: a bar on a terminal, else lines now
//! and then.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between updates of a bar.
const FRAME: Duration = Duration::from_millis(200);
/// Between looks without a terminal.
const LOOK: Duration = Duration::from_secs(1);
/// Between lines without a terminal.
const PAUSE: Duration = Duration::from_secs(5);

/// Says how it goes.
#[derive(Debug)]
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    said: Option<(Instant, u64)>,
}

impl Progress {
    /// A bar if the standard error is a terminal.
    #[must_use]
    pub(super) fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style = "{wide_bar} {pos}/{len} pages  {per_sec}  {msg}";
            bar.set_style(ProgressStyle::with_template(style).expect("a template that parses"));
            bar
        });
        Self { bar, said: None }
    }

    /// How long to wait before [`update`](Self::update) has something new to say.
    #[must_use]
    pub(super) fn interval(&self) -> Duration {
        if self.bar.is_some() { FRAME } else { LOOK }
    }

    /// Says a line.
    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("page-server: {line}")),
            None => eprintln!("page-server: {line}"),
        }
    }

    /// Shows how many pages have arrived.
    pub(super) fn update(&mut self, arrived: u64, total: u64) {
        if total == 0 {
            return;
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(arrived);
            return;
        }
        let (at, before) = self.said.unwrap_or((Instant::now(), 0));
        if self.said.is_none() {
            self.said = Some((at, before));
        } else if at.elapsed() >= PAUSE && arrived != before {
            self.say(&format!("{arrived} of {total} pages have arrived"));
            self.said = Some((Instant::now(), arrived));
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
