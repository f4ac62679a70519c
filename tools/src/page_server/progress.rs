//! What is said while serving: on the standard error, with a bar on a terminal, else lines
//! now and then; or to the program that serves.

use std::fmt;
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use afterimage::{Address, DestinationStats};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between updates of a bar.
const FRAME: Duration = Duration::from_millis(200);
/// Between looks without a terminal.
const LOOK: Duration = Duration::from_secs(1);
/// Between lines without a terminal.
const PAUSE: Duration = Duration::from_secs(5);

/// What a program hears that does by a function what a command does.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Notice {
    /// Clients can connect here, and a VMM where it is to hand its guest over.
    Listening(Address),
    /// A source is attached, perhaps again.
    Attached,
    /// What the destination has done so far; from a page-client, before it says anything else
    /// that follows from it.
    Counted(Box<DestinationStats>),
    /// Anything else, in words.
    Line(String),
}

/// Says how it goes.
#[derive(Debug)]
pub(crate) struct Progress {
    /// Who speaks.
    tool: &'static str,
    voice: Voice,
    said: Option<(Instant, u64)>,
}

/// Where it is said.
enum Voice {
    Bar(ProgressBar),
    Lines,
    /// With the pause between looks.
    Hearer(Box<dyn Fn(Notice)>, Duration),
}

impl fmt::Debug for Voice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bar(_) => "Bar",
            Self::Lines => "Lines",
            Self::Hearer(..) => "Hearer",
        })
    }
}

impl Progress {
    /// A bar if the standard error is a terminal.
    #[must_use]
    pub(crate) fn new(tool: &'static str) -> Self {
        if !stderr().is_terminal() {
            return Self { tool, voice: Voice::Lines, said: None };
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        let style = "{wide_bar} {pos}/{len} pages  {per_sec}  {msg}";
        bar.set_style(ProgressStyle::with_template(style).expect("a template that parses"));
        Self { tool, voice: Voice::Bar(bar), said: None }
    }

    /// Tells `hearer` instead of the standard error.
    #[must_use]
    pub(crate) fn to(hearer: impl Fn(Notice) + 'static) -> Self {
        Self::to_often(hearer, LOOK)
    }

    /// The same, with so long a pause between looks.
    #[must_use]
    pub(crate) fn to_often(hearer: impl Fn(Notice) + 'static, pause: Duration) -> Self {
        Self { tool: "", voice: Voice::Hearer(Box::new(hearer), pause), said: None }
    }

    /// How long to wait before [`update`](Self::update) has something new to say.
    #[must_use]
    pub(crate) fn interval(&self) -> Duration {
        match self.voice {
            Voice::Bar(_) => FRAME,
            Voice::Lines => LOOK,
            Voice::Hearer(_, pause) => pause,
        }
    }

    /// Says a line.
    pub(crate) fn say(&self, line: &str) {
        let tool = self.tool;
        match &self.voice {
            Voice::Bar(bar) => bar.suspend(|| eprintln!("{tool}: {line}")),
            Voice::Lines => eprintln!("{tool}: {line}"),
            Voice::Hearer(hear, _) => hear(Notice::Line(line.to_owned())),
        }
    }

    /// Says where destinations can connect.
    pub(crate) fn listening(&self, address: &Address) {
        match &self.voice {
            Voice::Hearer(hear, _) => hear(Notice::Listening(address.clone())),
            _ => self.say(&format!("listening on {address}")),
        }
    }

    /// Says where a VMM can have its memory served.
    pub(crate) fn open(&self, address: &Address) {
        match &self.voice {
            Voice::Hearer(hear, _) => hear(Notice::Listening(address.clone())),
            _ => self.say(&format!("a VMM can have its memory served at {address}")),
        }
    }

    /// Says that a source is attached.
    pub(crate) fn attached(&self) {
        match &self.voice {
            Voice::Hearer(hear, _) => hear(Notice::Attached),
            _ => self.say("a source is attached"),
        }
    }

    /// Tells a program all that was counted.
    pub(crate) fn count(&self, stats: &DestinationStats) {
        if let Voice::Hearer(hear, _) = &self.voice {
            hear(Notice::Counted(Box::new(stats.clone())));
        }
    }

    /// Shows how many pages have arrived.
    pub(crate) fn update(&mut self, arrived: u64, total: u64) {
        if total == 0 {
            return;
        }
        if let Voice::Bar(bar) = &self.voice {
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

impl Drop for Progress {
    fn drop(&mut self) {
        if let Voice::Bar(bar) = &self.voice {
            bar.finish_and_clear();
        }
    }
}
