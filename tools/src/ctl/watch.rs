//! `watch`: a live view of a migration.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde_json::Value;

use super::connection::{Connection, Failure};
use super::options::Watch;
use super::view::{Moment, Rate};

/// The process has ended before everything had arrived.
const NOT_ALL: u8 = 4;
/// Events that are kept in view on a terminal.
const MAX_LINES: usize = 8;

/// Shows how it goes, from the state at the subscription on, until the other side hangs up.
pub(super) fn watch(
    connection: &mut Connection,
    state: &Value,
    how: &Watch,
    json: bool,
) -> Result<ExitCode, Failure> {
    let mut screen = if json { Screen::Json } else { Screen::of_stdout() };
    // There is an event at each interval.
    connection.wait_longer(how.interval)?;
    let mut rate = Rate::default();
    let mut outcome = None;
    screen.state(state, &mut rate);
    while let Some(event) = connection.next()? {
        match event["event"].as_str() {
            Some("closing") => outcome = event["outcome"].as_str().map(str::to_owned),
            Some("progress") => {
                screen.state(&event, &mut rate);
                continue;
            }
            _ => {}
        }
        screen.event(&event);
    }
    screen.end();
    Ok(match outcome.as_deref() {
        Some("finished") => ExitCode::SUCCESS,
        _ => ExitCode::from(NOT_ALL),
    })
}

/// Where it is shown.
enum Screen {
    Json,
    Lines,
    /// With the last events, and how many lines were drawn.
    Terminal {
        events: Vec<String>,
        drawn: usize,
        picture: String,
    },
}

impl Screen {
    fn of_stdout() -> Self {
        if io::stdout().is_terminal() {
            Self::Terminal { events: Vec::new(), drawn: 0, picture: String::new() }
        } else {
            Self::Lines
        }
    }

    /// Shows how things stand.
    fn state(&mut self, state: &Value, rate: &mut Rate) {
        if let Self::Json = self {
            return print(&format!("{state}\n"));
        }
        let moment = Moment::of(state);
        let rate = moment.as_ref().and_then(|it| rate.next(it.at_us(), it.bytes()));
        match self {
            Self::Json => {}
            Self::Lines => {
                let none = || format!("{}: nothing has been counted yet", state["phase"]);
                print(&(moment.map_or_else(none, |it| it.line(rate)) + "\n"));
            }
            Self::Terminal { picture, .. } => {
                *picture = moment.map_or_else(String::new, |it| it.picture(rate));
                self.draw();
            }
        }
    }

    fn event(&mut self, event: &Value) {
        let at = event["at_us"].as_u64().unwrap_or(0) as f64 / 1e6;
        let text = |name: &str| event[name].as_str().unwrap_or_default();
        let line = format!("{at:8.1} s  {} {}{}", text("event"), text("message"), text("outcome"));
        match self {
            Self::Json => print(&format!("{event}\n")),
            Self::Lines => print(&(line.trim_end().to_owned() + "\n")),
            Self::Terminal { events, .. } => {
                events.push(line);
                if events.len() > MAX_LINES {
                    events.remove(0);
                }
                self.draw();
            }
        }
    }

    /// Draws over what was drawn before.
    fn draw(&mut self) {
        let Self::Terminal { events, drawn, picture } = self else { return };
        let mut text = String::new();
        if *drawn > 0 {
            let _ = write!(text, "\x1b[{drawn}A");
        }
        // A line that is too long is cut off rather than taken for two.
        text += "\r\x1b[J\x1b[?7l";
        let lines: Vec<_> = picture.lines().chain(events.iter().map(String::as_str)).collect();
        *drawn = lines.len();
        for line in lines {
            text += line;
            text.push('\n');
        }
        text += "\x1b[?7h";
        print(&text);
    }

    fn end(&mut self) {
        if !matches!(self, Self::Json) {
            print("the process has ended\n");
        }
    }
}

/// Whoever does not read any more ends this with the next line.
fn print(text: &str) {
    let mut output = io::stdout().lock();
    if output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_err() {
        std::process::exit(0);
    }
}
